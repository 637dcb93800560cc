"""A stage: a function with a config, made durable by a record, a lease and a fingerprint.

`execute` is what a Ray task runs, and works without Ray as well. It neither orders stages nor
retries them: that is Ray's part, and the graph's to ask for.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import failure
from pipeline import record as records
from pipeline.config import Config
from pipeline.identity import IdentityError, body_name, canonical
from pipeline.lease import Holder, Lease, acquire
from pipeline.progress import ProgressHandle, Report
from pipeline.record import Record, Source
from pipeline.store import Store, open_store

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a workflow."""

    name: str
    """Lower case letters, digits, `-` and `_`; the folder in the store starts with it."""
    title: str
    """One line for people."""
    body: Callable[[StageContext, Any], Mapping[str, Any]]
    """A function at the top of a module: (context, config) to outputs, which are JSON."""
    version: int
    """To be raised whenever the body computes something else: results of old versions are left."""
    config: Config
    """All that decides what the body computes, apart from its inputs."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Inputs: the name that the body uses, and the stage that makes it."""
    pinned: str | None = None
    """An address whose files (and outputs) are taken instead of running the body."""

    def problems(self) -> Iterator[str]:
        """What is wrong with this stage by itself."""
        if not _NAME.fullmatch(self.name):
            yield f"{self.name!r} is not a stage's name: use lower case letters, digits, - and _"
        if not isinstance(self.config, Config):
            yield f"{self.name}: its config is not a Config but {self.config!r}"
        for identify in (
            lambda: canonical(self.config, f"{self.name}.config"),
            lambda: body_name(self.body),
        ):
            try:
                identify()
            except IdentityError as error:
                yield f"{self.name}: {error}"


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Where and on what a workflow runs; no part of any fingerprint."""

    root: str
    """The store: a folder or s3://bucket/prefix."""
    workflow: str
    """The workflow's name, for people."""
    tracking_uri: str | None = None
    """MLflow; None tracks nothing."""
    experiment: str = "adsc"
    """MLflow experiment."""
    parent_run_id: str | None = None
    """The workflow's MLflow run; made by the driver where it is None."""
    num_workers: int = 1
    """Ray Train workers of a training stage."""
    cpus_per_worker: float = 1
    """CPU cores of a worker."""
    gpus_per_worker: float = 0
    """GPUs of a worker."""
    stage_cpus: float = 0.1
    """The share of a core that a stage's own process reserves."""
    max_retries: int = 2
    """How often a stage starts again after its process or machine was lost."""
    lease_seconds: float = 20
    """After so long without a sign of life others take a stage over."""
    address: str | None = None
    """An existing Ray cluster; None starts Ray on this machine, unless RAY_ADDRESS is set."""
    dashboard_port: int | None = None
    """The port of the embedded Ray's dashboard; None takes a free one."""
    cache: str = "~/.cache/adsc"
    """Where inputs from a remote store are kept on each machine."""
    commit: str | None = None
    """The code's git commit; the driver fills it in."""


class InputError(ValueError):
    """A body asked for an input that its stage doesn't declare."""


class Input:
    """What an upstream stage made."""

    def __init__(self, record: Record, cache: str = "~/.cache/adsc") -> None:
        self.record, self._cache = record, cache
        self.uri: str = record.uri
        self.fingerprint: str = record.fingerprint
        self.outputs: dict[str, Any] = record.outputs

    @cached_property
    def folder(self) -> Path:
        """The files on this machine: in place where the store is local, else a checked copy.

        Read only: other stages and later runs use the same files.
        """
        store = open_store(self.uri)
        place = store.local("")
        if place is not None:
            return place
        stage = records.folder(self.record.stage, self.fingerprint)
        name = f"{stage}-{self.record.attempt or 'pinned'}"
        kept = Path(self._cache).expanduser() / name
        if not kept.is_dir():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".tmp-") as scratch:
                fetched = Path(scratch) / name
                store.download("", fetched)
                records.verify(fetched, self.record)
                # Another process of this machine may have been faster with the same files.
                with contextlib.suppress(OSError):
                    fetched.rename(kept)
        return kept


class Inputs(dict[str, Input]):
    """Inputs by the names that the stage declares."""

    def __missing__(self, name: str) -> NoReturn:
        declared = ", ".join(self) or "none"
        raise InputError(f"there is no input {name!r}; add it to the stage's needs ({declared})")


@dataclass(kw_only=True)
class StageContext:
    """What a body gets besides its config."""

    name: str
    fingerprint: str
    run: RunContext
    inputs: dict[str, Input]
    out: Path
    """A folder for everything that the stage makes; stored when the body returns."""
    train_storage: tuple[str, str]
    """(storage_path, name) for `ray.train.RunConfig`, the same for all attempts: they resume."""
    track: Tracker
    progress_handle: ProgressHandle
    """`progress` for other processes: it can be pickled."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Report progress in any unit; cheap, from any thread of the stage's process."""
        self.progress_handle(done, total, note)


def execute(
    stage: Stage,
    fingerprint: str,
    context: RunContext,
    progress: ProgressHandle,
    inputs: Mapping[str, Record],
) -> Record:
    """The stage's record: found, waited for, or made by running the body under a lease.

    Raises:
        StageFailed: the body raised; StageInterrupted when it lost a process or machine.
    """
    store = open_store(context.root)

    def finished() -> Record | None:
        return records.load(store, stage.name, fingerprint)

    def waiting(holder: Holder, seconds: float) -> None:
        note = f"for {seconds:.0f} s: held by {holder.holder} since {holder.since}"
        progress.send(Report(state="waiting", note=note))

    if found := finished():
        return found
    attempt = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    lease = Lease(store, records.lease_key(stage.name, fingerprint), attempt, context.lease_seconds)
    while not acquire(lease, lambda: finished() is not None, waiting):
        if found := finished():
            return found
    try:
        # Whoever held the lease may have finished between our look and our turn.
        if found := finished():
            return found
        progress.send(Report(state="running"))
        return _attempt(stage, fingerprint, context, progress, inputs, store, lease)
    finally:
        lease.release()


def _attempt(
    stage: Stage,
    fingerprint: str,
    context: RunContext,
    progress: ProgressHandle,
    inputs: Mapping[str, Record],
    store: Store,
    lease: Lease,
) -> Record:
    """Run the body once, under the lease, and publish its record."""
    home = records.folder(stage.name, fingerprint)
    target = records.attempt_key(stage.name, fingerprint, lease.attempt)
    started, clock = datetime.now(UTC), time.monotonic()
    tags = {"adsc.record": store.uri(records.record_key(stage.name, fingerprint))}
    tags |= {"adsc.fingerprint": fingerprint, "adsc.attempt": lease.attempt}
    try:
        with _folder(store, target) as out, _tracker(context, stage, tags) as track:
            track.params(stage.config.model_dump())
            body_context = StageContext(
                name=stage.name,
                fingerprint=fingerprint,
                run=context,
                inputs=Inputs({name: Input(it, context.cache) for name, it in inputs.items()}),
                out=out,
                train_storage=(store.uri(home), "run"),
                track=track,
                progress_handle=progress,
            )
            outputs = _outputs(stage, stage.body(body_context, stage.config))
            made = Record(
                stage=stage.name,
                fingerprint=fingerprint,
                attempt=lease.attempt,
                outputs=outputs,
                files=records.manifest(out),
                inputs={
                    name: Source(fingerprint=it.fingerprint, uri=it.uri)
                    for name, it in inputs.items()
                },
                config=canonical(stage.config),
                version=stage.version,
                body=body_name(stage.body),
                commit=context.commit,
                started=started.isoformat(timespec="seconds"),
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - clock, 3),
                run_id=track.run_id,
                host=socket.gethostname(),
            )
            if store.local("") is None:
                store.upload(out, target)
            if not lease.confirm():
                lease.lost()
            record = records.publish(store, made)
    # The boundary of a stage: whatever its body raises is written down and becomes a text.
    except Exception as error:  # noqa: BLE001
        raise failure.of_body(store, stage.name, fingerprint, lease.attempt, error) from None
    # Other attempts can't be reached any more: of processes that died, or ours, if we came second.
    records.sweep(store, record)
    return record


@contextlib.contextmanager
def _folder(store: Store, target: str) -> Iterator[Path]:
    """The attempt's folder: in place where the store is local, else a scratch folder."""
    place = store.local(target)
    if place is None:
        with tempfile.TemporaryDirectory(prefix="adsc-stage-") as scratch:
            yield Path(scratch)
        return
    place.mkdir(parents=True)
    try:
        yield place
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


@contextlib.contextmanager
def _tracker(context: RunContext, stage: Stage, tags: Mapping[str, str]) -> Iterator[Tracker]:
    from pipeline import tracking

    if context.tracking_uri is None:
        yield tracking.Tracker(tracking.RunHandle("", None))
        return
    with tracking.stage_run(
        context.tracking_uri, context.experiment, context.parent_run_id, stage.name, tags
    ) as tracker:
        yield tracker


def _outputs(stage: Stage, outputs: object) -> dict[str, Any]:
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"the body of {stage.name} returned a {type(outputs).__name__}; return a dict of JSON "
            "values, {} if there is nothing to say"
        )
    literals: dict[str, Any] = canonical(outputs, "outputs")
    return literals
