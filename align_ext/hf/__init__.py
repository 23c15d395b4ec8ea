"""Adapters in Hugging Face models: the only folder that imports transformers, peft and datasets."""
