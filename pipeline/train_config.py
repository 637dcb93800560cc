"""What one training stage is, as config. Apart from the loop, so that the processes that only start
and watch a training do not load torch and transformers for it.
"""

from typing import Literal

from pydantic import Field

from pipeline.config import Config

DECODER_LINEARS = (
    r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)


class LoraSettings(Config):
    """The adapter; the defaults are LLaVA-1.5's published recipe (r 128, alpha 256)."""

    rank: int = Field(128, gt=0)
    """Rank of the two factors."""
    alpha: float = Field(256, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: str = DECODER_LINEARS
    """Regular expression that a module's full name must match; the default is the decoder alone."""


class TrainConfig(Config):
    """One training stage."""

    plan: str = ""
    """Pruning plan while training, such as `2:1/4,5:1/4`; empty trains without any drop."""
    steps: int = Field(100, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(32, gt=0)
    """Conversations in one optimizer step, over all workers."""
    accumulate: int = Field(1, gt=0)
    """Micro-batches into which each worker splits its share of a step; saves memory."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of the adapter and of parts tuned in full."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises to its peak; it then falls as a half cosine."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; above it the gradient is scaled down."""
    lora: LoraSettings | None = LoraSettings()
    """The adapter; null trains none."""
    tune: tuple[str, ...] = ()
    """Regular expressions of parameters that are tuned in full, such as the projector's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 holds the frozen base in bf16 and computes under autocast; trained weights stay fp32."""
    checkpoint_every: int = Field(100, gt=0)
    """Optimizer steps between checkpoints; at most that many are lost when a process dies."""
    log_every: int = Field(10, gt=0)
    """Optimizer steps between lines in the tracking server."""
    seed: int = 0
    """Order of the data, the adapter's initial values and dropout."""
