"""The study on a cluster: Ray Tune places trials, reuses actors, detects lost workers,
and stops the trials that the study stops.

The study chooses the next trial, the bench runs it; the store keeps a file
per trial that is over. docs/search-details.md explains why neither is left to Tune.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.durable import record as records
from pipeline.search.study import Proposal, Rung, Study, Trial
from pipeline.search.trial import Bench, Reached, SearchJob
from pipeline.store import Store

MAX_LOST = 3
"""How often a trial is restarted after its worker or machine was lost."""
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # unused tables of results
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # interrupts are the driver's
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Tune's state is never restored
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Tune reads them from the environment."""


class Progress(NamedTuple):
    """A worker's report on its trial after a rung, or at its end."""

    started: float
    worker: str
    rungs: tuple[Rung, ...]
    last: Reached | None = None
    """If the trial is finished."""
    failed: str = ""
    """Why it can't continue."""


class Worker(tune.Trainable):
    """The actor: one Bench, loaded once, for one trial after the other; a step is a rung."""

    def setup(self, config: dict[str, Any], job: SearchJob) -> None:  # type: ignore[override]
        """A first trial."""
        self._job = job
        self._bench: Bench | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._proposal, self._started = Proposal(*config["proposal"]), time.time()
        self._trial: Iterator[Reached] | None = None
        self._reached: list[Rung] = []

    def step(self) -> dict[str, Any]:
        """Run the trial up to its next rung."""
        import ray

        name = f"{ray.util.get_node_ip_address()}/{os.getpid()}"
        failed, reached = "", None
        try:
            self._bench = self._bench or Bench(self._job)
            if self._trial is None:
                one = self._proposal
                self._trial = self._bench.trial(one.number, one.plan, one.settings)
            reached = next(self._trial)
            seconds = time.time() - self._started
            self._reached.append(Rung(reached.resource, reached.judged.value, seconds))
        # Any error of a model, a plan or a library ends this trial only.
        except Exception as error:  # noqa: BLE001
            failed = records.clean(f"{type(error).__name__}: {error}")
        last = reached if reached is not None and reached.confirm is not None else None
        progress = Progress(self._started, name, tuple(self._reached), last, failed)
        return {"progress": progress, "done": bool(failed) or last is not None}

    def cleanup(self) -> None:
        """End the trial now; the base is restored."""
        if self._trial is not None:
            self._trial.close()  # type: ignore[attr-defined]  # a generator


class _Unsaved:
    """Keeps Tune from pickling an object to restore an experiment: the store does that here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        pass


class Proposals(_Unsaved, Searcher):
    """Lets Tune take the next trial from the study."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        self._study = study
        self.of: dict[str, Proposal] = {}
        """By Tune's names of trials."""
        self.again: list[Proposal] = []
        """Trials that lost their workers."""

    def suggest(self, trial_id: str) -> Any:
        proposal = self.again.pop() if self.again else self._study.next()
        if proposal is None:  # but one that runs may have to begin again
            return None if self._study.running else Searcher.FINISHED
        self.of[trial_id] = proposal
        return {"proposal": tuple(proposal)}

    def on_trial_complete(self, trial_id: str, *given: Any, **more: Any) -> None:
        """Nothing: `Ended` updates the study once the trial is stored."""


class Halving(_Unsaved, FIFOScheduler):
    """Lets the study decide whether a trial continues."""

    def __init__(self, study: Study, proposals: Proposals) -> None:
        super().__init__()
        self._study, self._proposals = study, proposals

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        proposal = self._proposals.of[trial.trial_id]
        if continues(self._study, proposal, result["progress"]):
            return TrialScheduler.CONTINUE
        return TrialScheduler.STOP


class Ended(_Unsaved, tune.Callback):
    """Stores each trial that ends, before the study is updated.

    At the end of Tune's step, where an error ends the search; elsewhere Tune would take
    it for the trial's own failure.
    """

    def __init__(
        self, study: Study, proposals: Proposals, store: Store, report: Callable[[Trial], None]
    ) -> None:
        self._study, self._proposals, self._store, self._report = study, proposals, store, report
        self._new: list[tuple[Proposal, Progress]] = []
        self._lost: Counter[int] = Counter()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        proposal = self._proposals.of.pop(trial.trial_id)
        self._new.append((proposal, trial.last_result["progress"]))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A step never raises, so its worker was lost."""
        proposal = self._proposals.of.pop(trial.trial_id)
        self._lost[proposal.number] += 1
        if (times := self._lost[proposal.number]) <= MAX_LOST:
            self._proposals.again.append(proposal)
            return
        error = str(trial.get_pickled_error()).strip().partition("\n")[0]
        reason = records.clean(f"its worker was lost {times} times: {error}")
        self._new.append((proposal, Progress(time.time(), "", (), failed=reason)))

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        new, self._new = self._new, []
        for proposal, progress in new:
            trial = ended(proposal, progress)
            self._store.create(key_of(trial.number), json.dumps(trial.to_dict()).encode())
            self._study.over(trial)
            self._report(trial)


def run_trials(
    study: Study,
    job: SearchJob,
    store: Store,
    count: int,
    report: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Run the remaining trials of a study, `count` at a time."""
    os.environ.update(SETTINGS)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the study reports failures
    several = study.config.workers_per_trial > 1
    # Where Ray Train's workers do the work, the trial's own process only waits.
    cpus, gpus = (0.1, 0.0) if several else (job.run.cpus_per_worker, job.run.gpus_per_worker)
    proposals = Proposals(study)
    with tempfile.TemporaryDirectory(prefix="adsc-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(Worker, job=job), {"CPU": cpus, "GPU": gpus}),
            tune_config=tune.TuneConfig(
                search_alg=proposals,
                scheduler=Halving(study, proposals),
                num_samples=-1,  # the study decides when it is over
                max_concurrent_trials=count,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                # A trial's state is what the study keeps; and one that can't be saved would be
                # an error to Tune, which then does not use its actor again.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[Ended(study, proposals, store, report)],
            ),
        ).fit()


def continues(study: Study, proposal: Proposal, progress: Progress) -> bool:
    """Whether there is a next rung for this trial."""
    if progress.failed or progress.last is not None:
        return False
    rung = len(progress.rungs) - 1
    return study.continues(proposal.number, rung, progress.rungs[-1].value)


def ended(proposal: Proposal, progress: Progress) -> Trial:
    """The trial as it is stored."""
    last = progress.last
    confirm = last.confirm if last else None
    return Trial(
        number=proposal.number,
        name=proposal.name,
        plan=proposal.plan,
        cost=proposal.cost,
        known=proposal.known,
        settings=proposal.settings,
        state="failed" if progress.failed else "stopped" if last is None else "finished",
        reason=progress.failed,
        rungs=progress.rungs,
        rows=tuple(last.judged.sums.tolist()) if last else (),
        confirm=tuple(confirm.sums.tolist()) if confirm else (),
        weights=tuple(confirm.weights.tolist()) if confirm else (),
        worker=progress.worker,
        started=progress.started,
        ended=time.time(),
    )


def key_of(number: int) -> str:
    """The key of a trial that is over, below the search's folder."""
    return f"trials/{number:05d}.json"


def kept_trials(store: Store) -> list[Trial]:
    """The trials that are over, in the order in which they ended."""
    found = [store.read(entry.key) for entry in store.list("trials")]
    trials = [Trial.from_dict(json.loads(data)) for data in found if data is not None]
    return sorted(trials, key=lambda trial: trial.ended)
