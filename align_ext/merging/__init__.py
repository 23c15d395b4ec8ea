"""Combines several adapters into one."""
