"""`align-lora inspect`: shows what an adapter's folder holds."""

from align_ext.cli.app import Folder, UserError, app
from align_ext.system.terminal import plain_console


@app.command("inspect")
def inspect_folder(adapter: Folder) -> None:
    """Shows what an adapter's folder holds: architecture, options, tasks, and each layer's rank, parameters, norms.

    Every file is checked (keys, shapes, finite values, and that the files belong together). Needs no base model.

    Example: align-lora inspect run/adapter
    """
    from align_ext.io.inspect_adapter import inspect_adapter

    try:
        inspect_adapter(adapter, plain_console())
    except ValueError as error:
        raise UserError(str(error)) from error
