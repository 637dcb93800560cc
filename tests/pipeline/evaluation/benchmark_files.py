"""Small benchmarks in the formats of the official files, cut to a few questions."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

TEN = ["2", "2", "two", "3", "3", "3", "3", "3", "4", "4"]


def picture(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (48, 48), (shade, 255 - shade, 90)).save(data, format="PNG")
    return data.getvalue()


def _pictures(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(40 * shade))


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def gqa(folder: Path) -> None:
    _pictures(folder / "images", "n1.jpg", "n2.jpg")
    about = {"semantic": "obj", "detailed": "existC"}
    rows = [("n1", "Is it red?", "yes", "verify"), ("n2", "What is it?", "dog", "query"),
            ("n1", "Which thing?", "t-shirt", "choose")]  # fmt: skip
    _write(
        folder / "testdev_balanced_questions.json",
        {
            f"20{n}": {"imageId": image, "question": question, "answer": answer,
                       "types": about | {"structural": kind}, "isBalanced": True}
            for n, (image, question, answer, kind) in enumerate(rows)
        },
    )  # fmt: skip


def vqav2(folder: Path) -> None:
    name = "COCO_val2014_000000000042.jpg"
    _pictures(folder / "val2014", name)
    _write(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"info": {}, "questions": [
            {"image_id": 42, "question": "How many?", "question_id": 42000},
            {"image_id": 42, "question": "Is it?", "question_id": 42001},
        ]},
    )  # fmt: skip
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": n}
        for n, answer in enumerate(TEN, 1)
    ]
    _write(
        folder / "v2_mscoco_val2014_annotations.json",
        {"annotations": [
            {"question_id": 42001, "image_id": 42, "answer_type": "yes/no",
             "multiple_choice_answer": "yes",
             "answers": [one | {"answer": "yes"} for one in answers]},
            {"question_id": 42000, "image_id": 42, "answer_type": "number",
             "multiple_choice_answer": "3", "answers": answers},
        ]},
    )  # fmt: skip


def textvqa(folder: Path) -> None:
    _pictures(folder / "train_images", "0a.jpg")
    entry = {"question_id": 34602, "image_id": "0a", "question": "what does the Sign say?",
             "answers": ["stop"] * 9 + ["the stop"], "set_name": "val"}  # fmt: skip
    _write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [entry]})


def vizwiz(folder: Path) -> None:
    _pictures(folder / "val", "VizWiz_val_00000000.jpg")
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    entry = {"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": answers,
             "answer_type": "unanswerable", "answerable": 0}  # fmt: skip
    _write(folder / "Annotations" / "val.json", [entry])


def pope(folder: Path) -> None:
    names = ["COCO_val2014_000000310196.jpg", "COCO_val2014_000000210789.jpg"]
    _pictures(folder / "val2014", *names)
    for kind in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": n, "image": names[n % 2], "label": "yes" if n < 2 else "no",
             "text": f"Is there a {thing} in the image?"}
            for n, thing in enumerate(("snowboard", "person", "car", "dog"), 1)
        ]  # fmt: skip
        text = "\n".join(json.dumps(line) for line in lines)
        _write(folder / "coco" / f"coco_pope_{kind}.json", text + "\n")


def scienceqa(folder: Path) -> None:
    _pictures(folder / "images" / "test", "5/image.png")
    problem = {"question": "Which is north?", "choices": ["Maine", "Texas"], "answer": 0,
               "hint": "A map.", "image": "image.png", "subject": "social science",
               "split": "test"}  # fmt: skip
    _write(folder / "problems.json", {"5": problem, "6": problem | {"image": None}})
    _write(folder / "pid_splits.json", {"train": ["1"], "test": ["5", "6"]})


def mme(folder: Path) -> None:
    from pipeline.evaluation.benchmarks import MME_COGNITION as COGNITION
    from pipeline.evaluation.benchmarks import MME_PERCEPTION

    home = folder / "MME_Benchmark_release_version"
    for kind in (*MME_PERCEPTION, *COGNITION):
        apart = kind in ("posters", "celebrity", "scene", "landmark", "artwork")
        for name in ("a", "b") if kind == "existence" else ("a",):
            _pictures(home / kind / ("images" if apart else "."), f"{name}.png")
            _write(
                home / kind / ("questions_answers_YN" if apart else ".") / f"{name}.txt",
                "Is it here? Please answer yes or no.\tYes\n"
                "Is it there? Please answer yes or no.\tNo\n",
            )


def seedbench(folder: Path) -> None:
    _pictures(folder / "SEED-Bench-image", "145_259")
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    entry = {**choices, "answer": "B", "data_id": "145_259", "data_type": "image",
             "question": "How many towels?", "question_id": "101669",
             "question_type_id": 5}  # fmt: skip
    video = entry | {"data_type": "video", "data_id": "1.mp4", "question_type_id": 10}
    types = {"Instances Counting": 5, "Action Recognition": 10}
    _write(folder / "SEED-Bench.json", {"question_type": types, "questions": [entry, video]})


def _table(file: Path) -> None:
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image",
               "source", "l2-category", "comment", "split"]  # fmt: skip
    image = base64.b64encode(picture(7)).decode()
    more = ["action", "x", "logic", "nan", "dev"]
    rows = [
        ["241", 'Say "which"?', "Read it.", "cat", "dog", "", "", "A", more[0], image, *more[1:]],
        ["1000241", 'Say "which"?', "Read it.", "dog", "cat", "", "", "B", more[0], image,
         *more[1:]],
        ["252", "Other?", "nan", "1", "2", "3", "4", "D", "ocr", "241", *more[1:]],
    ]  # fmt: skip
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    _write(file, "\n".join("\t".join(row) for row in [columns, *quoted]) + "\n")


def mmbench(folder: Path) -> None:
    _table(folder / "mmbench_dev_20230712.tsv")
    _table(folder / "mmbench_dev_cn_20231003.tsv")  # they come into one folder


WRITERS: dict[str, Callable[[Path], None]] = {
    "gqa": gqa,
    "vqav2": vqav2,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "pope": pope,
    "scienceqa": scienceqa,
    "mme": mme,
    "seedbench": seedbench,
    "mmbench": mmbench,
    "mmbench_cn": mmbench,
}
QUESTIONS = {
    "gqa": 3, "vqav2": 2, "textvqa": 1, "vizwiz": 1, "pope": 12, "scienceqa": 1, "mme": 30,
    "seedbench": 1, "mmbench": 3, "mmbench_cn": 3,
}  # fmt: skip
