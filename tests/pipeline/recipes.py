"""What the demo's recipe makes of changes to its config."""

from __future__ import annotations

from pipeline.training.config import TrainConfig
from workflows.demo.workflow import demo_paper as demo


def training_configs(*branches: str, **changes: object) -> dict[str, TrainConfig]:
    """The configs of the demo's training stages, by name."""
    stages = demo().edit({key.replace("__", "."): it for key, it in changes.items()}).stages()
    found = {stage.name: stage.config for stage in stages}
    return {
        name: config
        for name, config in found.items()
        if isinstance(config, TrainConfig) and name.startswith(branches or ("train", "control"))
    }
