"""Stages that evaluate a checkpoint on local questions: those of a compression, without training.

Checkpoint and prepared data are used in place and identified by digests; task files (conversations
in LLaVA's JSON) are prepared first. workflows/commands/eval.py is the command line.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

import adsc
from adsc.method import Method
from adsc.named import DENSE, names_in, plan_named
from adsc.serving.settings import FIELD, served_plan
from adsc.weight_files import original_layout, original_name
from pipeline.data.config import PrepareConfig
from pipeline.data.mixture import Source
from pipeline.data.prepared import FLAT
from pipeline.durable.stage import Stage, adopted
from pipeline.evaluation.benchmarks import (
    BENCHMARKS,
    CONVERT,
    BenchmarksConfig,
    find_files,
    root_of,
)
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.evaluation.methods import OWN, PLAN, MethodConfig, build_method, parse_method
from pipeline.kinds.base import BASE, BaseConfig, pin_digest
from pipeline.kinds.evaluate import EVALUATE
from pipeline.kinds.prepare import PREPARE
from pipeline.kinds.report import REPORT, ReportConfig
from pipeline.packaged import resolve
from pipeline.store import open_store

CONTEXT = 1_000_000  # tokens: no question is quarantined for its length
TOWERS = {"efficientnet_lite0": "workflows.stamps_tower.register"}
"""Vision towers missing from transformers -> the function that registers them in a process."""


class TaskConfig(PrepareConfig):
    """Preparation of task files. Questions may repeat: benchmark files share some, and nothing is
    trained on them."""

    unique: ClassVar[bool] = False
    bounded: ClassVar[str] = "fix the task files: every question counts"


def evaluation_stages(
    checkpoint: str,
    methods: Sequence[str] | None,
    *,
    tasks: Sequence[str] = (),
    data: str | None = None,
    limit: int | None = None,
    **settings: Any,
) -> list[Stage]:
    """The stages base, (files,) prepare, evaluate and report.

    Args:
        checkpoint: a folder, s3://, package://NAME/FOLDER or a hub id.
        methods: as parse_method reads them; `own` is the plan in the checkpoint's config, `own:64`
            its plan of that name. None evaluates an elastic checkpoint with every plan and dense,
            others with their own plan.
        tasks: JSON files of one folder, or benchmarks as NAME=FOLDER; with `data`, the names of
            its splits (`test` if none).
        data: the folder of a finished prepare stage.
        limit: most records of each task, sampled with a fixed seed. A record of a benchmark is a
            picture with its questions, or a question in all orders of its options.
        settings: further fields of EvaluateConfig.

    Raises:
        ValueError: something doesn't exist, or is ambiguous.
    """
    source = _checkpoint(checkpoint)
    if other := original_name(checkpoint) or original_layout(_read_config(checkpoint) or {}):
        raise ValueError(f"can't evaluate {checkpoint}: {other}")
    sources, splits, benchmarks = _data(data, tasks, limit)
    arms = _arms(methods, checkpoint)
    if settings.get("engine") == "vllm":
        _check_served(arms, _read_config(checkpoint))
    config = EvaluateConfig(
        title=f"Evaluation of {_short(checkpoint)}",
        task=", ".join(splits),
        arms=tuple(arms),
        control=next((arm.name for arm in arms if not arm.runs_with), arms[0].name),
        splits=tuple(splits),
        benchmarks=tuple(benchmarks),
        **settings,
    )
    return [
        source,
        *sources,
        EVALUATE.stage(
            name="evaluate",
            title="evaluate: every method, same questions",
            config=config,
            needs={"base": "base", "data": "prepare"},
        ),
        REPORT.stage(
            name="report",
            title="report: page and figure",
            config=ReportConfig(),
            needs={"evaluate": "evaluate"},
        ),
    ]


def setup_for(checkpoint: str) -> str | None:
    """The function that Ray's processes call first (`Workflow.setup`); None if transformers knows
    the checkpoint's vision tower."""
    vision = (_read_config(checkpoint) or {}).get("vision_config") or {}
    return TOWERS.get(vision.get("model_type", ""))


def content_digest(place: str) -> str | None:
    """A digest of the content of a folder or an S3 prefix; None if it is empty.

    Of its manifest if it has one (exported checkpoints, prepared data), else of names, sizes and
    modification times (on S3, ETags): hashing a large model takes minutes.
    """
    store = open_store(place)
    if (manifest := store.read("manifest.json")) is not None:
        return hashlib.sha256(manifest).hexdigest()
    lines = [f"{entry.key} {entry.size} {entry.version}" for entry in store.list("")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None


def _checkpoint(source: str) -> Stage:
    if source.startswith("package://") or _is_hub_id(source):
        config = pin_digest(BaseConfig(source=source))
        if _is_hub_id(source) and (cached := _hub_config(source)) is not None:
            config = config.model_copy(update={"revision": extract_commit_hash(str(cached), None)})
        return BASE.stage(
            name="base",
            title="base: the checkpoint",
            config=config,
        )
    if open_store(source).read("config.json") is None:
        raise ValueError(
            f"there is no checkpoint at {source!r}: it has no config.json; "
            "`adsc show demo export --path` prints the path of the demo's"
        )
    return adopted(
        name="base",
        title="base: the checkpoint",
        place=source,
        digest=str(content_digest(source)),
    )


def _data(
    prepared: str | None, tasks: Sequence[str], limit: int | None
) -> tuple[list[Stage], list[str], list[str]]:
    """The stages that prepare the questions, the splits to evaluate, and the benchmarks' names."""
    if prepared is not None:
        if limit is not None:
            raise ValueError("--limit is for task files: leave it out with prepared data")
        # `adsc show` prints the folder of an attempt; the stage's folder above it has the record.
        home = re.sub(r"/attempts/[^/]+/?$", "", prepared)
        place = home if open_store(home).read("record.json") is not None else prepared
        digest = content_digest(prepared)
        if digest is None:
            raise ValueError(f"there is no prepared data at {prepared!r}")
        prepare = adopted(
            name="prepare",
            title="prepare: existing data",
            place=place,
            digest=digest,
        )
        return [prepare], _splits(prepared, tasks), []
    named = [task.partition("=") for task in tasks if not Path(task).is_file()]
    if not tasks:
        raise ValueError(
            "no questions: give --tasks with JSON files of conversations or benchmarks "
            "(pope=FOLDER), or --data with prepared data"
        )
    if missing := [name for name, sign, _ in named if not sign]:
        raise ValueError(f"there are no task files {', '.join(missing)}")
    if named and len(named) < len(tasks):
        raise ValueError("--tasks has both benchmarks and task files: evaluate them separately")
    if named:
        files, sources = _benchmarks([(name, Path(place)) for name, _, place in named], limit)
    else:
        files, sources = _files([Path(task) for task in tasks], limit)
    config = TaskConfig(
        splits={name: {name: source} for name, source in sources.items()},
        template="auto",
        context=CONTEXT,
        max_quarantined=0,
    )
    stage = PREPARE.stage(
        name="prepare",
        title="prepare: task files to questions",
        config=config,
        needs={"data": "files", "base": "base"},
    )
    return [files, stage], list(sources), list(sources) if named else []


def _splits(prepared: str, wanted: Sequence[str]) -> list[str]:
    """The splits of prepared data to evaluate: those wanted, `test`, or the only one.

    Raises:
        ValueError: a split isn't there.
    """
    shards = [
        entry.key for entry in open_store(prepared).list("") if entry.key.endswith(".parquet")
    ]
    present = sorted({key.rpartition("/")[0].rpartition("/")[2] or FLAT for key in shards})
    if not present:
        raise ValueError(f"{prepared} holds no prepared data: there is no Parquet shard in it")
    splits = list(wanted) or (["test"] if "test" in present else present)
    if missing := [split for split in splits if split not in present]:
        raise ValueError(
            f"{prepared} holds no {', '.join(missing)}, only {', '.join(present)}: name one with "
            "--tasks, or leave --tasks out"
        )
    if len(splits) > 1 and not wanted:
        raise ValueError(f"{prepared} holds {', '.join(present)}: name one with --tasks")
    return splits


def _files(files: Sequence[Path], limit: int | None) -> tuple[Stage, dict[str, Source]]:
    """Task files of one folder, by their stems."""
    folders = {file.resolve().parent for file in files}
    sources = {file.stem: Source(data=file.name, cap=limit) for file in files}
    if len(folders) > 1 or len(sources) < len(files):
        raise ValueError(
            f"task files {', '.join(map(str, files))}: put them into one folder, under different "
            "names; their pictures lie in `images` there"
        )
    (folder,) = folders
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    lines.append(str(content_digest(str(folder / PrepareConfig().images))))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    stage = adopted(name="files", title="files: the tasks", place=str(folder), digest=digest)
    return stage, sources


def _benchmarks(
    named: Sequence[tuple[str, Path]], limit: int | None
) -> tuple[Stage, dict[str, Source]]:
    """Public benchmarks by name, from their official files."""
    folders = {name: folder.expanduser().resolve() for name, folder in named}
    if len(folders) < len(named):
        raise ValueError(f"{', '.join(name for name, _ in named)}: name each benchmark once")
    if unknown := [name for name in folders if name not in BENCHMARKS]:
        raise ValueError(
            f"no benchmarks {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}, each as "
            "NAME=FOLDER with its files"
        )
    for name, folder in folders.items():
        find_files(name, folder)
    digests = {name: str(content_digest(str(folder))) for name, folder in folders.items()}
    stage = CONVERT.stage(
        name="files",
        title="files: benchmarks to questions",
        config=BenchmarksConfig(
            folders={name: str(folder) for name, folder in folders.items()}, digests=digests
        ),
    )
    sources = {
        name: Source(data=f"{name}.jsonl", images=str(root_of(name, folder, Path())), cap=limit)
        for name, folder in folders.items()
    }
    return stage, sources


def _arms(methods: Sequence[str] | None, checkpoint: str) -> list[ArmConfig]:
    """One arm per method, each checked as far as this machine can read the checkpoint."""
    config = _read_config(checkpoint)
    named = names_in(config or {})
    if methods is None:
        methods = [DENSE, *(f"{OWN}:{name}" for name in named)] if named else [OWN]
    arms: dict[str, ArmConfig] = {}
    for text in methods:
        arm = _own_arm(text, checkpoint, config) or _arm(text, text)
        arms[arm.name] = arm
    if config is not None:
        _check_fit(arms.values(), config)
    return _curve(list(arms.values()), _short(checkpoint))


def _curve(arms: list[ArmConfig], name: str) -> list[ArmConfig]:
    """Mark named plans as budgets of one checkpoint; if there are any, dense is one more."""
    if not any(arm.budget for arm in arms):
        return arms
    return [
        arm.model_copy(update={"budget": arm.budget or DENSE, "curve": name})
        if arm.budget or not arm.runs_with
        else arm
        for arm in arms
    ]


def _arm(text: str, written: str, budget: str = "") -> ArmConfig:
    """The arm of a method, named by `text`."""
    method = parse_method(written)
    if method.method is not None:
        adsc.peers.check_name(method.method.name)
    return ArmConfig(
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", text),
        label=text.removeprefix(PLAN),
        checkpoint="base",
        plan=method.plan,
        method=method.method,
        budget=budget,
    )


def _own_arm(text: str, checkpoint: str, config: dict[str, Any] | None) -> ArmConfig | None:
    """The arm of `own` or `own:NAME`; None for any other method."""
    word, colon, name = text.strip().partition(":")
    if word != OWN:
        return None
    if not colon:
        written = _own_method(checkpoint, config)
        return _arm(written, written)
    if config is None:
        raise ValueError(_unreadable(checkpoint))
    plan = plan_named(name, config)
    if isinstance(plan, Method):
        raise ValueError(_peer(checkpoint, plan.name, text))
    return _arm(text.strip(), f"{PLAN}{plan}", budget=name)


def _check_fit(methods: Iterable[MethodConfig], config: dict[str, Any]) -> None:
    """Attach every method to the model without weights, before any stage runs.

    Raises:
        ValueError: one doesn't fit: a layer the model doesn't have, a budget out of reach.
    """
    try:
        known = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(known, trust_remote_code=False)
    except (ValueError, KeyError, TypeError):
        return  # workers may load code that knows this kind of model
    try:
        for method in methods:
            adsc.attach(model, build_method(method, model))
    except adsc.UnsupportedModel as error:
        raise ValueError(str(error)) from error


def _check_served(arms: Iterable[ArmConfig], config: dict[str, Any] | None) -> None:
    """Raise ValueError for a plan that vLLM can't serve with this checkpoint."""
    if config is None:
        return
    known = AutoConfig.for_model(**config)
    for arm in arms:
        setattr(known, FIELD, str(arm.plan) or DENSE)
        served_plan(known)


def _read_config(checkpoint: str) -> dict[str, Any] | None:
    """The checkpoint's config.json; None if it can't be read from here."""
    if _is_hub_id(checkpoint):
        cached = _hub_config(checkpoint)
        data = None if cached is None else cached.read_bytes()
    elif checkpoint.startswith("package://"):
        data = (resolve(checkpoint) / "config.json").read_bytes()
    else:
        data = open_store(checkpoint).read("config.json")
    return None if data is None else dict(json.loads(data))


def _hub_config(checkpoint: str) -> Path | None:
    """The config.json of a hub id, in the snapshot of its commit; None where it can't be read."""
    try:
        return Path(str(cached_file(checkpoint, "config.json")))
    except (OSError, ValueError):  # offline, or the hub has no such model
        return None


def _is_hub_id(checkpoint: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint)) and not Path(checkpoint).exists()


def _own_method(checkpoint: str, config: dict[str, Any] | None) -> str:
    """The plan in a checkpoint's config, as the text of a method."""
    if config is None:
        raise ValueError(_unreadable(checkpoint))
    plan = config.get("adsc")
    if plan is not None and "method" in plan:
        raise ValueError(_peer(checkpoint, plan["method"], OWN))
    text = "" if plan is None else str(adsc.PruningPlan.from_dict(plan))
    return f"{PLAN}{text}" if text else DENSE


def _unreadable(checkpoint: str) -> str:
    return (
        f"the config of {checkpoint!r} can't be read from here, so its own plan is unknown: "
        "name the methods, such as --methods dense plan:2:1/4"
    )


def _peer(checkpoint: str, peer: str, text: str) -> str:
    return (
        f"{checkpoint} runs with the peer {peer!r}: name it with its layer "
        f"average instead of `{text}`, such as {peer}:22"
    )


def _short(checkpoint: str) -> str:
    """The last part of a checkpoint's address."""
    return checkpoint.rstrip("/").rpartition("/")[2]
