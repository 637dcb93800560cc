"""Public benchmarks from their official files: questions as lmms-eval puts them to LLaVA.

A record is a picture with all its questions, so that none is stored or read twice. The files
keep each benchmark's own layout, as unpacked (docs/evaluation.md). Scoring is scoring.py's.
Nothing here downloads, and nothing of a picture is read, except where the file holds it (MMBench).
"""

import base64
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Config
from pipeline.data.files import describe
from pipeline.data.templates import MARKER
from pipeline.durable.stage import Kind, StageContext

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGH"
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
MAX_FIELD = 1 << 27
"""Most characters of a cell of a table: a picture in base64."""
CIRCLE = 1_000_000
"""MMBench: the same question with its options in another order has this much more as its index."""
LONGEST_INDEX = 64
"""Characters; MMBench: more is a picture, less the index of the row that has it."""
_HEAD = 1024  # bytes by which a file of another kind is known
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip


class BenchmarkError(ValueError):
    """A benchmark's files are not there, or not as they are published."""


class Item(NamedTuple):
    """One question."""

    picture: str
    """Below the root of the pictures."""
    question: str
    expected: str
    """One answer, or one in each line."""
    kind: str
    record: str = ""
    """What else it belongs to than its picture."""


class Files(NamedTuple):
    """Where a reader finds things."""

    folder: Path
    """The benchmark's."""
    found: list[Path]
    """What it needs, in that order."""
    made: Path
    """Folder of ours for pictures that its files hold."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is known of one."""

    title: str
    needs: tuple[str, ...]
    """Its files (or folders), as patterns in its folder or in a folder of it; `|` is or."""
    pictures: str | None
    """Root of its pictures below its folder; None where its files hold them."""
    rule: str
    """A key of scoring.RULES."""
    read: Callable[[Files], Iterator[Item]]
    """Its questions."""


def _gqa(files: Files) -> Iterator[Item]:
    for item in _json(files.found[0]).values():
        yield Item(
            f"{item['imageId']}.jpg",
            f"{item['question']}\n{SHORT}",
            item["answer"],
            item["types"]["structural"],
        )


def _vqav2(files: Files) -> Iterator[Item]:
    answers = {one["question_id"]: one for one in _json(files.found[1])["annotations"]}
    for item in _json(files.found[0])["questions"]:
        own = answers[item["question_id"]]
        yield Item(
            f"COCO_val2014_{item['image_id']:012d}.jpg",
            f"{item['question']}\n{SHORT}",
            _lines(one["answer"] for one in own["answers"]),
            own["answer_type"],
        )


def _textvqa(files: Files) -> Iterator[Item]:
    for item in _json(files.found[0])["data"]:
        yield Item(
            f"{item['image_id']}.jpg",
            f"{item['question'].capitalize()}\n{SHORT}",
            _lines(item["answers"]),
            "text",
        )


def _vizwiz(files: Files) -> Iterator[Item]:
    for item in _json(files.found[0]):
        yield Item(
            item["image"],
            f"{item['question'].capitalize()}\n{UNANSWERABLE}\n{SHORT}",
            _lines(one["answer"] for one in item["answers"]),
            item["answer_type"],
        )


def _pope(files: Files) -> Iterator[Item]:
    for file in files.found:
        kind = file.stem.rpartition("_")[2]
        for item in map(json.loads, _rows(file)):
            question = f"{item['text'].strip()}\n{SHORT}"
            yield Item(item["image"], question, _yes_or_no(item["label"]), kind)


def _scienceqa(files: Files) -> Iterator[Item]:
    problems = _json(files.found[0])
    for number in _json(files.found[1])["test"]:
        item = problems[number]
        if item["image"] is None:
            continue
        hint = f"Context: {item['hint']}\n" if item["hint"] else ""
        yield Item(
            f"{number}/{item['image']}",
            hint + _choices(item["question"], item["choices"], LETTER),
            chr(ord("A") + item["answer"]),
            item["subject"],
        )


def _mme(files: Files) -> Iterator[Item]:
    for folder in files.found:
        texts = sorted(folder.glob("questions_answers_YN/*.txt")) or sorted(folder.glob("*.txt"))
        if not texts:
            raise BenchmarkError(f"mme: {folder} holds no questions: .txt files, a line a question")
        pictures = folder / "images" if (folder / "images").is_dir() else folder
        named = {path.stem: path for path in pictures.iterdir() if path.suffix != ".txt"}
        for text in texts:
            if text.stem not in named:
                raise BenchmarkError(f"mme: {text} has no picture of that name in {pictures}")
            place = named[text.stem].relative_to(files.folder)
            for row in _rows(text):
                question, answer = _cells(text, row)
                question = question.replace(" Please answer yes or no.", "").strip()
                prompt = f"{question}\n{SHORT}"
                yield Item(str(place), prompt, _yes_or_no(answer), folder.name)


def _seedbench(files: Files) -> Iterator[Item]:
    whole = _json(files.found[0])
    types = {number: name for name, number in whole["question_type"].items()}
    for item in whole["questions"]:
        if item["data_type"] == "image":
            choices = [item[f"choice_{letter}"] for letter in "abcd"]
            question = _choices(item["question"], choices, LETTER)
            kind = types[item["question_type_id"]]
            yield Item(item["data_id"], question, _letter_of(choices, item["answer"]), kind)


def _mmbench(prompt: str) -> Callable[[Files], Iterator[Item]]:
    def read(files: Files) -> Iterator[Item]:
        csv.field_size_limit(MAX_FIELD)
        with files.found[0].open(encoding="utf-8-sig", newline="") as lines:
            for row in csv.DictReader(_decoded(files.found[0], lines), delimiter="\t"):
                record = int(row["index"]) % CIRCLE
                own = len(row["image"]) > LONGEST_INDEX
                made = files.made / f"{record if own else int(row['image']) % CIRCLE}.jpg"
                if not made.exists():
                    if not own:
                        raise ValueError(f"row {row['index']} has the picture of {row['image']!r}")
                    made.write_bytes(base64.b64decode(row["image"], validate=True))
                cells = (row.get(letter) or "" for letter in LETTERS)
                choices = list(takewhile(_is_there, cells))
                hint = f"{row['hint']}\n" if _is_there(row["hint"]) else ""
                yield Item(
                    made.name,
                    hint + _choices(row["question"], choices, prompt),
                    _letter_of(choices, row["answer"]),
                    row["category"],
                    str(record),
                )

    return read


def _is_there(cell: str) -> bool:
    return cell.strip().lower() not in ("", "nan", "none")


def _decoded(file: Path, lines: Iterator[str]) -> Iterator[str]:
    with file.open("rb") as start:
        _check_kind(file, start.read(_HEAD))
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise BenchmarkError(
            f"{file} is not UTF-8 ({error.reason}): fetch it again, or convert it"
        ) from None


def _check_kind(file: Path, head: bytes) -> None:
    if other := describe(head):
        raise BenchmarkError(f"{file} {other}")


def _cells(file: Path, row: str) -> tuple[str, str]:
    """A question and its answer."""
    question, tab, answer = row.partition("\t")
    if not tab or "\t" in answer:
        raise BenchmarkError(f"{file}: {row[:80]!r} is not a question, a tab and an answer")
    return question, answer


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except ValueError as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(f"{file} is not JSON ({error}): unpack or fetch it again") from None


def _text(file: Path) -> str:
    data = file.read_bytes()
    _check_kind(file, data[:_HEAD])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BenchmarkError(
            f"{file} is not UTF-8 (byte {error.start}): fetch it again, or convert it"
        ) from None


def _rows(file: Path) -> list[str]:
    """Its lines that are not empty; other characters that end one belong to the text."""
    return [line.strip() for line in _text(file).split("\n") if line.strip()]


def _lines(answers: Any) -> str:
    # An answer that is empty stays one: a point has the same normal form.
    return "\n".join(" ".join(answer.split()) or "." for answer in answers)


def _yes_or_no(answer: str) -> str:
    text = answer.strip().lower()
    if text not in ("yes", "no"):
        raise ValueError(f"answer {answer!r} is neither yes nor no")
    return text


def _choices(question: str, choices: list[str], prompt: str) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, prompt])


def _letter_of(choices: list[str], letter: str) -> str:
    """The letter of an option that is there."""
    if letter not in list(LETTERS[: len(choices)]):
        raise ValueError(f"answer {letter!r} is none of {len(choices)} options")
    return letter


BENCHMARKS: Mapping[str, Benchmark] = {
    "gqa": Benchmark(
        title="GQA, testdev balanced",
        needs=("testdev_balanced_questions.json",),
        pictures="images",
        rule="same_words",
        read=_gqa,
    ),
    "vqav2": Benchmark(
        title="VQAv2, val2014",
        needs=(
            "v2_OpenEnded_mscoco_val2014_questions.json",
            "v2_mscoco_val2014_annotations.json",
        ),
        pictures="val2014",
        rule="vqa_accuracy",
        read=_vqav2,
    ),
    "textvqa": Benchmark(
        title="TextVQA, val 0.5.1, no OCR tokens",
        needs=("TextVQA_0.5.1_val.json",),
        pictures="train_images",
        rule="text_vqa_accuracy",
        read=_textvqa,
    ),
    "vizwiz": Benchmark(
        title="VizWiz VQA, val",
        needs=("val.json",),
        pictures="val",
        rule="text_vqa_accuracy",
        read=_vizwiz,
    ),
    "pope": Benchmark(
        title="POPE on COCO",
        needs=tuple(f"coco_pope_{kind}.json" for kind in ("random", "popular", "adversarial")),
        pictures="val2014",
        rule="pope_match",
        read=_pope,
    ),
    "scienceqa": Benchmark(
        title="ScienceQA, test, questions with a picture",
        needs=("problems.json", "pid_splits.json"),
        pictures="images/test",
        rule="letter_match",
        read=_scienceqa,
    ),
    "mme": Benchmark(
        title="MME",
        needs=(*MME_PERCEPTION, *MME_COGNITION),
        pictures=".",
        rule="mme_match",
        read=_mme,
    ),
    "seedbench": Benchmark(
        title="SEED-Bench, pictures",
        needs=("SEED-Bench.json",),
        pictures="SEED-Bench-image",
        rule="letter_match",
        read=_seedbench,
    ),
    "mmbench": Benchmark(
        title="MMBench, dev",
        needs=("mmbench_dev_[!c]*.tsv|MMBench_DEV_EN*.tsv",),
        pictures=None,
        rule="letter_match",
        read=_mmbench(LETTER),
    ),
    "mmbench_cn": Benchmark(
        title="MMBench-CN, dev",
        needs=("mmbench_dev_cn*.tsv|MMBench_DEV_CN*.tsv",),
        pictures=None,
        rule="letter_match",
        read=_mmbench(LETTER_CN),
    ),
}


class BenchmarksConfig(Config):
    """Which are converted."""

    folders: dict[str, str]
    """Name of a benchmark -> its folder."""
    digests: dict[str, str]
    """Name of a benchmark -> digest of its files: changed files are another run."""


def convert(ctx: StageContext, config: BenchmarksConfig) -> dict[str, Any]:
    """Stage body: NAME.jsonl of conversations for each benchmark, and pictures/NAME where its file
    holds the pictures.

    Raises:
        BenchmarkError: a file is missing, or is not as it is published.
    """
    counts = {}
    for done, (name, folder) in enumerate(config.folders.items()):
        ctx.progress(done, len(config.folders), name)
        counts[name] = convert_one(name, Path(folder), ctx.out)
    return {"questions": counts}


CONVERT = Kind(
    id="pipeline.evaluation.benchmarks.convert", version=1, body=convert, config=BenchmarksConfig
)


def find_files(name: str, folder: Path) -> list[Path]:
    """The files that a benchmark needs, each in its folder or in a folder of it.

    Raises:
        BenchmarkError: there is none, or more than one, or no folder of pictures.
    """
    found = []
    for pattern in BENCHMARKS[name].needs:
        globs = [glob for one in pattern.split("|") for glob in (one, f"*/{one}")]
        there = sorted(path for glob in globs for path in folder.glob(glob))
        if len(there) != 1:
            names = ", ".join(map(str, there)) or "none"
            raise BenchmarkError(
                f"{name}: {folder} should hold one {pattern.replace('|', ' or ')}; there is {names}"
                + ("; name a folder with one of them" if there else "")
            )
        found += there
    if not (pictures := folder / (BENCHMARKS[name].pictures or ".")).is_dir():
        raise BenchmarkError(f"{name}: there is no folder of pictures {pictures}")
    return found


def convert_one(name: str, folder: Path, out: Path) -> int:
    """Write `out`/NAME.jsonl and return how many questions it holds. Raises: as `convert`."""
    found = find_files(name, folder)
    made = root_of(name, folder, out)
    made.mkdir(parents=True, exist_ok=True)
    records: dict[tuple[str, str], list[Item]] = {}
    count = 0
    try:
        for count, item in enumerate(BENCHMARKS[name].read(Files(folder, found, made)), 1):  # noqa: B007
            records.setdefault((item.record, item.picture), []).append(item)
    except BenchmarkError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise BenchmarkError(
            f"{name}: {', '.join(map(str, found[:3]))} {'and more ' if found[3:] else ''}are not "
            f"as they are published: after {count} questions, {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    if not count:
        raise BenchmarkError(f"{name}: there is no question in {folder}")
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
        for (record, picture), items in records.items():
            lines.write(json.dumps(_record(record or picture, picture, items)) + "\n")
    return count


def root_of(name: str, folder: Path, out: Path) -> Path:
    """Root of a benchmark's pictures: of its own, or of those that `convert` writes."""
    own = BENCHMARKS[name].pictures
    return out / "pictures" / name if own is None else folder / own


def _record(name: str, picture: str, items: list[Item]) -> dict[str, Any]:
    turns = []
    for place, item in enumerate(items):
        marker = "" if place else f"{MARKER}\n"
        turns.append({"from": "human", "value": marker + item.question})
        turns.append({"from": "gpt", "value": item.expected})
    kinds = [item.kind for item in items]
    return {"id": name, "image": picture, "conversations": turns, "kinds": kinds}
