"""Scores of a model on tasks."""
