"""What one training stage is, as config. Apart from the loop, so that the processes that only start
and watch a training do not load torch and transformers for it.

Fields marked OPERATIONAL decide how a stage is computed and not what: they are in no fingerprint.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from pipeline.config import ADDED, OPERATIONAL, Config
from pipeline.evaluation.methods import MethodConfig, PeerConfig, Plan

if TYPE_CHECKING:
    from adsc.plan import PruningPlan

DECODER_LINEARS = (
    r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)
PROJECTOR = r".*multi_modal_projector\..*"
DENSE = "dense"
"""The name of no plan: as a teacher, and among a training's plans."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What can name a plan."""
PlanName = Annotated[str, BeforeValidator(lambda key: str(key) if type(key) is int else key)]
"""A plan's name; YAML reads 64 as a number."""
MOMENTS = "moments.safetensors"
"""AdamW's state in a checkpoint, and in a stage's result where `carry_optimizer` is set."""


def check_plans(plans: Mapping[str, str], weights: Mapping[str, float]) -> None:
    """Raise ValueError for plans or weights by name that can't be drawn from."""
    if not plans and not weights:
        return
    from adsc.plan import PruningPlan

    for name, plan in plans.items():
        if not NAME.fullmatch(name) or name == DENSE:
            raise ValueError(
                f"{name!r} can't name a plan: use letters, digits, `_`, `.` and `-`, such as 192; "
                f"{DENSE} is the name of no plan, and only has a weight"
            )
        if not PruningPlan.parse(plan).stages:
            raise ValueError(f"the plan {name!r} drops nothing: give {DENSE} a weight instead")
    if odd := sorted(weights.keys() - plans.keys() - {DENSE}):
        raise ValueError(
            f"weights for {', '.join(odd)}, which no plan is named; there are "
            f"{', '.join([*plans, DENSE])}"
        )
    if bad := [name for name, weight in weights.items() if not 0 <= weight < math.inf]:
        raise ValueError(f"weights of {', '.join(bad)} are no numbers from 0")
    if never := [name for name in plans if not weights.get(name, 1.0)]:
        raise ValueError(
            f"plans of weight 0 ({', '.join(never)}) would be published and never trained; raise "
            "their weights or leave them out"
        )
    if weights and not plans:
        raise ValueError(f"weights {dict(weights)} without plans: name the plans too")


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


Checkpointing = bool | Literal["selective"]
Decay = Annotated[float, Field(ge=0, lt=1)]
Expression = Annotated[str, AfterValidator(_expression)]


class LoraSettings(Config):
    """The adapter; the defaults are LLaVA-1.5's published recipe (r 128, alpha 256)."""

    rank: int = Field(128, gt=0)
    """Rank of the two factors."""
    alpha: float = Field(256, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: Expression = DECODER_LINEARS
    """Regular expression that a module's full name must match; the default is the decoder alone."""


class OffloadSettings(Config):
    """Where ZeRO keeps what a GPU has no room for: `cpu`, or a folder on a local NVMe disk."""

    optimizer: str | None = None
    """`cpu` or a folder for the optimizer's moments (zero1 to zero3); null: on the device."""
    parameters: str | None = None
    """`cpu` or a folder for the parameters (zero3 only); null: on the device."""


class DistillSettings(Config):
    """Self-distillation: the model learns from its own answers under less compression."""

    weight: float = Field(1.0, gt=0)
    """Weight w of the divergence: loss = cross entropy + w * T^2 * KL(teacher || student), all
    means over supervised tokens."""
    temperature: float = Field(1.0, gt=0)
    """T, by which the logits of both are divided before the divergence."""
    teacher: str = "dense"
    """`dense`: the base itself, adapter disabled and no plan. Or a milder plan than the student's,
    such as `2:1/2`: the same weights with the adapter, under that plan."""

    @field_validator("teacher")
    @classmethod
    def _is_dense_or_a_plan(cls, teacher: str) -> str:
        from adsc.plan import PruningPlan  # adsc loads torch

        if teacher != DENSE and not PruningPlan.parse(teacher).stages:
            raise ValueError("a teacher without a plan is written dense")
        return teacher


def teacher_plan(distill: DistillSettings) -> "PruningPlan":
    """The plan that a teacher runs with; empty where it is dense."""
    from adsc.plan import PruningPlan

    return PruningPlan() if distill.teacher == DENSE else PruningPlan.parse(distill.teacher)


class GrowSettings(Config):
    """Compression that grows from step to step, towards the plan (adsc.curriculum.grown_plan)."""

    extreme: float = Field(1.5, gt=1)
    """The first step's keep ratios are the plan's to the power 1 / extreme."""
    settle: float = Field(0.25, ge=0, lt=1)
    """Share of the steps, the last ones, that train with the plan itself."""


class TrainConfig(MethodConfig):
    """One training stage."""

    plan: Plan = ""
    """Pruning plan while training, such as `2:1/4,5:1/4`; empty trains without any drop."""
    method: PeerConfig | None = Field(None, json_schema_extra=ADDED)
    """A peer while training, instead of a plan."""
    plans: dict[PlanName, str] = Field({}, json_schema_extra=ADDED)
    """Plans by name, one of which each step draws; `plan` is one of them. Empty: each step trains
    with `plan`."""
    weights: dict[PlanName, float] = Field({}, json_schema_extra=ADDED)
    """How often each of `plans` is drawn, in proportion; 1 where a name is left out. `dense` stands
    for steps without a plan, of which there are none unless it is named."""
    grow: GrowSettings | None = Field(None, json_schema_extra=ADDED)
    """Compression that grows from step to step towards `plan`; null trains with it throughout."""
    distill: DistillSettings | None = Field(None, json_schema_extra=ADDED)
    """Self-distillation under the plan or peer; null trains on the data's answers alone."""
    steps: int | None = Field(100, gt=0)
    """Optimizer steps; null where `epochs` is set."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the stage's share of the data; null where `steps` is set."""
    data_share: float = Field(1.0, gt=0, le=1)
    """Share of the conversations that the stage draws from; which ones follows from `seed`."""
    batch_size: int = Field(32, gt=0)
    """Conversations in one optimizer step, over all workers."""
    group_by_length: bool = False
    """Steps of rows of similar length: less padding, somewhat less random batches."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of the adapter."""
    tune_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the parts tuned in full; null: the adapter's."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises to its peak; it then falls as a half cosine."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moment."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; above it the gradient is scaled down."""
    lora: LoraSettings | None = LoraSettings()
    """The adapter; null trains none."""
    tune: tuple[Expression, ...] = ()
    """Regular expressions of parameters that are tuned in full, such as the projector's."""
    carry_optimizer: bool = False
    """Start with the optimizer's moments of the stage before, and leave this stage's to the next.
    Both stages need it; the schedule starts anew in any case."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 holds the frozen base in bf16 and computes under autocast; trained weights stay fp32."""
    seed: int = Field(0, ge=0, lt=2**53)
    """Order of the data, the adapter's initial values and dropout."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        "ddp", json_schema_extra=OPERATIONAL
    )
    """What workers share: ddp nothing but gradients; DeepSpeed's ZeRO 1 also splits the optimizer
    among them, 2 the gradients, 3 the parameters. The losses are the same."""
    offload: OffloadSettings = Field(OffloadSettings(), json_schema_extra=OPERATIONAL)
    """What ZeRO moves off the device."""
    accumulate: int = Field(1, gt=0, json_schema_extra=OPERATIONAL)
    """Micro-batches into which each worker splits its share of a step; saves memory."""
    micro_tokens: int | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    """Most positions (padding included) of a micro-batch: instead of `accumulate`, as many
    micro-batches as that takes."""
    packing: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Rows of a micro-batch follow one another in one row without padding; only with attention
    backends that keep them apart."""
    activation_checkpointing: Checkpointing = Field(False, json_schema_extra=OPERATIONAL)
    """Recompute activations in the backward pass instead of keeping them; saves memory, costs up to
    a third more time. selective keeps the results of attention and of large matrix products and
    recomputes what is cheap."""
    memory: Literal["auto"] | None = Field(None, json_schema_extra=OPERATIONAL)
    """auto: `micro_tokens` and `activation_checkpointing` are chosen for the workers' GPUs, in the
    place of what they and `accumulate` are set to; on a CPU nothing is chosen."""
    attention: Literal[
        "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"
    ] = Field("sdpa", json_schema_extra=OPERATIONAL)
    """Attention kernel, by transformers' name. Where flash attention can't run (its package, a GPU
    or bf16 is missing), the next older one or sdpa does, with a warning."""
    kernels: Literal["liger"] | None = Field(None, json_schema_extra=OPERATIONAL)
    """liger: its fused RMSNorm, SwiGLU and rotary embedding (package liger-kernel, on a GPU); null:
    torch's. Not with `compile`, which fuses the same."""
    compile: Literal["layers"] | None = Field(None, json_schema_extra=OPERATIONAL)
    """layers: torch.compile for each decoder layer, whatever the plan of a step; null runs eagerly.
    Compiled dropout draws other numbers. Not with zero3."""
    checkpoint_every: int = Field(100, gt=0, json_schema_extra=OPERATIONAL)
    """Optimizer steps between checkpoints; at most that many are lost when a process dies."""
    keep_checkpoints: int = Field(2, gt=0, json_schema_extra=OPERATIONAL)
    """Checkpoints that stay; older ones are deleted."""
    log_every: int = Field(10, gt=0, json_schema_extra=OPERATIONAL)
    """Optimizer steps between lines in the tracking server."""
    diverged_norm: float = Field(100.0, gt=1, json_schema_extra=OPERATIONAL)
    """A gradient norm of more than this many times the median of the last 50 steps stops the stage
    (from the 20th step on)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps = {self.steps} and epochs = {self.epochs}: set one and the other to null"
            )
        if self.plans and (self.grow or self.method):
            other = "grow" if self.grow else "method"
            raise ValueError(f"plans and {other}: steps either draw plans or they don't; set one")
        if self.grow and self.method:
            raise ValueError("grow and method: a peer's choice does not grow; set plan, or no grow")
        check_plans(self.plans, self.weights)
        self.check_teacher()
        if self.strategy == "ddp" and (self.offload.optimizer or self.offload.parameters):
            raise ValueError("offload needs a ZeRO strategy: set strategy to zero2 or zero3")
        if self.strategy != "zero3" and self.offload.parameters:
            raise ValueError(
                f"offload.parameters needs strategy zero3, which splits them; it is {self.strategy}"
            )
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                f"compile = {self.compile} with activation_checkpointing = selective, which looks "
                "at operators that a compiled layer no longer has: set one of them to null or false"
            )
        if self.compile and self.kernels:
            raise ValueError(
                f"compile = {self.compile} with kernels = {self.kernels}: both fuse the same "
                "operators; set one of them to null"
            )
        if self.compile and self.strategy == "zero3":
            raise ValueError(
                f"compile = {self.compile} with strategy zero3, which gathers the parameters of a "
                "layer while it runs and can't be compiled: choose ddp, zero1 or zero2, or set "
                "compile to null"
            )
        return self

    @classmethod
    def llava15(cls, **changes: Any) -> Self:
        """LLaVA-1.5's published LoRA recipe (r 128, alpha 256, rate 2e-4, projector 2e-5, batch
        128, one epoch), with fields changed by name."""
        recipe: dict[str, Any] = {
            "steps": None,
            "epochs": 1.0,
            "batch_size": 128,
            "learning_rate": 2e-4,
            "tune": (PROJECTOR,),
            "tune_learning_rate": 2e-5,
            "warmup": 0.03,
            "betas": (0.9, 0.999),
            "lora": LoraSettings(rank=128, alpha=256, dropout=0.05),
            "precision": "bf16",
            "activation_checkpointing": True,
        }
        return cls(**recipe | changes)

    def check_teacher(self) -> None:
        """Raise PlanError if the teacher has fewer vision tokens at any layer than a plan that it
        teaches. Nothing is known of a plan that is still to be found."""
        if self.distill is None or not isinstance(self.plan, str):
            return
        from adsc.curriculum import grown_plan
        from adsc.plan import PlanError, PruningPlan

        teacher = teacher_plan(self.distill)
        students = [PruningPlan.parse(plan) for plan in self.plans.values() or [self.plan]]
        if self.grow is not None:
            students = [grown_plan(plan, 0, self.grow.extreme) for plan in students]
        for student in filter(lambda plan: plan.stages, students):
            for layer, _ in teacher.stages:
                own, other = teacher.share_at(layer), student.share_at(layer)
                if own < other:
                    raise PlanError(
                        f"distill.teacher = {self.distill.teacher} keeps {own} of the vision "
                        f"tokens at layer {layer}, and the plan {student}, which it teaches, "
                        f"{other}: name a milder teacher, or dense"
                    )

    @property
    def zero_stage(self) -> int:
        """1 to 3 under ZeRO, 0 under DDP."""
        return 0 if self.strategy == "ddp" else int(self.strategy.removeprefix("zero"))

    def rows_of(self, rows: int) -> int:
        """How many of a split's rows the stage draws from."""
        return max(1, round(rows * self.data_share))

    def steps_for(self, rows: int) -> int:
        """Optimizer steps over a split of `rows` rows."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.rows_of(rows) * (self.epochs or 0) / self.batch_size - 1e-9))
