"""Where the scripts of this folder put their tables."""

from pathlib import Path


def show(text: str, markers: tuple[str, str], file: Path | None) -> None:
    """Prints a text, or puts it between the markers of a file."""
    if file is None:
        print(text)
        return
    begin, end = markers
    before, rest = file.read_text().split(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
