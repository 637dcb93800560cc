"""Configs are edited by dotted keys; every problem is reported at once."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from pipeline.config import Config, ConfigError, edit


class Train(Config):
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Step size."""
    epochs: int = Field(1, ge=1)
    """Passes over the data."""
    name: str = "run"
    """A label."""
    mode: Literal["reverse", "fixed"] = "fixed"
    """A word."""
    plan: tuple[tuple[int, float], ...] = ()
    """Pairs."""
    limit: int | None = None
    """Rows."""

    @model_validator(mode="after")
    def _epochs_fit(self) -> Train:
        if self.mode == "reverse" and self.epochs == 1:
            raise ValueError("a reverse curriculum has at least 2 epochs; set epochs")
        return self


class Workflow(Config):
    train: Train = Train()
    """A section."""
    stages: tuple[Train, ...] = (Train(), Train(epochs=2))
    """Several sections."""
    named: dict[str, Train] = {"control": Train()}
    """Sections by name."""
    extra: Train | None = None
    """A section that may be missing."""
    seed: int = 0
    """Seed."""


Share = Annotated[float, Field(ge=0, lt=1)]


class Shares(Config):
    pair: tuple[Share, Share] = (0.9, 0.95)
    """Two."""
    named: dict[str, Share] | None = None
    """By name."""


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.learning_rate", "1e-4", 1e-4),
        ("train.learning_rate", "0.5", 0.5),
        ("train.epochs", "3", 3),
        ("train.epochs", 3, 3),
        ("train.name", "123", "123"),
        ("train.name", "no", "no"),
        ("train.name", "8:30", "8:30"),
        ("train.name", "1e-4", "1e-4"),
        ("train.limit", "null", None),
        ("train.plan", "[[2, 0.5], [4, 1]]", ((2, 0.5), (4, 1.0))),
        ("stages.1.epochs", "5", 5),
        ("named.control.name", "dense", "dense"),
    ],
)
def test_strings_are_read_as_yaml(key: str, text: object, value: object) -> None:
    found: object = edit(Workflow(), {key: text})
    for name in key.split("."):
        if isinstance(found, Config):
            found = getattr(found, name)
        else:
            found = found[int(name) if name.isdigit() else name]  # type: ignore[index]
    assert found == value
    assert type(found) is type(value)


def test_the_rest_stays() -> None:
    config = Workflow(seed=7)
    edited = edit(config, {"train.epochs": "2", "extra": "{epochs: 4}"})
    assert config == Workflow(seed=7)
    assert edited == Workflow(seed=7, train=Train(epochs=2), extra=Train(epochs=4))


def test_all_problems_at_once() -> None:
    changes = {
        "train.lerning_rate": "1",
        "epochs": "2",
        "train.epochs": "0",
        "train.mode": "forward",
        "stages.5.epochs": "1",
        "extra.epochs": "2",
        "seed": "x",
        "qqqq": "1",
    }
    with pytest.raises(ConfigError) as error:
        edit(Workflow(), changes)
    message = str(error.value)
    assert "8 problems" in message
    assert "train.lerning_rate is unknown; did you mean train.learning_rate?" in message
    assert "did you mean train.epochs?" in message
    assert "train.epochs = 0: Input should be greater than or equal to 1 (int, >= 1)" in message
    assert "one of 'reverse', 'fixed'" in message
    assert "stages.5.epochs is unknown" in message
    assert "extra is None" in message
    assert "qqqq is unknown; valid are train, stages, named, extra, seed" in message


def test_a_rule_over_several_fields() -> None:
    with pytest.raises(ConfigError, match=r"train: a reverse curriculum has at least 2 epochs"):
        edit(Workflow(), {"train.mode": "reverse"})
    assert edit(Workflow(), {"train.mode": "reverse", "train.epochs": 2}).train.epochs == 2


def test_a_section_with_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"train.lr is unknown"):
        edit(Workflow(), {"train": "{epochs: 2, lr: 3}"})


def test_configs_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Workflow().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Workflow(sed=1)  # type: ignore[call-arg]


def test_docstrings_become_descriptions() -> None:
    assert Train.model_fields["learning_rate"].description == "Step size."


def test_types_of_parts_are_named_without_their_marks() -> None:
    with pytest.raises(ConfigError) as caught:
        edit(Shares(), {"pair": "[0.9, 2]", "named": "{a: 1}"})
    assert "(tuple[float, float])" in str(caught.value)
    assert "(dict[str, float] | None)" in str(caught.value)
