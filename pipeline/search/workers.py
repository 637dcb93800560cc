"""The study on a cluster: Ray actors that each take one trial after the other.

What is tried next is the study's business, what a trial does the bench's. Here is who runs what,
what is kept, and what happens when a machine is lost. Ray Tune is not used: docs/search.md says
what was tried with it, and what it did.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pipeline import record as records
from pipeline.search.study import Proposal, Rung, Study, Trial
from pipeline.search.trial import Bench, Job, Reached
from pipeline.store import Store

MAX_LOST = 3
"""How often a trial starts again whose worker or machine was lost."""


class Progress(NamedTuple):
    """What a worker tells of its trial after a rung, or at its end."""

    started: float
    worker: str
    rungs: tuple[Rung, ...]
    last: Reached | None = None
    """Of a trial that is through."""
    failed: str = ""
    """Why it can't go on."""


class Worker:
    """The actor: one Bench, loaded once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bench: Bench | None = None
        self._trial: Iterator[Reached] | None = None

    def begin(self, proposal: Proposal) -> Progress:
        """A trial up to its first rung."""
        self.stop()
        self._proposal, self._started = proposal, time.time()
        self._reached: list[Rung] = []
        return self.go_on()

    def go_on(self) -> Progress:
        """The trial up to its next rung."""
        import ray

        name = f"{ray.util.get_node_ip_address()}/{os.getpid()}"
        failed, reached = "", None
        try:
            self._bench = self._bench or Bench(self._job)
            if self._trial is None:
                self._trial = self._bench.trial(self._proposal.number, self._proposal.plan)
            reached = next(self._trial)
            seconds = time.time() - self._started
            self._reached.append(Rung(reached.resource, reached.judged.value, seconds))
        # Whatever a model, a plan or a library raises ends this trial, and no other.
        except Exception as error:  # noqa: BLE001
            failed = records.clean(f"{type(error).__name__}: {error}")
        last = reached if reached is not None and reached.confirm is not None else None
        return Progress(self._started, name, tuple(self._reached), last, failed)

    def stop(self) -> None:
        """End the trial where it is; the base is given back."""
        if self._trial is not None:
            self._trial.close()  # type: ignore[attr-defined]  # a generator
            self._trial = None


class Running(NamedTuple):
    worker: Any
    proposal: Proposal
    lost: int


def run_trials(
    study: Study,
    job: Job,
    store: Store,
    count: int,
    told: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Run what is left of a study, `count` trials at a time.

    Each trial that ends is kept before the study knows of it. One whose worker was lost begins
    again on a new worker.
    """
    import ray
    from ray.exceptions import RayActorError

    several = study.config.workers_per_trial > 1
    # Where Ray Train's workers do the work, the trial's own process only waits.
    cpus, gpus = (0.1, 0.0) if several else (job.run.cpus_per_worker, job.run.gpus_per_worker)
    remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(Worker)
    free: list[Any] = []
    running: dict[Any, Running] = {}
    try:
        while True:
            while len(running) < count and (proposal := study.next()) is not None:
                worker = free.pop() if free else remote.remote(job)
                running[worker.begin.remote(proposal)] = Running(worker, proposal, 0)
            if not running:
                return
            (ready,), _ = ray.wait(list(running))
            worker, proposal, lost = running.pop(ready)
            try:
                progress: Progress = ray.get(ready)
            except RayActorError as error:
                ray.kill(worker)  # it may only be out of reach
                if lost < MAX_LOST:
                    worker = remote.remote(job)
                    running[worker.begin.remote(proposal)] = Running(worker, proposal, lost + 1)
                    continue
                reason = f"its worker was lost {lost + 1} times: {error}".partition("\n")[0]
                progress, worker = Progress(time.time(), "", (), failed=records.clean(reason)), None
            if goes_on(study, proposal, progress):
                running[worker.go_on.remote()] = Running(worker, proposal, lost)
                continue
            trial = ended(proposal, progress)
            store.create(key_of(trial.number), json.dumps(trial.to_dict()).encode())
            study.over(trial)
            told(trial)
            if worker is not None:
                free.append(worker)
    finally:
        for worker in [*free, *(it.worker for it in running.values())]:
            ray.kill(worker)


def goes_on(study: Study, proposal: Proposal, progress: Progress) -> bool:
    """Whether there is a next rung for this trial."""
    if progress.failed or progress.last is not None:
        return False
    rung = len(progress.rungs) - 1
    return study.goes_on(proposal.number, rung, progress.rungs[-1].value)


def ended(proposal: Proposal, progress: Progress) -> Trial:
    """The trial as it is kept."""
    last = progress.last
    confirm = last.confirm if last else None
    return Trial(
        number=proposal.number,
        name=proposal.name,
        plan=proposal.plan,
        cost=proposal.cost,
        known=proposal.known,
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
    """Where a trial that is over is kept, below the search's folder."""
    return f"trials/{number:05d}.json"


def kept_trials(store: Store) -> list[Trial]:
    """The trials that are over, in the order in which they ended."""
    found = [store.read(entry.key) for entry in store.list("trials")]
    trials = [Trial.from_dict(json.loads(data)) for data in found if data is not None]
    return sorted(trials, key=lambda trial: trial.ended)
