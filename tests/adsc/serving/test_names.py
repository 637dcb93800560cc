"""Names of tensors: what transformers writes of a served family has a place in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from adsc import PruningPlan
from adsc.serving.names import unknown_names
from tests.adsc.serving.configs import config_of, next_of


@pytest.mark.parametrize("made", [config_of, next_of])
def test_saved_names_are_known_and_others_are_not(made: Any, tmp_path: Path) -> None:
    config = made("1:1/2")
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) > 50
    assert unknown_names(config, [*names, "extra.weight"]) == ["extra.weight"]
    config.adsc = PruningPlan().to_dict()
    assert unknown_names(config, ["extra.weight"]) == []
