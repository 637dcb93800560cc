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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import adsc
from pipeline.data.prepared import PreparedData
from pipeline.data.templates import find_template
from pipeline.data.worker import TASK, Work, render_chunks
from pipeline.durable.identity import canonical, digest
from pipeline.durable.progress import ProgressHandle
from pipeline.durable.record import Record
from pipeline.durable.session import git_commit
from pipeline.durable.stage import Input, Inputs, RunContext, StageContext
from pipeline.evaluation.generation import (
    Questions,
    build_inputs,
    count_tokens,
    generate_tokens,
    majority_answers,
    share_right,
    to_device,
)
from pipeline.evaluation.methods import MethodConfig, build_method
from pipeline.evaluation.speed import measure_and_count
from pipeline.kinds.merge import MergeConfig
from pipeline.kinds.report import ReportConfig
from pipeline.packaged import resolve
from pipeline.redact import flatten
from pipeline.stages.evaluate import Scored, results
from pipeline.stages.merge import merge
from pipeline.stages.prepare import prepare_data
from pipeline.stages.report import report
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.training.adapters import merge_trained
from pipeline.training.batches import StepBatch, StepLoader
from pipeline.training.config import TrainConfig
from pipeline.training.feed import from_processes
from pipeline.training.loop import Sources, train
from pipeline.training.torchrun import FolderContext
from workflows.demo.fashion_grids import write_grids
from workflows.demo.tiny_base import TinyBaseConfig, start_decoder, train_tower
from workflows.evidence.adapt import AdaptedConfig
from workflows.evidence.config import (
    CONTROL,
    Arm,
    BudgetConfig,
    EvidenceConfig,
    arms,
    control_of,
    controls,
    evaluated,
    trainings,
)
from workflows.evidence.features import LOOKING, install, pack, remember, unpack
from workflows.evidence.questions import Asking, load_asking, questions_of, score
from workflows.evidence.retention import Answered, write_retention
from workflows.evidence.summary import write_summary
from workflows.stamps.base import StampsBaseConfig, start_stamps
from workflows.stamps.scenes import ScenesConfig, write_scenes

log = logging.getLogger(__name__)
SPAWN = multiprocessing.get_context("spawn")


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


class Task(NamedTuple):
    """One training of one arm, or the asking of an untrained one."""

    arm: Arm
    seed: int | None
    file: Path


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
    _log()
    began = time.monotonic()
    (out / "arms").mkdir(parents=True, exist_ok=True)
    _claim(config, out)
    with ProcessPoolExecutor(processes, mp_context=SPAWN) as pool:
        _make_world(config, out, pool.map)
    if base_only:
        return 0
    missing = [task for task in todo if not task.file.exists()]
    log.info("%d of %d arms are to be run", len(missing), len(todo))
    failed = _run_all(config, out, missing, processes, began + stop_after) if missing else 0
    if config.recipes:
        _write_ladder(config, out)
    elif not only:
        _write_results(config, out)
    return int(failed > 0)


def _claim(config: EvidenceConfig, out: Path) -> None:
    """Data and base in `out` are of one config: they are found by their names alone."""
    shared = ("data", "prepare", "base", "made")
    own = flatten({name: canonical(getattr(config, name)) for name in shared})
    file = out / "world.json"
    if not file.exists():
        file.write_text(json.dumps(own, indent=1))
    there = json.loads(file.read_text())
    if other := sorted(key for key in own | there if own.get(key) != there.get(key)):
        told = "; ".join(f"{key} is {there.get(key)} there, {own.get(key)} here" for key in other)
        raise ValueError(f"{out} holds other data or another base: {told}; take another --out")


def _make_world(config: EvidenceConfig, out: Path, each: Callable[..., Iterable[Any]]) -> None:
    """Pictures, base and prepared data below `out`."""
    quiet = ProgressHandle(stage="evidence")

    def pictures(folder: Path) -> None:
        folder.mkdir()
        if isinstance(config.data, ScenesConfig):
            write_scenes(folder, config.data, quiet, partial(each, chunksize=50))
        else:
            write_grids(folder, config.data, quiet, partial(each, chunksize=50))

    def prepared(folder: Path, base: str = "base") -> None:
        folder.mkdir()
        given = _input(out / "pictures"), _input(out / base)
        prepare_data(*given, config.prepare, folder, quiet, render=partial(_render, each=each))

    _once(out / "pictures", pictures)
    if config.made is None:
        _once(out / "base", lambda folder: shutil.copytree(resolve(config.base.source), folder))
        _once(out / "prepared", prepared)
        return
    made, first = config.made, "tower" if isinstance(config.made, TinyBaseConfig) else "start"
    if isinstance(made, AdaptedConfig):
        _once(out / first, lambda folder: shutil.copytree(resolve(made.source.source), folder))
    else:
        begin = _train_tower if isinstance(made, TinyBaseConfig) else _start_stamps
        _once(out / first, lambda folder: _apart(begin, made, out, folder))
    _once(out / "prepared", lambda folder: prepared(folder, first))
    _once(out / "base", lambda folder: _apart(_train_base, config, out, folder))


def _once(folder: Path, make: Callable[[Path], object]) -> None:
    """The folder appears whole or not at all."""
    if folder.exists():
        return
    began = time.monotonic()
    scratch = folder.with_name(folder.name + ".making")
    shutil.rmtree(scratch, ignore_errors=True)
    make(scratch)
    scratch.rename(folder)
    log.info("%s: %.0f s", folder.name, time.monotonic() - began)


def _apart(work: Callable[..., None], *arguments: Any) -> None:
    """In a process of its own: this one is forked later, and must not hold a device by then."""
    with ProcessPoolExecutor(1, mp_context=SPAWN, initializer=_log) as pool:
        pool.submit(work, *arguments).result()


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def _render(
    tasks: list[dict[str, Any]], work: Work, each: Callable[..., Iterable[Any]]
) -> Iterator[pa.Table]:
    """pipeline.stages.prepare's rows, by this machine's processes."""
    for tables in each(partial(_render_one, work=work), tasks):
        yield from tables


def _render_one(task: dict[str, Any], work: Work) -> list[pa.Table]:
    return list(render_chunks(pa.Table.from_pylist([task], schema=TASK), work))


def _train_tower(made: TinyBaseConfig, out: Path, folder: Path) -> None:
    found = train_tower(_context(folder, data=out / "pictures"), made.tower)
    log.info("tower: %s", found)


def _start_stamps(made: StampsBaseConfig, out: Path, folder: Path) -> None:
    start_stamps(_context(folder, data=out / "pictures"), made.start)


def _train_base(config: EvidenceConfig, out: Path, folder: Path) -> None:
    """What `made.decoder` trains, tower frozen; a checkpoint of a killed training is gone on
    with."""
    made, workers = config.made, 0
    assert made is not None
    if isinstance(made, TinyBaseConfig):
        _once(
            out / "start", lambda at: start_decoder(_context(at, tower=out / "tower"), made.start)
        )
        workers = made.tower.workers
    context = FolderContext(out / "base-steps", data_workers=workers)
    train(made.decoder, Sources(base=out / "start", data=out / "prepared" / "train"), context)
    context.close()
    inputs = {"base": out / "start", "data": out / "prepared", "trained": context.checkpoints()[-1]}
    merge(_context(folder, template=config.prepare.template, **inputs), MergeConfig())
    (folder / "probe.safetensors").unlink()


def _context(out: Path, template: str = "", **inputs: Path) -> StageContext:
    """What a stage's body needs, around folders of this machine; nothing is tracked."""
    out.mkdir()
    return StageContext(
        name=out.stem,
        fingerprint="0" * 64,
        run=RunContext(root=str(out.parent), workflow="evidence"),
        inputs=Inputs({name: _input(place, template) for name, place in inputs.items()}),
        out=out,
        train_storage=(str(out.parent), "run"),
        track=Tracker(RunHandle("", None)),
        progress_handle=ProgressHandle(stage=out.stem),
    )


def _input(place: Path, template: str = "") -> Input:
    record = Record(
        stage=place.name,
        fingerprint="0" * 64,
        attempt="1",
        outputs={"template": template},
        uri=str(place.resolve()),
    )
    return Input(record)


def tasks(config: EvidenceConfig, out: Path, only: Sequence[str] | None) -> list[Task]:
    """Tier by tier, and within one seed by seed, so that what is cut short has fewer seeds of fewer
    arms; untrained peers last: they are asked more slowly than an arm is trained where they loop
    over pictures."""
    everything = {arm.name: arm for budget in config.budgets for arm in arms(config, budget)}
    everything |= {arm.name: arm for arm in controls(config)}
    if unknown := set(only or ()) - everything.keys():
        raise ValueError(
            f"there are no arms {', '.join(sorted(unknown))}; there are {', '.join(everything)}"
        )
    chosen = [arm for name, arm in everything.items() if only is None or name in only]
    untrained = [arm for arm in chosen if not arm.way]
    ordered: list[tuple[Arm, int | None]]
    ordered = [(arm, None) for arm in untrained if arm.method.method is None]
    ordered += [
        (arm, seed)
        for tier in sorted({arm.tier for arm in chosen})
        for seed in config.seeds
        for arm in chosen
        if arm.way and arm.tier == tier
    ]
    ordered += [(arm, None) for arm in untrained if arm.method.method is not None]
    return [Task(arm, seed, _file(config, out, arm, seed)) for arm, seed in ordered]


def _jobs(config: EvidenceConfig, out: Path, missing: Sequence[Task]) -> list[list[Task]]:
    """Tasks of one training together, so that no two processes train the same."""
    jobs: dict[Path, list[Task]] = {}
    for task in missing:
        own = task.file if task.seed is None else _trained(config, out, task)
        jobs.setdefault(own, []).append(task)
    return list(jobs.values())


def _trained(config: EvidenceConfig, out: Path, task: Task) -> Path:
    """Where the weights of a task's training are kept."""
    about: list[Any] = [config.data, config.prepare, config.base, config.made]
    return out / "trained" / digest(about + trainings(config, task.arm, task.seed or 0))[:12]


def _file(config: EvidenceConfig, out: Path, arm: Arm, seed: int | None) -> Path:
    """Where a result lies: its name holds a digest of what decides it."""
    about: list[Any] = [config.data, config.prepare, config.base, config.made, arm.method]
    about += [config.evaluate.max_new_tokens]
    about += [] if seed is None else trainings(config, arm, seed)
    about += [] if arm.split == "test" else [arm.split]
    ending = "" if seed is None else f"-s{seed}"
    return out / "arms" / f"{arm.name}{ending}-{digest(about)[:8]}.json"


def _run_all(
    config: EvidenceConfig, out: Path, tasks: Sequence[Task], processes: int, deadline: float
) -> int:
    """Run the tasks on one device; how many failed or were not begun."""
    global _WORLD
    torch.set_num_threads(1)  # a process that has begun threads can't be forked safely
    world = _load_world(config, out, tasks, processes)
    jobs = _jobs(config, out, tasks)
    log.info("batches are loaded")
    _WORLD = world
    failed = done = 0
    with ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("fork"), initializer=_set_up
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


def _load_world(config: EvidenceConfig, out: Path, tasks: Sequence[Task], processes: int) -> World:
    base, train_folder = out / "base", out / "prepared" / "train"
    stages = [
        stage
        for task in tasks
        if task.seed is not None and not _trained(config, out, task).exists()
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
    processor = _processor(config, base)
    asked = {
        split: load_asking(out / "prepared", split, processor, config.evaluate.batch_size, pictures)
        for split in {task.arm.split for task in tasks}
    }
    features = remember(_load(base, None), pictures) if _is_frozen(config, base) else {}
    return World(out, config, streams, asked, pictures, features)


def _stream_of(stage: TrainConfig) -> tuple[int, int]:
    """What its batches follow from: the seed, and where rows are sorted by length its steps."""
    return stage.seed, (stage.steps or 0) if stage.group_by_length else 0


def _is_frozen(config: EvidenceConfig, base: Path) -> bool:
    """Whether all arms have the base's own tower and projector, of a kind that can be remembered.

    On a device of its own a tower takes less time than looking its features up."""
    kind = json.loads((base / "config.json").read_text())["model_type"]
    return kind == "llava" and not config.train.tune and not torch.cuda.is_available()


def _packed(batch: StepBatch, pictures: dict[bytes, torch.Tensor]) -> StepBatch:
    return replace(batch, micro=[pack(one, pictures) for one in batch.micro])


def _processor(config: EvidenceConfig, base: Path) -> Any:
    """Asks as training asked."""
    processor = AutoProcessor.from_pretrained(base)
    processor.chat_template = find_template(config.prepare.template, processor).jinja()
    return processor


def _set_up() -> None:
    logging.getLogger("pipeline").setLevel(logging.WARNING)  # steps of single trainings
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


class SharedBatches(FolderContext):
    """Checkpoints in a folder, batches from the memory that all processes share."""

    def stream(self, load: Callable[[int], StepBatch], steps: range) -> Iterator[StepBatch]:
        assert _WORLD is not None and isinstance(load, StepLoader)
        world, batches = _WORLD, _WORLD.streams[_stream_of(load.config)]
        return (
            replace(
                batches[step],
                micro=[unpack(one, world.pictures) for one in batches[step].micro],
            )
            for step in steps
        )


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
    kept = _trained(world.config, world.out, task)
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
    model = _load(world.out / "base", None if trained is None else trained / "trained")
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


def _load(base: Path, trained: Path | None) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = adsc.from_pretrained(base)
    if trained is not None:
        model = merge_trained(model, trained)
    return model.to(device).eval()


class Replies(NamedTuple):
    """What an arm said, by question."""

    scores: list[float]
    """1 or 0: exact matches of greedy answers; of lists, the share of right entries."""
    answers: list[str]
    generated_tokens: list[int]
    """The end token included."""
    seconds: list[float]
    """Wall time of the batch that the question was in, divided by its questions."""


def _ask(world: World, split: str, model: Any) -> Replies:
    tokenizer = _processor(world.config, world.out / "base").tokenizer
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
            replies.scores[number] = score(answer, questions.asked[number])
            replies.answers[number] = answer.strip()
            replies.generated_tokens[number] = length
            replies.seconds[number] = seconds
    return replies


def _write_ladder(config: EvidenceConfig, out: Path) -> None:
    """The table of what has been run, on the questions that were asked (evidence_retention)."""
    model = _load(out / "base", None)
    found: list[Answered] = []
    for budget in config.budgets:
        for arm in arms(config, budget):
            scores, seconds = {}, 0.0
            for seed in config.seeds if arm.way else (None,):
                file = _file(config, out, arm, seed)
                if file.exists():
                    said = json.loads(file.read_text())
                    scores[seed], seconds = said["scores"], said["training_seconds"]
            if scores:
                found.append(
                    Answered(
                        name=arm.name.removesuffix(f"-{budget.name}"),
                        label=arm.label,
                        budget=budget.name,
                        runs_with=arm.method.runs_with,
                        tokens=_average(arm.method, model),
                        control=control_of(config, arm) if arm.way else CONTROL,
                        seconds=seconds,
                        scores=scores,
                    )
                )
    questions = questions_of(out / "prepared", config.questions)
    kinds = [one.kind for one in questions.asked]
    labels = {budget.name: budget.label for budget in config.budgets}
    write_retention(found, kinds, questions.scenes(), out, config.questions, labels)


def _average(method: MethodConfig, model: Any) -> float:
    tokens, layers = model.config.image_seq_length, len(model.model.language_model.layers)
    return float(build_method(method, model).average_tokens(tokens, layers))


def _write_results(config: EvidenceConfig, out: Path) -> None:
    """results.json, samples.parquet and report of each budget, and the summary: of what has been
    run."""
    measured = _measured(config, out)
    questions = Questions(out / "prepared" / "test")
    scenes = questions.scenes()
    guesses = majority_answers(PreparedData(out / "prepared" / "train"))
    folders: dict[str, Path] = {}
    for budget in config.budgets:
        said, commits = _replies(config, out, budget)
        asked = evaluated(config, budget)
        there = tuple(arm for arm in asked.arms if arm.name in said)
        if not any(arm.runs_with for arm in there):
            log.warning("%s is left out: none of its own arms has been run", budget.label)
            continue
        made = results(
            asked.model_copy(update={"arms": there}),
            questions.asked,
            scenes,
            {name: _scored(own) for name, own in said.items()},
            measured,
            workflow="evidence",
            commit=", ".join(sorted(commits)),
            config={"evidence": config.model_dump(mode="json")},
            majority=share_right(questions.asked, guesses) | {"source": "train"},
        )
        folder = folders[budget.name] = out / f"budget-{budget.name}"
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(made, indent=1))
        tables = [_samples(name, own, questions, scenes) for name, own in said.items()]
        pq.write_table(pa.concat_tables(tables), folder / "samples.parquet")
        page = out / f"report-{budget.name}"
        shutil.rmtree(page, ignore_errors=True)
        report(_context(page, evaluate=folder), ReportConfig())
    if folders:
        write_summary(folders, out)
    if config.control_splits:
        _write_controls(config, out, share_right(questions.asked, guesses))


def _replies(
    config: EvidenceConfig, out: Path, budget: BudgetConfig
) -> tuple[dict[str, Replies], set[str]]:
    """What every arm said that has been run, and by which commits it was asked."""
    said, commits = {}, set()
    for arm in arms(config, budget):
        for seed in config.seeds if arm.way else (None,):
            file = _file(config, out, arm, seed)
            if not file.exists():
                log.warning("%s is left out: it has not been run", file.stem)
                continue
            found = json.loads(file.read_text())
            name = arm.name if seed is None else f"{arm.name}-s{seed}"
            # Files of before 2026-11-23 have scores alone.
            said[name] = Replies(*(found.get(field, []) for field in Replies._fields))
            commits.add(str(found["commit"]))
    return said, commits


def _scored(said: Replies) -> Scored:
    scores = np.array(said.scores, dtype=float)
    return Scored(scores, sum(said.seconds) or None, sum(said.generated_tokens) or None)


def _samples(arm: str, said: Replies, questions: Questions, scenes: list[str]) -> pa.Table:
    """A row a question; null where a file of before holds no more than scores."""
    many, asked = len(scenes), questions.asked
    unknown = [None] * many
    return pa.table(
        {
            "arm": [arm] * many,
            "number": range(many),
            "record": scenes,  # whose digest stands for it: intervals go by pictures
            "kind": [one.kind for one in asked],
            "prompt": [one.text for one in asked],
            "expected": [one.expected for one in asked],
            "answer": pa.array(said.answers or unknown, pa.string()),
            "score": pa.array(said.scores, pa.float64()),
            "generated_tokens": pa.array(said.generated_tokens or unknown, pa.int32()),
            "seconds": pa.array(said.seconds or unknown, pa.float64()),
        }
    )


def _write_controls(config: EvidenceConfig, out: Path, majority: dict[str, Any]) -> None:
    """controls.json: accuracy of the dense base, of the same without what it needs, and of the most
    frequent answer, in all and by kind."""
    found = {"majority": majority}
    for arm in [*arms(config, config.budgets[0]), *controls(config)]:
        file = _file(config, out, arm, None)
        if arm.method == MethodConfig() and not arm.way and file.exists():
            scores = np.array(json.loads(file.read_text())["scores"], dtype=float)
            kinds = np.array([one.kind for one in Questions(out / "prepared" / arm.split).asked])
            found[arm.name] = {
                "accuracy": float(scores.mean()),
                "by_kind": {str(k): float(scores[kinds == k].mean()) for k in np.unique(kinds)},
            }
    (out / "controls.json").write_text(json.dumps(found, indent=1))


def _measured(config: EvidenceConfig, out: Path) -> dict[str, Any]:
    """Times and costs of every method of every budget, on the base, by this process alone."""
    _set_up()
    base = out / "base"
    model, processor = _load(base, None), _processor(config, base)
    questions = Questions(out / "prepared" / "test")
    chosen = questions.load(questions.first(config.evaluate.prefill_batch))
    inputs = to_device(build_inputs(chosen, processor), model)
    methods: dict[str, MethodConfig] = {
        arm.method.runs_with: arm.method
        for budget in config.budgets
        for arm in arms(config, budget)
    }
    measured = measure_and_count(
        model,
        inputs,
        [build_method(method, model) for method in methods.values()],
        rounds=config.evaluate.prefill_rounds,
        decode_rounds=config.evaluate.decode_rounds,
        decode_tokens=config.evaluate.decode_tokens,
    )
    return measured | {"methods": dict(zip(methods, measured["methods"], strict=True))}
