"""A workflow is data: a name, a config, and the function that turns the config into stages.

Variants edit another workflow: `demo().edit({"curriculum.order": "forward"}, name="demo_forward")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config, edit
from pipeline.durable.stage import Stage
from pipeline.redact import flatten


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A workflow, as run by `adsc run NAME`."""

    name: str
    config: Config
    build: Callable[[Any], list[Stage]]
    """Builds the stages from the config; runs nothing."""
    setup: str | None = None
    """Full name of a function that every Ray process calls first, such as one that registers a
    model with transformers."""

    def edit(self, changes: Mapping[str, Any], name: str | None = None) -> Workflow:
        """The workflow with dotted keys of its config changed.

        Raises:
            ConfigError: all unknown keys and bad values at once.
        """
        return replace(self, config=edit(self.config, changes), name=name or self.name)

    def parameters(self, changes: Sequence[str] = ()) -> dict[str, str]:
        """What its runs are compared by: the keys in the config's `COMPARED_BY`, and those changed
        by `changes` (KEY=VALUE, applied already)."""
        wanted = (*self.config.COMPARED_BY, *(change.partition("=")[0] for change in changes))
        return {
            key: value
            for key, value in flatten(self.config.model_dump(mode="json")).items()
            if value != "None" and any(key == one or key.startswith(f"{one}.") for one in wanted)
        }

    def stages(self) -> list[Stage]:
        return self.build(self.config)
