"""Training: what Ray Train costs over the bare loop, and what a plan saves of a step.

    python -m benchmarks.train                        # both parts, minutes on two cores
    python -m benchmarks.train --part steps --json out.json

`launchers` runs the pipeline's own loop on a small model three times at once, as a plain process
and in Ray Train with batches from a thread and from Ray Data. They take turns, some steps each, so
that a machine's changing speed hits all alike; a ratio is made of two turns of one round. `ratio`
is of wall time, `cpu` of the training process's processor time, which other processes disturb less.
The first steps of a turn aren't counted, since the others' turns gave their batches time to be
made. Ray Data may be further ahead than that, so its `wait` shows a stream that keeps up, no more.

`steps` is a LoRA step with a plan over one without: forward, backward and AdamW on the adapters of
all decoder linears; the base is frozen. `bound` is the ratio of the FLOPs that torch counts in a
real step without recomputation, so `MFU` counts no work twice. `saved MB` is what the forward pass
keeps for the backward pass beside parameters, each storage once; `peak MB` is the CUDA allocator's,
model and optimizer included. With a GPU it is LLaVA-1.5-7B's geometry with random weights.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import adsc
from benchmarks.measure import Case, Row, report, speedup, take_turns
from benchmarks.models import build, llava_config, parsed, parser, plans, prompts, twin
from pipeline.training.config import Checkpointing
from pipeline.training.memory import checkpoint_activations
from pipeline.training.throughput import peak_flops

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
CHANGED = "dense, changed"
_ATEN = torch.ops.aten


def _cpu_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The counter knows the CUDA attention kernels, but not the CPU's, which do the same work.
_CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
}


class Training:
    """A model with adapters and one batch, to be stepped on.

    Args:
        model: a peft model, with or without a plan.
        inputs: the batch; all words are labels.
        optimizer: of the adapters, which twins share.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        ids = inputs["input_ids"]
        labels = ids.masked_fill(ids == model.config.image_token_id, -100)
        self.inputs = inputs | {"labels": labels}

    def loss(self) -> Tensor:
        """The loss of the batch."""
        return self.model(**self.inputs, use_cache=False).loss

    def step(self) -> None:
        """Forward, backward, update."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self) -> int:
        """Bytes that a forward pass keeps for its backward pass, parameters left out."""
        parameters = {one.untyped_storage().data_ptr() for one in self.model.parameters()}
        kept: dict[int, tuple[int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            # Detached: a node that holds its own output is never freed. Held, so that no address
            # is used again.
            tensor = tensor.detach()
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss()
        return sum(size for size, _ in kept.values())

    def flops(self) -> int:
        """FLOPs of a forward and backward pass as torch counts them."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            self.loss().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def with_adapters(model: nn.Module, rank: int) -> Any:
    """The model with LoRA on every linear of its decoder, in the model's own dtype."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """The CUDA allocator's peak during a step; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def measure(
    options: argparse.Namespace,
    *,
    checkpointing: Checkpointing = False,
    change: Callable[[nn.Module], Any] | None = None,
) -> list[Row]:
    """A row for each plan; `options` as `main` reads them.

    Args:
        checkpointing: false, true or `selective`.
        change: what is done to each model but one more dense one: the changed dense model is
            compared with that, and plans with the changed dense model.
    """
    config = llava_config(options.geometry)
    model = with_adapters(build(config, options.device, options.dtype), options.rank)
    chosen = plans(config)
    models = {"dense": model} | {name: twin(model, plan) for name, plan in chosen.items()}
    if change:
        models = {"dense": model, CHANGED: twin(model)} | models
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    size = (options.text, options.device, options.dtype)
    flops = {
        name: options.batch * Training(one, prompts(config, 1, *size), optimizer).flops()
        for name, one in models.items()
    }
    if checkpointing:
        for one in models.values():
            checkpoint_activations(one, checkpointing)
    for name, one in models.items():
        if change and name != "dense":
            change(one)
    inputs = prompts(config, options.batch, *size)
    runs = {name: Training(one, inputs, optimizer) for name, one in models.items()}
    cases = [Case(name=name, call=run.step) for name, run in runs.items()]
    times = take_turns(cases, options.rounds, options.device, warm=False)
    peak = peak_flops(options.device)

    rows = []
    for name, run in runs.items():
        seconds = statistics.median(times[name])
        base = CHANGED if change and name in chosen else "dense"
        ratio, bound = speedup(times, name, base), flops["dense"] / flops[name]
        memory = peak_bytes(run.step, options.device)
        rows.append(
            {"case": name, "plan": str(chosen.get(name, ""))}
            | ratio
            | {"bound": bound, "share": ratio["speed-up"] / bound, "ms": 1e3 * seconds}
            | {"TFLOP/s": flops[name] / seconds / 1e12}
            | {"MFU": flops[name] / seconds / peak if peak else None}
            | {"saved MB": run.saved_bytes() / 1e6}
            | {"peak MB": memory / 1e6 if memory else None}
        )
    return rows


ARMS = ("bare loop", "Ray Train", "Ray Train, Ray Data")
WARM = 2  # steps of a turn that are not counted
PATIENCE = 900  # seconds that a process waits for its turn


class Turns:
    """A train context whose steps come in turns with those of other processes; it times them.

    Args:
        context: the launcher's own.
        arm: this process's place in ARMS.
        folder: shared by all; a file in it says that a turn is over.
        steps: of a turn.
    """

    def __init__(self, context: Any, arm: int, folder: Path, steps: int) -> None:
        self._context, self._arm, self._folder, self._steps = context, arm, folder, steps
        self._turns: list[dict[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def stream(self, load: Any, steps: range) -> Iterator[Any]:
        """The launcher's batches, when it is this process's turn."""
        self._running = self._in_turns(load, steps)
        return self._running

    def finish(self) -> None:
        """The last turn is over, too."""
        next(self._running, None)

    def _in_turns(self, load: Any, steps: range) -> Iterator[Any]:
        batches = self._context.stream(load, steps)
        for turn in range(len(steps) // self._steps):
            self._wait_for(turn)
            waited = 0.0
            for step in range(self._steps):
                started = time.perf_counter()
                batch = next(batches)
                got = time.perf_counter()
                if step == WARM:
                    wall, cpu, waited = started, time.process_time(), 0.0
                waited += got - started
                yield batch  # and come back when the step is done
            seconds = time.perf_counter() - wall
            self._turns.append(
                {"wall": seconds, "cpu": time.process_time() - cpu, "wait": waited / seconds}
            )
            (self._folder / f"{self._arm}.json").write_text(json.dumps(self._turns))
            (self._folder / f"{turn}-{self._arm}.over").touch()

    def _wait_for(self, turn: int) -> None:
        order = list(range(len(ARMS)))
        before = [(t, arm) for t in range(turn + 1) for arm in (order if t % 2 else order[::-1])]
        place = before.index((turn, self._arm))
        if not place:
            return
        over = self._folder / "{}-{}.over".format(*before[place - 1])
        give_up = time.monotonic() + PATIENCE
        while not over.exists():
            if time.monotonic() > give_up:
                raise TimeoutError(f"{over.name} did not come in {PATIENCE} s: another arm died")
            time.sleep(0.005)


def make_world(folder: Path, tiny: bool) -> None:
    """A random small LLaVA in `base`, and a prepared split of photograph-sized noise in `data`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from pipeline.stages.prepare import SCHEMA
    from workflows.demo.tiny_llava import TinyLlavaConfig, build_model, build_processor

    sizes = {"width": 32, "layers": 3} if tiny else {"width": 256, "mlp_width": 704}
    config = TinyLlavaConfig(**sizes)
    processor = build_processor(["a picture of noise"], config)
    for part in (build_model(processor, config, seed=0), processor):
        part.save_pretrained(folder / "base")
    (folder / "data" / "train").mkdir(parents=True)
    draw, vision = np.random.default_rng(0), (config.image_size // config.patch_size) ** 2
    rows = []
    for number in range(64):
        encoded = io.BytesIO()
        noise = draw.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(encoded, "JPEG")
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        words = draw.integers(4, 20, int(draw.integers(40, 80))).tolist()
        rows.append(
            {
                "id": str(number),
                "pictures": [encoded.getvalue()],
                "input_ids": [1, *[image] * vision, *words],
                "labels": [-100] * (1 + vision) + words,
                "kinds": [],
                "turns": "[]",
                "length": 1 + vision + len(words),
                "supervised": len(words),
                "vision_tokens": vision,
            }
        )
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, folder / "data" / "train" / "0.parquet", row_group_size=16)


def run_arm(arm: int, folder: Path, rounds: int, turn: int) -> None:
    """Train in this process, which is a plain one or a Ray Train worker."""
    from pipeline.training.config import LoraSettings, TrainConfig
    from pipeline.training.loop import Sources, train
    from pipeline.training.torchrun import FolderContext

    torch.set_num_threads(1)
    config = TrainConfig(
        plan="2:1/4",
        steps=turn * (rounds + 1),
        batch_size=4,
        lora=LoraSettings(rank=16, alpha=32),
        checkpoint_every=turn,
        log_every=10,
    )
    context: Any
    if arm:
        from pipeline.durable.progress import ProgressHandle
        from pipeline.durable.record import Record
        from pipeline.durable.stage import Input
        from pipeline.stages.train import RayContext
        from pipeline.tracking.tracker import RunHandle

        inputs = {
            name: Input(
                Record(
                    stage=name, fingerprint="0" * 64, attempt="1", outputs={},
                    uri=str(folder / name),
                )
            )
            for name in ("base", "data")
        }  # fmt: skip
        progress, run = ProgressHandle(stage="train"), RunHandle("", None)
        context = RayContext(progress, run, inputs, data_workers=arm - 1)
    else:
        context = FolderContext(folder / "bare")
    sources = Sources(base=folder / "base", data=folder / "data" / "train")
    turns = Turns(context, arm, folder / "turns", turn)
    train(config, sources, turns)
    turns.finish()


def launchers(options: argparse.Namespace) -> list[Row]:
    """A row for each arm: time of its steps over the bare loop's, and the share spent waiting."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory(prefix="adsc-benchmark-") as name:
        folder = Path(name)
        make_world(folder, tiny=options.geometry == "tiny")
        (folder / "turns").mkdir()
        settings = (folder, options.rounds, options.turn)
        if not ray.is_initialized():
            ray.init(address="local", num_cpus=4, log_to_driver=False, logging_level=logging.ERROR)
        trainers = [
            TorchTrainer(
                lambda arm: run_arm(arm["arm"], *settings),
                train_loop_config={"arm": arm},
                scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(name=f"arm-{arm}", storage_path=f"{folder}/ray"),
                torch_config=TorchConfig(backend="gloo"),
            )
            for arm in range(1, len(ARMS))
        ]
        threads = [threading.Thread(target=trainer.fit) for trainer in trainers]
        for thread in threads:
            thread.start()
        bare = multiprocessing.get_context("spawn").Process(target=run_arm, args=(0, *settings))
        bare.start()
        bare.join()
        for thread in threads:
            thread.join()
        unfinished = [
            name
            for arm, name in enumerate(ARMS)
            if not (folder / "turns" / f"{options.rounds}-{arm}.over").exists()
        ]
        if unfinished:
            raise RuntimeError(f"{unfinished} did not come to the end; see what is printed above")
        # The first turn warms up.
        turns = [
            json.loads((folder / "turns" / f"{arm}.json").read_text())[1:]
            for arm in range(len(ARMS))
        ]
    rows = []
    for arm, name in enumerate(ARMS):
        row: Row = {"launcher": name}
        for kind, column in (("wall", "ratio"), ("cpu", "cpu")):
            ratios = [b[kind] / a[kind] for a, b in zip(turns[0], turns[arm], strict=True)]
            row |= {
                column: statistics.median(ratios),
                f"{column} low": min(ratios),
                f"{column} high": max(ratios),
            }
        waits = [turn["wait"] for turn in turns[arm]]
        seconds = statistics.median(turn["wall"] for turn in turns[arm])
        row |= {"wait": statistics.median(waits), "wait high": max(waits)}
        rows.append(row | {"ms": 1e3 * seconds / (options.turn - WARM)})
    return rows


def mfu_row(options: argparse.Namespace) -> Row:
    """MFU of LLaVA-1.5-7B with random weights; only a GPU can tell."""
    row = {"what": "MFU, LLaVA-1.5-7B LoRA step, random weights"}
    if options.device.type != "cuda":
        return row | {"dense": None, "note": "not measured: no GPU here"}
    big = argparse.Namespace(**vars(options))
    big.geometry, big.batch, big.rank, big.dtype = "llava-1.5-7b", 4, 64, torch.bfloat16
    measured = {one["case"]: one["MFU"] for one in measure(big)}
    return row | measured | {"note": "by torch's own count of FLOPs"}


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__ or "", geometry_name="cpu-narrow", rows=2, rounds=7)
    made.add_argument("--part", choices=("all", "launchers", "steps"), default="all")
    made.add_argument("--turn", type=int, default=12, help="steps of a launcher's turn")
    made.add_argument("--rank", type=int, default=16, help="of the adapters")
    made.add_argument("--checkpointing", action="store_true", help="recompute each layer")
    made.add_argument("--compiled", action="store_true", help="compile each layer")
    options = parsed(made, arguments)
    if options.turn <= WARM:
        made.error(f"--turn {options.turn}: the first {WARM} steps of a turn are not counted")
    rows: list[Row] = []
    if options.part != "steps":
        rows += launchers(options)
    if options.part != "launchers":
        change = adsc.compile_layers if options.compiled else None
        rows += measure(options, checkpointing=options.checkpointing, change=change)
        rows.append(mfu_row(options))
    report("train", vars(options), rows, options.device, options.json)


if __name__ == "__main__":
    main()
