"""The base model: which layers it has, whether it is sound, what tells it from others."""
