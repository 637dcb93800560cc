"""Values as people type them: numbers are decimal, texts stay as typed, each has one reading."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from pipeline.config import Config, ConfigError, edit
from pipeline.evaluation.methods import MethodError, parse_method
from pipeline.values import ValueSyntaxError, read_value
from workflows.registry import load_workflow


class Settings(Config):
    count: int = 1
    rate: float = Field(0.5, ge=0)
    on: bool = False
    name: str = ""
    path: str | None = None
    pair: tuple[int, int] = (1, 2)
    free: dict[str, str | int | float | bool] = {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-007", -7), ("+08", 8), ("1_000", 1000), ("0x10", 16), ("0o17", 15),
        ("0b11", 3), (" 5 ", 5), ("1.", 1.0), (".5", 0.5), ("01.50", 1.5), ("1e3", 1000.0),
        ("1E-4", 1e-4), ("-.inf", -math.inf), ("true", True), ("FALSE", False), ("null", None),
        ("~", None), ("1:30", "1:30"), ("190:20:30.15", "190:20:30.15"), ("no", "no"),
        ("yes", "yes"), ("On", "On"), ("off", "off"), ("2026-11-28", "2026-11-28"), ("", ""),
        ("a #b", "a #b"), ("&a b", "&a b"), ("*.tar", "*.tar"), ("!x y", "!x y"), ("=", "="),
        ("--- a", "--- a"), ("'no'", "no"), ('"a\\nb"', "a\nb"), ("'a' b", "'a' b"),
        ("[010, 1:30, no, 2026-11-28, 'x']", [10, "1:30", "no", "2026-11-28", "x"]),
        ("{on: 010, <<: =, b: }", {"on": 10, "<<": "=", "b": None}),
        ("[2:1/4, 4:1/4]", ["2:1/4", "4:1/4"]), ("2:1/4,4:1/4", "2:1/4,4:1/4"),
        ("[!!int 010]", "[!!int 010]"), ("[&a 1, *a]", "[&a 1, *a]"),
        ("!!python/object/apply:os.getcwd []", "!!python/object/apply:os.getcwd []"),
        ("[" * 5000, "[" * 5000), ("9" * 5000, "9" * 5000), ("１０", "１０"),
    ],
)  # fmt: skip
def test_what_was_typed(text: str, value: Any) -> None:
    found = read_value(text)
    assert found == value and type(found) is type(value)


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueSyntaxError, match="'a' twice"):
        read_value("{b: 1, a: 1, a: 2}")
    with pytest.raises(ConfigError, match=r"free = .* names 'a' twice"):
        edit(Settings(), {"free": "{a: 1, a: 2}"})


@given(
    st.integers(), st.text("0", max_size=3), st.sampled_from(["{}", " {}\n", "[{}]", "{{k: {}}}"])
)
def test_whole_numbers_are_decimal(number: int, zeros: str, form: str) -> None:
    text = f"{'-' * (number < 0)}{zeros}{abs(number)}"
    found = read_value(form.format(text))
    found = found[0] if isinstance(found, list) else found
    assert (found["k"] if isinstance(found, dict) else found) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(5e-324)
def test_floats_come_back(number: float) -> None:
    for text in (repr(number), f"{number:e}", f"{number:.17E}"):
        assert read_value(text) == float(text)


@given(st.text("0123456789_.:+-eExXobinfa#~ \t", max_size=8))
@example("0x_1")
def test_a_number_is_what_python_reads_it_as(text: str) -> None:
    """An oracle of its own: what is taken for a number is one for Python, in decimal."""
    found = read_value(text)
    if isinstance(found, float) and not math.isfinite(found):
        assert text.strip().lstrip("+-").lower() in (".inf", ".nan") or float(text) == found
    elif isinstance(found, int | float):
        plain = text.strip()
        if plain.lstrip("+-")[:2] in ("0x", "0o", "0b"):
            assert found == int(plain, 0)
        else:
            assert found == float(plain)
    else:
        assert isinstance(found, str | list | dict) or found is None


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20))
def test_a_text_field_keeps_what_was_typed(text: str) -> None:
    """Whatever YAML would cut off, replace or convert; only quotes around the whole go."""
    found = edit(Settings(), {"name": text}).name
    if text.strip()[:1] in ("'", '"'):
        try:
            unquoted = yaml.safe_load(text.strip())
        except yaml.YAMLError:
            unquoted = text.strip()
        assert found in (unquoted, text.strip(), text)
    else:
        assert found.strip() == text.strip()


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner,
                                                                max_size=3),
))  # fmt: skip
def test_what_yaml_writes_is_read_back(value: Any) -> None:
    """PyYAML quotes what has two readings; then there is one."""
    text = yaml.safe_dump([value], default_flow_style=True, width=1 << 20)
    assert read_value(text) == [value]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("count", "1:30"), ("count", "yes"), ("count", "true"), ("count", ""), ("count", "1.5"),
        ("count", "1,000"), ("count", "2026-11-28"), ("rate", "true"), ("rate", ".inf"),
        ("rate", "inf"), ("rate", "nan"), ("rate", ".nan"), ("rate", "1e400"), ("rate", "1,5"),
        ("rate", ""), ("on", "2"), ("on", "maybe"), ("pair", "[1, true]"), ("pair", "[1, 1:30]"),
        ("pair.1", "true"), ("pair.1", "no"), ("free", "{a: .inf}"), ("free.a", "nan: 1"),
    ],
)  # fmt: skip
def test_what_is_no_such_value_is_refused_with_what_was_typed(key: str, text: str) -> None:
    start = Settings(free={"a": 1})
    with pytest.raises(ConfigError, match=rf"^config has .+:\n  {key.partition('.')[0]}"):
        edit(start, {key: text})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "1e3", 1000), ("count", "1_000", 1000), ("on", "yes", True), ("on", "off", False),
        ("on", "1", True), ("name", "010", "010"), ("name", "true", "true"), ("name", "", ""),
        ("name", "run #3", "run #3"), ("path", "/data/a #1", "/data/a #1"), ("path", "null", None),
        ("path", "0123456", "0123456"), ("pair", "[010, 08]", (10, 8)),
        ("free", "{a: no, b: 010, c: true}", {"a": "no", "b": 10, "c": True}),
    ],
)  # fmt: skip
def test_fields_take_what_was_meant(key: str, text: str, value: Any) -> None:
    found = getattr(edit(Settings(), {key: text}), key)
    assert found == value and type(found) is type(value)


def test_options_of_methods_are_read_alike() -> None:
    peer = parse_method("pyramiddrop:010,layers=[01,2],a=010,b=no,c=1:30").method
    assert peer is not None and peer.average == 10
    assert peer.options == {"layers": (1, 2), "a": 10, "b": "no", "c": "1:30"}
    for text in ("fastv:inf", "fastv:nan", "fastv:1e400"):
        with pytest.raises(MethodError, match="is not a method"):
            parse_method(text)
    for text in ("fastv:22,a=.inf", "fastv:22,a=.nan", "fastv:22,layers=[a: 1]"):
        with pytest.raises(MethodError, match="the options of"):
            parse_method(text)


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=1:30", "train.steps=true", "train.seed=-1", "curriculum.extreme=.inf",
        "curriculum.extreme=nan", "train.learning_rate=inf", "train.seed=1e30", "evaluate.seed=-1",
        "search.seed=-1", "train.betas=[0.9, 1]", "train.lora.targets=(", "train.tune=['[']",
        "curriculum.training=[{learning_rate: .inf}, {}, {}]", "data.seed=-1",
    ],
)  # fmt: skip
def test_a_dry_run_accepts_nothing_that_a_stage_refuses_later(change: str) -> None:
    key = change.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ConfigError, match=rf"{key}|learning_rate = inf"):
        load_workflow("demo", [change]).stages()


def test_a_workflow_reads_decimals() -> None:
    config: Any = load_workflow("demo", ["train.steps=010", "train.batch_size=1_6"]).config
    assert (config.train.steps, config.train.batch_size) == (10, 16)
