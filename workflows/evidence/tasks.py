"""Arms as tasks: which there are, in which order they run, where results and weights lie, and the
model that answers.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor

import adsc
from pipeline.data.templates import find_template
from pipeline.durable.identity import digest
from pipeline.training.adapters import merge_trained
from workflows.evidence.config import (
    Arm,
    EvidenceConfig,
    arms,
    controls,
    trainings,
)


class Task(NamedTuple):
    """One training of one arm, or the evaluation of an untrained one."""

    arm: Arm
    seed: int | None
    file: Path


def tasks(config: EvidenceConfig, out: Path, only: Sequence[str] | None) -> list[Task]:
    """Tier by tier, and within one seed by seed, so that what is cut short has fewer seeds of fewer
    arms; untrained peers last: where they loop over pictures, evaluating one takes longer than
    training an arm."""
    everything = {arm.name: arm for budget in config.budgets for arm in arms(config, budget)}
    everything |= {arm.name: arm for arm in controls(config)}
    if unknown := set(only or ()) - everything.keys():
        raise ValueError(
            f"there are no arms {', '.join(sorted(unknown))}; there are {', '.join(everything)}"
        )
    chosen = [arm for name, arm in everything.items() if only is None or name in only]
    untrained = [arm for arm in chosen if not arm.trained_with]
    ordered: list[tuple[Arm, int | None]]
    ordered = [(arm, None) for arm in untrained if arm.method.method is None]
    ordered += [
        (arm, seed)
        for tier in sorted({arm.tier for arm in chosen})
        for seed in config.seeds
        for arm in chosen
        if arm.trained_with and arm.tier == tier
    ]
    ordered += [(arm, None) for arm in untrained if arm.method.method is not None]
    return [Task(arm, seed, result_file(config, out, arm, seed)) for arm, seed in ordered]


def jobs_of(config: EvidenceConfig, out: Path, missing: Sequence[Task]) -> list[list[Task]]:
    """Tasks of one training together, so that no two processes train the same."""
    jobs: dict[Path, list[Task]] = {}
    for task in missing:
        own = task.file if task.seed is None else trained_folder(config, out, task)
        jobs.setdefault(own, []).append(task)
    return list(jobs.values())


def trained_folder(config: EvidenceConfig, out: Path, task: Task) -> Path:
    """Where the weights of a task's training are kept."""
    about: list[Any] = [config.data, config.prepare, config.base, config.made]
    return out / "trained" / digest(about + trainings(config, task.arm, task.seed or 0))[:12]


def result_file(config: EvidenceConfig, out: Path, arm: Arm, seed: int | None) -> Path:
    """Where a result lies: its name holds a digest of what decides it."""
    about: list[Any] = [config.data, config.prepare, config.base, config.made, arm.method]
    about += [config.evaluate.max_new_tokens]
    about += [] if seed is None else trainings(config, arm, seed)
    about += [] if arm.split == "test" else [arm.split]
    ending = "" if seed is None else f"-s{seed}"
    return out / "arms" / f"{arm.name}{ending}-{digest(about)[:8]}.json"


class Replies(NamedTuple):
    """An arm's replies, by question."""

    scores: list[float]
    """1 or 0: exact matches of greedy answers; of lists, the share of right entries."""
    answers: list[str]
    generated_tokens: list[int]
    """The end token included."""
    seconds: list[float]
    """Wall time of the batch that the question was in, divided by its questions."""


def load_model(base: Path, trained: Path | None) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = adsc.from_pretrained(base)
    if trained is not None:
        model = merge_trained(model, trained)
    return model.to(device).eval()


def processor_of(config: EvidenceConfig, base: Path) -> Any:
    """Prompts as in training."""
    processor = AutoProcessor.from_pretrained(base)
    processor.chat_template = find_template(config.prepare.template, processor).text
    return processor


def set_up() -> None:
    logging.getLogger("pipeline").setLevel(logging.WARNING)  # steps of single trainings
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
