"""`python -m align_ext.cli` is align-lora."""

from align_ext.cli.app import main

main()
