"""Writes the design of a new study: a copy of one of the presets, one YAML file each, or of another study's."""

from importlib import resources
from pathlib import Path

from align_ext.study.design import DESIGN
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown, shown_path
from align_ext.system.reading import read_text
from align_ext.system.writing import atomic_file, check_writable


def presets() -> dict[str, str]:
    """Returns the text of each preset by its name."""
    files = (resources.files("align_ext.study") / "presets").iterdir()
    return {
        Path(f.name).stem: f.read_text("utf-8") for f in sorted(files, key=lambda f: f.name) if f.name.endswith(".yaml")
    }


def new_study(folder: Path, like: str) -> Path:
    """Writes the design of a new study and returns the file.

    Args:
        folder: the folder of the new study.
        like: the name of a preset, or the folder of a study.

    Raises:
        ValueError: there is no such preset or study, the folder holds a study, or it cannot be written to.
    """
    text = presets().get(like) or _design_of(Path(like))
    file = folder / DESIGN
    if file.exists():
        raise ValueError(f"{shown(str(file))} exists: edit it, or name another folder")
    check_writable(folder, "name another one")
    with atomic_file(file) as new:
        new.write_text(text, encoding="utf-8")
    return file


def _design_of(study: Path) -> str:
    """Returns the text of a study's design."""
    if not study.is_dir():
        raise ValueError(f"{unknown_name('preset', str(study), presets())}, and there is no such folder of a study")
    if not (study / DESIGN).is_file():
        raise ValueError(f"{shown_path(study)} holds no {DESIGN}: name a preset, or the folder of a study")
    return read_text(study / DESIGN)
