"""The demo: a small LLaVA compressed end to end on two CPU cores, real pictures, generated
questions.

Hypothesis: at two thirds fewer vision tokens, means of tiles after the first layer, distilled from
the dense base, keep at least 98 % of what the dense model keeps that was LoRA-tuned for as many
steps. The paper's recipe (drops, a reverse curriculum, no
teacher) is trained and evaluated beside it; `demo_paper` is that recipe alone.
"""

from typing import Any

from pipeline.data.config import PrepareConfig
from pipeline.durable.stage import Stage
from pipeline.durable.workflow import Workflow
from pipeline.evaluation.config import EvaluateConfig
from pipeline.kinds.base import BaseConfig
from pipeline.kinds.export import ExportConfig
from pipeline.recipe import ComparedConfig, CompressConfig, CurriculumConfig, compress
from pipeline.training.config import DistillSettings, LoraSettings, TrainConfig
from workflows.demo.pictures import FashionConfig, pictures

BASE = "package://workflows/assets/tiny_base"


class DemoConfig(CompressConfig):
    """A compression with the data that it makes for itself."""

    data: FashionConfig = FashionConfig()
    """The grids and questions."""


PAPER = ("2:1/4,4:1/4", CurriculumConfig(order="reverse", stages=3, extreme=1.5))
"""The paper's recipe on this base: two drops, in three training stages of equal length."""


def demo() -> Workflow:
    plan, order = PAPER
    paper = ComparedConfig(
        label="the paper's recipe",
        plan=plan,
        curriculum=order,
        train={"steps": 50, "distill": None},
    )
    config = DemoConfig(
        plan="1:1/4;pool=tiles",
        curriculum=CurriculumConfig(order="fixed", stages=1),
        # On validation questions (one seed) 4e-3 is better than 2e-3 for this plan and for the
        # paper's, and no worse for the control, for which 8e-3 is too much (docs/evidence.md).
        train=_train(steps=150, distill=DistillSettings(), learning_rate=4e-3),
        compare={"paper": paper},
        **_SHARED,
    )
    return Workflow(
        name="demo",
        config=config,
        build=build,
    )


def demo_paper() -> Workflow:
    plan, order = PAPER
    config = DemoConfig(plan=plan, curriculum=order, train=_train(steps=100), **_SHARED)
    return Workflow(
        name="demo_paper",
        config=config,
        build=build,
    )


def _train(steps: int, learning_rate: float = 2e-3, **changes: Any) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=16,
        accumulate=4,  # as fast, and a third of a worker's memory less
        learning_rate=learning_rate,
        lora=LoraSettings(rank=16, alpha=32, dropout=0.0),
        checkpoint_every=25,
        **changes,
    )


_SHARED: dict[str, Any] = {
    "base": BaseConfig(source=BASE),
    "prepare": PrepareConfig(template="vicuna_short", context=512),
    "export": ExportConfig(
        name="tiny-llava-compressed", base="tiny_base of this repository", licence="apache-2.0"
    ),
    "evaluate": EvaluateConfig(
        title="A small LLaVA with two thirds fewer vision tokens",
        task="real pictures, generated questions: Fashion-MNIST things in 3 x 3 grids",
    ),
}


def build(config: DemoConfig) -> list[Stage]:
    return compress(config, pictures(config.data))
