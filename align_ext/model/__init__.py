"""Inserts, loads, merges, removes and counts the adapters of a model."""
