"""Pages: what comes from outside is escaped, and a value that a template misses is an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import UndefinedError

from pipeline.reporting.pages import embedded, render
from pipeline.search.study import Rung, Trial

HOSTILE = "<script>alert('x')</script>"


def trial(**changes: Any) -> Trial:
    given: dict[str, Any] = {
        "number": 0,
        "name": HOSTILE,
        "plan": HOSTILE,
        "cost": 32.0,
        "known": True,
        "state": "finished",
        "rungs": (Rung(2, 0.25, 1.0), Rung(4, 0.125, 2.0)),
    }
    return Trial(**(given | changes))


def search(**changes: Any) -> str:
    given: dict[str, Any] = {
        "title": HOSTILE,
        "finding": HOSTILE,
        "picture": embedded(b"png"),
        "objective": "loss",
        "unit": HOSTILE,
        "best": [trial()],
        "known": [trial()],
        "left_out": {HOSTILE: HOSTILE},
        "failed": [],
        "settings": HOSTILE,
    }
    return render("search", {"written": lambda settings: HOSTILE}, **(given | changes))


def test_the_page_of_a_search_escapes_what_it_shows() -> None:
    page = search(failed=[trial(state="failed", reason=HOSTILE)])
    assert page.startswith("<!DOCTYPE html>")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert '<td class="n">0.1250</td><td class="n">32</td>' in page
    assert "2: 0.2500 → 4: 0.1250" in page
    assert 'src="data:image/png;base64,cG5n"' in page
    assert "none" not in page and "none" in search()


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="reason"):
        search(failed=[SimpleNamespace(plan="1:1/2")])
