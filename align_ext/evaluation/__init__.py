"""Scores a model on tasks."""
