"""A study: which plan to try next, whether a trial continues after a rung, and the best trials.

Everything follows from the finished and the running trials, so a killed study resumes
from its records alone. Optuna proposes points, each time from the trials so
far; it keeps no state between proposals. Nothing here runs a trial, or depends on Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from adsc.plan import PruningPlan
from pipeline.search.config import SearchConfig
from pipeline.search.keys import Settings, drawn
from pipeline.search.space import SHARES, Candidate, Space

State = Literal["finished", "stopped", "failed"]


class Proposal(NamedTuple):
    """A trial to run."""

    number: int
    name: str
    """Name of a known placement, else the proposer."""
    plan: str
    cost: float
    code: tuple[float, ...]
    known: bool
    settings: Settings = ()
    """Settings of the training; empty: the workflow's own."""


class Rung(NamedTuple):
    """A trial's result at a rung."""

    resource: int
    """Training steps or validation conversations."""
    value: float
    """The objective on the validation conversations seen so far."""
    seconds: float
    """Wall time of the trial so far."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial that is over."""

    number: int
    name: str
    plan: str
    cost: float
    known: bool
    settings: Settings = ()
    state: State
    reason: str = ""
    """Why it failed."""
    rungs: tuple[Rung, ...] = ()
    rows: tuple[float, ...] = ()
    """If finished: each validation conversation's sum (of losses, of right answers)."""
    confirm: tuple[float, ...] = ()
    """The same for the held-out conversations that the search doesn't see."""
    weights: tuple[float, ...] = ()
    """Number of terms in each sum of `confirm`: answer tokens, or questions."""
    worker: str = ""
    started: float = 0.0
    """Seconds since the epoch."""
    ended: float = 0.0

    @property
    def value(self) -> float:
        """The objective at the last rung; NaN if it failed before the first."""
        return self.rungs[-1].value if self.rungs else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self) | {"rungs": [list(rung) for rung in self.rungs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `to_dict`."""
        lists: dict[str, Any] = {name: tuple(data[name]) for name in ("rows", "confirm", "weights")}
        lists["settings"] = tuple((key, value) for key, value in data.get("settings", ()))
        return cls(**{**data, **lists, "rungs": tuple(Rung(*rung) for rung in data["rungs"])})


@dataclass
class Study:
    """The trials so far, and the next one."""

    space: Space
    config: SearchConfig
    trials: list[Trial] = field(default_factory=list)
    """Trials that are over, including those of earlier processes."""
    own: Settings = ()
    """The workflow's own values of `config.over`, if they are in its ranges."""

    def __post_init__(self) -> None:
        self.known = self.space.known()
        self.ranges = self.config.ranges
        self.running: dict[int, Proposal] = {}
        self._rungs: dict[int, dict[int, tuple[float, float]]] = {}
        for trial in self.trials:
            for rung, reached in enumerate(trial.rungs):
                self._seen(rung, trial.number, reached.value, trial.cost)

    def next(self) -> Proposal | None:
        """The next trial, which counts as running from now on; None if none is left."""
        over = {trial.number for trial in self.trials} | self.running.keys()
        number = next((n for n in range(self.config.trials) if n not in over), None)
        if number is None:
            return None
        tried = {trial.plan for trial in self.trials} | {it.plan for it in self.running.values()}
        if self.ranges:  # a plan may come again, with other settings
            tried = set()
        if number < len(self.known):
            name, found = list(self.known.items())[number]
            proposal = Proposal(number, name, *found, known=True)
        else:
            at_random = number < len(self.known) + self.config.startup
            who = "random" if at_random else self.config.sampler
            rng = np.random.default_rng([self.config.seed, number])
            settings: Settings = ()
            if who == "random":
                candidate = self.space.draw(rng, tried)
                settings = drawn(self.ranges, rng)
            else:
                candidate, settings = self._ask(number, tried)
            if candidate is None:
                return None
            proposal = Proposal(number, who, *candidate, known=False, settings=settings)
        self.running[number] = proposal
        return proposal

    def _ask(self, number: int, tried: set[str]) -> tuple[Candidate | None, Settings]:
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = [f"depth of {share:g}" for share in SHARES]
        anchors = self.space.anchors
        space: dict[str, Any] = dict.fromkeys(names, FloatDistribution(0, 1))
        if len(anchors) > 1:
            space["anchor"] = CategoricalDistribution(anchors)
        space |= {key: one.distribution() for key, one in self.ranges.items()}
        sampler = optuna.samplers.TPESampler(
            seed=(1_000_003 * self.config.seed + number) % 2**32,  # of 32 bits in numpy
            n_startup_trials=0,
            multivariate=True,
            constant_liar=True,
        )
        study = optuna.create_study(
            sampler=sampler, directions=["minimize"] * (2 if self.config.front else 1)
        )

        def tell(plan: str, settings: Settings, **outcome: Any) -> None:
            settings = settings or self.own
            if self.ranges and not settings:
                return  # of a training outside of the ranges
            parsed = PruningPlan.parse(plan)
            # The trial's real position; the sampler's point was only near it.
            point: dict[str, Any] = dict(zip(names, self.space.code(parsed.stages), strict=True))
            point |= {"anchor": parsed.anchor} if len(anchors) > 1 else {}
            point |= dict(settings)
            study.add_trial(create_trial(params=point, distributions=space, **outcome))

        for trial in sorted(self.trials, key=lambda it: it.number):
            if trial.state == "failed" or PruningPlan.parse(trial.plan).anchor not in anchors:
                continue
            values = [self.config.sign * trial.value]
            if self.config.front:
                tell(trial.plan, trial.settings, values=[*values, trial.cost])
            elif trial.state == "finished":
                tell(trial.plan, trial.settings, values=values)
            else:
                steps = {it.resource: self.config.sign * it.value for it in trial.rungs}
                tell(trial.plan, trial.settings, state=TrialState.PRUNED, intermediate_values=steps)
        for proposal in self.running.values():
            if PruningPlan.parse(proposal.plan).anchor in anchors:
                tell(proposal.plan, proposal.settings, state=TrialState.RUNNING)
        point = study.ask(space).params
        code = [point[name] for name in names]
        settings = tuple((key, point[key]) for key in self.ranges)
        wanted = point.get("anchor", anchors[0])
        for anchor in (wanted, *(other for other in anchors if other != wanted)):
            if found := self.space.nearest(code, anchor, tried):
                return found, settings
        return None, settings

    def continues(self, number: int, rung: int, value: float) -> bool:
        """Whether a running trial continues after a rung: it is among the best 1/eta of those that
        reached it so far (ASHA, arXiv 1810.05934, in the variant that stops). Known placements
        always continue: the others are compared with them.

        On a front, one trial is better than another if it is in both objectives.
        """
        proposal = self.running[number]
        self._seen(rung, number, value, proposal.cost)
        if proposal.known:
            return True
        reached = self._rungs[rung]
        mine = reached[number]
        better = sum(self._better(other, mine) for other in reached.values())
        return better < len(reached) / self.config.eta

    def _seen(self, rung: int, number: int, value: float, cost: float) -> None:
        self._rungs.setdefault(rung, {})[number] = (self.config.sign * value, cost)

    def _better(self, one: tuple[float, float], other: tuple[float, float]) -> bool:
        if not self.config.front:
            return one[0] < other[0]
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    def over(self, trial: Trial) -> None:
        """A trial has ended."""
        self.running.pop(trial.number, None)
        self.trials.append(trial)

    def best(self) -> Trial | None:
        """The best finished trial; of a front, its knee."""
        return _pick(self.finished(), self.config)

    def best_known(self) -> Trial | None:
        """The best of the known placements."""
        return _pick([trial for trial in self.finished() if trial.known], self.config)

    def finished(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "finished"]

    def front(self) -> list[Trial]:
        """Finished trials of which none is better in both objectives, the cheapest first."""
        return front_of(self.finished(), self.config.sign)


def front_of(trials: Iterable[Trial], sign: int) -> list[Trial]:
    """Trials of which none has both a better value and a lower cost; the cheapest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda it: (it.cost, sign * it.value, it.number)):
        if not front or sign * trial.value < sign * front[-1].value:
            front.append(trial)
    return front


def _pick(trials: Sequence[Trial], config: SearchConfig) -> Trial | None:
    if not trials:
        return None
    if not config.front:
        return min(trials, key=lambda it: (config.sign * it.value, it.number))
    front = front_of(trials, config.sign)
    costs = np.array([it.cost for it in front])
    values = np.array([config.sign * it.value for it in front])

    def scaled(numbers: np.ndarray) -> np.ndarray:
        span = np.ptp(numbers)
        return (numbers - numbers.min()) / span if span else np.zeros_like(numbers)

    # The knee: farthest below the line from the cheapest to the best.
    return front[int(np.argmin(scaled(costs) + scaled(values)))]
