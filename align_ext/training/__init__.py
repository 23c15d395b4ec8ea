"""Trainers, checkpoints, and the training job."""
