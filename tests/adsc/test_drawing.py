"""Plans drawn on a picture whose cells have one colour each, so that every pixel is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adsc.cli import main
from adsc.drawing import cells_left, draw_plan
from adsc.plan import PlanError, PruningPlan

LATTICE = (4, 6)
SIDE = 336 // 6


def picture() -> Image.Image:
    """Each cell of the lattice in a colour of its own."""
    colours = np.random.default_rng(0).integers(0, 256, (*LATTICE, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(SIDE, 0).repeat(SIDE, 1))


def cells(sheet: Image.Image, panel: int) -> np.ndarray:
    """(4, 6, 3) colours of a panel's cells, beside their middle, where a dot may be."""
    left, corner = panel * (6 * SIDE + 12), SIDE // 8
    body = np.asarray(sheet)[22:, left : left + 6 * SIDE]
    return body[corner::SIDE, corner::SIDE].astype(int)


def test_dropped_tokens_fade_and_kept_ones_stay() -> None:
    sheet = draw_plan(picture(), PruningPlan.parse("1:1/2;anchor=first"), LATTICE)
    before, after = cells(sheet, 0), cells(sheet, 1)
    kept = np.arange(24).reshape(LATTICE) % 2 == 0
    assert np.array_equal(after[kept], before[kept])
    faded = 0.82 * 255 + 0.18 * before[~kept]
    assert np.abs(after[~kept] - faded).max() <= 1


def test_tiles_have_their_mean_colour_also_after_a_second_drop() -> None:
    sheet = draw_plan(picture(), PruningPlan.parse("1:1/4,3:1/2;pool=tiles"), LATTICE)
    before = cells(sheet, 0)
    for panel, (rows, columns) in enumerate([(2, 2), (4, 2)], 1):
        tiles = before.reshape(4 // rows, rows, 6 // columns, columns, 3)
        means = tiles.mean((1, 3)).repeat(rows, 0).repeat(columns, 1)
        assert np.abs(cells(sheet, panel) - means).max() <= 1


@pytest.mark.parametrize("plan", ["1:1/5;pool=tiles", "0:1/7;pool=runs", "1:1/3,2:1/2,3:0"])
def test_a_token_stands_for_cells_of_its_own(plan: str) -> None:
    parsed = PruningPlan.parse(plan)
    stages = list(cells_left(parsed, LATTICE))
    assert [len(stage) for stage in stages] == parsed.tokens_after_drops(24)
    for stage in stages:
        covered = [cell for mine in stage.values() for cell in mine]
        assert len(covered) == len(set(covered))
        assert all(token in mine for token, mine in stage.items())
        if parsed.pool:
            assert sorted(covered) == list(range(24))


def test_the_command_draws_one_panel_per_drop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture().save(tmp_path / "in.png")
    arguments = ["plan", "--model", "llava-1.5-7b", "--image", str(tmp_path / "in.png")]
    drawing = tmp_path / "out.png"
    assert main([*arguments, "--draw", "4:1/9,24:0;pool=tiles", "--out", str(drawing)]) == 0
    assert capsys.readouterr().out.strip() == str(drawing)
    with Image.open(drawing) as sheet:
        assert sheet.size == (3 * 336 + 2 * 12, 336 + 22)
    for wrong, says in (
        (["--draw", "40:1/2"], "the decoder has layers 0..31"),
        (["--draw", "1:1/2", "--out", str(tmp_path / "no" / "x.png")], "can't be drawn to"),
        (["--draw", "1:1/2", "--image", str(tmp_path)], "can't be drawn to"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert says in capsys.readouterr().err


def test_a_model_without_a_lattice_is_refused() -> None:
    with pytest.raises(PlanError, match="lie on one lattice"):
        draw_plan(picture(), PruningPlan.parse("1:1/2"), None)
