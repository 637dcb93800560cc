"""lmms-eval with our model class, in its own environment: the same answers as the pipeline's."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoProcessor

import adsc
from pipeline.evaluation.generation import Questions, generate_answers
from pipeline.evaluation.scoring import exact_match
from tests.small import Small
from workflows.lmms_task import write_task

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv-lmms" / "bin" / "python"
SCRIPT = Path(__file__).with_name("run_lmms.py")
BASE = ROOT / "workflows" / "assets" / "tiny_base"
PLAN = "2:1/4,4:1/4"
BENCHMARKS = (
    "gqa", "vqav2_val", "textvqa_val", "pope", "scienceqa_img", "mme", "mmbench_en_dev",
    "mmbench_cn_dev", "seedbench", "vizwiz_vqa_val",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="no .venv-lmms here: `make lmms-eval` builds it (1.7 GB)"
    ),
]


@pytest.fixture(scope="module")
def task(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    assert write_task(small.prepared / "test", folder, "few_grids", max_new_tokens=8) == 48
    return folder


def lmms_eval(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(PYTHON), str(SCRIPT), *words], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("method", ["dense", f"plan:{PLAN}"])
def test_the_harness_finds_what_the_pipeline_finds(
    small: Small, task: Path, tmp_path: Path, method: str
) -> None:
    done = lmms_eval(
        tmp_path / "hf",
        "--model=adsc",
        "--model_args",
        f"pretrained={BASE},image_backend=pil,method={method.replace(',', '+')}",
        f"--include_path={task}",
        "--tasks=few_grids",
        "--batch_size=16",
        f"--output_path={tmp_path / 'out'}",
        "--log_samples",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("*samples_few_grids.jsonl")
    rows = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()),
        key=lambda row: row["doc_id"],
    )
    questions = Questions(small.prepared / "test").load(range(48))
    model = adsc.from_pretrained(BASE).eval()
    adsc.attach(model, method.removeprefix("plan:").replace("dense", ""))
    answers = generate_answers(model, AutoProcessor.from_pretrained(BASE), questions, 16, 8)
    assert [row["filtered_resps"] for row in rows] == answers
    (found,) = (tmp_path / "out").rglob("*_results.json")
    metrics = json.loads(found.read_text())["results"]["few_grids"]
    expected = [exact_match(a, q.expected) for a, q in zip(answers, questions, strict=True)]
    assert metrics["exact_match,none"] == pytest.approx(sum(expected) / 48)


def test_a_sample_that_cannot_be_answered_ends_the_run(task: Path, tmp_path: Path) -> None:
    functions = (task / "questions.py").read_text()
    broken = tmp_path / "task"
    broken.mkdir()
    (broken / "few_grids.yaml").write_text((task / "few_grids.yaml").read_text())
    text = functions.replace('doc["question"]', 'doc["question"] + "<image>" * 3')
    (broken / "questions.py").write_text(text)
    done = lmms_eval(
        tmp_path / "hf",
        "--model=adsc",
        f"--model_args=pretrained={BASE},image_backend=pil",
        f"--include_path={broken}",
        "--tasks=few_grids",
        "--limit=2",
        "--verbosity=DEBUG",  # else lmms-eval prints the error and exits with 0, without results
        f"--output_path={tmp_path / 'out'}",
    )
    assert done.returncode != 0 and not list(tmp_path.rglob("*_results.json"))
    assert "no answers to few_grids/test/" in done.stderr + done.stdout
    assert "3 <image> marks for 1 pictures" in done.stderr + done.stdout


def test_the_benchmarks_are_known_by_these_names(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import run_lmms\n"
        "from lmms_eval.tasks import TaskManager\n"
        f"print(sorted(set({BENCHMARKS!r}) - set(TaskManager().all_tasks)))"
    )
    done = subprocess.run([str(PYTHON), "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]"


SAID = ("yes", "No.", "y", "no, it is", "two", "The 3", "a dog", "dont know", "red, blue",
        "p.m.", "dog's", "B", "b", "A. cat", "3.5", "1,000", "", "maybe")  # fmt: skip
TRUE = ("yes", "no", "2", "3", "dog", "don't know", "red blue", "pm", "dog 's", "1000")
PROGRAM = """
import json, sys
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.mme.utils import mme_process_results
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from lmms_eval.tasks.seedbench.utils import seed_process_result
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val
from pipeline.evaluation.scoring import RULES, _MENDED
answers, true = json.loads(sys.argv[1])
table = {k: v for k, v in EvalAIAnswerProcessor.CONTRACTIONS.items() if k != v}
assert table == _MENDED, set(table.items()) ^ set(_MENDED.items())
def differ(rule, ours, theirs, *about):
    if ours != theirs and abs(ours - theirs) > 1e-9:
        print(rule, *map(repr, about), ours, theirs)
for answer in answers:
    for one, others in [(one, others) for one in true for others in (0, 7, 8)]:
        given = [one] * (10 - others) + ["x"] * others
        expected = "\\n".join(given)
        people = [{"answer": text, "answer_id": n} for n, text in enumerate(given)]
        theirs = vqav2_process_results_val({"question_id": 1, "answers": people}, [answer])
        differ("vqav2", RULES["vqa_accuracy"](answer, expected), theirs["exact_match"], answer, one)
        theirs = textvqa_process_results({"question_id": 1, "answers": list(given)}, [answer])
        ours = RULES["text_vqa_accuracy"](answer, expected)
        differ("textvqa", ours, theirs["exact_match"], answer, one)
    for one in ("yes", "no"):
        doc = {"answer": one, "category": "count", "question_id": 1}
        theirs = mme_process_results(doc, [answer])["mme_perception_score"]["score"]
        differ("mme", RULES["mme_match"](answer, one), theirs, answer, one)
for answer in ("A", "b", "B.", "A. cat", "cat", ""):
    for place in (0, 1):
        theirs = sqa_process_results({"choices": ["cat", "dog"], "answer": place}, [answer])
        ours = RULES["letter_match"](answer, "AB"[place])
        differ("scienceqa", ours, theirs["exact_match"], answer)
for answer in ("A", "b", "B.", "C. cat", ""):
    for one in "ABCD":
        doc = {"answer": one, "data_type": "image", "question_id": 1}
        theirs = seed_process_result(doc, [answer])["seed_image"]
        hit = float(theirs["pred"].lower().strip() == one.lower())
        differ("seed", RULES["letter_match"](answer, one), hit, answer, one)
"""


def test_our_rules_are_the_harness_s(tmp_path: Path) -> None:
    """Where both score VQAv2, TextVQA, MME, ScienceQA and SEED-Bench, every score is the same."""
    program = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import run_lmms\n" + PROGRAM
    done = subprocess.run(
        [str(PYTHON), "-c", program, json.dumps([SAID, TRUE])],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout.strip(), done.stdout
