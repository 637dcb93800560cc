"""The manifest of a published checkpoint: size and SHA-256 of each file, and their lineage.

Every reader compares a checkpoint with its manifest before loading anything. The SHA-256 of the
manifest identifies the checkpoint; it is not a signature: a writer there can replace both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from pipeline.durable.record import File
from pipeline.store import file_sha256
from pipeline.store.interface import TEMPORARY

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
SUFFIXES = {".json", ".jinja", ".md", ".model", ".safetensors", ".txt"}
"""File types allowed in a checkpoint, besides LICENSE and NOTICE: none that loading could run."""
BOOKKEEPING = (".git", ".gitattributes", ".gitignore", ".cache", ".huggingface")
"""Files of git and the hub's client in a folder: not part of a checkpoint, and never published."""
MAX_BYTES = 64 << 20
"""Size limit of a manifest; a longer one isn't parsed."""


class ExportError(ValueError):
    """The checkpoint can't be published, or differs from what was published; all reasons at
    once."""


def write_manifest(folder: Path, lineage: dict[str, Any]) -> None:
    """Write sizes and SHA-256 of all files to manifest.json; it must be the last file written.

    Raises:
        ExportError: files of a type that checkpoints don't need.
    """
    check_kinds(folder)
    files = [File.read(folder, path) for path in files_of(folder) if path != folder / MANIFEST]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "lineage": lineage,
        "files": [file.model_dump() for file in files],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def check_kinds(folder: Path, left_out: Collection[str] = ()) -> None:
    """Raise an ExportError if a folder holds files of a type that checkpoints don't need, except
    those with a part of their path in `left_out`."""
    inside = [path.relative_to(folder) for path in files_of(folder)]
    names = [it.as_posix() for it in inside if not set(it.parts) & set(left_out)]
    if strange := [name for name in names if not _allowed(name)]:
        raise ExportError(
            f"{', '.join(strange)}: only {', '.join(sorted(SUFFIXES))}, LICENSE and NOTICE can be "
            "published, with weights as safetensors. Move other files out of the folder; "
            "save_pretrained converts weights to safetensors"
        )


def parse(text: bytes, place: str) -> list[File]:
    """The files that a manifest lists.

    Raises:
        ExportError: it can't be read, is of a later version, or lists a file that isn't allowed.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} bytes are too many for a manifest")
        manifest = json.loads(text)
        version = manifest["schema_version"]
        files = [File.model_validate(entry) for entry in manifest["files"]]
    except (ValueError, KeyError, TypeError, ValidationError, RecursionError) as error:
        raise ExportError(f"{place}/{MANIFEST} can't be read: {error}") from None
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"{place}/{MANIFEST} has schema version {version}, this program reads {SCHEMA_VERSION}"
        )
    refuse(place, [problem for file in files if (problem := _unsafe(file.path))])
    return files


def verify_folder(folder: Path) -> list[File]:
    """Compare a folder with its manifest before anything in it is loaded.

    Raises:
        ExportError: every missing, truncated, altered, extra or unsafe file, by name.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ExportError(f"{folder} is not an exported checkpoint: {error}") from None
    files = parse(text, str(folder))
    problems = [problem for file in files if (problem := difference(folder, file))]
    problems += [f"{name} is not in the manifest" for name in unlisted(folder, files)]
    refuse(str(folder), problems)
    return files


def refuse(place: str, problems: Sequence[str]) -> None:
    """Raise an ExportError with all problems, if there are any."""
    if problems:
        raise ExportError(f"{place} isn't what was exported: {'; '.join(problems)}. Copy it again")


def difference(folder: Path, file: File) -> str | None:
    """How a folder's file differs from its entry in the manifest; None if it doesn't."""
    path = folder / file.path
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{file.path} is a link out of the folder"
    if not path.is_file():
        return f"{file.path} is missing"
    if (size := path.stat().st_size) != file.size:
        return f"{file.path} has {size} bytes instead of {file.size}"
    if file_sha256(path) != file.sha256:
        return f"{file.path} was altered (checksum)"
    return None


def unlisted(folder: Path, files: Sequence[File]) -> list[str]:
    """Files of a folder that a manifest doesn't list, apart from a store's own."""
    listed = {folder / file.path for file in files} | {folder / MANIFEST, folder / ".lock"}
    return [
        path.relative_to(folder).as_posix()
        for path in files_of(folder)
        if path not in listed and not path.name.startswith(TEMPORARY)
    ]


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, and links, which `difference` checks."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def digest(text: bytes) -> str:
    """The identity of a checkpoint: its manifest's SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(text).hexdigest()


def _allowed(path: str) -> bool:
    name = PurePosixPath(path)
    return name.suffix in SUFFIXES or name.name in ("LICENSE", "NOTICE")


def _unsafe(path: str) -> str | None:
    """Why an entry of a manifest is refused; None if it is allowed."""
    named = PurePosixPath(path)
    if named.is_absolute() or ".." in named.parts or "\\" in path:
        return f"{path!r} leads out of the folder"
    if path != str(named) or path in (MANIFEST, "."):
        return f"{path!r} is not the name of a checkpoint's file"
    if not _allowed(path):
        return f"{path} is of a type that is never exported"
    return None
