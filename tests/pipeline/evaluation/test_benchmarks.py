"""Public benchmarks: official files to conversations, and what is wrong with files."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.benchmarks import BENCHMARKS, BenchmarkError, convert_one, root_of
from tests.pipeline.evaluation.benchmark_files import QUESTIONS, TEN, WRITERS


def converted(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    folder, out = tmp_path / name, tmp_path / "out"
    out.mkdir(parents=True)
    WRITERS[name](folder)
    assert convert_one(name, folder, out) == QUESTIONS[name]
    records = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    for record in records:
        assert (root_of(name, folder, out) / record["image"]).is_file()
        questions = [turn["value"] for turn in record["conversations"][::2]]
        assert [text.count("<image>") for text in questions] == [1] + [0] * (len(questions) - 1)
        assert len(record["kinds"]) == len(questions)
    return records


def exchanges(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(texts[::2], texts[1::2], record["kinds"], strict=True))


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def test_every_benchmark_is_written_here() -> None:
    assert WRITERS.keys() == BENCHMARKS.keys() == QUESTIONS.keys()


def test_gqa(tmp_path: Path) -> None:
    one, two = converted("gqa", tmp_path)
    assert (one["id"], one["image"]) == ("n1.jpg", "n1.jpg")
    assert exchanges(one) == [
        (f"Is it red?{SHORT}", "yes", "verify"),
        (f"Which thing?{SHORT}", "t-shirt", "choose"),
    ]
    assert exchanges(two) == [(f"What is it?{SHORT}", "dog", "query")]


def test_vqav2(tmp_path: Path) -> None:
    (record,) = converted("vqav2", tmp_path)
    assert record["image"] == "COCO_val2014_000000000042.jpg"
    assert exchanges(record) == [
        (f"How many?{SHORT}", "\n".join(TEN), "number"),
        (f"Is it?{SHORT}", "\n".join(["yes"] * 10), "yes/no"),
    ]


def test_textvqa_and_vizwiz(tmp_path: Path) -> None:
    (text,) = converted("textvqa", tmp_path / "text")
    prompt = f"What does the sign say?{SHORT}"
    assert exchanges(text) == [(prompt, "\n".join(["stop"] * 9 + ["the stop"]), "text")]
    (blind,) = converted("vizwiz", tmp_path / "blind")
    ((question, answers, kind),) = exchanges(blind)
    assert question == (
        "What is this?\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.{SHORT}"
    )
    assert answers == "\n".join(["unanswerable"] * 10) and kind == "unanswerable"


def test_pope(tmp_path: Path) -> None:
    records = converted("pope", tmp_path)
    assert len(records) == 2
    found = [one for record in records for one in exchanges(record)]
    assert (f"Is there a snowboard in the image?{SHORT}", "yes", "adversarial") in found
    assert [kind for *_, kind in found].count("random") == 4


def test_multiple_choice(tmp_path: Path) -> None:
    (science,) = converted("scienceqa", tmp_path / "science")
    prompt = f"Context: A map.\nWhich is north?\nA. Maine\nB. Texas{LETTER}"
    assert science["image"] == "5/image.png"
    assert exchanges(science) == [(prompt, "A", "social science")]
    (seed,) = converted("seedbench", tmp_path / "seed")
    prompt = f"How many towels?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}"
    assert exchanges(seed) == [(prompt, "B", "Instances Counting")]


def test_mmbench(tmp_path: Path) -> None:
    one, other = converted("mmbench", tmp_path)
    assert (one["id"], one["image"], other["id"], other["image"]) == (
        "241", "241.jpg", "252", "241.jpg",
    )  # fmt: skip
    assert exchanges(one) == [
        (f'Read it.\nSay "which"?\nA. cat\nB. dog{LETTER}', "A", "action"),
        (f'Read it.\nSay "which"?\nA. dog\nB. cat{LETTER}', "B", "action"),
    ]
    assert exchanges(other) == [(f"Other?\nA. 1\nB. 2\nC. 3\nD. 4{LETTER}", "D", "ocr")]


def test_mmbench_cn(tmp_path: Path) -> None:
    (question, *_), *_ = exchanges(converted("mmbench_cn", tmp_path)[0])
    assert question.endswith("\nB. dog\n请直接回答选项字母。")


def test_mme(tmp_path: Path) -> None:
    records = converted("mme", tmp_path)
    assert len(records) == 15
    poster = next(record for record in records if record["kinds"][0] == "posters")
    assert poster["image"] == "MME_Benchmark_release_version/posters/images/a.png"
    assert exchanges(poster) == [
        (f"Is it here?{SHORT}", "yes", "posters"),
        (f"Is it there?{SHORT}", "no", "posters"),
    ]


def test_missing_and_changed_files_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    WRITERS["gqa"](tmp_path)
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(BenchmarkError, match=r"gqa: there is no folder of pictures .*images"):
        convert_one("gqa", tmp_path, out)
    (tmp_path / "pictures").rename(tmp_path / "images")
    file = tmp_path / "testdev_balanced_questions.json"
    rows = json.loads(file.read_text())
    del rows["201"]["imageId"]
    file.write_text(json.dumps(rows))
    with pytest.raises(BenchmarkError, match=r"after 1 questions, KeyError: 'imageId'"):
        convert_one("gqa", tmp_path, out)
    file.write_text("{}")
    with pytest.raises(BenchmarkError, match="no question"):
        convert_one("gqa", tmp_path, out)
    file.unlink()
    with pytest.raises(BenchmarkError, match=r"one testdev_balanced_questions.json; there is none"):
        convert_one("gqa", tmp_path, out)
    assert not list(out.iterdir()), "nothing half-written"
    WRITERS["mme"](tmp_path / "mme")
    text = tmp_path / "mme" / "MME_Benchmark_release_version" / "count" / "a.txt"
    text.write_text("Is it? Please answer yes or no.\tMaybe\n")
    with pytest.raises(BenchmarkError, match="'Maybe' is neither yes nor no"):
        convert_one("mme", tmp_path / "mme", out)


def test_files_are_read_as_they_come(tmp_path: Path) -> None:
    """With a byte order mark; people's empty answers stay answers; trailing tabs; other names."""
    out = tmp_path / "out"
    out.mkdir()
    WRITERS["textvqa"](tmp_path)
    file = tmp_path / "TextVQA_0.5.1_val.json"
    file.write_text("\ufeff" + file.read_text().replace('"the stop"', '""'), encoding="utf-8")
    assert convert_one("textvqa", tmp_path, out) == 1
    (record,) = map(json.loads, (out / "textvqa.jsonl").read_text().splitlines())
    assert record["conversations"][1]["value"] == "\n".join(["stop"] * 9 + ["."])
    WRITERS["mme"](tmp_path)
    text = tmp_path / "MME_Benchmark_release_version" / "count" / "a.txt"
    text.write_text("Is it?\tYes\t\n")
    assert convert_one("mme", tmp_path, out) == QUESTIONS["mme"] - 1
    text.with_suffix(".png").rename(text.with_name("b.png"))
    with pytest.raises(BenchmarkError, match=r"count/a.txt has no picture of that name"):
        convert_one("mme", tmp_path, out)


def test_options_have_no_gaps(tmp_path: Path) -> None:
    WRITERS["mmbench"](tmp_path)
    (tmp_path / "mmbench_dev_cn_20231003.tsv").unlink()
    file = (tmp_path / "mmbench_dev_20230712.tsv").rename(tmp_path / "MMBench_DEV_EN.tsv")
    out = tmp_path / "out"
    assert convert_one("mmbench", tmp_path, out) == 3
    whole = file.read_text()
    file.write_text(whole.replace('"2"\t"3"', '""\t"3"'))
    with pytest.raises(BenchmarkError, match=r"after 2 questions, .*'D' is none of 1 options"):
        convert_one("mmbench", tmp_path, out)
    file.write_text(whole.replace('\t"241"\t', '\t"7"\t'))
    with pytest.raises(BenchmarkError, match=r"row 252 has the picture of '7'"):
        convert_one("mmbench", tmp_path, out)
    (tmp_path / "mmbench_dev_en_20231003.tsv").write_text(whole)
    with pytest.raises(BenchmarkError, match="name a folder with one of them"):
        convert_one("mmbench", tmp_path, out)
