"""Prepared questions as a task of lmms-eval: a folder with its YAML, its functions and a Parquet
file of pictures, questions and answers.

    python -m workflows.lmms_task PREPARED/test FOLDER --name demo_grids
    .venv-lmms/bin/python -m lmms_eval --model adsc --include_path FOLDER --tasks demo_grids ...

Scored by exact match, as the stage `evaluate` does.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.evaluation.generation import Questions

FUNCTIONS = "questions"
ROWS = 256  # questions of a row group


def write_task(split: Path, folder: Path, name: str, max_new_tokens: int) -> int:
    """Write the task and return its number of questions."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = Questions(split)
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    feature = {"_type": "List", "feature": {"_type": "Image"}}
    text = {"dtype": "string", "_type": "Value"}
    features = {"question": text, "answer": text, "kind": text, "pictures": feature}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(
        {
            "question": pa.string(),
            "answer": pa.string(),
            "kind": pa.string(),
            "pictures": pa.list_(picture),
        },
        metadata=about,
    )
    data = folder / f"{name}.parquet"
    with pq.ParquetWriter(data, schema, compression="zstd") as writer:
        for rows in _rows(questions):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    kinds = list(dict.fromkeys(entry.kind for entry in questions.entries))
    metrics = ["exact_match", *(f"exact_match_{kind}" for kind in kinds)]
    functions = {
        key: f"!function {FUNCTIONS}.{key}"
        for key in ("doc_to_visual", "doc_to_text", "process_results")
    }
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data.absolute())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "max_new_tokens": max_new_tokens,
            "temperature": 0,
            "num_beams": 1,
            "do_sample": False,
        },
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": [{"version": 0.0}],
    }
    tags = "".join(f"{key}: {value}\n" for key, value in functions.items())
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False) + tags)
    with as_file(files("workflows") / "assets" / "lmms_task" / f"{FUNCTIONS}.py") as source:
        shutil.copyfile(source, folder / f"{FUNCTIONS}.py")
    return len(questions)


def _rows(questions: Questions) -> Iterator[list[dict[str, object]]]:
    for start in range(0, len(questions), ROWS):
        loaded = questions.load(range(start, min(start + ROWS, len(questions))))
        yield [
            {
                "question": question.text,
                "answer": question.expected,
                "kind": question.kind,
                "pictures": [{"bytes": it, "path": None} for it in question.pictures],
            }
            for question in loaded
        ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflows.lmms_task")
    parser.add_argument("split", type=Path, help="a split of prepared data: .../test")
    parser.add_argument("folder", type=Path, help="folder to write the task into")
    parser.add_argument("--name", default="local_questions", help="the task's name")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="longest answer in tokens")
    options = parser.parse_args()
    write_task(options.split, options.folder, options.name, options.max_new_tokens)


if __name__ == "__main__":
    main()
