"""The project's Markdown pages, read for the tests: fenced blocks, headings, links.

Not a Markdown parser: it knows the few forms that the pages use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = ("docs/reference/", "docs/_build/")
FENCE = re.compile(r"^( *)(`{3,}|:{3,})(.*)$")
MARK = re.compile(r"^<!-- (not run|slow|after): (.+) -->$")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Path from the repository's root."""
    line: int
    """Of the opening fence, from 1."""
    language: str
    text: str
    not_run: str = ""
    """Why no test runs it; empty where one does."""
    slow: str = ""
    """Why only a test marked slow runs it."""
    after: str = ""
    """The page whose Python blocks run before this one."""

    @property
    def fast(self) -> bool:
        """Whether `make test` runs it."""
        return not self.not_run and not self.slow

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page of the repository but the generated ones, as paths from its root."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found += [ROOT / "infra" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [page.relative_to(ROOT).as_posix() for page in found]
    return [name for name in names if not name.startswith(GENERATED)]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, mark, opened = [], {}, None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, start, language, text = fence[2], number, fence[3].strip(), []
        elif opened is not None and line.strip() == opened:
            found.append(Block(page, start, language, "\n".join(text), **mark))
            opened, mark = None, {}
        elif opened is not None:
            text.append(line)
        elif marked := MARK.match(line):
            mark = {marked[1].replace(" ", "_"): marked[2]}
        elif line.strip():
            mark = {}
    assert opened is None, f"{page}:{start}: the block is never closed"
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks and without code in backticks."""
    lines, opened = [], None
    for line in (ROOT / page).read_text().splitlines():
        fence = FENCE.match(line)
        if opened is None and fence:
            opened = fence[2]
        elif opened is not None and line.strip() == opened:
            opened = None
        elif opened is None:
            lines.append(line)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", "\n".join(lines))


def links(page: str) -> list[str]:
    """The targets of a page's links and pictures."""
    return LINK.findall(prose(page))


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    opened = None
    for line in (ROOT / page).read_text().splitlines():
        fence = FENCE.match(line)
        if opened is None and fence:
            opened = fence[2]
        elif opened is not None and line.strip() == opened:
            opened = None
        elif opened is None and (heading := re.match(r"#{1,6} (.+)", line)):
            slug = slugify(heading[1])
            count = found[slug] = found.get(slug, -1) + 1
            found.update({f"{slug}-{count}": 0} if count else {})
    return set(found)


def slugify(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
