"""A training checkpoint: what is taken between two steps, how it is written and read back.

Taking one copies tensors to the CPU and blocks the trainer; writing is left to a thread of the
launcher. A folder holds

    trained/            adapter and fully tuned parts, as every later stage reads them, history.json
    moments.safetensors AdamW's state, whole and by parameter name: `exp_avg:NAME`, ...
    state.json          step, data position, schedule, seeds, the last gradient norms

There is no pickle in it, and nothing that depends on the strategy or the number of workers. Random
generators have no state worth keeping: they are seeded from (seed, step, rank) before every step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.training.adapters import Trained
from pipeline.training.config import MOMENTS

FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that this training can't resume from."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that a run needs to resume after `step` steps, on the CPU."""

    state: dict[str, Any]
    """What is not a tensor."""
    history: list[list[float]]
    """[step, loss] as logged so far."""
    trained: Trained
    moments: dict[str, dict[str, torch.Tensor]]

    def write(self, folder: Path) -> None:
        """Write into a folder without readers; publishing it atomically is up to the launcher.

        Raises:
            OSError: the disk is full or can't be written to.
        """
        try:
            self._write(folder)
        except SafetensorError as error:
            raise OSError(f"{folder} can't be written to: {error}") from error

    def _write(self, folder: Path) -> None:
        self.trained.write(folder / "trained")
        (folder / "trained" / "history.json").write_text(json.dumps(self.history))
        flat = {
            f"{key}:{name}": tensor
            for name, state in self.moments.items()
            for key, tensor in state.items()
        }
        save_file(flat, folder / MOMENTS)
        (folder / "state.json").write_text(json.dumps({"format": FORMAT, **self.state}, indent=1))


def read_state(folder: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """State and history of a checkpoint.

    Raises:
        CheckpointError: a format of another version of this code.
    """
    state = json.loads((folder / "state.json").read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"the checkpoint {folder} has format {state['format']}, this code reads {FORMAT}: "
            "finish the run with the version that started it, or restart the stage"
        )
    return state, json.loads((folder / "trained" / "history.json").read_text())


def read_moments(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """AdamW's state by parameter name."""
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        kind, _, name = key.partition(":")
        moments.setdefault(name, {})[kind] = tensor
    return moments
