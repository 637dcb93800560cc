"""The manifest of a published checkpoint: size and SHA-256 of each file, and where they come from.

Whatever reads a checkpoint compares it with the manifest before it loads anything. The manifest's
own SHA-256 names the checkpoint; it is no signature: whoever may write there can write both.
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
from pipeline.store.base import TEMPORARY

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
SUFFIXES = {".json", ".jinja", ".md", ".model", ".safetensors", ".txt"}
"""What a checkpoint may hold, besides LICENSE and NOTICE: nothing that loading could execute."""
BOOKKEEPING = (".git", ".gitattributes", ".gitignore", ".cache", ".huggingface")
"""What git and the hub's client leave in a folder: no part of a checkpoint, and never published."""
MAX_BYTES = 64 << 20
"""Of a manifest; a longer one isn't parsed."""


class ExportError(ValueError):
    """The checkpoint can't be published, or isn't what was published; all reasons at once."""


def write_manifest(folder: Path, lineage: dict[str, Any]) -> None:
    """Sizes and SHA-256 of all files, in manifest.json. The last file to be written.

    Raises:
        ExportError: files of a kind that a checkpoint has no need of.
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
    """Raise an ExportError if a folder holds files of a kind that a checkpoint has no need of, but
    for those with a part of their path in `left_out`."""
    inside = [path.relative_to(folder) for path in files_of(folder)]
    names = [it.as_posix() for it in inside if not set(it.parts) & set(left_out)]
    if strange := [name for name in names if not _allowed(name)]:
        raise ExportError(
            f"{', '.join(strange)}: only {', '.join(sorted(SUFFIXES))}, LICENSE and NOTICE are "
            "published, and weights are to be safetensors. Move the others out of the folder; "
            "save_pretrained writes weights of other formats as safetensors"
        )


def parse(text: bytes, place: str) -> list[File]:
    """The files that a manifest lists.

    Raises:
        ExportError: it can't be read, is of a later version, or lists what no checkpoint may hold.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} bytes are no manifest")
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
    """Compare a folder with its manifest, before anything in it is loaded.

    Raises:
        ExportError: every missing, truncated, altered, extra or unsafe file, by name.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ExportError(f"{folder} is no exported checkpoint: {error}") from None
    files = parse(text, str(folder))
    problems = [problem for file in files if (problem := difference(folder, file))]
    problems += [f"{name} is not in the manifest" for name in strangers(folder, files)]
    refuse(str(folder), problems)
    return files


def refuse(place: str, problems: Sequence[str]) -> None:
    """Raise an ExportError with all problems, if there are any."""
    if problems:
        raise ExportError(f"{place} isn't what was exported: {'; '.join(problems)}. Copy it again")


def difference(folder: Path, file: File) -> str | None:
    """In what a folder's file differs from its entry in the manifest; None if in nothing."""
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


def strangers(folder: Path, files: Sequence[File]) -> list[str]:
    """Files of a folder that a manifest doesn't list; what a store leaves beside them is none."""
    listed = {folder / file.path for file in files} | {folder / MANIFEST, folder / ".lock"}
    return [
        path.relative_to(folder).as_posix()
        for path in files_of(folder)
        if path not in listed and not path.name.startswith(TEMPORARY)
    ]


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, and links, which `difference` judges."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def digest(text: bytes) -> str:
    """The name of a checkpoint: its manifest's SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(text).hexdigest()


def _allowed(path: str) -> bool:
    name = PurePosixPath(path)
    return name.suffix in SUFFIXES or name.name in ("LICENSE", "NOTICE")


def _unsafe(path: str) -> str | None:
    """Why an entry of a manifest is never followed; None if it may be."""
    named = PurePosixPath(path)
    if named.is_absolute() or ".." in named.parts or "\\" in path:
        return f"{path!r} leads out of the folder"
    if path != str(named) or path in (MANIFEST, "."):
        return f"{path!r} is no name of a checkpoint's file"
    if not _allowed(path):
        return f"{path} is of a kind that is never exported"
    return None
