"""What is published agrees with itself: one version, and a source distribution that holds what the build reads."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from align_ext import __version__

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
LISTED = (
    "from setuptools import setup; from distutils.core import run_setup; d = run_setup('setup.py', stop_after='init'); "
)
LISTED += "print(*d.get_command_obj('build_ext').get_source_files(), sep='\\n')"


def test_the_version_is_the_same_wherever_it_stands():
    assert __version__ == VERSION
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION


def test_the_citation_says_of_the_project_what_pyproject_says():
    citation, project = yaml.safe_load((ROOT / "CITATION.cff").read_text()), (ROOT / "pyproject.toml").read_text()
    for key, name in {"title": "name", "abstract": "description", "license": "license"}.items():
        assert f'{name} = "{citation[key]}"' in project


def test_a_source_distribution_holds_what_the_build_reads():
    found = subprocess.run([sys.executable, "-c", LISTED], cwd=ROOT, capture_output=True, text=True, check=True)
    read = {path for folder in ("csrc", "build_support") for path in (ROOT / folder).rglob("*.*")}
    read = {path.relative_to(ROOT) for path in read if "__pycache__" not in path.parts}
    assert {Path(line) for line in found.stdout.split()} == read | {
        Path("CMakeLists.txt"), Path("CHANGELOG.md"), Path("CITATION.cff")
    }  # fmt: skip
