"""One attempt at a stage: the function that a Ray task runs, which makes a stage durable.

Look for the record, take the lease, run the body, publish the record once. It also works without
Ray. It neither orders nor retries stages: Ray does, as the graph submits them.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config import Config
from pipeline.durable import completion, failure
from pipeline.durable import record as records
from pipeline.durable.identity import canonical, load_body
from pipeline.durable.lease import Holder, Lease, acquire
from pipeline.durable.progress import ProgressHandle, Report
from pipeline.durable.record import Record, Source
from pipeline.durable.reference import references, resolve
from pipeline.durable.stage import Input, Inputs, RunContext, Stage, StageContext
from pipeline.retry import every, retried
from pipeline.store import Store, StoreUnavailable, open_store
from pipeline.tracking import spool

if TYPE_CHECKING:
    from pipeline.tracking.tracker import Tracker

Result = TypeVar("Result")

PATIENCE_SECONDS = 600.0
"""How long a store may be unavailable before a stage gives up."""


def execute(
    stage: Stage,
    fingerprint: str,
    context: RunContext,
    progress: ProgressHandle,
    inputs: Mapping[str, Record],
) -> Record:
    """The stage's record: read, waited for, or produced by running the body under a lease.

    Raises:
        StageFailed: the body raised; StageInterrupted when it lost a process or machine.
    """
    store = open_store(context.root)

    def patiently(call: Callable[[], Result]) -> Result:
        """The result of `call`, retried while the store is unavailable."""
        return retried(
            call,
            lambda error: isinstance(error, StoreUnavailable),
            every(2.0, PATIENCE_SECONDS),
            lambda error: progress.send(Report(state="waiting", note=f"for the store: {error}")),
        )

    def finished() -> Record | None:
        return patiently(lambda: records.load(store, stage.name, fingerprint))

    def settled() -> Record | None:
        """The record, if the stage is finished and this run has nothing to complete."""
        record = finished()
        return None if record and completion.is_due(stage, record, context) else record

    def waiting(holder: Holder, seconds: float) -> None:
        note = f"for {seconds:.0f} s: held by {holder.holder} since {holder.since}"
        progress.send(Report(state="waiting", note=note))

    if record := settled():
        return record
    attempt = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    lease = Lease(store, records.lease_key(stage.name, fingerprint), attempt, context.lease_seconds)
    while not patiently(lambda: acquire(lease, lambda: settled() is not None, waiting)):
        if record := settled():
            return record
    try:
        # The previous holder may have finished just before the lease was acquired.
        if record := settled():
            return record
        progress.send(Report(state="running"))
        if record := finished():
            return _complete(
                stage, fingerprint, context, progress, inputs, store, record, patiently
            )
        return _attempt(stage, fingerprint, context, progress, inputs, store, lease, patiently)
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
    patiently: Callable[[Callable[[], Any]], Any],
) -> Record:
    """Run the body once, under the lease, and publish its record."""
    home = records.folder(stage.name, fingerprint)
    target = records.attempt_key(stage.name, fingerprint, lease.attempt)
    started, clock = datetime.now(UTC), time.monotonic()
    tags = _tags(stage, fingerprint, context, store, lease.attempt)
    try:
        with _folder(store, target) as out, _tracker(context, stage, store, tags) as track:
            track.params(stage.config.model_dump())
            config, referred = _resolved(stage, inputs)
            body_context = StageContext(
                name=stage.name,
                fingerprint=fingerprint,
                run=context,
                inputs=_inputs(inputs, context, without=referred),
                out=out,
                train_storage=(store.uri(home), "run"),
                track=track,
                progress_handle=progress,
            )
            outputs = _outputs(stage, load_body(stage.kind.body)(body_context, config))
            own_record = Record(
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
                version=stage.kind.version,
                body=stage.kind_id,
                commit=context.commit,
                started=started.isoformat(timespec="seconds"),
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - clock, 3),
                run_id=track.run_id,
                workflow_run=context.run_page,
                gpus=context.most_workers * context.gpus_per_worker if stage.kind.workers else 0.0,
                host=socket.gethostname(),
            )
            if store.local("") is None:
                patiently(lambda: store.upload(out, target))
            track.flush()
            if notes := _notes(track, records.undone(own_record).values()):
                own_record = own_record.model_copy(update={"notes": notes})
            if not patiently(lease.confirm):
                lease.lost()
            record = patiently(lambda: records.publish(store, own_record))
    # The boundary of a stage: any error of its body is written to the store and becomes text.
    except Exception as error:  # noqa: BLE001
        raise failure.of_body(store, stage.name, fingerprint, lease.attempt, error) from None
    # Other attempts are unreachable now: those of dead processes, or this one if it came second.
    records.sweep(store, record)
    return record


def _complete(
    stage: Stage,
    fingerprint: str,
    context: RunContext,
    progress: ProgressHandle,
    inputs: Mapping[str, Record],
    store: Store,
    record: Record,
    patiently: Callable[[Callable[[], Any]], Any],
) -> Record:
    """Complete what a finished stage left undone, under the lease."""
    assert stage.kind.complete is not None
    complete = load_body(stage.kind.complete)
    home = records.folder(stage.name, fingerprint)
    tags = _tags(stage, fingerprint, context, store, record.attempt)
    try:
        with _tracker(context, stage, store, tags) as track:
            config, referred = _resolved(stage, inputs)
            result = Input(record, context.cache, context.cache_gib)  # keeps its copy while alive
            body_context = StageContext(
                name=stage.name,
                fingerprint=fingerprint,
                run=context,
                inputs=_inputs(inputs, context, without=referred),
                out=result.folder,
                train_storage=(store.uri(home), "run"),
                track=track,
                progress_handle=progress,
            )
            outputs = _outputs(stage, complete(body_context, config, record))
        return patiently(lambda: completion.publish(store, home, record, outputs))
    # The boundary of a stage, as in `_attempt`.
    except Exception as error:  # noqa: BLE001
        raise failure.of_body(store, stage.name, fingerprint, record.attempt, error) from None


def _tags(
    stage: Stage, fingerprint: str, context: RunContext, store: Store, attempt: str
) -> dict[str, str]:
    tags = {"adsc.record": store.uri(records.record_key(stage.name, fingerprint))}
    tags |= {"adsc.fingerprint": fingerprint, "adsc.attempt": attempt}
    tags |= {"adsc.workflow": context.workflow, "mlflow.note.content": stage.title}
    return tags | ({"adsc.commit": context.commit} if context.commit else {})


def _resolved(stage: Stage, inputs: Mapping[str, Record]) -> tuple[Config, set[str]]:
    """The config with references resolved, and the stages that it refers to."""
    referred = {reference.stage for reference in references(stage.config)}
    config = resolve(stage.config, {name: inputs[name].outputs for name in referred})
    return config, referred


def _inputs(
    inputs: Mapping[str, Record], context: RunContext, without: Collection[str] = ()
) -> Inputs:
    """The inputs of a body, `without` the stages that its config only refers to."""
    return Inputs(
        {
            name: Input(it, context.cache, context.cache_gib)
            for name, it in inputs.items()
            if name not in without
        }
    )


def _notes(track: Tracker, known: Collection[str]) -> tuple[str, ...]:
    """Notes on tracking: that the server was unavailable, and what it refused, which is lost."""
    lost = [it for it in track.problems if it not in known and not it.startswith("tracking waits")]
    return tuple(filter(None, (track.summary(), *lost)))


@contextlib.contextmanager
def _folder(store: Store, target: str) -> Iterator[Path]:
    """The attempt's folder: in place if the store is local, else a scratch folder."""
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
def _tracker(
    context: RunContext, stage: Stage, store: Store, tags: Mapping[str, str]
) -> Iterator[Tracker]:
    from pipeline.tracking import tracker as tracking

    if context.tracking_uri is None:
        yield tracking.Tracker(tracking.RunHandle("", None))
        return
    place = spool.folder(store.root, store.local("tracking"), context.cache)
    with tracking.stage_run(
        context.tracking_uri, context.experiment, context.parent_run_id, stage.name, tags, place
    ) as tracker:
        yield tracker


def _outputs(stage: Stage, outputs: object) -> dict[str, Any]:
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"the body of {stage.name} returned a {type(outputs).__name__}; return a dict of JSON "
            "values, {} if there are none"
        )
    literals: dict[str, Any] = canonical(outputs, "outputs")
    return literals
