"""MLflow's client, as tracking uses it: every call, and what each can raise.

Besides `mlflow_model` and `mlflow_registry` the only file that imports MLflow, and lazily. It
neither waits nor tries again: `pipeline.tracking.tracker` says what to send,
`pipeline.tracking.spool` when.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.redact import redact
from pipeline.tracking import moved, view
from pipeline.tracking.address import TrackingError, check_path, database_of, explained
from pipeline.tracking.handle import RunHandle
from pipeline.tracking.spool import Item, Unavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

TOKEN = "token:"
"""Begins a parent's id that is not known yet: the parent's token follows."""


class TrackingUnavailable(TrackingError):
    """The tracking address may be right, but no server answers there now."""


def prepare(
    tracking_uri: str,
    experiment: str,
    artifacts: str | None = None,
    report: Callable[[str], object] = lambda text: None,
) -> str:
    """Create database and experiment, once and before any stage runs; return the address that
    stages are to use.

    Args:
        tracking_uri: an MLflow server, or a database that every worker reaches.
        experiment: name of the experiment; made if it isn't there.
        artifacts: where a new experiment puts artifacts, a folder or s3://. A server knows by
            itself; SQLite's default is a folder beside the database; any other database needs it.
        report: is called with what people should know, such as that a database had moved.

    Raises:
        TrackingError: no server there, an unwritable folder, a deleted experiment, an address that
            isn't MLflow's.
    """
    scheme = urlsplit(tracking_uri).scheme
    if reason := explained(tracking_uri):
        raise TrackingError(f"can't track at {redact(tracking_uri)}: {reason}")
    if scheme in ("", "file"):
        raise _unusable(tracking_uri, "it is a folder, which MLflow 3 no longer accepts")
    try:
        if scheme in ("http", "https"):
            _create_experiment(tracking_uri, experiment, artifacts)
        elif scheme == "sqlite":
            database = database_of(tracking_uri)
            if database is None:
                raise _unusable(tracking_uri, "an SQLite address has three slashes before the path")
            check_path(str(database))
            options = tracking_uri.partition("?")
            tracking_uri = f"sqlite:///{database}{options[1]}{options[2]}"
            database.parent.mkdir(parents=True, exist_ok=True)
            # Two processes that make the tables of a fresh database at once break it.
            with database.with_name(database.name + ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if change := moved.heal(database):
                    report(change)
                beside = (database.parent / moved.ARTIFACTS).as_uri()
                _create_experiment(tracking_uri, experiment, artifacts or beside)
        elif not re.match("postgresql|mysql|mssql", scheme):
            raise _unusable(tracking_uri, f"{scheme!r} is neither a web address nor a database")
        elif not artifacts:
            raise _unusable(tracking_uri, "a database shared by machines needs `artifacts` as well")
        else:
            there = _create_experiment(tracking_uri, experiment, artifacts)
            if there.rstrip("/") != artifacts.rstrip("/"):
                report(
                    f"MLflow keeps the artifacts of experiment {experiment!r} at {redact(there)}, "
                    f"where it was made, and not at {artifacts}"
                )
    except TrackingError:
        raise
    except failures() as error:
        kind = TrackingError if _refused(error) else TrackingUnavailable
        raise kind(str(_unusable(tracking_uri, brief(error)))) from None
    return tracking_uri


class Run:
    """Sends items into one run, which may have to be made or found first."""

    def __init__(
        self, handle: RunHandle, report: Callable[[str], object], replay: bool = False
    ) -> None:
        self.handle, self.run_id, self._report = handle, handle.run_id, report
        self.experiment_id = ""
        self.closed = handle.nowhere
        self.kept: Callable[[Path], Path] = Path
        self._search = replay
        self._unavailable = False
        self._causes: set[str] = set()

    def deliver(self, items: Sequence[Item]) -> int:
        """Send the first item (of metrics: the first few).

        Raises:
            Unavailable: no server answers.
        """
        kind = items[0]["kind"]
        some = items[:1]
        if kind == "metrics":
            some = list(takewhile(lambda item: item["kind"] == "metrics", items))[:200]
        if self.closed:
            return len(some)
        try:
            client = client_of(self.handle.tracking_uri)
            if kind == "create":
                self._create(client, some[0])
            else:
                self.run_id = self.run_id or self._find(client)
                if self.run_id is None:
                    raise Unavailable("its run is not made yet")
                getattr(self, f"_{kind}")(client, self.run_id, some)
        except failures() as error:
            cause = brief(error)
            if not _refused(error):
                # Once an absence: a server that dies says something else than one that is gone.
                if not self._unavailable:
                    self._report(f"tracking waits: {self.handle.tracking_uri}: {cause}")
                self._unavailable = self._search = True
                raise Unavailable(cause) from error
            if cause not in self._causes:
                self._causes.add(cause)
                self._report(f"{kind} not tracked: {self.handle.tracking_uri}: {cause}")
            if kind == "create":
                self.closed = True
        self._unavailable = False
        return len(some)

    def _find(self, client: MlflowClient, token: str | None = None) -> str | None:
        found = client.get_experiment_by_name(self.handle.experiment)
        token = token or self.handle.token
        if found is None or not token:
            return None
        tagged = f"tags.`adsc.token` = '{token}'"
        runs = client.search_runs([found.experiment_id], tagged, max_results=1)
        return runs[0].info.run_id if runs else None

    def _create(self, client: MlflowClient, item: Item) -> None:
        # The answer to a first try may have been lost, and the run be there.
        if self._search and (found := self._find(client)):
            self.run_id = found
            return
        experiment = client.get_experiment_by_name(self.handle.experiment)
        if experiment is None:
            raise TrackingError(
                f"experiment {self.handle.experiment!r} is gone; `prepare` makes it"
            )
        self.experiment_id = experiment.experiment_id
        tags = dict(item["tags"])
        parent = tags.get("mlflow.parentRunId", "")
        if parent.startswith(TOKEN):
            if (found := self._find(client, parent.removeprefix(TOKEN))) is None:
                raise Unavailable("its parent is not made yet")
            tags["mlflow.parentRunId"] = found
        run = client.create_run(experiment.experiment_id, item["time"], tags, run_name=item["name"])
        self.run_id = run.info.run_id

    def _params(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in items[0]["values"].items()]
        for start in range(0, len(params), 100):
            client.log_batch(run, params=params[start : start + 100])

    def _metrics(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(*value) for item in items for value in item["values"]]
        for start in range(0, len(metrics), 1000):
            client.log_batch(run, metrics=metrics[start : start + 1000])

    def _tag(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        client.set_tag(run, items[0]["key"], items[0]["value"])

    def _artifact(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        path, folder = Path(items[0]["path"]), items[0]["folder"]
        if not path.exists():
            path = self.kept(path)
        send = client.log_artifacts if path.is_dir() else client.log_artifact
        send(run, str(path), folder)

    def _text(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        client.log_text(run, items[0]["text"], items[0]["name"])

    def _dataset(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        values = [items[0][key] for key in ("name", "digest", "source_type", "source")]
        client.log_inputs(run, [DatasetInput(Dataset(*values), tags=[])])

    def _abandoned(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        experiment = client.get_run(run).info.experiment_id
        same = f"tags.`adsc.record` = '{items[0]['record']}' and attributes.status = 'RUNNING'"
        for other in client.search_runs([experiment], same):
            # This may be sent late: the runs of later attempts are none of its business.
            if other.info.run_id != run and other.info.start_time < items[0]["before"]:
                client.set_terminated(other.info.run_id, "KILLED")

    def _end(self, client: MlflowClient, run: str, items: Sequence[Item]) -> None:
        if items[0].get("dead") and client.get_run(run).info.status != "RUNNING":
            return
        client.set_terminated(run, items[0]["status"], items[0]["time"])


@lru_cache(maxsize=8)
def client_of(tracking_uri: str) -> MlflowClient:
    # MLflow's own patience is minutes per call, and it reports its use to its makers: both can be
    # set from outside.
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def failures() -> tuple[type[Exception], ...]:
    """What a tracking server, its database or its artifact store can raise."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    # MLflow loads these itself where artifacts lie on S3; unloaded, they can't have been raised.
    s3 = [
        getattr(sys.modules[module], name)
        for module, name in (
            ("boto3.exceptions", "Boto3Error"),
            ("botocore.exceptions", "BotoCoreError"),
            ("botocore.exceptions", "ClientError"),
        )
        if module in sys.modules
    ]
    return (TrackingError, MlflowException, RequestException, SQLAlchemyError, OSError, *s3)


def _refused(error: Exception) -> bool:
    """Whether the error is specific to this call: the server refused it, or a local file isn't
    there."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500
    network = (ConnectionError, TimeoutError, RequestException)
    return isinstance(error, TrackingError | OSError) and not isinstance(error, network)


def _unusable(tracking_uri: str, reason: str) -> TrackingError:
    return TrackingError(
        f"can't track at {redact(tracking_uri)}: {redact(reason)}. Write an MLflow server's "
        "address (http://host:port), or a database (sqlite:////data/mlflow.db)"
    )


def _create_experiment(tracking_uri: str, experiment: str, artifacts: str | None) -> str:
    """Where the experiment, made if need be, keeps its artifacts."""
    from mlflow.exceptions import MlflowException

    client = client_of(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            client.create_experiment(
                experiment, artifact_location=artifacts, tags={view.TAG: view.saved_view()}
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
        return artifacts or ""
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {experiment!r} at {redact(tracking_uri)} was deleted; choose another "
            f"name, or restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    if view.TAG not in found.tags:  # made before there was one; who may not change it goes without
        with contextlib.suppress(MlflowException):
            client.set_experiment_tag(found.experiment_id, view.TAG, view.saved_view())
    return str(found.artifact_location)


def brief(error: Exception) -> str:
    """Why, in one short line: of a network error only its cause, which stands last in its text."""
    text = str(error).strip()
    cause = re.search(r"\[Errno -?\d+\] [\w ]+|(?:read|connect) timed out", text, re.I)
    if cause and "://" in text:
        return f"no answer, {cause[0]}"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
