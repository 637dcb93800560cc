"""Where checkpoints lie that ship inside an installed package: package://NAME/FOLDER."""

from importlib.resources import files
from pathlib import Path


def resolve(source: str) -> Path:
    """The folder that a source names; a hub id stays as it is."""
    if not source.startswith("package://"):
        return Path(source).expanduser()
    package, _, folder = source.removeprefix("package://").partition("/")
    return Path(str(files(package))) / folder
