"""A trial: attach a plan, train for a while or not at all, and score it.

A worker loads the base once and runs trial after trial; after each the model is restored. A
trial's rungs follow one another as a curriculum's stages do: each continues the adapter of the one
before with its own warm-up and decay, so a trial that is stopped has cost what it did, and no
training has to be halted in its middle. With several workers a trial's trainings are Ray Train
runs, and this process holds no model.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoProcessor

import adsc
from adsc.dropping.outputs import full_length_logits
from pipeline.data.conversations import IGNORED
from pipeline.data.prepared import PreparedData
from pipeline.data.templates import find_template
from pipeline.durable.identity import digest
from pipeline.durable.record import Record
from pipeline.durable.stage import Input, Inputs, RunContext, StageContext
from pipeline.evaluation.generation import Questions, build_inputs, generate_batch, to_device
from pipeline.evaluation.scoring import exact_match
from pipeline.evaluation.speed import measure
from pipeline.search.config import SearchConfig
from pipeline.search.keys import Settings, with_settings
from pipeline.store import open_store
from pipeline.training.adapters import load_trained
from pipeline.training.batches import COLUMNS, collate
from pipeline.training.config import OffloadSettings, TrainConfig
from pipeline.training.curriculum import CurriculumConfig, configs_of, plans_of
from pipeline.training.loop import Sources, train
from pipeline.training.torchrun import FolderContext

MEASURED_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625)
"""Shares of the vision tokens whose prefill is timed for a budget of time."""
PREFILL_ROUNDS = 9


class TrialRefused(ValueError):
    """No trial of this search can run with this config."""


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """Everything that the trials of one search share; it can be pickled."""

    search: SearchConfig
    train: TrainConfig
    """For trials that train."""
    curriculum: CurriculumConfig
    """Likewise."""
    inputs: dict[str, Input]
    """`base`, and `data` with the splits train, validation and confirm."""
    storage: str
    """Where the search keeps what trials share: a folder or s3://."""
    run: RunContext
    train_stage: Callable[[StageContext, TrainConfig], Mapping[str, Any]]
    """Body of a training stage, which trains a trial on several workers."""


class Judged(NamedTuple):
    """Per conversation, sums of losses over answer tokens (or of right answers over questions), and
    how many there are."""

    sums: np.ndarray
    weights: np.ndarray

    @property
    def value(self) -> float:
        return float(self.sums.sum() / self.weights.sum())


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A rung of a trial."""

    resource: int
    judged: Judged
    confirm: Judged | None
    """At the last rung."""


def segments(job: SearchJob, plan: str, settings: Settings = ()) -> list[TrainConfig]:
    """The trainings of a trial with this plan and these settings, one per rung; empty if it trains
    nothing.

    Raises:
        ConfigError: a setting that the training does not take.
        TrialRefused: short trainings of unspecified length.
    """
    config, base = job.search, with_settings(job.train, settings)
    if config.fidelity == "untrained":
        return []
    if config.fidelity == "curriculum":
        parts = configs_of(job.curriculum, base, plans_of(job.curriculum, plan))
    else:
        ends = config.rungs or ((base.steps,) if base.steps else ())
        if not ends:
            raise TrialRefused(
                f"search.fidelity = lora with train.epochs = {base.epochs}: set how many steps a "
                "trial trains, such as search.rungs=[30,100]"
            )
        each = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        parts = [
            base.model_copy(update={"plan": plan, "steps": steps, "epochs": None, "seed": seed})
            for seed, steps in enumerate(each, 1000 * base.seed + 1)
        ]
    return [
        part.model_copy(
            update={
                "carry_optimizer": part.carry_optimizer or config.fidelity == "lora",
                "checkpoint_every": 10**9,  # at its end
            }
        )
        for part in parts
    ]


class Bench:
    """One worker: it holds the base and the validation conversations, and runs trials."""

    def __init__(self, job: SearchJob) -> None:
        self.job = job
        self._base = job.inputs["base"].folder
        self._data = job.inputs["data"].folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        untrained = job.search.fidelity == "untrained"
        self._half = job.train.precision == "bf16" or (untrained and self.device.type == "cuda")
        self._processor: Any = AutoProcessor.from_pretrained(self._base)
        self._loaded: Any = None
        self._splits: dict[str, Any] = {}
        if job.search.objective == "accuracy":
            template = find_template(job.inputs["data"].outputs["template"], self._processor)
            self._processor.chat_template = template.text

    @property
    def model(self) -> Any:
        """The base, loaded once."""
        if self._loaded is None:
            loaded = adsc.from_pretrained(
                self._base,
                dtype=torch.bfloat16 if self._half else torch.float32,
                attn_implementation=self.job.train.attention,
            )
            self._loaded = loaded.to(self.device)
        return self._loaded

    def trial(self, number: int, plan: str, settings: Settings = ()) -> Iterator[Reached]:
        """Run a trial, yielding each rung; closing the iterator ends it."""
        trainings = segments(self.job, plan, settings)
        if not trainings:
            yield from self._untrained(plan)
            return
        with tempfile.TemporaryDirectory(prefix="adsc-trial-") as scratch:
            several = self.job.search.workers_per_trial > 1
            run = self._trained_by_ray if several else self._trained_here
            yield from run(number, plan, trainings, Path(scratch), settings)

    def _untrained(self, plan: str) -> Iterator[Reached]:
        config = self.job.search
        rows = min(config.rows, self._size("validation"))
        ends = [*(rung for rung in config.rungs if rung < rows), rows]
        parts: list[Judged] = []
        for start, end in zip((0, *ends), ends, strict=False):
            parts.append(self.judge(plan, "validation", range(start, end)))
            so_far = Judged(*(np.concatenate(each) for each in zip(*parts, strict=True)))
            confirm = self.judge(plan, "confirm") if end == rows else None
            yield Reached(resource=end, judged=so_far, confirm=confirm)

    def _trained_here(
        self,
        number: int,
        plan: str,
        trainings: Sequence[TrainConfig],
        scratch: Path,
        settings: Settings,
    ) -> Iterator[Reached]:
        start: Path | None = None
        steps = 0
        for place, one in enumerate(trainings):
            # One worker shares nothing, and DeepSpeed would not give the model back.
            config = one.model_copy(update={"strategy": "ddp", "offload": OffloadSettings()})
            with borrowed(self.model, config) as model:
                context = FolderContext(scratch / f"{place}", keep=1)
                sources = Sources(
                    base=self._base, data=self._data / "train", start=start, model=model
                )
                train(config, sources, context)
                context.close()
                start = context.checkpoints()[-1] / "trained"
                steps += int(start.parent.name.partition("-")[2])
                last = place == len(trainings) - 1
                judged = self.judge(plan, "validation")
                confirm = self.judge(plan, "confirm") if last else None
            yield Reached(resource=steps, judged=judged, confirm=confirm)

    def _trained_by_ray(
        self,
        number: int,
        plan: str,
        trainings: Sequence[TrainConfig],
        scratch: Path,
        settings: Settings,
    ) -> Iterator[Reached]:
        import ray

        from pipeline.durable.progress import ProgressHandle
        from pipeline.tracking.tracker import RunHandle, Tracker

        job, run = self.job, self.job.run
        store, inputs = open_store(job.storage), dict(job.inputs)
        # After a kill a number can be reused with another plan; a training must not be.
        home = f"trainings/{number:05d}-{digest([plan, *settings] if settings else plan)[:8]}"
        elsewhere = ray.remote(
            num_cpus=run.cpus_per_worker,
            num_gpus=run.gpus_per_worker,
            scheduling_strategy="DEFAULT",  # and not in the share of a machine that Tune gave us
        )(_judge)
        steps = 0
        for place, config in enumerate(trainings):
            name = f"{home}-{place}"
            out = scratch / f"{place}"
            out.mkdir()
            made = job.train_stage(
                StageContext(
                    name=name,
                    fingerprint=digest(name),
                    run=replace(run, num_workers=job.search.workers_per_trial),
                    inputs=Inputs(inputs),
                    out=out,
                    train_storage=(job.storage, name),
                    track=Tracker(RunHandle("", None)),
                    progress_handle=ProgressHandle(stage="search"),
                ),
                config,
            )
            steps += made["steps"]
            target = f"{name}-weights"
            store.upload(out, target)
            record = Record(
                stage="trial", fingerprint=digest(store.uri(target)), attempt="", outputs={},
                uri=store.uri(target),
            )  # fmt: skip
            inputs["start"] = Input(record, run.cache, run.cache_gib)
            last = place == len(trainings) - 1
            splits = ["validation", "confirm"] if last else ["validation"]
            judged = ray.get(elsewhere.remote(job, inputs["start"], config, plan, splits))
            yield Reached(resource=steps, judged=judged[0], confirm=judged[1] if last else None)

    def judge(self, plan: str, split: str, rows: range | None = None) -> Judged:
        """Score the current model under a plan on a split's conversations."""
        model = self.model.eval()
        adsc.attach(model, plan)
        rows = rows or range(self._size(split))
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self._half else nullcontext()
        how = self._answers if self.job.search.objective == "accuracy" else self._losses
        with torch.inference_mode(), mixed:
            judged = how(model, split, rows)
        if not np.isfinite(judged.value):
            raise ValueError(f"the loss under {plan} is {judged.value} on {split}")
        return judged

    def _size(self, split: str) -> int:
        return len(self._split(split))

    def _split(self, split: str) -> PreparedData:
        if split not in self._splits:
            self._splits[split] = PreparedData(self._data / split)
        data: PreparedData = self._splits[split]
        return data

    def _losses(self, model: Any, split: str, rows: range) -> Judged:
        sums, weights = [], []
        size = self.job.search.batch_size
        for start in range(rows.start, rows.stop, size):
            numbers = range(start, min(start + size, rows.stop))
            batch = collate(self._split(split).rows(numbers, COLUMNS), self._processor)
            labels = batch.pop("labels").to(self.device)
            inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
            losses = token_losses(model(**inputs, use_cache=False), labels)
            sums.append(losses.sum(1).cpu().numpy())
            weights.append((labels[:, 1:] != IGNORED).sum(1).cpu().numpy())
        return Judged(np.concatenate(sums), np.concatenate(weights).astype(np.float64))

    def _answers(self, model: Any, split: str, rows: range) -> Judged:
        key = f"questions of {split}"
        if key not in self._splits:
            self._splits[key] = Questions(self._data / split)
        questions: Questions = self._splits[key]
        numbers = [n for n, entry in enumerate(questions.entries) if entry.row in rows]
        sums, weights = np.zeros(len(rows)), np.zeros(len(rows))
        size, most = self.job.search.batch_size, self.job.search.max_new_tokens
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            loaded = questions.load(some)
            for number, question, answer in zip(
                some, loaded, generate_batch(model, self._processor, loaded, most), strict=True
            ):
                row = questions.entries[number].row - rows.start
                sums[row] += exact_match(answer.text, question.expected)
                weights[row] += 1
        return Judged(sums, weights)

    def prefill(self) -> dict[int, float]:
        """Milliseconds of a prefill of `batch_size` questions whose layers all see so many vision
        tokens of each picture, for some numbers of them."""
        questions = Questions(self._data / "validation")
        size = min(self.job.search.batch_size, len(questions))
        model = self.model.eval()
        inputs = to_device(build_inputs(questions.load(range(size)), self._processor), model)
        cost = adsc.estimate_cost(model.config, None, image_size=self.job.search.image_size)
        n = cost.per_layer[0].vision_tokens
        counts = sorted({max(1, round(share * n)) for share in MEASURED_SHARES})
        plans = [adsc.PruningPlan.parse("" if c == n else f"0:{c}/{n}") for c in counts]
        found = measure(
            model, inputs, plans, rounds=PREFILL_ROUNDS, decode_rounds=1, decode_tokens=2
        )
        return {
            count: one["prefill_ms"]["median"] for count, one in zip(counts, found, strict=True)
        }


def token_losses(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """(B, S - 1): negative log likelihood of each label from the second column on, 0 where there is
    none; logits may be those of the columns that a plan left."""
    logits = output.logits
    if logits.shape[1] != labels.shape[1]:
        # Map of columns to kept logits: logits of all columns would not fit in memory.
        index = torch.arange(logits.shape[1], device=logits.device, dtype=torch.float32)
        places = {"logits": index[None, :, None].expand(len(logits), -1, 1)}
        places["kept_positions"] = output.kept_positions
        columns = full_length_logits(places, labels)[..., 0].long()
    else:
        columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    rows, places_at = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    chosen = logits[rows, columns[rows, places_at]].float()
    losses = nn.functional.cross_entropy(
        chosen, labels[rows, places_at + 1], reduction="none"
    ).double()
    table = torch.zeros(labels[:, 1:].shape, dtype=torch.float64, device=labels.device)
    table[rows, places_at] = losses
    return table


@contextmanager
def borrowed(model: nn.Module, config: TrainConfig) -> Iterator[nn.Module]:
    """The model for one training, and afterwards as it was: no adapter, tuned parts put back."""
    before = {
        name: (parameter, parameter.data.clone())
        for name, parameter in model.named_parameters()
        if any(re.fullmatch(rule, name) for rule in config.tune)
    }
    try:
        yield model
    finally:
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, data in before.values():
            parameter.data = data
        for parameter in model.parameters():
            parameter.grad = None


def _judge(
    job: SearchJob, trained: Input, config: TrainConfig, plan: str, splits: Sequence[str]
) -> list[Judged]:
    """A Ray task: what a Ray Train run made, judged on a machine that may not have its folders."""
    bench = Bench(job)
    with borrowed(bench.model, config) as model:
        load_trained(model, trained.folder / "trained")
        return [bench.judge(plan, split) for split in splits]
