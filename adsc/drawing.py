"""A plan drawn on a picture: the vision tokens that are left after each drop.

One panel shows the picture as the tokens see it, and one each drop: tokens that are gone are faded,
groups that are averaged have their mean colour, and a dot marks where each mean stands. It knows
the plan and the tokens' lattice; it runs no model.
"""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from adsc.plan import PlanError, PruningPlan

PANEL = 336
"""Pixels of a panel's longer side, about."""
_GAP, _TITLE = 12, 22
_LINE, _DOT = "#D55E00", "#D55E00"

Lattice = tuple[int, int]
Cells = dict[int, tuple[int, ...]]
"""Every token that is left -> the tokens of the input that it stands for."""


def draw_plan(picture: Image.Image, plan: PruningPlan, lattice: Lattice | None) -> Image.Image:
    """The panels side by side.

    Args:
        picture: cut to the lattice's shape around its center, as LLaVA-1.5's processor does.
        lattice: (height, width) of the image's vision tokens.

    Raises:
        PlanError: the tokens lie on no lattice, or the plan doesn't fit it.
    """
    if lattice is None:
        raise PlanError(
            "this model's vision tokens don't lie on one lattice per image, so a plan can't be "
            "drawn on it; name a model such as llava-1.5-7b"
        )
    height, width = lattice
    side = max(2, PANEL // max(lattice))
    shown = _cut(picture.convert("RGB"), lattice).resize((width * side, height * side))
    panels = list(_panels(shown, plan, lattice))
    columns, high = len(panels), height * side + _TITLE
    sheet = Image.new("RGB", (columns * (width * side + _GAP) - _GAP, high), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (title, panel) in enumerate(panels):
        left = column * (width * side + _GAP)
        pen.text((left, 3), title, "black", font)
        sheet.paste(panel, (left, _TITLE))
    return sheet


def _cut(picture: Image.Image, lattice: Lattice) -> Image.Image:
    height, width = lattice
    scale = min(picture.width / width, picture.height / height)
    across, down = round(width * scale), round(height * scale)
    left, top = (picture.width - across) // 2, (picture.height - down) // 2
    return picture.crop((left, top, left + across, top + down))


def _panels(
    shown: Image.Image, plan: PruningPlan, lattice: Lattice
) -> Iterator[tuple[str, Image.Image]]:
    total = lattice[0] * lattice[1]
    yield f"input: {total} tokens", shown
    for (layer, _), cells in zip(plan.stages, cells_left(plan, lattice), strict=True):
        title = f"from layer {layer}: {len(cells)} of {total}"
        yield title, _panel(shown, cells, lattice, pooled=plan.pool is not None)


def cells_left(plan: PruningPlan, lattice: Lattice) -> Iterator[Cells]:
    """After each drop, the tokens that are left, each with the cells of the lattice that it stands
    for: itself, or with a pool all that were averaged into it."""
    total = lattice[0] * lattice[1]
    if plan.pool is None:
        for kept in plan.kept_indices(total, lattice):
            yield {token: (token,) for token in kept}
        return
    cells: Cells = {token: (token,) for token in range(total)}
    for groups in plan.groups(total, lattice):
        cells = {
            group.anchor: tuple(cell for member in group.members for cell in cells[member])
            for group in groups
        }
        yield cells


def _panel(shown: Image.Image, cells: Cells, lattice: Lattice, pooled: bool) -> Image.Image:
    height, width = lattice
    side = shown.width // width
    panel = Image.blend(shown, Image.new("RGB", shown.size, "white"), 0.82)
    means = shown.resize((width, height), Image.Resampling.BOX)
    pen = ImageDraw.Draw(panel)
    owner = {cell: token for token, mine in cells.items() for cell in mine}
    for token, mine in cells.items():
        colours = [means.getpixel((cell % width, cell // width)) for cell in mine]
        colour = tuple(sum(channel) // len(mine) for channel in zip(*colours, strict=True))
        for cell in mine:
            x, y = cell % width * side, cell // width * side
            if pooled:
                pen.rectangle((x, y, x + side - 1, y + side - 1), colour)
            else:
                box = (x, y, x + side, y + side)
                panel.paste(shown.crop(box), box)
        if pooled:
            x, y = token % width * side + side // 2, token // width * side + side // 2
            pen.circle((x, y), max(1, side // 5), _DOT)
    for cell, token in owner.items() if pooled else ():
        x, y = cell % width * side, cell // width * side
        if cell % width and owner.get(cell - 1) != token:
            pen.line((x, y, x, y + side), _LINE)
        if cell >= width and owner.get(cell - width) != token:
            pen.line((x, y, x + side, y), _LINE)
    return panel
