"""From a loader of steps to the trainer: batches that are ready before they are needed.

Three ways, with the same batches in the same order: a thread in the trainer's process, processes
beside it, or processes on any machine of the cluster, through Ray Data.

What streams through Ray Data is the numbers of one rank's *steps*, not rows. Ray Train's own splits
of a data set (`streaming_split(equal=True)`) drop the rows that don't divide evenly, give ranks
rows by their number, and keep no position in a checkpoint; a step's number decides all of that by
itself (pipeline/training/batches.py), so a stream that starts at step s is a resumed one.
"""

import dataclasses
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.training.batches import StepBatch

Batch = TypeVar("Batch")
AHEAD = 2
"""Steps that are made before they are needed."""
STORE_BYTES = 2**30
"""Most bytes of finished steps of one rank in Ray's object store."""


def from_thread(load: Callable[[int], Batch], steps: range, ahead: int = AHEAD) -> Iterator[Batch]:
    """load(step) for each step, in order, made by one thread that runs up to `ahead` ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        left = iter(steps)
        waiting: deque[Future[Batch]] = deque(
            pool.submit(load, step) for step in islice(left, ahead)
        )
        try:
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(pool.submit(load, step) for step in islice(left, 1))
                yield batch
        finally:
            for future in waiting:
                future.cancel()


def from_processes(
    load: Callable[[int], Batch], steps: range, workers: int, ahead: int = AHEAD
) -> Iterator[Batch]:
    """load(step) for each step, in order, made by processes on this machine that run up to `ahead`
    steps ahead each."""
    from torch.utils.data import DataLoader

    source: Any = _Steps(load)
    return iter(
        DataLoader(
            source, batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=ahead
        )
    )


@dataclasses.dataclass(frozen=True)
class _Steps:
    """A loader of steps as torch's data sets are."""

    load: Callable[[int], Any]

    def __getitem__(self, step: int) -> Any:
        return self.load(step)


def from_ray_data(
    load: "Callable[[int], StepBatch]", steps: range, workers: int, ahead: int = AHEAD
) -> "Iterator[StepBatch]":
    """load(step) for each step, in order, made by `workers` processes anywhere in the cluster.

    The processes live as long as the stream, so that each keeps its cache of row groups. They
    reserve no CPU: where trainers hold all of a machine's cores, whatever asks for one (and a read
    of `ray.data.range` does) would wait for the training that waits for it.

    Args:
        load: is sent to the processes once.
        steps: in order.
        workers: processes.
        ahead: finished steps that are fetched to this machine before they are needed.
    """
    import pyarrow as pa
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = ray.data.ExecutionResources(object_store_memory=STORE_BYTES)
    if not steps:
        return
    # A block is a step, so that each is handed on as soon as it is made.
    numbers = ray.data.from_arrow([pa.table({"step": [step]}) for step in steps])
    made = numbers.map_batches(
        _Worker,  # type: ignore[arg-type]
        fn_constructor_args=(load,),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    batches = made.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=ahead)
    for table, step in zip(batches, steps, strict=True):
        if table["step"][0].as_py() != step:
            raise RuntimeError(f"Ray Data gave step {table['step'][0]} where {step} was due")
        yield _unpacked(table["batch"][0].as_buffer())


class _Worker:
    """One process that loads steps."""

    def __init__(self, load: "Callable[[int], StepBatch]") -> None:
        self.load = load

    def __call__(self, table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        steps = table["step"].to_pylist()
        made = [_packed(self.load(step)) for step in steps]
        return pa.table({"step": steps, "batch": pa.array(made, pa.large_binary())})


def _packed(batch: "StepBatch") -> bytes:
    # As arrays, whose bytes are copied once; tensors would go through torch.save.
    micro: Any = [{name: one.numpy() for name, one in part.items()} for part in batch.micro]
    return pickle.dumps(dataclasses.replace(batch, micro=micro), protocol=5)


def _unpacked(data: Any) -> "StepBatch":
    import torch

    batch: StepBatch = pickle.loads(data)
    micro = [{name: torch.from_numpy(one) for name, one in part.items()} for part in batch.micro]
    return dataclasses.replace(batch, micro=micro)
