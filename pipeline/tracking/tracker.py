"""What people browse of a workflow, in MLflow (its client is in pipeline/tracking/mlflow_calls.py).

A workflow is a parent run, a stage a child run; `adsc.record` on a stage's run names its record in
the store. Every call names its run: there is no active run, so stages that share a process can't
write into each other's.

The store is the source of truth, so tracking never fails or delays a stage: a call writes
into a journal (pipeline/tracking/spool.py), and a thread sends that. While the server is down or
hangs it tries again; what is left at the end is sent by the next run (`reconcile`). Run, params,
metrics, tags, artifacts and the end can be sent twice and are there once. Only `prepare`, which
runs while the user still looks, raises. Autologging is deliberately left to MLflow itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.redact import HIDDEN, flatten, leaves, redact
from pipeline.tracking import moved
from pipeline.tracking.address import TrackingError, default_uri
from pipeline.tracking.handle import RunHandle
from pipeline.tracking.mlflow_calls import (
    TOKEN,
    Run,
    TrackingUnavailable,
    brief,
    client_of,
    failures,
    prepare,
)
from pipeline.tracking.mlflow_registry import register
from pipeline.tracking.spool import Item, Journal, Sender, Unavailable, abandoned
from pipeline.tracking.system_metrics import sampled

__all__ = [
    "RunHandle",
    "Tracker",
    "TrackingError",
    "TrackingUnavailable",
    "child_run",
    "default_uri",
    "prepare",
    "reconcile",
    "stage_run",
    "start_workflow",
]

log = logging.getLogger(__name__)

WAIT_SECONDS = 15.0
"""How long the start and the end of a run wait for a server that hangs."""
MAX_VALUE = 6000
"""Characters that MLflow keeps of a parameter; of a tag it keeps 8000."""


def start_workflow(
    tracking_uri: str,
    experiment: str,
    workflow: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    spool: Path | str | None = None,
) -> Tracker:
    """Open the parent run of a workflow; `finish` closes it, as FINISHED, FAILED or KILLED."""
    tags = {"adsc.workflow": workflow, **tags}
    tracker = _open_run(tracking_uri, experiment, workflow, tags, spool)
    tracker.params(params)
    return tracker


@contextmanager
def stage_run(
    tracking_uri: str,
    experiment: str,
    parent_run_id: str | None,
    stage_name: str,
    tags: Mapping[str, str],
    spool: Path | str | None = None,
) -> Iterator[Tracker]:
    """A stage's run, closed FINISHED, or FAILED when the body raises (KILLED on an interrupt).

    The caller holds the stage's lease: a run of the same `adsc.record` that still says RUNNING is a
    dead attempt's, and is closed as KILLED.

    Args:
        spool: folder for what could not be sent yet; the next run looks there.
    """
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    tags = {"adsc.stage": stage_name, **parent, **tags}
    tracker = _open_run(tracking_uri, experiment, stage_name, tags, spool)
    tracker.close_abandoned(tags.get("adsc.record"))
    try:
        with sampled(tracker.metrics):
            yield tracker
    except BaseException as error:
        tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracker.finish("FINISHED")


def child_run(parent: Tracker, name: str, tags: Mapping[str, str]) -> Tracker:
    """A run below another one, such as a trial below its search; `finish` closes it. Below a
    tracker that writes nowhere, it writes nowhere."""
    handle = parent.handle
    if handle.nowhere:
        return Tracker(RunHandle("", None))
    tags = {"mlflow.parentRunId": parent.id_for_children, **tags}
    return _open_run(handle.tracking_uri, handle.experiment, name, tags, handle.spool or None)


class Tracker:
    """Writes into one run, from any process and without waiting; see the module."""

    def __init__(self, handle: RunHandle, owner: bool = False) -> None:
        """`owner` is the process whose death ends the run."""
        self.problems: list[str] = []
        self._handle, self._owner = handle, owner
        self._run = Run(handle, self._report)
        self._sender: Sender | None = None

    @property
    def run_id(self) -> str | None:
        return self._run.run_id

    @property
    def page(self) -> str:
        """The page of the run below its server's address; empty until the run could be created."""
        known = self._run.experiment_id and self.run_id
        return f"experiments/{self._run.experiment_id}/runs/{self.run_id}" if known else ""

    @property
    def id_for_children(self) -> str:
        """The run's id, or a placeholder until it could be created."""
        return self.run_id or f"{TOKEN}{self._handle.token}"

    @property
    def handle(self) -> RunHandle:
        return replace(self._handle, run_id=self.run_id)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log a nested config under dotted keys; credentials are hidden, long values cut with a
        mark."""
        if values:
            named = {_name(key): _cut(value) for key, value in flatten(values).items()}
            self._add("params", values=named)

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers; nested names are joined by `/`, which MLflow groups by. None is left out."""
        now, numbers = _now(), []
        for path, value in leaves(values):
            name = _name("/".join(path))
            try:
                if path and value is not None:
                    numbers.append((name, float(value), now, step or 0))
            except (TypeError, ValueError):
                self._report(f"metric {name} is {value!r}, not a number")
        self._add("metrics", values=numbers)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Upload a file, or a folder with all that is in it; it is to stay as it is."""
        self._add("artifact", path=str(Path(path).absolute()), folder=folder)

    def text(self, name: str, text: str) -> None:
        """Log a text as an artifact of that name."""
        self._add("text", name=name, text=redact(text))

    def dataset(self, uri: str, name: str, digest: str) -> None:
        """Name a data set that this run read: where it is, and which version (36 characters of its
        digest stay)."""
        source = json.dumps({"uri": redact(uri)})
        of_kind = urlsplit(uri).scheme or "local"
        self._add("dataset", name=name, digest=digest[:36], source_type=of_kind, source=source)

    def note(self, text: str) -> None:
        """The run's description, Markdown, on top of its page."""
        self.tag("mlflow.note.content", text)

    def tag(self, key: str, value: str) -> None:
        self._add("tag", key=key, value=_cut(redact(str(value))))

    def model(
        self, folder: Path | str, name: str, tags: Mapping[str, str] = {}
    ) -> tuple[str, str] | None:
        """Log an exported checkpoint as a model that MLflow can serve (see
        pipeline/tracking/mlflow_model.py), and register it. The one call that waits, and that is
        not made up for later.

        Args:
            tags: of the registered version; `adsc.manifest` keeps the same checkpoint from getting
                a second one.

        Returns its addresses `models:/m-...` and `models:/NAME/VERSION`, or None when that failed.
        """
        if self.handle.nowhere:
            return None
        if not self.flush() or self.run_id is None:
            self._report(f"the model was not logged: no run at {self._handle.tracking_uri}")
            return None
        client = client_of(self._handle.tracking_uri)
        shown = {key: _cut(redact(value)) for key, value in tags.items()}
        try:
            return register(client, self.run_id, Path(folder), name, shown)
        except failures() as error:
            self._report(f"model not tracked at {self._handle.tracking_uri}: {brief(error)}")
            return None

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until all is sent or a try has failed: whether all is sent."""
        return self._sender is None or self._sender.flush(seconds or WAIT_SECONDS)

    def summary(self) -> str | None:
        """A note on outages of the server; None if there were none."""
        return self._sender.summary() if self._sender else None

    def finish(self, status: str) -> None:
        """Close the run, after what its other processes left; what can't be sent now, later is."""
        ended = _now()
        self.flush()
        if self._handle.spool and self._sender and not self._sender.unavailable:
            reconcile(self._handle.spool, self._handle.tracking_uri, token=self._handle.token)
        if summary := self.summary():
            self._report(summary)
        if self.problems:
            self.tag("adsc.tracking_problems", "; ".join(self.problems))
        self._add("end", status=status, time=ended)
        self.close()

    def close(self) -> None:
        """Send pending data if the server answers; for processes other than the run's own."""
        if self._sender is None:
            return
        if not self.flush():
            for item, _ in self._sender.journal.unsent():
                if item["kind"] == "artifact":
                    self._sender.journal.keep(Path(item["path"]))
        self._sender.close()

    def close_abandoned(self, record: str | None) -> None:
        """Mark earlier runs of the same record that still say RUNNING as KILLED; for the holder of
        its lease only."""
        if record and "'" not in record:
            self._add("abandoned", record=record, before=_now())

    def _add(self, kind: str, **item: Any) -> None:
        if self._run.closed:
            return
        try:
            if self._sender is None:
                journal = Journal.create(_spool(self._handle), self._header())
                self._run.kept = journal.kept
                self._sender = Sender(journal, self._run.deliver)
            self._sender.append({"kind": kind, **item})
        except OSError as error:
            self._report(f"{kind} not tracked: {error}")

    def _header(self) -> Item:
        handle = self._handle
        return {
            "uri": redact(handle.tracking_uri),
            "experiment": handle.experiment,
            "run_id": self.run_id,
            "token": handle.token,
            "owner": self._owner,
        }

    def _report(self, problem: str) -> None:
        problem = redact(problem)
        if problem not in self.problems:
            self.problems.append(problem)
            log.warning("%s", problem)


def reconcile(spool: Path | str, tracking_uri: str, token: str | None = None) -> str | None:
    """Send what processes that are dead left in a folder, and close their runs as KILLED.

    Args:
        tracking_uri: used for journals of the same address, which hold it without credentials.
        token: only journals of this run.

    Returns:
        What was done and what is left, as a sentence; None where there was nothing.
    """
    if not Path(spool).is_dir():
        return None
    sent = left = 0
    deadline = time.monotonic() + WAIT_SECONDS
    # The journal that makes a run comes before those that only write into it.
    for journal in sorted(abandoned(Path(spool)), key=lambda it: not it.header["owner"]):
        header, drained = journal.header, False
        uri = moved.current(header["uri"], Path(spool))
        uri = tracking_uri if redact(tracking_uri) == uri else uri
        if HIDDEN in uri or token not in (None, header["token"]):
            journal.close(delete=False)
            continue
        handle = RunHandle(uri, header["run_id"], header["experiment"], header["token"])
        run = Run(handle, log.warning, replay=True)
        run.kept = partial(_kept, journal, header["uri"], uri)
        ended = journal.mentions('"kind": "end"')
        try:
            while (items := journal.unsent()) and time.monotonic() < deadline:
                count = run.deliver([item for item, _ in items])
                journal.mark(items[count - 1][1])
                sent += count
            drained = not items
            if drained and header["owner"] and not ended:
                run.deliver([{"kind": "end", "status": "KILLED", "time": _now(), "dead": True}])
        except Unavailable:
            drained = False
        left += not drained
        # Nobody waits longer than a month for a run that never came to be.
        journal.close(delete=drained or journal.age() > 30 * 24 * 3600)
    if not sent and not left:
        return None
    rest = f"; {left} journals wait in {spool}" if left else ""
    return f"MLflow: {sent} items of earlier processes sent{rest}"


def _kept(journal: Journal, old_uri: str, new_uri: str, path: Path) -> Path:
    """Where a file is that is no longer where it was tracked."""
    now = moved.moved_path(path, old_uri, new_uri)
    return now if now.exists() else journal.kept(path)


def _open_run(
    tracking_uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    spool: Path | str | None = None,
) -> Tracker:
    """A tracker of a new run, which is created later if no server answers now."""
    token = uuid.uuid4().hex
    shown = {key: _cut(redact(str(value))) for key, value in tags.items()}
    shown["mlflow.user"] = os.environ.get("USER") or f"uid {os.getuid()}"
    shown["adsc.token"] = token
    handle = RunHandle(tracking_uri, None, experiment, token, str(spool or ""))
    tracker = Tracker(handle, owner=True)
    failures()  # MLflow is loaded here: that takes seconds, and is no server's silence
    tracker._add("create", name=name, tags=shown, time=_now())
    tracker.flush()
    return tracker


def _spool(handle: RunHandle) -> Path:
    return Path(handle.spool or Path(tempfile.gettempdir()) / f"adsc-tracking-{os.getuid()}")


def _now() -> int:
    return int(time.time() * 1000)


def _name(key: str) -> str:
    """A key that MLflow accepts: other characters become `_`, at most 250."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]


def _cut(value: str) -> str:
    """At most MAX_VALUE characters, and the cut says so."""
    mark = f" [cut: {len(value)} characters in all]"
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - len(mark)] + mark
