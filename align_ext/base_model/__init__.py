"""The base model: loads and checks it, selects its layers, records its fingerprint."""
