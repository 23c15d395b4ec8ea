"""A command of two processes of which one fails."""

import io
import sys
from contextlib import redirect_stderr
from pathlib import Path

from hf import shards

import align_ext.cli  # noqa: F401  whose app is replaced
from align_ext.system import processes


def fail(rank, port, folder, failing):
    """The command's main in one of two processes, whose work fails in the process `failing` alone."""
    shards.join(rank, port)
    app = sys.modules["align_ext.cli.app"]

    def work(**_):
        with processes.joined("cpu"), processes.all_or_none():
            if rank == failing:
                raise app.UserError(f"only process {rank} sees it")

    app.app = work
    with redirect_stderr(io.StringIO()) as said:
        code = app._run()
    Path(folder, str(rank)).write_text(f"{code} {said.getvalue()}")
