"""HTML pages from the Jinja templates beside this file. Each needs no other file, and escapes
whatever it is given: names, plans and answers come from outside.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any


def render(name: str, filters: dict[str, Callable[..., str]], **values: Any) -> str:
    """The page of the template `name`.html with these values; one that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(f"{name}.html").render(values)


def embedded(png: bytes) -> str:
    """The address of a picture that a page carries within itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
