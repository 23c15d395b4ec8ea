"""The command align-lora: one file per subcommand, and separate files for the work of the larger ones."""

from align_ext.cli import train, data, report, generate, eval, merge, export, inspect, doctor, bench, study  # isort: skip  in the order of --help
from align_ext.cli.app import app, main

__all__ = [
    "app", "bench", "data", "doctor", "eval", "export", "generate", "inspect", "main", "merge", "report", "study",
    "train",
]  # fmt: skip
