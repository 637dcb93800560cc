"""How an image's tokens are parted into groups of which each becomes one token: runs and tiles.

Index arithmetic on integers alone: groups depend on the lattice and on how many there are to be,
never on content. Plans with `pool` and the peer `pool` share it; averaging is in
`adsc.dropping.pooling`.

A sheet is what may be averaged together: the lattice of a picture, of a crop or of a frame, or its
row ends. It is a list of rows, and rows may differ in length once it was cut unevenly. A cut takes
bands of whole rows, by the floors floor(i * rows / bands), and each row of a band by the floors of
its own length. A run is a tile of a sheet with one row. The next cut acts on the sheet of the
cells, a row for each band, so groups nest.

Legend: h x w lattice, n tokens, m groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

Sheet = Sequence[Sequence[int]]
Cell = tuple[int, ...]
STRETCH = 2
"""How many times as long as wide, or as wide as long, an even tile may be on a square lattice."""


class Region(NamedTuple):
    """A lattice among the tokens of an image: row r, column c is token start + r * stride + c."""

    height: int
    width: int
    start: int
    stride: int

    def sheet(self) -> list[range]:
        """Its tokens, row by row."""
        starts = (self.start + row * self.stride for row in range(self.height))
        return [range(start, start + self.width) for start in starts]


class Group(NamedTuple):
    """Tokens that become one, and the one of them at whose place it stands."""

    anchor: int
    members: Cell


def cut(sheet: Sheet, counts: Sequence[int]) -> list[list[Cell]]:
    """The cells of each of len(counts) bands of whole rows, counts[b] of them in band b; the tokens
    of a cell in row order."""
    rows, bands = len(sheet), len(counts)
    cells = []
    for band, count in enumerate(counts):
        mine = sheet[band * rows // bands : (band + 1) * rows // bands]
        cells.append(
            [
                tuple(
                    token
                    for row in mine
                    for token in row[i * len(row) // count : (i + 1) * len(row) // count]
                )
                for i in range(count)
            ]
        )
    return cells


def tile_counts(sheet: Sheet, m: int) -> list[int]:
    """Cells in each band of m tiles: h' x w' = m even ones if a lattice allows it, else ragged."""
    widths = {len(row) for row in sheet}
    if len(widths) == 1 and (even := even_tiles(len(sheet), widths.pop(), m)):
        return [even[1]] * even[0]
    return ragged_counts(sheet, m)


def even_tiles(height: int, width: int, m: int) -> tuple[int, int] | None:
    """(h', w') with h' * w' = m whose tiles are at most STRETCH times as long as wide, or as wide
    as long; None if there are none.

    First those that divide the lattice into equal tiles, then by nearness to a square, then wide
    tiles before high ones.
    """
    found = []
    for down in range(1, min(height, m) + 1):
        across, rest = divmod(m, down)
        if rest or across > width:
            continue
        stretch = Fraction(height * across, down * width)
        stretch = max(stretch, 1 / stretch)
        if stretch <= STRETCH:
            found.append((not is_whole(height, width, down, across), stretch, -down, across))
    if not found:
        return None
    *_, down, across = min(found)
    return -down, across


def are_whole(lattice: tuple[int, int], counts: Sequence[int]) -> bool:
    """Whether all tiles of drops that leave so many tokens are whole and alike."""
    height, width = lattice
    for m in counts:
        even = even_tiles(height, width, m)
        if even is None or not is_whole(height, width, *even):
            return False
        height, width = even
    return True


def is_whole(height: int, width: int, down: int, across: int) -> bool:
    """Whether down x across tiles are all alike."""
    return height % down == 0 and width % across == 0


def ragged_counts(sheet: Sheet, m: int) -> list[int]:
    """Cells in each band, so many bands that cells are nearly square, and as many in each.

    A band must have no more cells than its longest row has tokens; where shares of m do not fit
    into any number of bands, each row is a band, with cells in proportion to its length.
    """
    rows, widest, n = len(sheet), max(map(len, sheet)), sum(map(len, sheet))
    square = min(rows, m, round((m * rows * rows / n) ** 0.5) or 1)
    for bands in range(max(-(-m // widest), square), min(rows, m) + 1):
        counts = [(band + 1) * m // bands - band * m // bands for band in range(bands)]
        room = (
            max(map(len, sheet[band * rows // bands : (band + 1) * rows // bands]))
            for band in range(bands)
        )
        if all(count <= most for count, most in zip(counts, room, strict=True)):
            return counts
    return share([len(row) for row in sheet], m)


def share(sizes: Sequence[int], m: int) -> list[int]:
    """m parted in proportion to sizes, by largest remainders; each at least 1, at most its size."""
    total = sum(sizes)
    parts = [size * m // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * m % total), i))
    for i in order[: m - sum(parts)]:
        parts[i] += 1
    for i, part in enumerate(parts):
        if part == 0:
            parts[parts.index(max(parts))] -= 1
            parts[i] = 1
    return parts


def partition(
    sheets: Sequence[Sheet], m: int, anchor: str, runs: bool
) -> tuple[list[Group], list[Sheet]]:
    """The m groups of an image, in the order of their anchors, and the sheets of these.

    Args:
        sheets: of the tokens that are left; at most m of them.
        m: at most as many as there are tokens.
        anchor: `first`, `center` or `last` member in row order.
        runs: each sheet is one sequence, whatever its rows.
    """
    groups: list[Group] = []
    left: list[Sheet] = []
    sizes = [sum(map(len, sheet)) for sheet in sheets]
    for sheet, count in zip(sheets, share(sizes, m), strict=True):
        if runs:
            sheet = [[token for row in sheet for token in row]]
        bands = cut(sheet, [count] if runs else tile_counts(sheet, count))
        places = [[_place(cell, anchor) for cell in band] for band in bands]
        groups += [
            Group(place, cell)
            for mine, band in zip(places, bands, strict=True)
            for place, cell in zip(mine, band, strict=True)
        ]
        left.append(places)
    return sorted(groups), left


def _place(cell: Cell, anchor: str) -> int:
    return {"first": cell[0], "center": cell[len(cell) // 2], "last": cell[-1]}[anchor]
