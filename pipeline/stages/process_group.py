"""torch.distributed for the workers of Ray Train, set up without torch in the other processes.

Ray's own `TorchConfig` loads torch wherever it is unpickled: in the stage's process and in the
controller's, seconds of processor time each, and neither computes anything. With this one only the
workers load it; there it does what `TorchConfig` does, by the same functions of Ray.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

LEAVE_SECONDS = 30
"""How long workers that end may take to leave their group."""


@dataclass
class ProcessGroup(BackendConfig):
    """A process group of all workers."""

    backend: str
    """Of torch.distributed: `gloo`, `nccl`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Torch

    @property
    def framework(self) -> TrainingFramework:
        """As Ray's dashboard shows it."""
        return TrainingFramework.TORCH


class _Torch(Backend):
    """In the controller: has each worker join, and leave at the end."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:  # type: ignore[override]
        size = len(worker_group)
        place = worker_group.execute_single(0, get_address_and_port)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend_config.backend, place, rank, size
                )
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        left = worker_group.execute_async(_leave, len(worker_group))
        with contextlib.suppress(ray.exceptions.GetTimeoutError):  # their processes end anyway
            ray.get(left, timeout=LEAVE_SECONDS)


def _join(backend: str, place: tuple[str, int], rank: int, size: int) -> None:
    from ray.train.torch import config

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place[0], str(place[1])
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, init_method="env://")


def _leave(size: int) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=size > 1)
