"""A pipeline of three functions, make -> double -> total, and beside double its sibling square."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.durable.stage import Kind, RunContext, Stage, StageContext


class Toy(Config):
    """Config of a toy stage."""

    log: str
    """File to which a body adds a line whenever it runs."""
    value: int = 3
    """What the body computes with."""
    seconds: float = 0.0
    """How long it takes."""
    fail: str = ""
    """The message with which it fails."""


def work(context: StageContext, config: Toy) -> None:
    with Path(config.log).open("a") as file:
        file.write(f"{context.name}\n")
    for step in range(int(config.seconds * 10)):
        context.progress(step, config.seconds * 10, "working")
        time.sleep(0.1)
    if config.fail:
        raise ValueError(config.fail)


def make(context: StageContext, config: Toy) -> dict[str, Any]:
    work(context, config)
    (context.out / "deep").mkdir()
    (context.out / "deep" / "numbers.txt").write_text(" ".join(map(str, range(config.value))))
    return {"count": config.value}


def double(context: StageContext, config: Toy) -> dict[str, Any]:
    work(context, config)
    text = (context.inputs["made"].folder / "deep" / "numbers.txt").read_text()
    numbers = [int(word) for word in text.split()]
    (context.out / "doubled.txt").write_text(" ".join(str(2 * number) for number in numbers))
    return {"count": context.inputs["made"].outputs["count"]}


def total(context: StageContext, config: Toy) -> dict[str, Any]:
    work(context, config)
    text = (context.inputs["doubled"].folder / "doubled.txt").read_text()
    return {"total": sum(map(int, text.split()))}


KINDS = {
    body: Kind(id=f"tests.pipeline.toy.{name}", version=1, body=body, config=Toy)
    for name, body in (("make", make), ("double", double), ("total", total))
}


def stages(log: Path | str, **changes: dict[str, Any]) -> list[Stage]:
    """The toy pipeline; `double={"value": 4}` changes one stage's config."""

    def toy(name: str, body: Any, needs: dict[str, str] | None = None) -> Stage:
        return KINDS[body].stage(
            name=name,
            title=f"Toy stage {name}",
            config=Toy(log=str(log), **changes.get(name, {})),
            needs=needs,
        )

    return [
        toy("total", total, {"doubled": "double"}),
        toy("double", double, {"made": "make"}),
        toy("square", double, {"made": "make"}),
        toy("make", make),
    ]


def with_kind(stage: Stage, **changes: Any) -> Stage:
    """The stage with its kind's body, id or version changed."""
    return replace(stage, kind=replace(stage.kind, **changes))


def context(root: Path | str, **changes: Any) -> RunContext:
    return RunContext(root=str(root), workflow="toy", **{"lease_seconds": 30.0, **changes})
