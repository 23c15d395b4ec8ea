"""Rows of many tasks, and batches that mix them."""
