"""Fingerprints of the stages that ship, frozen: what users have finished stays finished.

After a version was raised on purpose, or a stage was added:

    python -m tests.workflows.test_fingerprints > tests/workflows/fingerprints.json
"""

import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.durable.graph import fingerprints
from pipeline.durable.identity import load_body
from pipeline.durable.stage import Kind, Stage
from pipeline.durable.workflow import Workflow
from pipeline.evaluation.benchmarks import BenchmarksConfig
from tests.pipeline.evaluation.benchmark_files import WRITERS
from workflows.demo.workflow import demo_paper as demo
from workflows.evaluation import evaluation_stages
from workflows.evidence.workflow import evidence
from workflows.registry import WORKFLOWS, load_workflow

FROZEN = Path(__file__).with_name("fingerprints.json")
CHECKPOINT = "package://workflows/assets/tiny_base"
SEARCH = {"plan": "search", "search.average": 22}


def variants() -> Iterator[tuple[str, Workflow]]:
    """Every workflow that ships, and one edit for each part of its stages that can be left out."""
    for name in WORKFLOWS:
        # A relative folder is one of the directory that the command was started in.
        changes = ["data.folder=/data/llava"] if name.startswith("llava") else []
        yield name, load_workflow(name, changes)
    yield "demo, its former rate", load_workflow("demo", ["train.learning_rate=2e-3"])
    for fidelity in ("untrained", "lora", "curriculum"):
        yield f"demo, search, {fidelity}", demo().edit({**SEARCH, "search.fidelity": fidelity})
    yield "demo, one training", demo().edit({"curriculum.order": "fixed", "curriculum.stages": 1})
    yield (
        "demo, search, one training",
        demo().edit({**SEARCH, "curriculum.order": "fixed", "curriculum.stages": 1}),
    )
    small = {"seeds": (0,), "variants": ("adsc",), "anchors": (), "trained_peers": ("fastv",)}
    yield "evidence, small", evidence().edit(small)


def evaluations(folder: Path) -> Iterator[tuple[str, list[Stage]]]:
    """`adsc eval`, whose stages know files by place and content: those are filled in."""
    task = folder / "tasks" / "test.json"
    task.parent.mkdir()
    task.write_text("[]")
    methods = ["dense", "plan:2:1/4,4:1/4", "fastv:22"]
    stages = evaluation_stages(CHECKPOINT, methods, tasks=[str(task)])
    yield "eval, task files", [_placed(stage, folder) for stage in stages]
    WRITERS["pope"](folder / "pope")
    stages = evaluation_stages(CHECKPOINT, methods, tasks=[f"pope={folder / 'pope'}"])
    yield "eval, benchmarks", [_placed(stage, folder) for stage in stages]


def _placed(stage: Stage, folder: Path) -> Stage:
    if stage.pinned is not None:
        return dataclasses.replace(stage, pinned="/data", digest="0" * 64)
    text = stage.config.model_dump_json().replace(str(folder.resolve()), "/data")
    config = type(stage.config).model_validate_json(text)
    if isinstance(config, BenchmarksConfig):
        config = config.model_copy(update={"digests": dict.fromkeys(config.digests, "0" * 64)})
    return dataclasses.replace(stage, config=config)


def current(folder: Path) -> dict[str, dict[str, str]]:
    """Of this code, in the form of the file: the first 64 bits of each."""
    found = {name: workflow.stages() for name, workflow in variants()}
    found |= dict(evaluations(folder))
    return {
        name: {stage: one[:16] for stage, one in fingerprints(stages).items()}
        for name, stages in found.items()
    }


def test_no_finished_stage_is_made_again(tmp_path: Path) -> None:
    frozen, found = json.loads(FROZEN.read_text()), current(tmp_path)
    changed = {
        name: sorted(stage for stage in stages if found[name].get(stage) != stages[stage])
        for name, stages in frozen.items()
        if found[name] != stages
    }
    assert not changed, (
        "these stages would run again in every store: mark new config fields ADDED, or raise a "
        "version on purpose (see this file's first lines)"
    )
    assert found.keys() == frozen.keys()


def test_every_kind_that_ships_has_an_id_of_its_own() -> None:
    root = Path(__file__).parents[2]
    kinds: dict[str, list[Kind[Any]]] = {}
    for path in (
        path for name in ("pipeline", "workflows") for path in (root / name).rglob("*.py")
    ):
        if "Kind(" in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
            for kind in (it for it in vars(module).values() if isinstance(it, Kind)):
                if kind not in kinds.setdefault(kind.id, []):
                    kinds[kind.id].append(kind)
    assert {"pipeline.stages.merge.merge", "workflows.fashion.compose_fashion"} < kinds.keys()
    assert not {id: same for id, same in kinds.items() if len(same) > 1}
    for (kind,) in kinds.values():
        assert callable(load_body(kind.body)) and callable(load_body(kind.complete or kind.body))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        json.dump(current(Path(scratch)), sys.stdout, indent=1)
