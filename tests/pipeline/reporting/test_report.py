"""The report from a made-up results.json: what it says, that it needs nothing else, that it
shows."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from adsc import PruningPlan
from pipeline.kinds.report import ReportConfig
from pipeline.reporting.results import Results, ResultsError
from pipeline.stages.report import finding, remarks, render, report
from pipeline.tracking import tracker as tracking
from tests.pipeline.contexts import stage_context

KINDS = {"what": 0.11, "where": 0.12, "count": 0.38, "any": 0.62}
BROWSER = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PLAN = "2:1/2,4:1/2,6:1/4"


def interval(mean: float, half: float, count: int = 1600) -> dict[str, float]:
    return {"mean": mean, "low": max(0, mean - half), "high": min(1, mean + half), "n": count}


def arm(name: str, label: str, plan: str, trained: bool, mean: float) -> dict[str, Any]:
    parsed, share = PruningPlan.parse(plan), 1 - 0.6 * PruningPlan.parse(plan).reduction(64, 8)
    return {
        "name": name,
        "label": label,
        "checkpoint": "base",
        "plan": plan,
        "trained": trained,
        "accuracy": interval(mean, 0.013),
        "by_kind": {
            kind: interval(min(1, mean + shift), 0.026, 400)
            for kind, shift in zip(KINDS, (0.04, -0.02, -0.05, 0.05), strict=True)
        },
        "difference": None,
        "retention": mean / 0.931,
        "average_vision_tokens": parsed.average_tokens(64, 8),
        "reduction": parsed.reduction(64, 8),
        "tokens_per_layer": parsed.tokens_per_layer(64, 8),
        "flops": int(41.7e6 * share),
        "flops_reduction": 1 - share,
        "kv_cache_bytes": int(712_704 * share),
        "kv_reduction": 1 - share,
        "prefill_ms": {"median": 120 * share, "low": 117 * share, "high": 129 * share},
        "prefill_speedup": 1 / share,
        "decode_tokens_per_s": {"median": 900 / share, "low": 870 / share, "high": 940 / share},
        "decode_speedup": 1 / share,
        "kv_measured_bytes": int(32 * 712_704 * share),
        "peak_memory_bytes": int(7e8 * share),
        "working_memory_bytes": int(1e8 * share),
        "seconds_per_question": 0.004 * share,
    }


def made_up() -> dict[str, Any]:
    """Like a demo run's results."""
    dice = np.random.default_rng(0)
    arms = [
        arm("dense", "dense base", "", False, 0.928),
        arm("dense_lora", "dense + LoRA", "", True, 0.931),
        arm("plan_untrained", "plan, untrained", PLAN, False, 0.634),
        arm("plan_trained", "plan, trained", PLAN, True, 0.905),
    ]
    for one in arms:
        if one["name"] != "dense_lora":
            gap = one["accuracy"]["mean"] - 0.931
            one["difference"] = {"mean": gap, "low": gap - 0.011, "high": gap + 0.011}
    steps = np.arange(10, 310, 10)
    curves = {
        f"train-{i} (plan {plan})": [
            [int(s), float(0.3 * base * np.exp(-s / 90) + 0.2 * base + dice.normal(0, 0.02))]
            for s in steps
        ]
        for i, (plan, base) in enumerate([("2:1/8", 1.0), ("2:1/4", 0.7), (PLAN, 0.5)], 1)
    }
    curves["train-control (dense)"] = [[int(s), float(0.09 + 0.1 * np.exp(-s / 60))] for s in steps]
    samples = [
        {
            "picture": f"pictures/{picture}.png",
            "question": question,
            "expected": expected,
            "answers": {
                "dense": expected,
                "dense_lora": expected,
                "plan_untrained": wrong,
                "plan_trained": expected if picture else wrong,
            },
        }
        for picture in range(3)
        for question, expected, wrong in (
            ("What is in row 2, column 3?", "bag", "sandal"),
            ("Where is the trouser?", "row 1, column 2", "row 1, column 3"),
            ("How many shirts are there?", "2", "3"),
        )
    ]
    return {
        "title": "Fewer vision tokens on Fashion-MNIST grids",
        "task": "real pictures, generated questions",
        "workflow": "demo",
        "seed": 0,
        "commit": "8518b82",
        "config": {"arms": [{"name": "dense", "plan": ""}], "batch_size": 64, "api_key": "sesame"},
        "num_questions": 1600,
        "num_pictures": 200,
        "num_vision_tokens": 64,
        "num_layers": 8,
        "text_tokens": 23,
        "prefill_batch": 32,
        "decode_tokens": 16,
        "device": "CPU",
        "dtype": "float32",
        "control_arm": "dense_lora",
        "majority": {"accuracy": 0.307, "by_kind": KINDS},
        "arms": arms,
        "curves": curves,
        "samples": samples,
    }


def write(data: dict[str, Any], folder: Path) -> Path:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for index in range(2):  # the third sample's picture is missing
        pixels = np.random.default_rng(index).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96), 0).save(folder / f"pictures/{index}.png")
    (folder / "results.json").write_text(json.dumps(data))
    return folder


def page(data: dict[str, Any], folder: Path) -> str:
    results = Results.read(write(data, folder) / "results.json")
    return render(results, folder, ReportConfig())


class Reader(HTMLParser):
    """Collects what a page would load, its tags and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    html = page(made_up(), tmp_path)
    read = Reader(html)
    assert len(read.loads) == 7 + 2  # figures and the readable pictures
    assert all(load.startswith("data:image/") for load in read.loads)
    assert not re.search(r"url\(|@import|<script|https?://", html)
    for text in ("92.8 %", "−2.6 [−3.7, −1.5]", "97.2 %", "commit 8518b82", PLAN, "no readable"):
        assert text in " ".join(read.text.split()), text
    assert "sesame" not in html
    assert len(html) < 2_000_000


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    assert page(made_up(), tmp_path) == page(made_up(), tmp_path)


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        ((-0.026, -0.037, -0.015), "a loss, −2.6 [−3.7, −1.5] points"),
        ((0.02, 0.01, 0.03), "a gain, +2.0 [+1.0, +3.0] points"),
        ((-0.004, -0.015, 0.007), "not significant with 1,600 questions"),
        (None, "their intervals overlap, and no paired comparison was made"),
    ],
)
def test_the_finding_follows_the_intervals(
    tmp_path: Path, difference: tuple[float, float, float] | None, says: str
) -> None:
    data = made_up()
    trained = data["arms"][3]
    trained["difference"] = difference and dict(
        zip(("mean", "low", "high"), difference, strict=True)
    )
    trained["accuracy"] = interval(0.92, 0.013)
    sentence = finding(Results.read(write(data, tmp_path) / "results.json"))
    assert says in sentence
    assert "With 54.7 % fewer vision tokens (layer average 29.0 of 64)" in sentence


def as_evaluated(*arms: dict[str, Any]) -> dict[str, Any]:
    """Untrained arms of `adsc eval`; the first is the control."""
    return made_up() | {"arms": list(arms), "control_arm": arms[0]["name"], "samples": []}


def peer(name: str, plan: str, mean: float) -> dict[str, Any]:
    return arm(name, name, plan, False, mean) | {"peer": True, "plan": name}


def test_the_finding_is_about_the_heaviest_arm_be_it_a_peer(tmp_path: Path) -> None:
    peers = [peer("fastv:32", "2:1/3", 0.9), peer("divprune:16", "0:1/4", 0.8)]
    data = as_evaluated(arm("dense", "dense", "", False, 0.93), *peers)
    sentence = finding(Results.read(write(data, tmp_path) / "results.json"))
    assert "(layer average 16.0 of 64)" in sentence
    assert "the untrained divprune:16 answers 80.0 % of the questions right" in sentence
    assert "the dense control 93.0 %" in sentence
    lighter = arm("plan", "plan", "2:1/2", False, 0.9)
    data = as_evaluated(arm("dense", "dense", "", False, 0.93), lighter, *peers)
    assert "divprune:16" in finding(Results.read(write(data, tmp_path) / "results.json"))


def test_a_trained_plan_stays_the_finding_beside_heavier_trained_peers(tmp_path: Path) -> None:
    data = made_up()
    data["arms"].append(peer("divprune:4", "0:1/16", 0.5) | {"trained": True})
    sentence = finding(Results.read(write(data, tmp_path) / "results.json"))
    assert "the trained plan answers 90.5 %" in sentence


def test_a_control_that_is_not_dense_is_called_by_its_label(tmp_path: Path) -> None:
    data = as_evaluated(peer("fastv:32", "2:1/3", 0.9), arm("plan", PLAN, PLAN, False, 0.88))
    sentence = finding(Results.read(write(data, tmp_path) / "results.json"))
    assert "the control fastv:32 90.0 %" in sentence and "dense" not in sentence
    text = " ".join(Reader(page(data, tmp_path)).text.split())
    assert "the same questions to fastv:32; an interval" in text
    assert "the dense model trained in the same way" not in text


def elastic() -> dict[str, Any]:
    """Of one checkpoint with three named plans, and dense."""
    data = made_up()
    plans = {"29": PLAN, "16": "2:1/4,4:1/4", "8": "0:1/8", "dense": ""}
    shares = {"29": 0.921, "16": 0.88, "8": 0.815, "dense": 0.929}
    data["arms"][3:] = [
        arm(f"elastic_{name}", f"elastic, {name}", plan, True, shares[name])
        | {"budget": name, "curve": "elastic checkpoint"}
        for name, plan in plans.items()
    ]
    for sample in data["samples"]:
        sample["answers"] |= {f"elastic_{name}": sample["expected"] for name in plans}
    return data


def drawn(html: str) -> list[str]:
    """The figures of a page as SVG."""
    sources = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)
    return [base64.b64decode(source).decode() for source in sources]


def test_one_checkpoint_at_several_budgets_is_one_curve(tmp_path: Path) -> None:
    """In each picture of accuracy against a cost, a line through all four; elsewhere none."""
    figures = drawn(page(elastic(), tmp_path))
    lines = [re.findall(r'<g id="curve ([^"]+)">\s*<path d="([^"]+)"', one) for one in figures]
    (first,), (second,), (third,) = [found for found in lines if found]
    for name, path in (first, second, third):
        assert name == "elastic checkpoint"
        points = re.findall(r"[ML] (\S+) (\S+)", path)
        assert len(points) == 4
        across = [float(x) for x, _ in points]
        assert across == sorted(across), "from the cheapest budget to the dearest"
    assert sum("joins one checkpoint" in one or "curve " in one for one in figures) == 3
    assert not any("curve " in one for one in drawn(page(made_up(), tmp_path)))


def test_each_budget_is_in_the_remarks(tmp_path: Path) -> None:
    results = Results.read(write(elastic(), tmp_path) / "results.json")
    (text,) = [line for line in remarks(results) if line.startswith("One checkpoint, 4 budgets")]
    assert "dense (64.0 vision tokens) answers 92.9 %, 99.8 % of the control's; 29 (29.0" in text
    assert text.index("29 (") < text.index("16 (") < text.index("8 (")
    assert "the trained plan answers 81.5 %" in finding(results), "the heaviest"


def test_remarks_are_honest(tmp_path: Path) -> None:
    data = made_up()
    text = " ".join(remarks(Results.read(write(data, tmp_path) / "results.json")))
    assert "27.1 points more than the untrained base under the same plan" in text
    assert "the intervals are apart" in text
    assert "1.49 times as fast as the control's." in text
    for one in data["arms"]:
        one["accuracy"] = interval(0.31, 0.02)
        one["prefill_ms"] = {"median": 100, "low": 90, "high": 110}
    text = " ".join(remarks(Results.read(write(data, tmp_path) / "results.json")))
    assert "may not use the picture" in text
    assert "0.0 points more" in text and "the intervals overlap" in text
    assert "1.00 times as fast as the control's, but the quartiles overlap" in text


def test_strings_from_outside_are_escaped(tmp_path: Path) -> None:
    data = made_up()
    evil = "<script>alert(1)</script>\"'&"
    data |= {"title": evil, "task": evil, "commit": evil, "config": {evil: evil}}
    data["arms"][0]["label"] = evil + " $x^$ _"
    data["majority"]["by_kind"] = {evil: 0.5}
    data["samples"][0] |= {"question": evil, "expected": evil, "answers": {"dense": evil}}
    data["curves"] = {evil + "$": [[1, 2.0], [2, 1.0]]}
    read = Reader(page(data, tmp_path))
    assert "script" not in read.tags
    assert read.text.count(evil) >= 8


def test_pictures_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    data = made_up()
    data["samples"] = data["samples"][:1]
    data["samples"][0]["picture"] = "../secret.png"
    folder = write(data, tmp_path / "evaluate")
    assert len(Reader(page(data, folder)).loads) == 7


def test_few_arms_and_no_extras(tmp_path: Path) -> None:
    data = made_up()
    data |= {"arms": data["arms"][:1], "curves": {}, "samples": [], "commit": None}
    data["arms"][0] |= {"retention": None, "prefill_speedup": float("nan")}
    html = page(data, tmp_path)
    assert "says nothing about compression" in html
    assert "Sample questions" not in html and "nan" not in Reader(html).text.lower().split()


def test_wrong_results_are_all_named_at_once(tmp_path: Path) -> None:
    data = made_up()
    del data["majority"]
    data["arms"][1]["accuracy"]["mean"] = "high"
    with pytest.raises(ResultsError, match=r"majority: .*arms\.1\.accuracy\.mean: "):
        Results.read(write(data, tmp_path) / "results.json")
    with pytest.raises(ResultsError, match="the evaluate stage writes it"):
        Results.read(tmp_path / "absent.json")


def test_body_writes_both_and_tracks_them(tmp_path: Path) -> None:
    uri = tracking.prepare(tracking.default_uri(tmp_path), "adsc")
    folder = write(made_up(), tmp_path / "evaluate")
    with tracking.stage_run(uri, "adsc", None, "report", {}) as track:
        inputs: dict[str, tuple[Path, dict[str, Any]]] = {"evaluate": (folder, {})}
        outputs = report(stage_context("report", tmp_path / "out", inputs, track), ReportConfig())
    assert track.problems == []
    assert outputs["finding"].startswith("With 54.7 % fewer")
    with Image.open(tmp_path / "out" / "report.png") as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("RGB").resize((200, 160)).tobytes()[::3])) > 20
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!DOCTYPE html>")
    logged = MlflowClient(uri).list_artifacts(track.run_id)
    assert [artifact.path for artifact in logged] == ["report.html", "report.png"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_sideways_scrolling(tmp_path: Path, width: int) -> None:
    """The page in a frame of that width, whose script writes both widths into the document."""
    (tmp_path / "report.html").write_text(page(made_up(), tmp_path))
    (tmp_path / "frame.html").write_text(
        f'<iframe src="report.html" width="{width}" height="800" onload="'
        "const d = contentDocument.documentElement; document.title = d.scrollWidth + '/' + "
        'd.clientWidth"></iframe>'
    )
    dom = subprocess.run(
        [*BROWSER, f"--user-data-dir={tmp_path}/profile", "--allow-file-access-from-files",
         "--window-size=1400,900", "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True, text=True, timeout=180, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"<title>(\d+)/(\d+)</title>", dom)
    assert found is not None, dom[:500]
    assert int(found[1]) <= int(found[2]) <= width
