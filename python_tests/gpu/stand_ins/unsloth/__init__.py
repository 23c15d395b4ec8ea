"""Stands in for Unsloth in a dry run of gpu_check.py."""
