"""Checkpoints that ship inside an installed package: package://NAME/FOLDER."""

from importlib.resources import files
from pathlib import Path


def resolve(source: str) -> Path:
    """The folder of a source; a hub id is returned as a path unchanged."""
    if not source.startswith("package://"):
        return Path(source).expanduser()
    package, _, folder = source.removeprefix("package://").partition("/")
    return Path(str(files(package))) / folder
