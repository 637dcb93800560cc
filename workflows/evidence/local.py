"""The evidence on one machine without Ray: base, data, arms, tables.

Stage bodies, training loop, scoring and tables are the pipeline's; here is only who does what when.
Pictures are decoded once, and pass a frozen tower once, before processes are forked that share
them: on a small model the same work would else take as long as training. What a training made is
kept (trained/DIGEST), so that other questions can be asked of it later; an arm's result is one JSON
file with the score of every question. Both are named by a digest of what was computed, and neither
is made twice.
"""

import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

import adsc
from pipeline.commit import git_commit
from pipeline.evaluation.generation import (
    count_tokens,
    generate_tokens,
    to_device,
)
from pipeline.evaluation.methods import build_method
from pipeline.training.batches import StepBatch, StepLoader
from pipeline.training.config import DENSE, TrainConfig
from pipeline.training.feed import from_processes
from pipeline.training.loop import Sources, train
from pipeline.training.torchrun import FolderContext
from workflows.evidence.config import (
    EvidenceConfig,
    trainings,
)
from workflows.evidence.features import (
    LOOKING,
    TAUGHT,
    install,
    pack,
    remember,
    teach_ahead,
    unpack,
)
from workflows.evidence.questions import Asking, load_asking, score
from workflows.evidence.tables import write_ladder, write_results
from workflows.evidence.tasks import (
    Replies,
    Task,
    jobs_of,
    load_model,
    processor_of,
    set_up,
    tasks,
    trained_folder,
)
from workflows.evidence.world import SPAWN, claim, make_world, start_log, start_process

log = logging.getLogger(__name__)


class World(NamedTuple):
    """What all arms share; made before processes are forked, so that they share its memory."""

    out: Path
    config: EvidenceConfig
    streams: dict[tuple[int, int], list[StepBatch]]
    """Packed batches of each training stage by what they follow from: the same for all arms."""
    asked: dict[str, Asking]
    """By split."""
    pictures: dict[bytes, torch.Tensor]
    """What batches hold the keys of (evidence_features.unpack)."""
    features: dict[bytes, torch.Tensor]
    """Of all pictures, as the base's tower and projector make them (evidence_features)."""


_WORLD: World | None = None  # of a forked process


def run(
    config: EvidenceConfig,
    out: Path,
    *,
    processes: int,
    only: Sequence[str] | None = None,
    base_only: bool = False,
    stop_after: float = float("inf"),
) -> int:
    """Everything that `out` lacks: 0, or 1 where arms are left out or failed.

    Raises:
        ValueError: arms that there are not, or an `out` of other data or another base.
    """
    todo = tasks(config, out, only)
    start_log()
    began = time.monotonic()
    (out / "arms").mkdir(parents=True, exist_ok=True)
    claim(config, out)
    with ProcessPoolExecutor(processes, mp_context=SPAWN, initializer=start_process) as pool:
        make_world(config, out, pool.map)
    if base_only:
        return 0
    missing = [task for task in todo if not task.file.exists()]
    log.info("%d of %d arms are to be run", len(missing), len(todo))
    failed = _run_all(config, out, missing, processes, began + stop_after) if missing else 0
    if config.recipes:
        write_ladder(config, out)
    elif not only:
        write_results(config, out)
    return int(failed > 0)


def _run_all(
    config: EvidenceConfig, out: Path, tasks: Sequence[Task], processes: int, deadline: float
) -> int:
    """Run the tasks on one device; how many failed or were not begun."""
    global _WORLD
    torch.set_num_threads(1)  # a process that has begun threads can't be forked safely
    world = _load_world(config, out, tasks, processes)
    jobs = jobs_of(config, out, tasks)
    log.info("batches are loaded")
    _WORLD = world
    failed = done = 0
    with ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker
    ) as pool:
        running = {pool.submit(_run_job, job, deadline): job for job in jobs}
        for future in as_completed(running):
            error, job = future.exception(), running[future]
            failed += error is not None
            done += len(job)
            if error is not None:
                log.error("%s failed: %s: %s", job[0].file.stem, type(error), error)
            else:
                log.info("%d of %d: %s", done, len(tasks), future.result())
    _WORLD = None
    return failed + sum(not task.file.exists() for task in tasks)


def _start_worker() -> None:
    start_process()
    set_up()


def _load_world(config: EvidenceConfig, out: Path, tasks: Sequence[Task], processes: int) -> World:
    base, train_folder = out / "base", out / "prepared" / "train"
    stages = [
        stage
        for task in tasks
        if task.seed is not None and not trained_folder(config, out, task).exists()
        for stage in trainings(config, task.arm, task.seed)
    ]
    pictures: dict[bytes, torch.Tensor] = {}
    streams: dict[tuple[int, int], list[StepBatch]] = {}
    # The longest first: its batches are those of shorter ones of that seed, too.
    for stage in sorted(stages, key=lambda stage: -(stage.steps or 0)):
        if _stream_of(stage) not in streams:
            load = StepLoader(data=train_folder, processor=base, config=stage)
            made = from_processes(load, range(load.steps), processes)
            streams[_stream_of(stage)] = [_packed(batch, pictures) for batch in made]
    processor = processor_of(config, base)
    asked = {
        split: load_asking(out / "prepared", split, processor, config.evaluate.batch_size, pictures)
        for split in {task.arm.split for task in tasks}
    }
    features: dict[bytes, torch.Tensor] = {}
    if _is_frozen(config, base):
        model = load_model(base, None)
        features = remember(model, pictures)
        install(model, features)
        for stage in filter(_taught_by_base, stages):
            _teach(streams[_stream_of(stage)], stage.steps or 0, model, pictures)
        log.info("the teacher has answered")
    return World(out, config, streams, asked, pictures, features)


def _stream_of(stage: TrainConfig) -> tuple[int, int]:
    """What its batches follow from: the seed, and where rows are sorted by length its steps."""
    return stage.seed, (stage.steps or 0) if stage.group_by_length else 0


def _teach(
    stream: list[StepBatch], steps: int, model: Any, pictures: dict[bytes, torch.Tensor]
) -> None:
    """Put into a stream's first steps what the dense base teaches there, where it isn't yet."""
    for step, batch in enumerate(stream[:steps]):
        if TAUGHT not in batch.micro[0]:
            taught = [teach_ahead(model, micro, pictures) for micro in batch.micro]
            stream[step] = replace(batch, micro=taught)


def _taught_by_base(stage: TrainConfig) -> bool:
    return stage.distill is not None and stage.distill.teacher == DENSE


def _is_frozen(config: EvidenceConfig, base: Path) -> bool:
    """Whether all arms have the base's own tower and projector, of a kind that can be remembered.

    On a device of its own a tower takes less time than looking its features up."""
    kind = json.loads((base / "config.json").read_text())["model_type"]
    return kind == "llava" and not config.train.tune and not torch.cuda.is_available()


def _packed(batch: StepBatch, pictures: dict[bytes, torch.Tensor]) -> StepBatch:
    return replace(batch, micro=[pack(one, pictures) for one in batch.micro])


class SharedBatches(FolderContext):
    """Checkpoints in a folder, batches from the memory that all processes share."""

    def stream(self, load: Callable[[int], StepBatch], steps: range) -> Iterator[StepBatch]:
        assert _WORLD is not None and isinstance(load, StepLoader)
        world, batches = _WORLD, _WORLD.streams[_stream_of(load.config)]
        taught = _taught_by_base(load.config)
        for step in steps:
            micro = [unpack(one, world.pictures) for one in batches[step].micro]
            if not taught:
                for one in micro:
                    one.pop(TAUGHT, None)
            yield replace(batches[step], micro=micro)


def _run_job(job: Sequence[Task], deadline: float) -> str:
    """Train, if the arm is trained and nobody has yet, and ask; results into the tasks' files."""
    world = _WORLD
    assert world is not None
    if time.monotonic() > deadline:
        return f"{job[0].file.stem} was not begun"
    began = time.monotonic()
    trained = None if job[0].seed is None else _train(world, job[0])
    took = time.monotonic() - began
    found = [_answer(world, task, trained) for task in job]
    seconds = time.monotonic() - began
    right = ", ".join(
        f"{task.file.stem}: {share:.1f} %" for task, share in zip(job, found, strict=True)
    )
    return f"{right} in {seconds:.0f} s ({took:.0f} s)"


def _train(world: World, task: Task) -> Path:
    """The folder of what the task's training made: trained/ and about.json."""
    kept = trained_folder(world.config, world.out, task)
    if kept.exists():
        return kept
    began = time.monotonic()
    base, work = world.out / "base", world.out / "training" / kept.name
    start: Path | None = None
    losses: list[list[float]] = []
    stages = trainings(world.config, task.arm, task.seed or 0)
    for number, stage in enumerate(stages, 1):
        data = world.out / "prepared" / "train"
        model = _begin(world, base, task)
        sources = Sources(base=base, data=data, start=start, model=model)
        with closing(SharedBatches(work / str(number), keep=1)) as context:
            train(stage, sources, context)
        start = context.checkpoints()[-1] / "trained"
        losses.append(json.loads((start / "history.json").read_text()))
    about = {
        "trainings": [stage.model_dump(mode="json") for stage in stages],
        "losses": losses,
        "training_seconds": time.monotonic() - began,
        "commit": git_commit(),
    }
    scratch = kept.with_suffix(".making")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(exist_ok=True)
    shutil.copytree(start, scratch / "trained")  # type: ignore[arg-type]
    (scratch / "about.json").write_text(json.dumps(about))
    scratch.rename(kept)
    shutil.rmtree(work, ignore_errors=True)
    return kept


def _begin(world: World, base: Path, task: Task) -> Any:
    """The base with remembered features; None where the loop is to load it."""
    if not _remembers(world, task) or world.config.train.precision != "fp32":
        return None
    model: Any = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, attn_implementation=world.config.train.attention
    )
    install(model, world.features)
    return model


def _remembers(world: World, task: Task) -> bool:
    method = task.arm.method.method
    return bool(world.features) and (method is None or method.name not in LOOKING)


def _answer(world: World, task: Task, trained: Path | None) -> float:
    """Ask, and write the task's file; the share that is right, in per cent."""
    began = time.monotonic()
    model = load_model(world.out / "base", None if trained is None else trained / "trained")
    if _remembers(world, task):
        install(model, world.features)
    adsc.attach(model, build_method(task.arm.method, model))
    replies = _ask(world, task.arm.split, model)
    made: dict[str, Any] = {"trainings": [], "losses": [], "training_seconds": 0.0}
    if trained is not None:
        made = json.loads((trained / "about.json").read_text())
    found = {
        "arm": task.arm.name,
        "seed": task.seed,
        "split": task.arm.split,
        "method": task.arm.method.runs_with,
        **made,
        "asking_seconds": time.monotonic() - began,
        "commit": git_commit(),
        **replies._asdict(),
    }
    scratch = task.file.with_suffix(".writing")
    scratch.write_text(json.dumps(found))
    scratch.rename(task.file)
    return 100 * float(np.mean(replies.scores))


def _ask(world: World, split: str, model: Any) -> Replies:
    tokenizer = processor_of(world.config, world.out / "base").tokenizer
    questions, batches = world.asked[split]
    many = len(questions)
    replies = Replies([0.0] * many, [""] * many, [0] * many, [0.0] * many)
    for numbers, packed in batches:
        inputs = unpack(packed, world.pictures)
        began = time.perf_counter()
        new = generate_tokens(model, to_device(inputs, model), world.config.evaluate.max_new_tokens)
        answers = tokenizer.batch_decode(new, skip_special_tokens=True)
        seconds = (time.perf_counter() - began) / len(numbers)
        lengths, _ = count_tokens(new, model)
        for number, answer, length in zip(numbers, answers, lengths, strict=True):
            replies.scores[number] = score(answer, questions.entries[number])
            replies.answers[number] = answer.strip()
            replies.generated_tokens[number] = length
            replies.seconds[number] = seconds
    return replies
