"""How an answer is scored: exact match, or the published rule of a public benchmark.

A rule takes an answer and what was expected, and gives 0 to 1. Several expected answers (those of
ten people) are the lines of one text. What a benchmark makes of its questions' scores beyond their
mean is `FIGURES`. Each rule names its source; the words are ours.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.benchmarks import MME_COGNITION

Rule = Callable[[str, str], float]

CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am "
    "mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't "
    "she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've "
    "y'all'll you'd you'd've you'll you're you've"
)
"""What the VQA evaluation writes with apostrophes, whichever one of them is missing."""
_MENDED = {
    form[:place] + form[place + 1 :]: form
    for form in CONTRACTIONS.split()
    for place, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def references(expected: str) -> list[str]:
    """The answers that are expected, one or several."""
    return expected.strip().split("\n")


def exact_match(answer: str, expected: str) -> float:
    """Stripped texts are the same: 1 or 0."""
    return float(answer.strip() == expected.strip())


def same_words(answer: str, expected: str) -> float:
    """GQA: equal but for case and punctuation."""
    own, other = (text.translate(_NO_PUNCTUATION).lower().strip() for text in (answer, expected))
    return float(own == other)


def vqa_accuracy(answer: str, expected: str) -> float:
    """VQAv2: of ten people, three who said so are enough; the mean over all nine of the ten
    (Antol et al. 2015, https://visualqa.org/evaluation.html).

    >>> vqa_accuracy("Two.", "\\n".join(["2"] * 2 + ["3"] * 8))  # (2 x 1/3 + 8 x 2/3) / 10
    0.6
    """
    return _agreement(_normal(answer), [_normal(one) for one in references(expected)])


def text_vqa_accuracy(answer: str, expected: str) -> float:
    """TextVQA and VizWiz: the same after M4C's word splitting ("dog's" is "dog 's")."""
    others = [_normal(_split(one)) for one in references(expected)]
    return _agreement(_normal(_split(answer)), others)


def _agreement(answer: str, others: Sequence[str]) -> float:
    count, same = len(others), others.count(answer)
    left_out = same * min(1, (same - 1) / 3) + (count - same) * min(1, same / 3)
    return round(left_out / count, 12)


def _split(text: str) -> str:
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _normal(text: str) -> str:
    """The VQA evaluation's normal form: punctuation, then numbers, articles, apostrophes."""
    given = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,+\d", given) is not None
    found = given
    for mark in _MARKS:
        at_edge = f"{mark} " in given or f" {mark}" in given
        found = found.replace(mark, "" if at_edge or grouped else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = [_DIGITS.get(word, word) for word in found.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in ("a", "an", "the"))


def pope_match(answer: str, expected: str) -> float:
    """POPE: an answer is a no if its first sentence holds No, no or not, else a yes
    (evaluate.py of AoiDragon/POPE)."""
    words = answer.strip().partition(".")[0].replace(",", "").split(" ")
    predicted = "no" if {"No", "no", "not"} & set(words) else "yes"
    return float(predicted == expected.strip().lower())


def mme_match(answer: str, expected: str) -> float:
    """MME: yes or no within the first four characters; another answer is wrong (calculation.py of
    its evaluation tool)."""
    text = answer.lower().strip().replace(".", "")
    start = {"y": "yes", "n": "no"}.get(text, text[:4])
    predicted = next((word for word in ("yes", "no") if word in start), None)
    return float(predicted == expected.strip().lower())


def letter_match(answer: str, expected: str) -> float:
    """Multiple choice (ScienceQA, SEED-Bench, MMBench): the letter, alone or before `.`, `)` or
    `:`, or the only letter of an option that stands by itself ("The answer is (B)."). An answer in
    the option's words is wrong: the question asks for the letter."""
    return float(_letter(answer.strip()) == expected.strip().upper())


def _letter(answer: str) -> str | None:
    if alone := re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", answer):
        return alone[1].upper()
    if first := re.match(r"\(?([A-Z])[.):]", answer):
        return first[1]
    # An A before a word is an article, as in "A dog, so C".
    found = set(re.findall(r"(?<![\w'])(?:A(?!\s+(?!and |or )[a-z])|[B-H])(?![\w'])", answer))
    return found.pop() if len(found) == 1 else None


RULES: Mapping[str, Rule] = {
    "exact_match": exact_match,
    "same_words": same_words,
    "vqa_accuracy": vqa_accuracy,
    "text_vqa_accuracy": text_vqa_accuracy,
    "pope_match": pope_match,
    "mme_match": mme_match,
    "letter_match": letter_match,
}

Mean = Callable[[np.ndarray, np.ndarray], Any]
"""Of values (Q,) where a mask (Q,) holds: a number, or one for each resample of the pictures."""


def pope_figures(questions: Sequence[Any], scores: np.ndarray, mean: Mean) -> dict[str, Any]:
    """F1 of "yes", the mean of the sets (random, popular, adversarial), and the share of "yes"."""
    true = np.array([question.expected.strip().lower() == "yes" for question in questions])
    yes = true == (scores > 0)
    f1 = [
        2 * mean(yes & true, kind) / np.maximum(mean(yes, kind) + mean(true, kind), 1e-12)
        for kind in _masks(questions, "kind")
    ]
    return {"F1": sum(f1) / len(f1), "answers yes": mean(yes, np.ones(len(questions), bool))}


def mme_figures(questions: Sequence[Any], scores: np.ndarray, mean: Mean) -> dict[str, Any]:
    """Perception (of 2000 points) and cognition (of 800): for each category the percentage of
    questions and that of pictures with both questions right (Fu et al. 2023)."""
    both, once = _all_right(questions, scores, lambda question: (question.kind, question.record))
    points: dict[str, Any] = {"perception": 0.0, "cognition": 0.0}
    kinds = dict.fromkeys(question.kind for question in questions)
    for kind, mask in zip(kinds, _masks(questions, "kind"), strict=True):
        part = "cognition" if kind in MME_COGNITION else "perception"
        points[part] = points[part] + 100 * (mean(scores, mask) + mean(both, mask & once))
    return points


def circular_figures(questions: Sequence[Any], scores: np.ndarray, mean: Mean) -> dict[str, Any]:
    """CircularEval of MMBench: a question counts if it is right in every order of its options
    (Liu et al. 2023)."""
    right, once = _all_right(questions, scores, lambda question: question.record)
    return {"circular": mean(right, once)}


def _masks(questions: Sequence[Any], field: str) -> list[np.ndarray]:
    values = np.array([getattr(question, field) for question in questions])
    return [values == value for value in dict.fromkeys(values.tolist())]


def _all_right(
    questions: Sequence[Any], scores: np.ndarray, group: Callable[[Any], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Whether all questions of its group are right (Q,), and the first of each group (Q,)."""
    keys = [group(question) for question in questions]
    right = dict.fromkeys(keys, True)
    for key, score in zip(keys, scores, strict=True):
        right[key] = right[key] and bool(score)
    seen: set[Any] = set()
    first = [not (key in seen or seen.add(key)) for key in keys]  # type: ignore[func-returns-value]
    return np.array([right[key] for key in keys]), np.array(first)


FIGURES: Mapping[str, Callable[[Sequence[Any], np.ndarray, Mean], dict[str, Any]]] = {
    "pope": pope_figures,
    "mme": mme_figures,
    "mmbench": circular_figures,
    "mmbench_cn": circular_figures,
}
"""By benchmark, of questions with `record`, `kind`, `expected`, and their scores (Q,)."""
