"""The demo: a small LLaVA compressed end to end on two CPU cores, real pictures, generated
questions.

Hypothesis: at two thirds fewer vision tokens, training with a curriculum wins back most of what the
untrained drop loses against the dense model that was LoRA-tuned alike.
"""

from pipeline.recipe import CompressConfig, CurriculumConfig, compress
from pipeline.stage import Stage
from pipeline.stages.base import BaseConfig
from pipeline.stages.evaluate import EvaluateConfig
from pipeline.stages.export import ExportConfig
from pipeline.stages.prepare import PrepareConfig
from pipeline.training.config import LoraSettings, TrainConfig
from pipeline.workflow import Workflow
from workflows.fashion import FashionConfig, pictures

BASE = "package://workflows/assets/tiny_base"


class DemoConfig(CompressConfig):
    """A compression with the data that it makes for itself."""

    data: FashionConfig = FashionConfig()
    """The grids and questions."""


def demo() -> Workflow:
    config = DemoConfig(
        plan="2:1/4,4:1/4",
        base=BaseConfig(source=BASE),
        prepare=PrepareConfig(template="vicuna_short", context=512),
        curriculum=CurriculumConfig(order="reverse", stages=3, extreme=1.5),
        train=TrainConfig(
            steps=100,
            batch_size=16,
            accumulate=4,  # as fast, and a third of a worker's memory less
            learning_rate=2e-3,
            lora=LoraSettings(rank=16, alpha=32, dropout=0.0),
            checkpoint_every=25,
        ),
        export=ExportConfig(
            name="tiny-llava-compressed", base="tiny_base of this repository", licence="apache-2.0"
        ),
        evaluate=EvaluateConfig(
            title="A small LLaVA with two thirds fewer vision tokens",
            task="real pictures, generated questions: Fashion-MNIST things in 3 x 3 grids",
        ),
    )
    return Workflow(
        name="demo",
        title="compress the small LLaVA that ships here, in minutes on two cores",
        config=config,
        build=build,
    )


def build(config: DemoConfig) -> list[Stage]:
    return compress(config, pictures(config.data))
