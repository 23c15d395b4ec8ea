"""Compares architectures: a design file, one training run a cell, statistics and a report."""
