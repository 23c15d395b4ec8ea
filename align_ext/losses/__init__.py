"""Losses on the adapters."""
