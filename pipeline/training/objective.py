"""The loss of one micro-batch: cross entropy, and what a teacher's predictions add to it.

    loss = CE + weight * T^2 * KL(teacher || student)

Both are sums over the micro-batch's supervised positions, divided by the supervised tokens of the
global batch. So what workers and micro-batches hand in adds up to the loss of the global batch.

The teacher is the model itself: no second copy, and of its call nothing stays but hidden states at
supervised positions. Logits exist a chunk of positions at a time and are computed again in the
backward pass. The objective takes the place of a model's own `forward`, so that DDP, DeepSpeed and
autocast find in one call all that belongs to a step.

Legend: L labels, N those that the student predicts, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

import adsc
from adsc.attachment.attach import base_model, check_plan
from adsc.attachment.supervised import head, hidden_states
from adsc.method import Method
from adsc.plan import PruningPlan
from pipeline.data.conversations import IGNORED
from pipeline.training.config import DENSE, DistillSettings, teacher_plan
from pipeline.training.throughput import Stopwatch

CHUNK = 2**25
"""Most logits that exist at once: 128 MiB in fp32."""


class Losses(NamedTuple):
    """What a micro-batch adds to the loss of its step."""

    loss: Tensor
    """To be differentiated."""
    cross_entropy: Tensor
    """The part of the data's answers, without a gradient."""
    divergence: Tensor
    """T^2 * KL(teacher || student), not weighted, without a gradient."""


class Objective:
    """Stands in for the forward of a model that is trained.

    Args:
        model: with its adapter and the plan or peer that it is trained with.
        distill: None trains on labels alone.
        device: that trains.
        in_step: whether all workers must call the head equally often (ZeRO-3 gathers it each time).
    """

    def __init__(
        self, model: nn.Module, distill: DistillSettings | None, device: torch.device, in_step: bool
    ) -> None:
        self._model, self._distill, self._in_step = model, distill, in_step
        self._teacher = teacher_plan(distill) if distill is not None else PruningPlan()
        check_plan(model, self._teacher)
        self._head: Callable[[Tensor], Tensor] = head(model)
        self._vocabulary: int = base_model(model).config.get_text_config().vocab_size
        self.teaching = Stopwatch(device)
        """Time that teachers took."""

    def install(self, *, half: bool, compiled: bool = False) -> None:
        """Take the place of the model's forward.

        Args:
            half: compute under bf16 autocast.
            compiled: compile each decoder layer.
        """
        if compiled:
            adsc.compile_layers(self._model)
        forward: Any = self.__call__
        if half:
            # Inside the module, where DeepSpeed leaves it alone.
            forward = torch.autocast(self.teaching.device.type, dtype=torch.bfloat16)(forward)
        self._model.forward = forward

    def remove(self) -> None:
        """Give the model and its layers their own forward back."""
        adsc.uncompile_layers(self._model)
        vars(self._model).pop("forward", None)

    def __call__(
        self,
        *,
        labels: Tensor,
        supervised: int,
        plan: PruningPlan | Method,
        taught: Tensor | None = None,
        places: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The losses of a micro-batch, as a mapping, which DDP and DeepSpeed look into.

        Args:
            labels: (B, S).
            supervised: supervised tokens of the global batch.
            plan: of this step.
            taught: (L, D) what `teach` of a dense teacher found for these inputs; None runs the
                teacher.
            places: (L,) of the labels among B * S; None looks for them, and waits for the device.
            inputs: the model's other inputs.
        """
        if places is None:
            places = _places(labels)
        given = inputs | {"labels": labels, "use_cache": False}
        distill = self._distill if plan.stages else None
        goals, known = taught, None
        if distill is not None and goals is None:
            goals, known = self.teach(given, places)
        with adsc.running(self._model, plan):
            made = hidden_states(self._model, given)
        before = made.before(labels.shape[1]).flatten().index_select(0, places)
        # A label that no state predicts counts for nothing.
        targets = labels.flatten().index_select(0, places).masked_fill(before < 0, IGNORED)
        states = made.at(before.clamp(min=0))
        if distill is None:
            goals = None
        elif goals is not None:
            known = before >= 0 if known is None else known & (before >= 0)
        sums = self._sums(states, targets, goals, known) / supervised
        weight = distill.weight if distill is not None else 0.0
        loss = sums[0] + weight * sums[1] if distill is not None else sums[0]
        return Losses(loss, sums[0].detach(), sums[1].detach())._asdict()

    def teach(
        self, given: Mapping[str, Any], places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The teacher's states (L, D) before each of the L labels, row by row, and (L,) where there
        are such: a teacher that dropped what stands before a label says nothing of it.

        Args:
            given: a model's inputs with `labels`.
            places: (L,) of the labels among B * S; None looks for them.
        """
        running = adsc.running(self._model, self._teacher)
        with self.teaching, self._as_teacher(self._model), running:
            made = hidden_states(self._model, given)
        labels = given["labels"]
        places = _places(labels) if places is None else places
        numbers = made.before(labels.shape[1]).flatten().index_select(0, places)
        return made.at(numbers.clamp(min=0)), numbers >= 0

    def _sums(
        self, states: Tensor, targets: Tensor, goals: Tensor | None, known: Tensor | None
    ) -> Tensor:
        """(2,) cross entropy and divergence, summed over positions; see `_part`."""
        count = max(1, math.ceil(len(states) * self._vocabulary / CHUNK))
        if self._in_step:
            count = _most(count, states.device)
        parts: list[list[Any]] = [
            [None] * count if one is None else list(one.tensor_split(count))
            for one in (states, targets, goals, known)
        ]
        # Computed again in the backward pass, unless the logits are few and only the student's.
        again = count > 1 or goals is not None
        total = torch.zeros(2, device=states.device)
        for part in zip(*parts, strict=True):
            if again:
                total = total + checkpoint(self._part, *part, use_reentrant=False)
            else:
                total = total + self._part(*part)
        return total

    def _part(
        self, states: Tensor, targets: Tensor, goals: Tensor | None, known: Tensor | None
    ) -> Tensor:
        """(2,) cross entropy and divergence of some positions.

        Args:
            states: (N, D) the student's.
            targets: (N,) tokens.
            goals: (N, D) the teacher's states.
            known: (N,) where there are such; None: everywhere.
        """
        logits = self._head(states).float()
        entropy = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        if goals is None or self._distill is None:
            return torch.stack([entropy, torch.zeros_like(entropy)])
        heat = self._distill.temperature
        output = base_model(self._model).lm_head
        with self._as_teacher(output):
            goal = log_softmax(self._head(goals).float() / heat, dim=-1)
        each = kl_div(log_softmax(logits / heat, dim=-1), goal, reduction="none", log_target=True)
        rows = each.sum(-1) if known is None else each.sum(-1) * known
        return torch.stack([entropy, heat**2 * rows.sum()])

    @contextmanager
    def _as_teacher(self, module: nn.Module) -> Iterator[None]:
        """No gradient, no dropout, and no adapter where the teacher is the base."""
        assert self._distill is not None
        adapters = []
        if self._distill.teacher == DENSE:
            adapters = [one for one in module.modules() if isinstance(one, BaseTunerLayer)]
        training = [one for one in module.modules() if one.training]
        for layer in adapters:
            layer.enable_adapters(False)
        for one in training:
            one.training = False
        try:
            with torch.no_grad(), _uncached_autocast():
                yield
        finally:
            for one in training:
                one.training = True
            for layer in adapters:
                layer.enable_adapters(True)


def _places(labels: Tensor) -> Tensor:
    """(L,) where labels are among B * S."""
    return (labels != IGNORED).flatten().nonzero().squeeze(1)


def _uncached_autocast() -> Any:
    """Autocast as it is, without its cache: weights cast where there is no gradient would be found
    by the student, and never trained."""
    for kind in ("cuda", "cpu"):
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
    return nullcontext()


def _most(count: int, device: torch.device) -> int:
    """The largest count among the workers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)
