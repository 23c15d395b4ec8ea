"""Runs a page's blocks of Python and commands as they stand, from top to bottom: python -m hf.guide docs/guide/x.md.

A command is a line; `align-lora` and `python FILE` run in this process, which saves their imports, the others in bash.
Blocks of another kind (text) are not run.
"""

import re
import runpy
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(bash or python, text) of each block."""
    return BLOCK.findall(page.read_text())


def commands(block: str) -> list[str]:
    """The commands of a bash block; a backslash at the end of a line joins it with the next."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run_command(command: str) -> None:
    """Runs a command; raises where it fails."""
    from align_ext import cli

    words = shlex.split(command, comments=True)
    given = [name for word in words for name in (sorted(glob(word)) if "*" in word else [word])]
    simple = not set("|><&;$`").intersection(command)
    if simple and given[0] == "align-lora":
        code = _in_this_process(given, cli.main)
    elif simple and given[0] == "python" and given[1].endswith(".py"):
        code = _in_this_process(given[1:], lambda: runpy.run_path(given[1], run_name="__main__"))
    else:
        code = subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=False).returncode
    if code:
        raise SystemExit(f"exit code {code}: {command}")


def _in_this_process(arguments: list[str], main) -> int:
    before, sys.argv = sys.argv, arguments
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0
    finally:
        sys.argv = before
    return 0


def run(page: Path) -> None:
    """Runs all blocks of a page; a Python block has the names of those above it."""
    names = {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
            continue
        for command in commands(text):
            print("$", command, flush=True)
            run_command(command)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
