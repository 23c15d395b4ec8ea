"""Runs align-lora by `python -m align_ext.cli`."""

from align_ext.cli.app import main

main()
