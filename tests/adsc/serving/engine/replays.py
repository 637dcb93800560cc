"""CUDA graphs as far as a CPU has them: steps that are recorded once, then replayed from memory.

A CUDA graph is a list of kernels with the addresses that they read and write. Here it is a list of
torch's operators with their tensors: nothing of the model's Python runs again, and whatever a
replay needs must stand where it stood. vLLM's dispatcher, keys, padding, dummy runs and metadata
builders are its own; only its wrapper, which needs a device, is replaced.

One thing more is done for each replay: vLLM's CPU attention reads how to share its work among
threads from a tensor that depends on the lengths, so it is made anew from the recorded lengths. On
a GPU kernels find that out themselves, or builders keep it in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm import _custom_ops as ops
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context

SIZES = [1, 2, 4, 8, 16, 24, 32]


class Recording(TorchDispatchMode):
    """The operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found


@dataclass
class Graph:
    """A recorded step."""

    inputs: list[int]
    context: Any
    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    output: Any = None

    def replay(self) -> Any:
        for metadata, layers in by_metadata(self.context.attn_metadata).values():
            reschedule(metadata, self.context.no_compile_layers[layers[0]])
        with override_forward_context(self.context):
            for func, args, kwargs, found in self.calls:
                again = func(*args, **kwargs)
                known = {place(it) for it in tensors((args, kwargs))}
                for old, new in zip(tensors(found), tensors(again), strict=True):
                    if place(new) not in known:
                        old.copy_(new)
        return self.output


def tensors(tree: Any) -> list[Tensor]:
    return [it for it in tree_leaves(tree) if isinstance(it, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def by_metadata(all_metadata: dict[str, Any]) -> dict[int, tuple[Any, list[str]]]:
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, metadata in all_metadata.items():
        found.setdefault(id(metadata), (metadata, []))[1].append(name)
    return found


def reschedule(metadata: Any, layer: Any) -> None:
    metadata.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(metadata.seq_lens),
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_size,
        seq_lens=metadata.seq_lens,
        dtype=torch.float32,
        query_start_loc=metadata.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=layer.isa,
        enable_kv_split=False,
    )


class Replayed:
    """In the place of vLLM's `CUDAGraphWrapper`, whose rules it follows."""

    def __init__(self, model: Any):
        self.model = model
        self.graphs: dict[Any, Graph] = {}
        self.replays = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self.model(**inputs)
        own = [it.data_ptr() for it in tensors(inputs)]
        graph = self.graphs.get(context.batch_descriptor)
        if graph is None:
            graph = self.graphs[context.batch_descriptor] = Graph(own, context)
            with Recording() as recording:
                graph.output = self.model(**inputs)
            graph.calls = recording.calls
            return graph.output
        assert graph.inputs == own, "inputs moved between steps"
        self.replays += 1
        return graph.replay()


@dataclass
class Decided:
    """One step of an engine, and how vLLM dispatched it."""

    scheduled: list[int]
    drops: bool
    graph: bool


def arm(runner: Any) -> Replayed:
    """What a GPU's runner does on its start under cudagraph_mode=FULL_DECODE_ONLY."""
    config = runner.compilation_config
    config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = SIZES, SIZES[-1]
    dispatcher = runner.cudagraph_dispatcher
    dispatcher.initialize_cudagraph_keys(config.cudagraph_mode, runner.uniform_decode_query_len)
    runner.model = Replayed(runner.model)
    for mode, keys in dispatcher.get_capture_descs():
        for key in keys:
            runner._dummy_run(
                key.num_tokens,
                cudagraph_runtime_mode=mode,
                uniform_decode=key.uniform,
                is_graph_capturing=True,
            )
    found: Replayed = runner.model
    assert len(found.graphs) == len(SIZES)
    return found


@contextmanager
def watched(runner: Any, step: Callable[[], Any]) -> Any:
    """Note how each step is dispatched; `step` gives the one that runs."""
    decide, found = runner._determine_batch_execution_and_padding, []

    def determine(**kwargs: Any) -> Any:
        decided = decide(**kwargs)
        scheduled = kwargs["num_scheduled_tokens_np"].tolist()
        drops = step() is not None and step().drops
        found.append(Decided(scheduled, drops, decided[0] == CUDAGraphMode.FULL))
        return decided

    runner._determine_batch_execution_and_padding = determine
    try:
        yield found
    finally:
        runner._determine_batch_execution_and_padding = decide
