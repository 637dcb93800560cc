"""Logits that a checkpoint must reproduce, wherever it is loaded: by them a copy is known to be the
model that was scored, under each plan that it names.

The merge stage writes them beside the weights. A published checkpoint has them in a folder of their
own, since serving engines read every safetensors file beside config.json; copies that were
published before have them there as well.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import adsc

PROBE = "probe.safetensors"
"""Inputs, and the logits under the plan that the checkpoint runs with."""
NAMED_PROBE = "probe_plans.safetensors"
"""Beside it: the logits under each named plan, by its name."""
FOLDER = "probe"
"""Where both are in a published checkpoint."""


def find_probe(folder: Path) -> Path:
    """Where a checkpoint's probe is, or would be beside its weights."""
    published = folder / FOLDER / PROBE
    return published if published.is_file() else folder / PROBE


def put_aside(folder: Path) -> None:
    """Move a checkpoint's probe from beside its weights into its own folder."""
    for name in (PROBE, NAMED_PROBE):
        if (folder / name).is_file():
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.move(folder / name, folder / FOLDER / name)


def write_named_probe(model: Any, probe: dict[str, torch.Tensor], folder: Path) -> None:
    """Store the logits under each named plan; of a model without any, nothing. The model runs with
    the last of them then.

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
    """The logits by name; empty where there are none."""
    file = find_probe(folder).with_name(NAMED_PROBE)
    return load_file(file) if file.is_file() else {}
