"""Writes the design of a new study from one of the presets, one YAML file each."""

from importlib import resources
from pathlib import Path

from align_ext.study.design import DESIGN
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown
from align_ext.system.writing import atomic_file


def presets() -> dict[str, str]:
    """Returns the text of each preset by its name."""
    files = (resources.files("align_ext.study") / "presets").iterdir()
    return {
        Path(f.name).stem: f.read_text("utf-8") for f in sorted(files, key=lambda f: f.name) if f.name.endswith(".yaml")
    }


def new_study(folder: Path, like: str) -> Path:
    """Writes a preset as the design of a study and returns the file.

    Raises:
        ValueError: there is no such preset, or the folder holds a study.
    """
    known = presets()
    if like not in known:
        raise ValueError(unknown_name("preset", like, known))
    file = folder / DESIGN
    if file.exists():
        raise ValueError(f"{shown(str(file))} exists: edit it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as new:
        new.write_text(known[like], encoding="utf-8")
    return file
