"""The probe: logits that a checkpoint must reproduce wherever it is loaded, under each of its named
plans. They show that a copy is the model that was scored.

The merge stage writes them beside the weights. A published checkpoint has them in a separate
folder, because serving engines read every safetensors file beside config.json; older published
copies still have them beside the weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import adsc

PROBE = "probe.safetensors"
"""Inputs, and the logits under the checkpoint's default plan."""
NAMED_PROBE = "probe_plans.safetensors"
"""Beside it: the logits under each named plan, by name."""
FOLDER = "probe"
"""The folder of both in a published checkpoint."""


def find_probe(folder: Path) -> Path:
    """The path of a checkpoint's probe, or the one beside its weights if there is none."""
    published = folder / FOLDER / PROBE
    return published if published.is_file() else folder / PROBE


def put_aside(folder: Path) -> None:
    """Move a checkpoint's probe from beside its weights into the folder `probe`."""
    for name in (PROBE, NAMED_PROBE):
        if (folder / name).is_file():
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.move(folder / name, folder / FOLDER / name)


def write_named_probe(model: Any, probe: dict[str, torch.Tensor], folder: Path) -> None:
    """Store the logits under each named plan, if there are any. Leaves the last one attached.

    Args:
        probe: inputs of the model.
    """
    logits = {}
    for name in adsc.plans_of(model):
        adsc.attach(model, name)
        with torch.inference_mode():
            logits[name] = model(**probe).logits.contiguous()
    if logits:
        save_file(logits, folder / NAMED_PROBE)


def read_named_probe(folder: Path) -> dict[str, torch.Tensor]:
    """Plan name -> logits; empty if there are none."""
    file = find_probe(folder).with_name(NAMED_PROBE)
    return load_file(file) if file.is_file() else {}
