"""Prefill and decoding where nothing may be read back: CUDA graphs, torch.compile, waits.

Compiled cases are measured one after another, each in a compiler that has seen nothing else:
graphs of several plans side by side would slow each other's guards. So these ratios are of two
times minutes apart, unlike all others here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import adsc
from benchmarks.agreement import check, relative_error, skipped
from benchmarks.decode import Decoding, rows_of
from benchmarks.measure import Case, Row, speedup, synchronize, take_turns
from benchmarks.models import batch, build, llava_config, plans, prompts, twin

# bf16 through 32 layers; compiled kernels round elsewhere than eager ones. A wrong drop is near 1.
CLOSE = 6e-2


@contextlib.contextmanager
def no_host_checks() -> Iterator[None]:
    """Within it, transformers doesn't compare the numbers of image tokens and features on the host.

    The check can be turned off; the message that is written for it even so formats a tensor, which
    reads it back.
    """
    unread = mock.patch.object(Tensor, "__format__", lambda self, spec: "unread")
    with mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}), unread:
        yield


class Graph:
    """A prefill as one CUDA graph, to be replayed on other requests of the same shape."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]):
        self.model = model
        self.inputs = {name: one.clone() for name, one in inputs.items()}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._prefill()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._prefill()

    @torch.no_grad()
    def _prefill(self) -> Tensor:
        return self.model(**self.inputs, use_cache=False, logits_to_keep=1).logits

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        for name, one in inputs.items():
            self.inputs[name].copy_(one)
        self.graph.replay()
        return self.logits


@torch.no_grad()
def last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the last column, without a cache."""
    return model(**inputs, use_cache=False, logits_to_keep=1).logits


def _requests(options: argparse.Namespace, config: Any) -> list[dict[str, Tensor]]:
    """Three requests of one shape, with other words, pictures and places of the pictures."""
    return [
        batch(
            config,
            [(start, 0, options.text - start)] * options.batch,
            options.device,
            options.dtype,
            seed=start,
        )
        for start in (5, 1, 9)
    ]


def graph_rows(options: argparse.Namespace) -> list[Row]:
    """Replays of captured prefills: equal to eager on requests not captured, and their times."""
    if options.device.type != "cuda":
        return [skipped("CUDA graph of prefill", "all", "no CUDA device")]
    config = llava_config(options.geometry)
    model = build(config, options.device, options.dtype)
    first, *others = _requests(options, config)
    chosen: dict[str, Any] = {"dense": None} | plans(config)
    rows, cases, graphs = [], [], {}
    for name, plan in chosen.items():
        one = twin(model, plan)

        def error(name=name, one=one) -> float:
            with no_host_checks():
                graphs[name] = graph = Graph(one, first)
            return max(relative_error(graph(new).clone(), last_logits(one, new)) for new in others)

        rows.append(check("CUDA graph of prefill = eager", name, CLOSE, error))
    cases = [Case(name=name, call=lambda one=one: one(first)) for name, one in graphs.items()]
    if "dense" not in graphs:
        return rows
    times = take_turns(cases, options.rounds, options.device)
    dense = adsc.estimate_cost(config, None, options.text, batch_size=options.batch).flops
    for name in graphs:
        flops = adsc.estimate_cost(
            config, chosen[name], options.text, batch_size=options.batch
        ).flops
        rows.append(
            {"check": "replay", "case": name}
            | speedup(times, name)
            | {"bound": dense / flops, "ms": 1e3 * statistics.median(times[name])}
        )
    return rows


def compiler(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Arguments of torch.compile; without a GPU graphs are traced and run as they are."""
    cpu = {"backend": "eager"} if options.device.type == "cpu" else more
    # dynamic=False: each plan and each shape is a graph of its own.
    return {"fullgraph": True, "dynamic": False} | cpu


def compiled_prefill_rows(options: argparse.Namespace) -> list[Row]:
    """torch.compile of prefill: equal to eager, no graph after the first request, and times."""
    config = llava_config(options.geometry, layers=options.layers)
    model = build(config, options.device, options.dtype)
    first, *others = _requests(options, config)
    rows, seconds = [], {}
    chosen: dict[str, Any] = {"dense": None} | dict([next(iter(plans(config).items()))])
    for name, plan in chosen.items():
        torch._dynamo.reset()
        one = twin(model, plan)
        last_logits(one, first)  # transformers sets hooks in its first call, which can't be traced
        compiled = torch.compile(one, **compiler(options))

        graphs: list[int] = []

        def error(one=one, compiled=compiled, graphs=graphs) -> float:
            last_logits(compiled, first)
            graphs.append(counters["stats"]["unique_graphs"])
            return max(
                relative_error(last_logits(compiled, new), last_logits(one, new))
                for new in (first, *others)
            )

        def more(graphs=graphs) -> float:
            return float(counters["stats"]["unique_graphs"] - graphs[0])

        rows.append(check("compiled prefill = eager", name, CLOSE, error))
        if graphs:
            rows.append(check("graphs after the first request", name, 0.0, more))
            call = Case(name=name, call=lambda compiled=compiled: last_logits(compiled, first))
            seconds |= take_turns([call], options.rounds, options.device)
    torch._dynamo.reset()
    for name in seconds if "dense" in seconds else ():
        rows.append(
            {"check": "compiled prefill", "case": name}
            | speedup(seconds, name)
            | {"ms": 1e3 * statistics.median(seconds[name])}
        )
    return rows


def static_decode_rows(options: argparse.Namespace) -> list[Row]:
    """Compiled decoding on static caches, sized by layer where there is a plan."""
    config = llava_config(options.geometry)
    model = build(config, options.device, options.dtype)
    inputs = prompts(config, options.batch, options.text, options.device, options.dtype)
    name, plan = next(iter(plans(config).items()))
    times: dict[str, list[float]] = {}
    runs, checks, compile_seconds = {}, [], {}
    for case, one in {"dense": model, name: twin(model, plan)}.items():
        torch._dynamo.reset()
        how = compiler(options, mode="reduce-overhead")
        graphs: list[int] = []

        def error(case=case, one=one, how=how, graphs=graphs) -> float:
            wanted = Decoding(one, inputs, options.steps, static=True).decode()[0]
            run = Decoding(one, inputs, options.steps, static=True, compiled=how)
            start = time.perf_counter()
            for _ in range(2):  # traced, then recorded
                got = run.decode()[0]
                synchronize(options.device)
                run.set_back()
            compile_seconds[case] = time.perf_counter() - start
            graphs.append(counters["stats"]["unique_graphs"])
            runs[case] = run
            return relative_error(got, wanted)

        def more(graphs=graphs) -> float:
            return float(counters["stats"]["unique_graphs"] - graphs[0])

        checks.append(check("compiled step = eager", case, CLOSE, error))
        if graphs:
            run = runs[case]
            turn = Case(name=case, call=run.decode, prepare=run.set_back)
            times |= take_turns([turn], options.rounds, options.device, warm=False)
            checks.append(check("graphs after the first turns", case, 0.0, more))
    torch._dynamo.reset()
    rows = rows_of(times, runs, {name: plan}) if "dense" in runs else []
    return [row | {"compile s": compile_seconds[row["case"]]} for row in rows] + checks


def waits(call: Callable[[], Any]) -> int:
    """How often a call makes the host wait for the device."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def synchronisation_rows(options: argparse.Namespace) -> list[Row]:
    """How often the host waits in a prefill and in a step: as often for four drops as for one."""
    if options.device.type != "cuda":
        return [skipped("synchronisations", "all", "no CUDA device")]
    config = llava_config("tiny")
    model = build(config, options.device, options.dtype)
    inputs = prompts(config, 2, 20, options.device, options.dtype)
    found = {}
    for name, plan in {
        "dense": None,
        "one drop": "2:1/2",
        "four drops": "2:3/4,4:3/4,6:3/4,8:3/4",
    }.items():
        one = twin(model, plan)
        run = Decoding(one, inputs, 1)

        def step(run=run) -> None:
            run.set_back()
            run.decode()

        found[name] = (waits(lambda one=one: last_logits(one, inputs)), waits(step))
    rows: list[Row] = [
        {"check": "synchronisations", "case": name, "prefill": prefill, "step": decode}
        for name, (prefill, decode) in found.items()
    ]

    def over(name: str, base: str, place: int) -> Callable[[], float]:
        return lambda: float(found[name][place] - found[base][place])

    what = "more synchronisations"
    rows.append(check(what, "prefill, one drop over dense", 1.0, over("one drop", "dense", 0)))
    rows.append(check(what, "prefill, four drops over one", 0.0, over("four drops", "one drop", 0)))
    rows.append(check(what, "step, one drop over dense", 0.0, over("one drop", "dense", 1)))
    return rows
