"""Config of a search for a placement; a separate module, so that recipes don't import Optuna.

A config says what is computed. The run's context sets how many trials run at once, and where.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config import ADDED, OPERATIONAL, Config
from pipeline.search.keys import Range, full_key, read_range

Budget = float | tuple[float, float] | None
UNITS = {
    "average": "vision tokens on average",
    "gflops": "GFLOPs",
    "kv_mib": "MiB of KV cache",
    "prefill_ms": "ms of prefill",
}
"""Budget -> unit; a search has one budget."""


class SearchConfig(Config):
    """Where and how much to prune: the space, the budget that all its plans meet, and the study."""

    average: Budget = None
    """Budget: vision tokens of one picture that enter a decoder layer, mean over layers. A pair
    (least, most) of this or of another budget searches the front of objective against cost."""
    gflops: Budget = None
    """Budget: GFLOPs (adsc.estimate_cost, exact) of a prefill of one picture and `text_tokens`."""
    kv_mib: Budget = None
    """Budget: MiB of keys and values after that prefill."""
    prefill_ms: Budget = None
    """Budget: milliseconds of a prefill of `batch_size` questions, as measured on a worker."""
    tolerance: float = Field(0.01, ge=0, lt=1)
    """Allowed distance of a plan from a single budget, as a share of it."""
    text_tokens: int = Field(101, ge=0)
    """Tokens beside the picture's, for `gflops` and `kv_mib`."""
    image_size: tuple[int, int] | None = None
    """Height and width of a picture in pixels, for models whose token count depends on it."""

    drops: tuple[int, ...] = Field((1, 2, 3), min_length=1)
    """Numbers of drops to try."""
    keeps: tuple[str, ...] = Field(("1/8", "1/4", "1/3", "1/2", "2/3", "3/4"), min_length=1)
    """Keep ratios of a drop to try; the drops of a plan may have different ones."""
    anchors: tuple[Literal["last", "first", "center", "grid"], ...] = Field(
        ("last", "first", "center"), min_length=1
    )
    """Anchors to try."""
    pool: Literal["tiles", "runs"] | None = Field(None, json_schema_extra=ADDED)
    """Plans that average: groups on the lattice (`tiles`) or of the sequence (`runs`) become
    their mean. Placements whose tiles are all whole come first. None: tokens are dropped."""
    exit_layer: int | None = Field(None, gt=0, json_schema_extra=ADDED)
    """All plans end with an exit: from this layer on no vision token is left. It is not one of
    the `drops`."""
    first_layer: int = Field(0, ge=0)
    """The first layer at which a drop is legal; above 0 for models that add vision features to
    their first layers (Qwen3-VL)."""

    plan: str = Field("", json_schema_extra=ADDED)
    """The plan of all trials if only training keys are searched; then there is no
    budget."""
    over: dict[str, str] = Field({}, json_schema_extra=ADDED)
    """Keys of the training that trials vary, with their ranges: `{"train.learning_rate":
    "1e-4..1e-2,log", "train.lora.rank": "8,16,32", "train.distill.weight": "0..1"}`."""
    known: tuple[str, ...] = ()
    """Further plans to try first, besides the known placements (Space.known)."""
    trials: int = Field(64, gt=0)
    """Plans to try, the known ones included."""
    objective: Literal["loss", "accuracy"] = "loss"
    """The objective on the validation conversations: mean loss of an answer token, or share of
    right answers."""
    fidelity: Literal["untrained", "lora", "curriculum"] = "untrained"
    """Training of a trial before it is scored: none; an adapter for the last of `rungs`
    steps; or the workflow's whole curriculum."""
    rungs: tuple[int, ...] = ()
    """Points at which a trial is compared and may be stopped: training steps (`lora`) or
    validation conversations (`untrained`), ascending. Empty: it runs to its end; a curriculum's
    rungs are its stages."""
    eta: float = Field(3, gt=1)
    """At each rung the best 1/eta of the trials that reached it continue (ASHA)."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Search algorithm: Optuna's TPE (on both objectives of a front), or uniform draws."""
    startup: int = Field(10, ge=0)
    """Uniform draws before the sampler proposes, the known plans not counted."""
    rows: int = Field(256, gt=0)
    """Conversations on which trials are scored; held out of the training split."""
    confirm_rows: int = Field(256, gt=0)
    """Further held-out ones to compare the best plan with the best known one at the end; the
    search never sees them."""
    train_rows: int = Field(20_000, gt=0)
    """Maximum number of the other conversations that trials train on."""
    batch_size: int = Field(32, gt=0)
    """Conversations in a validation batch, and in the timed prefill."""
    max_new_tokens: int = Field(8, gt=0)
    """Longest answer in tokens, for `accuracy`."""
    seed: int = Field(0, ge=0)
    """Seed of draws, of the sampler, and of the held-out conversations."""
    workers_per_trial: int = Field(1, gt=0, json_schema_extra=OPERATIONAL)
    """Workers of a trial's training; above 1 it runs on Ray Train."""

    @field_validator("over")
    @classmethod
    def _are_ranges(cls, over: dict[str, str]) -> dict[str, str]:
        over = {full_key(key): text for key, text in over.items()}
        for key, text in over.items():
            read_range(key, text)
        return over

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.over and self.fidelity == "untrained":
            raise ValueError(
                f"over = {', '.join(self.over)} and fidelity = untrained contradict: only trials "
                "that train differ by it; set search.fidelity=lora and search.rungs"
            )
        if self.plan and not self.over:
            raise ValueError(f"plan = {self.plan!r} leaves nothing to search: set search.over")
        given = [name for name in UNITS if getattr(self, name) is not None]
        if len(given) > 1:
            settings = " and ".join(f"{name} = {getattr(self, name)}" for name in given)
            raise ValueError(f"{settings} contradict: a search has one budget, set only one")
        if self.plan and given:
            raise ValueError(
                f"plan = {self.plan!r} and {given[0]} = {getattr(self, given[0])} contradict: "
                "search plans at a budget, or training keys with one plan"
            )
        for name in given:
            low, high = _pair(getattr(self, name))
            if not 0 < low <= high or (low == high and isinstance(getattr(self, name), tuple)):
                raise ValueError(
                    f"{name} = {getattr(self, name)}: a budget is above 0, a range (least, most)"
                )
        if self.pool and "grid" in self.anchors:
            raise ValueError(
                f"anchors = {self.anchors} and pool = {self.pool} contradict: a mean takes the "
                "position of a member of its group; leave grid out"
            )
        if any(one < 1 for one in self.drops) or len(set(self.drops)) < len(self.drops):
            raise ValueError(f"drops = {self.drops}: different whole numbers from 1")
        if list(self.rungs) != sorted(set(self.rungs)) or any(rung < 1 for rung in self.rungs):
            raise ValueError(f"rungs = {self.rungs} must ascend from 1")
        if self.rungs and self.fidelity == "curriculum":
            raise ValueError(
                f"rungs = {self.rungs} and fidelity = curriculum contradict: the rungs of a "
                "curriculum are its stages; leave rungs out"
            )
        if self.rungs and self.fidelity == "untrained" and self.rungs[-1] > self.rows:
            raise ValueError(
                f"rungs = {self.rungs} and rows = {self.rows} contradict: an untrained trial's "
                "rungs are validation conversations, of which there are fewer"
            )
        if self.workers_per_trial > 1 and self.fidelity == "untrained":
            raise ValueError(
                f"workers_per_trial = {self.workers_per_trial} and fidelity = untrained "
                "contradict: only training is shared by workers"
            )
        return self

    @property
    def budget(self) -> tuple[str, float, float]:
        """Name, least and most of the budget.

        Raises:
            ValueError: no budget is set.
        """
        for name in UNITS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                return name, *value
            if value is not None:
                return name, value * (1 - self.tolerance), value * (1 + self.tolerance)
        if self.plan:
            return "average", 0.0, float("inf")
        raise ValueError(f"a search needs a budget: set one of {', '.join(UNITS)}")

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges of the keys in `over`."""
        return {key: read_range(key, text) for key, text in self.over.items()}

    @property
    def front(self) -> bool:
        """Whether the cost is an objective too."""
        return isinstance(getattr(self, self.budget[0]), tuple)

    @property
    def sign(self) -> int:
        """Factor of the objective so that less is better."""
        return 1 if self.objective == "loss" else -1


def _pair(value: Any) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, value)
