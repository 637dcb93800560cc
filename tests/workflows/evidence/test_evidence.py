"""The evidence: its arms reach their budgets, one machine runs it and goes on, Ray runs it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import ConfigError, edit
from pipeline.durable import graph
from pipeline.evaluation.methods import PeerConfig, build_method
from pipeline.evaluation.scoring import exact_match
from pipeline.reporting.results import Results
from tests.small import Small
from tests.workflows.evidence.evidence_model import SHARES, demo_model
from workflows.demo.tiny_llava import TinyLlavaConfig, build_model, build_processor
from workflows.evidence import __main__ as command
from workflows.evidence import local
from workflows.evidence import workflow as evidence
from workflows.evidence.config import (
    TRAINED_PEERS,
    BudgetConfig,
    EvidenceConfig,
    arms,
    trainings,
)
from workflows.evidence.world import claim


def large_model() -> torch.nn.Module:
    made = evidence.evidence_576_config().made
    assert made is not None
    sizes: TinyLlavaConfig = made.tower.model
    return build_model(build_processor(["a"], sizes), sizes, seed=0)


@pytest.mark.parametrize(
    ("scale", "tokens", "layers", "tolerance"), [("demo", 64, 8, 0.021), ("576", 576, 12, 0.01)]
)
def test_every_arm_meets_its_budget(scale: str, tokens: int, layers: int, tolerance: float) -> None:
    config = command.scales()[scale]()
    model = demo_model() if scale == "demo" else large_model()
    for budget in config.budgets:
        target = tokens * SHARES[budget.name]
        for arm in arms(config, budget):
            if arm.method.runs_with:
                average = build_method(arm.method, model).average_tokens(tokens, layers)
                assert average == pytest.approx(target, rel=tolerance), arm.name


def test_all_arms_are_trained_by_one_recipe() -> None:
    config = evidence.evidence_config()
    recipes = set()
    for budget in config.budgets:
        for arm in arms(config, budget):
            if arm.trained_with:
                stages = trainings(config, arm, seed=2)
                assert (stages[-1].plan, stages[-1].method) == (arm.method.plan, arm.method.method)
                recipes.add(tuple(s.model_dump_json(exclude={"plan", "method"}) for s in stages))
    assert len(recipes) == 1


def test_the_stages_of_ray_fit_together() -> None:
    stages = evidence.evidence().stages()
    graph.topological_order(stages)
    trained = 1 + sum(
        7 + len([p for p in b.peers if p.name in TRAINED_PEERS])
        for b in evidence.evidence_config().budgets
    )
    assert sum(stage.name.startswith("train-") for stage in stages) == 3 * 3 * trained
    with pytest.raises(ConfigError, match=r"python -m workflows\.evidence"):
        evidence.build(evidence.evidence_576_config())


def small_config(small: Small) -> EvidenceConfig:
    """A budget with two arms of two trainings each, on the model of `small`."""
    budget = BudgetConfig(
        name="b",
        label="less",
        plan="1:1/4,2:1/2",
        peers=(PeerConfig(name="fastv", average=28, options={"layer": 1}),),
    )
    config = evidence.evidence_config().model_copy(update={"budgets": (budget,)})
    return edit(
        config,
        {
            "base.source": str(small.base),
            "data.train_pictures": 24,
            "data.test_pictures": 3,
            "variants": ["adsc", "adsc_reverse"],
            "stages": 2,
            "seeds": [0, 1],
            "train.steps": 2,
            "train.batch_size": 4,
            "evaluate.prefill_batch": 2,
            "evaluate.prefill_rounds": 1,
            "evaluate.decode_rounds": 1,
            "evaluate.decode_tokens": 2,
        },
    )


def test_what_can_not_be_run_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command.main(["--out", str(out), "--arms", "dense", "nothing"]) == 2
    assert "there are no arms nothing; there are dense" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_of_other_data_is_refused(tmp_path: Path) -> None:
    config = evidence.evidence_config()
    claim(config, tmp_path)
    claim(edit(config, {"train.steps": 7, "seeds": [5]}), tmp_path)
    with pytest.raises(ValueError, match=r"data\.seed is 0 there, 3 here; take another --out"):
        claim(edit(config, {"data.seed": 3}), tmp_path)


@pytest.mark.slow
def test_one_machine_runs_what_is_missing(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(small)

    def run() -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert local.run(config, tmp_path, processes=1) == 0
        return caplog.text

    assert local.run(config, tmp_path, processes=1, stop_after=0) == 1
    assert not (tmp_path / "evidence.md").exists(), "there is nothing to tell yet"
    assert "14 of 14 arms are to be run" in run()
    files = {file: file.read_text() for file in (tmp_path / "arms").iterdir()}
    assert len(files) == 14  # dense, 4 anchors and fastv untrained; 4 trained with 2 seeds each
    found = Results.read(tmp_path / "budget-b" / "results.json")
    assert [len(arm.seeds) for arm in found.arms] == [0, 2, 0, 0, 0, 0, 0, 2, 2, 2]
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    compared = {
        (row["one"], row["other"]): row
        for row in json.loads((tmp_path / "evidence.json").read_text())
    }
    row = compared["adsc_first-untrained", "adsc-untrained"]
    accuracy = {arm.name: arm.accuracy.mean for arm in found.arms}
    expected = accuracy["adsc_first-untrained-b"] - accuracy["adsc-untrained-b"]
    assert row["difference"]["mean"] == pytest.approx(expected) and row["seeds"] == 0
    row = compared["adsc_reverse", "adsc"]
    assert row["seeds"] == 2
    seeds = {arm.name: [seed.accuracy for seed in arm.seeds] for arm in found.arms}
    pairs = zip(seeds["adsc_reverse-b"], seeds["adsc-b"], strict=True)
    assert row["difference"]["mean"] == pytest.approx(sum(a - b for a, b in pairs) / 2)
    samples = pq.read_table(tmp_path / "budget-b" / "samples.parquet").to_pylist()
    assert len(samples) == 14 * found.num_questions
    assert all(row["score"] == exact_match(row["answer"], row["expected"]) for row in samples)
    assert all(row["prompt"] and row["seconds"] > 0 for row in samples)
    assert all(1 <= row["generated_tokens"] <= config.evaluate.max_new_tokens for row in samples)
    assert "ADSC, reverse" in (tmp_path / "report-b" / "report.html").read_text()
    text = (tmp_path / "evidence.md").read_text()
    assert "| ADSC, reverse, untrained" not in text and "| fastv, trained |" in text

    lost = next(file for file in files if file.name.startswith("fastv-b-s1"))
    lost.unlink()
    assert "1 of 14 arms are to be run" in run()
    again = json.loads(lost.read_text())
    before = json.loads(files[lost])
    assert (again["scores"], again["losses"]) == (before["scores"], before["losses"])
    assert all(file.read_text() == text for file, text in files.items() if file != lost)


BUSY = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from workflows.evidence.world import SPAWN, start_process

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=SPAWN, initializer=start_process) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_a_killed_command_leaves_no_process_that_trains_on(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        worker = psutil.Process(int(command.stdout.readline()))
        command.kill()
    _, alive = psutil.wait_procs([worker], timeout=120)
    assert not alive


@pytest.mark.slow
@pytest.mark.usefixtures("ray_address")
def test_ray_runs_a_small_evidence(small: Small, tmp_path: Path) -> None:
    budget = (
        "[{name: b, label: less, plan: '1:1/4,2:1/2', "
        "peers: [{name: fastv, average: 28, options: {layer: 1}}]}]"
    )
    changes = {
        "base.source": small.base,
        "budgets": budget,
        "variants": "[adsc]",
        "seeds": "[0]",
        "stages": 1,
        "data.train_pictures": 24,
        "data.test_pictures": 3,
        "train.steps": 2,
        "train.batch_size": 4,
        "evaluate.prefill_rounds": 1,
        "evaluate.decode_rounds": 1,
    }
    words = ["run", "evidence", "--root", str(tmp_path)]
    words += [f"--set={key}={value}" for key, value in changes.items()]
    done = subprocess.run(
        [sys.executable, "-m", "workflows.commands.main", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("summary-*/attempts/*/evidence.md")
    assert "fastv, trained" in table.read_text()
