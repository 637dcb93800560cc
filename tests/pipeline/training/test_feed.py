"""Batches come in order and ahead, the same through a thread and through Ray Data."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from pipeline.training.batches import StepBatch, StepLoader
from pipeline.training.config import TrainConfig
from pipeline.training.feed import from_ray_data, from_thread
from tests.small import Small

pytestmark = pytest.mark.usefixtures("ray_address")

STEPS = range(3, 9)


def test_a_thread_works_ahead_and_stops_with_its_reader() -> None:
    made: list[int] = []
    third = threading.Event()

    def load(step: int) -> int:
        made.append(step)
        if step == 2:
            third.set()
        return 10 * step

    stream = from_thread(load, range(100), ahead=2)
    assert next(stream) == 0
    assert third.wait(10)  # before it was requested
    stream.close()
    assert made == [0, 1, 2]
    assert list(from_thread(load, range(3, 6))) == [30, 40, 50]


def test_an_error_in_a_loader_reaches_the_trainer() -> None:
    def load(step: int) -> int:
        if step == 2:
            raise ValueError("the picture of train/0001 is broken")
        return step

    stream = from_thread(load, range(5))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="train/0001"):
        next(stream)


def collected(folder: Path, base: Path, config: TrainConfig) -> list[StepBatch]:
    loader = StepLoader(data=folder, processor=base, config=config, rank=1, world_size=2)
    return list(from_ray_data(loader, STEPS, workers=1))


def test_ray_data_gives_the_thread_s_batches_where_no_cpu_is_left(small: Small) -> None:
    """The reader holds all cores, as trainers on a small machine do."""
    import ray

    config = TrainConfig(steps=20, batch_size=6, accumulate=2)
    folder = small.prepared / "train"
    cpus = ray.cluster_resources()["CPU"]
    reader = ray.remote(num_cpus=cpus)(collected).remote(folder, small.base, config)
    loader = StepLoader(data=folder, processor=small.base, config=config, rank=1, world_size=2)
    expected = list(from_thread(loader, STEPS))
    found = ray.get(reader, timeout=300)
    assert [batch.ids for batch in found] == [batch.ids for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.supervised, a.rows, a.padding) == (b.supervised, b.rows, b.padding)
        for mine, theirs in zip(a.micro, b.micro, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
