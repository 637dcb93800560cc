"""The study on a cluster: Ray Tune places trials, reuses their actors and stops them; what is tried
next, and what is kept, is ours.

What Tune does: fractional resources, concurrency, one actor for many trials, a lost machine's
trials again. What is not left to it, and why, stands in docs/search.md: proposals (OptunaSearch
can't be told where a projected point really was), ASHA's memory and restoring (both would need
Tune's pickles, where a file per finished trial says all).
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline import record as records
from pipeline.search.study import Proposal, Rung, Study, Trial
from pipeline.search.trial import Bench, Job, Reached
from pipeline.store import Store

MAX_LOST = 3
"""How often a trial starts again whose worker or machine was lost."""


class Worker(tune.Trainable):
    """The actor: one Bench, for one trial after the other; a step is a rung."""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]
        self._job = job
        self._bench: Bench | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._end()

    def _begin(self, config: dict[str, Any]) -> None:
        self._proposal = Proposal(*config["proposal"])
        self._rungs: Iterator[Reached] | None = None
        self._reached: list[Rung] = []
        self._started = time.time()

    def _end(self) -> None:
        if self._rungs is not None:
            self._rungs.close()  # type: ignore[attr-defined]  # a generator: it gives the base back

    def step(self) -> dict[str, Any]:
        number = self._proposal.number
        node = ray.util.get_node_ip_address()
        told: dict[str, Any] = {"started": self._started, "worker": f"{node}/{os.getpid()}"}
        try:
            self._bench = self._bench or Bench(self._job)
            if self._rungs is None:
                self._rungs = self._bench.trial(number, self._proposal.plan)
            reached = next(self._rungs)
        # Whatever a model, a plan or a library raises ends this trial, and no other.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {error}"
            return told | {"failed": records.clean(reason), "done": True}
        seconds = time.time() - self._started
        self._reached.append(Rung(reached.resource, reached.judged.value, seconds))
        told |= {"rungs": [list(rung) for rung in self._reached], "rows": [], "confirm": []}
        if reached.confirm is not None:
            told["rows"] = reached.judged.sums.tolist()
            told["confirm"] = reached.confirm.sums.tolist()
            told["weights"] = reached.confirm.weights.tolist()
        return told | {"done": reached.confirm is not None}


class Conductor:
    """Between a study and Tune: hears of results, keeps finished trials in the store."""

    def __init__(
        self, study: Study, store: Store, told: Callable[[Trial], None] = lambda trial: None
    ) -> None:
        self.study, self.store, self._told = study, store, told
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Proposal | None:
        proposal = self.study.next()
        if proposal is not None:
            self._numbers[trial_id] = proposal.number
        return proposal

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        if "failed" in result or result.get("done"):
            return True
        *_, (_, value, _) = result["rungs"]
        number = self._numbers[trial_id]
        return self.study.goes_on(number, len(result["rungs"]) - 1, value)

    def over(self, trial_id: str, result: dict[str, Any] | None, lost: str = "") -> None:
        """Once for each trial: its record is written, then the study knows of it."""
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        proposal, result = self.study.running[number], result or {}
        reason = lost or result.get("failed", "")
        state: Any = "failed" if reason else "finished" if result.get("confirm") else "stopped"
        trial = Trial(
            number=number,
            name=proposal.name,
            plan=proposal.plan,
            cost=proposal.cost,
            known=proposal.known,
            state=state,
            reason=reason,
            rungs=tuple(Rung(*rung) for rung in result.get("rungs", ())),
            rows=tuple(result.get("rows", ())),
            confirm=tuple(result.get("confirm", ())),
            weights=tuple(result.get("weights", ())),
            worker=result.get("worker", ""),
            started=result.get("started", time.time()),
            ended=time.time(),
        )
        self.store.create(key_of(number), json.dumps(trial.to_dict()).encode())
        self.study.over(trial)
        self._told(trial)


def key_of(number: int) -> str:
    """Where a finished trial is kept, below the search's folder."""
    return f"trials/{number:05d}.json"


def kept_trials(store: Store) -> list[Trial]:
    """The trials that are over, in the order in which they ended."""
    found = [store.read(entry.key) for entry in store.list("trials")]
    trials = [Trial.from_dict(json.loads(data)) for data in found if data is not None]
    return sorted(trials, key=lambda trial: trial.ended)


class _Proposals(Searcher):
    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self._conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        proposal = self._conductor.suggest(trial_id)
        return Searcher.FINISHED if proposal is None else {"proposal": tuple(proposal)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if not error:
            self._conductor.over(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: finished trials say all."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it for a restore that is not used


class _Halving(FIFOScheduler):
    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self._conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self._conductor.goes_on(trial.trial_id, result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Losses(tune.Callback):
    """Trials whose worker is gone for good: the searcher isn't told why."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error() or "its worker was lost"
        lost = str(error).strip().partition("\n")[0]
        self._conductor.over(trial.trial_id, trial.last_result, records.clean(lost))

    def __getstate__(self) -> dict[str, Any]:
        return {}


def run_trials(conductor: Conductor, job: Job, folder: tuple[str, str]) -> None:
    """Run what is left of a study, several trials at a time.

    Args:
        folder: (storage_path, name) for what Tune writes; nothing reads it again.
    """
    study, run = conductor.study, job.run
    left = study.config.trials - len(study.trials)
    if left <= 0:
        return
    several = study.config.workers_per_trial > 1
    # Where Ray Train's workers do the work, the trial's own process only waits.
    share = {"CPU": 0.1} if several else {"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker}
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(run.most_workers)
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    path, name = folder
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(Worker, job=job), share),
        tune_config=tune.TuneConfig(
            search_alg=_Proposals(conductor),
            scheduler=_Halving(conductor),
            num_samples=left,
            max_concurrent_trials=run.most_workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"{name}/tune-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_LOST),
            callbacks=[_Losses(conductor)],
        ),
    )
    tuner.fit()
