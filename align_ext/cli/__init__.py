"""The command align-lora: one file for each of its subcommands, and what the larger ones do beside them."""

from align_ext.cli import train, eval, merge, export, inspect, doctor, bench  # isort: skip  in the order of --help
from align_ext.cli.app import app, main

__all__ = ["app", "bench", "doctor", "eval", "export", "inspect", "main", "merge", "train"]
