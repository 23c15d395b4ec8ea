"""Reads rows of many tasks, encodes them, and mixes them into batches."""
