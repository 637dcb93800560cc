"""The benchmarks run at a tiny size and write what they print; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import agreement, decode, gpu, prefill, train
from benchmarks.measure import Case, speedup, take_turns
from benchmarks.models import build, llava_config, plans, prompts, twin, vision_tokens

CPU = torch.device("cpu")
TINY = ["--geometry", "tiny", "--device", "cpu", "--text", "20"]
MACHINE = ("device", "torch", "transformers", "commit", "date")
# Parts that take seconds; `--all` on a CPU runs the others as well.
QUICK = (
    "ceilings",
    "families",
    "static-caches",
    "prefill-8",
    "decode-1",
    "graphs-1",
    "train-4",
    "train-filled",
    "step-waits",
)


def test_each_benchmark_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        prefill: ["--rounds", "2"],
        decode: ["--rounds", "1", "--batches", "1", "2", "--steps", "2"],
        train: ["--part", "steps", "--rounds", "1", "--rank", "2"],
    }
    for benchmark, more in options.items():
        name = benchmark.__name__.removeprefix("benchmarks.")
        path = tmp_path / "new" / f"{name}.json"
        benchmark.main([*TINY, *more, "--json", str(path)])
        printed = capsys.readouterr().out
        document = json.loads(path.read_text())
        assert document["benchmark"] == name
        assert document["machine"]["torch"] == torch.__version__
        rows = [row for row in document["rows"] if "case" in row]
        for row in rows:
            assert row["low"] <= row["speed-up"] <= row["high"]
            assert row["case"] in printed
        dense, *others = rows
        assert dense["speed-up"] == 1
        if name == "train":
            assert all(row["saved MB"] < dense["saved MB"] for row in others)
            assert document["rows"][-1]["note"] == "not measured: no GPU here"


@pytest.mark.slow  # starts Ray Train twice
def test_launchers_take_turns_with_the_bare_loop(
    ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.json"
    train.main([*TINY, "--part", "launchers", "--rounds", "1", "--turn", "4", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["launcher"] for row in rows] == list(train.ARMS)
    assert rows[0]["ratio"] == rows[0]["cpu"] == 1
    assert all(0 <= row["wait"] < 1 for row in rows)


def test_kv_bytes_are_those_of_the_plan() -> None:
    config = llava_config("tiny")
    model = build(config, CPU, torch.float32)
    inputs = prompts(config, 2, 20, CPU, torch.float32)
    tokens = 2 * 64 * 4  # keys and values of a token in a layer, float32
    for plan in plans(config).values():
        layers = plan.tokens_per_layer(vision_tokens(config), config.text_config.num_hidden_layers)
        for static, room in ((False, 0), (True, 3)):
            decoding = decode.Decoding(twin(model, plan), inputs, 3, static=static)
            assert decoding.kv_bytes == 2 * tokens * sum(n + 20 + room for n in layers)
            first = decoding.decode()
            decoding.set_back()
            again = decoding.decode()
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_budgets_at_the_true_geometry() -> None:
    found = plans(llava_config("llava-1.5-7b"))
    averages = [plan.average_tokens(576, 32) for plan in found.values()]
    assert averages == pytest.approx([192, 128, 64], rel=0.01)
    assert all(plan.stages[0][0] > 0 for plan in found.values())


def test_turns_alternate_and_ratios_are_of_one_round() -> None:
    calls: list[str] = []
    cases = [Case(name=name, call=lambda name=name: calls.append(name)) for name in ("a", "b")]
    times = take_turns(cases, 2, CPU, warm=False)
    assert "".join(calls) == "baabba"
    assert [len(one) for one in times.values()] == [2, 2]
    ratios = speedup({"dense": [2.0, 8.0, 3.0], "plan": [1.0, 2.0, 1.0]}, "plan")
    assert ratios == {"speed-up": 3.0, "low": 2.0, "high": 4.0}


def test_a_check_that_fails_is_a_row_of_its_own() -> None:
    def broken() -> float:
        raise RuntimeError("no kernel")

    rows = [
        agreement.check("a", "b", 1.0, broken),
        agreement.check("a", "b", 1.0, lambda: float("nan")),
        agreement.check("a", "b", 1.0, lambda: 0.5),
        agreement.skipped("a", "b", "no such device"),
    ]
    assert agreement.failed(rows) == rows[:2]
    assert "RuntimeError: no kernel" in rows[0]["result"]


def test_parts_of_the_gpu_script_run_on_a_cpu(tmp_path: Path) -> None:
    for name in QUICK:
        options = gpu.parse(["--part", name, "--out", str(tmp_path), *TINY])
        assert gpu.run_part(name, options)
        document = json.loads((tmp_path / f"{name}.json").read_text())
        assert document["benchmark"] == name
        assert document["rows"]
        assert f"### {name}" in gpu.summary(document)


def test_all_skips_what_is_there_and_tells_what_is_not_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: ran.append(command[4]))
    document = {"benchmark": "static-caches", "machine": dict.fromkeys(MACHINE), "settings": {}}
    row = agreement.check("a cache", "a case", 0.0, lambda: 1.0)
    (tmp_path / "static-caches.json").write_text(json.dumps(document | {"rows": [row]}))
    assert not gpu.run_all(gpu.parse(["--all", "--out", str(tmp_path), *TINY]))
    assert set(ran) == gpu.PARTS.keys() - {"static-caches"}
    printed = capsys.readouterr().out
    assert "static-caches: is there" in printed
    assert "| a cache | a case | 1.000 | 0.000     | FAILED |" in printed
    assert "static-caches" in printed.splitlines()[-1]
