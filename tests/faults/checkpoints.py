"""Folders as the export stage writes them, sent to a store and checked."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.publishing.manifest import verify_folder, write_manifest
from pipeline.publishing.publish import Published, publish
from pipeline.store import Store

WEIGHTS = "model-00001.safetensors"
SIZES = {WEIGHTS: (9 << 20) + 5, "model-00002.safetensors": 1 << 20, "config.json": 300}


def make(folder: Path) -> Path:
    """A folder as the export stage writes it, but for what is in the files."""
    folder.mkdir()
    for name, size in SIZES.items():
        (folder / name).write_bytes(os.urandom(size))
    write_manifest(folder, {"commit": "8518b82"})
    return folder


def check(copy: Path) -> dict[str, float]:
    """What `publish` asks for; that a model computes the same is test_export's subject."""
    return {"files": len(verify_folder(copy))}


def export(place: Store, checkpoint: Path) -> Published:
    return publish(checkpoint, place, check)
