"""Logits that a checkpoint must reproduce, wherever it is loaded: by them a copy is known to be the
model that was scored, under each plan that it names.

The inputs and the default plan's logits are the merge stage's and the export's own; only what
several plans need stands here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import adsc

NAMED_PROBE = "probe_plans.safetensors"
"""Beside probe.safetensors: the logits under each named plan, by its name."""


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
    file = folder / NAMED_PROBE
    return load_file(file) if file.is_file() else {}
