"""Published scoring rules on examples worked by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.evaluation.intervals import RESAMPLES, Bootstrap
from pipeline.evaluation.scoring import (
    circular_figures,
    exact_match,
    letter_match,
    mme_figures,
    mme_match,
    pope_figures,
    pope_match,
    same_words,
    text_vqa_accuracy,
    vqa_accuracy,
)
from tests.pipeline.evaluation.benchmark_files import TEN


def test_exact_match_and_same_words() -> None:
    assert exact_match(" yes\n", "yes") == 1 and exact_match("Yes", "yes") == 0
    assert same_words("Yes.", "yes") == 1 and same_words("T-shirt", "tshirt") == 1
    assert same_words("yes it is", "yes") == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # 3 of 10 say 2: those three leave 2 others (2/3), the seven others leave 3 (1).
        ("2", (3 * 2 / 3 + 7 * 1) / 10),
        ("two", (3 * 2 / 3 + 7 * 1) / 10),
        ("The two.", (3 * 2 / 3 + 7 * 1) / 10),
        ("3", 1.0),
        # 2 of 10 say 4: those two leave 1 (1/3), the eight others 2 (2/3).
        ("4", (2 / 3 + 8 * 2 / 3) / 10),
        ("5", 0.0),
        ("", 0.0),
    ],
)
def test_vqa_accuracy_leaves_one_person_out(answer: str, expected: float) -> None:
    assert vqa_accuracy(answer, "\n".join(TEN)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("A dog", "dog"),
        ("an apple", "the apple"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("none", "0"),
        ("red/blue", "red blue"),  # a mark inside a word becomes a space,
        ("red, blue", "red blue"),  # and vanishes at a space
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("black\nand white", "black and white"),
    ],
)
def test_vqa_normal_form(answer: str, other: str) -> None:
    assert vqa_accuracy(answer, "\n".join([other] * 10)) == 1
    assert text_vqa_accuracy(answer, "\n".join([other] * 10)) == 1


def test_people_without_an_answer_count() -> None:
    """3 of 10 say dog: 0.9, wherever the two empty answers stand; `benchmarks` writes them as a
    point, which says nothing either."""
    answers = ["dog"] * 3 + ["cat"] * 5
    for people in (["."] * 2 + answers, [*answers, ".", "."]):
        assert vqa_accuracy("dog", "\n".join(people)) == pytest.approx(0.9)
    assert vqa_accuracy("two", "\n".join(["two"] * 10)) == 1  # as in lmms-eval, also if all agree


def test_vqa_normal_form_keeps_what_differs() -> None:
    assert vqa_accuracy("3.5", "\n".join(["35"] * 10)) == 0
    assert vqa_accuracy("dog's", "\n".join(["dog 's"] * 10)) == 0
    assert text_vqa_accuracy("dog's", "\n".join(["dog 's"] * 10)) == 1  # M4C splits it


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("No, there is none.", "no"),
        ("There is not a car. Yes", "no"),
        ("A car. No dog.", "yes"),  # the first sentence decides
        ("Nothing", "yes"),  # whatever is not a no is a yes
        ("", "yes"),
    ],
)
def test_pope(answer: str, read: str) -> None:
    assert pope_match(answer, read) == 1
    assert pope_match(answer, {"yes": "no", "no": "yes"}[read]) == 0


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes.", "yes"), ("n", "no"), ("No, it", "no"), ("It is", None), ("", None), ("Y", "yes")],
)
def test_mme(answer: str, read: str | None) -> None:
    assert [mme_match(answer, true) for true in ("yes", "no")] == [read == "yes", read == "no"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("b.", "B"),
        ("(b)", "B"),
        ("B. Two", "B"),
        ("(C)", "C"),
        ("D) Four", "D"),
        ("The answer is (B).", "B"),
        ("The answer is A", "A"),
        ("A dog, so C", "C"),
        ("Between A and B", None),
        ("Two", None),
        ("", None),
        ("A dog", None),
    ],
)
def test_letters(answer: str, letter: str | None) -> None:
    assert [letter_match(answer, one) for one in "ABCD"] == [one == letter for one in "ABCD"]


def question(record: str, kind: str, expected: str = "yes") -> SimpleNamespace:
    return SimpleNamespace(record=record, kind=kind, expected=expected)


def plain(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())


def test_pope_figures() -> None:
    """random: 2 hits, 1 false, 0 missed: F1 = 4/5. popular: 1 hit, 0 false, 1 missed: 2/3."""
    entries = [question("p", "random", e) for e in ("yes", "yes", "no", "no")]
    entries += [question("p", "popular", e) for e in ("yes", "yes", "no", "no")]
    found = pope_figures(entries, np.array([1, 1, 0, 1, 1, 0, 1, 1]), plain)
    assert found == {"F1": pytest.approx((4 / 5 + 2 / 3) / 2), "answers yes": 4 / 8}
    nothing = pope_figures(entries[2:4], np.ones(2), plain)
    assert nothing == {"F1": 0, "answers yes": 0}, "neither answered nor true anywhere"


def test_mme_figures() -> None:
    """existence: 3 of 4 questions, 1 of 2 pictures: 75 + 50; count: 0; code: 100 + 100."""
    entries = [question(p, "existence") for p in ("a", "a", "b", "b")]
    entries += [question("a", "count")] * 2 + [question("a", "code_reasoning")] * 2
    found = mme_figures(entries, np.array([1, 1, 1, 0, 0, 0, 1, 1]), plain)
    assert found == {"perception": 125.0, "cognition": 200.0}


def test_a_question_counts_if_right_in_every_order() -> None:
    entries = [question("1", "x"), question("2", "x"), question("1", "x")]
    assert circular_figures(entries, np.array([1, 1, 0]), plain) == {"circular": 0.5}


def test_figures_have_intervals_by_pictures() -> None:
    """Four pictures in draws: those that hold picture 2 twice as often count it twice."""
    pictures = [str(number % 4) for number in range(12)]
    entries = [question(p, "random", "yes" if n < 6 else "no") for n, p in enumerate(pictures)]
    scores = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1])
    draws = pope_figures(entries, scores, Bootstrap(pictures, seed=3).draws)["F1"]
    weights = np.random.default_rng(3).integers(4, size=(RESAMPLES, 4))
    again = []
    for drawn in weights[:50]:
        times = np.bincount(drawn, minlength=4)[[int(p) for p in pictures]]
        true = np.arange(12) < 6
        read = true == (scores > 0)
        hits, yes = (times * (read & true)).sum(), (times * read).sum() + (times * true).sum()
        again.append(2 * hits / yes)
    assert draws.shape == (RESAMPLES,) and draws[:50] == pytest.approx(again)
