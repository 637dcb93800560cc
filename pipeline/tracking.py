"""What people browse of a workflow, in MLflow. The only file that calls MLflow, and lazily.

A workflow is a parent run, a stage a child run; `adsc.record` on a stage's run names its record in
the store. Every call names its run: there is no active run, so stages that share a process can't
write into each other's.

The truth is in the store, so tracking never fails a stage. A server that dies is reported once, in
the log and in `Tracker.problems`; calls then return at once and one a minute tries again. Only
`prepare`, which runs while the user still looks, raises. System metrics, the model registry and
autologging are deliberately left to MLflow itself.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.redact import flatten, leaves, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

QUIET_SECONDS = 60.0
"""After a failure of the server, calls are dropped for so long before one tries again."""
MAX_VALUE = 6000
"""Characters that MLflow keeps of a parameter; of a tag it keeps 8000."""
MODEL_PACKAGES = ("torch", "transformers", "peft", "pillow", "safetensors")


class TrackingError(ValueError):
    """The tracking address can't be used; the message says why and what to write instead."""


def default_uri(folder: Path | str) -> str:
    """An SQLite database in `folder`; `prepare` puts artifacts beside it."""
    return f"sqlite:///{Path(folder).absolute() / 'mlflow.db'}"


def prepare(tracking_uri: str, experiment: str, artifacts: str | None = None) -> str:
    """Create database and experiment, once and before any stage runs; return the address that
    stages are to use.

    Args:
        tracking_uri: an MLflow server, or a database that every worker reaches.
        experiment: name of the experiment; made if it isn't there.
        artifacts: where a new experiment puts artifacts, a folder or s3://. A server knows by
            itself; SQLite's default is a folder beside the database; any other database needs it.

    Raises:
        TrackingError: no server there, an unwritable folder, a deleted experiment, an address that
            isn't MLflow's.
    """
    scheme = urlsplit(tracking_uri).scheme
    if scheme in ("", "file"):
        raise _unusable(tracking_uri, "that is a folder, which MLflow 3 no longer accepts")
    try:
        if scheme in ("http", "https"):
            _create_experiment(tracking_uri, experiment, artifacts)
        elif scheme == "sqlite":
            database = Path(tracking_uri.removeprefix("sqlite:///")).absolute()
            tracking_uri = f"sqlite:///{database}"
            database.parent.mkdir(parents=True, exist_ok=True)
            # Two processes that make the tables of a fresh database at once break it.
            with database.with_name(database.name + ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                beside = (database.parent / "mlflow-artifacts").as_uri()
                _create_experiment(tracking_uri, experiment, artifacts or beside)
        elif not re.match("postgresql|mysql|mssql", scheme):
            raise _unusable(tracking_uri, f"{scheme!r} is neither a web address nor a database")
        elif not artifacts:
            raise _unusable(tracking_uri, "a database shared by machines needs `artifacts` as well")
        else:
            _create_experiment(tracking_uri, experiment, artifacts)
    except TrackingError:
        raise
    except _failures() as error:
        raise _unusable(tracking_uri, _brief(error)) from None
    return tracking_uri


def start_workflow(
    tracking_uri: str,
    experiment: str,
    workflow: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str | None:
    """Open the parent run of a workflow. Returns its id, or None (with a warning) when tracking
    fails."""
    tracker = _open_run(tracking_uri, experiment, workflow, {"adsc.workflow": workflow, **tags})
    tracker.params(params)
    return tracker.run_id


def finish_workflow(tracking_uri: str, run_id: str | None, status: str = "FINISHED") -> None:
    """Close the parent run; `status` is FINISHED, FAILED or KILLED."""
    Tracker(RunHandle(tracking_uri, run_id)).finish(status)


@contextmanager
def stage_run(
    tracking_uri: str,
    experiment: str,
    parent_run_id: str | None,
    stage_name: str,
    tags: Mapping[str, str],
) -> Iterator[Tracker]:
    """A stage's run, closed FINISHED, or FAILED when the body raises (KILLED on an interrupt).

    The caller holds the stage's lease: a run of the same `adsc.record` that still says RUNNING is a
    dead attempt's, and is closed as KILLED.
    """
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    tags = {"adsc.stage": stage_name, **parent, **tags}
    tracker = _open_run(tracking_uri, experiment, stage_name, tags)
    tracker.close_abandoned(tags.get("adsc.record"))
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracker.finish("FINISHED")


@dataclass(frozen=True)
class RunHandle:
    """Where a run is: all that another process needs to write into it. Picklable; `run_id` None
    writes nowhere."""

    tracking_uri: str
    run_id: str | None

    def tracker(self) -> Tracker:
        return Tracker(self)


class Tracker:
    """Writes into one run, from any process; see the module for what happens when the server
    doesn't answer."""

    def __init__(self, handle: RunHandle) -> None:
        self.handle = handle
        self.problems: list[str] = []
        self._causes: set[str] = set()
        self._dropped = 0
        self._quiet_until = 0.0

    @property
    def run_id(self) -> str | None:
        return self.handle.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Log a nested config under dotted keys; credentials are hidden, long values cut with a
        mark."""

        def log_batches(client: MlflowClient, run: str) -> None:
            from mlflow.entities import Param

            params = [Param(_name(key), _cut(value)) for key, value in flatten(values).items()]
            for start in range(0, len(params), 100):
                client.log_batch(run, params=params[start : start + 100])

        self._send("params", log_batches)

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers; nested names are joined by `/`, which MLflow groups by. None is left out."""
        numbers: dict[str, float] = {}
        for path, value in leaves(values):
            name = _name("/".join(path))
            try:
                if value is not None:
                    numbers[name] = float(value)
            except (TypeError, ValueError):
                self._report(f"metric {name} is {value!r}, not a number")
        now = int(time.time() * 1000)

        def log_batch(client: MlflowClient, run: str) -> None:
            from mlflow.entities import Metric

            batch = [Metric(name, number, now, step or 0) for name, number in numbers.items()]
            client.log_batch(run, metrics=batch)

        self._send("metrics", log_batch)

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Upload a file, or a folder with all that is in it."""
        path = Path(path)
        if path.is_dir():
            self._send("artifact", lambda client, run: client.log_artifacts(run, str(path), folder))
        else:
            self._send("artifact", lambda client, run: client.log_artifact(run, str(path), folder))

    def dataset(self, uri: str, name: str, digest: str) -> None:
        """Name a data set that this run read: where it is, and which version (36 characters of its
        digest stay)."""
        kind = urlsplit(uri).scheme or "local"
        source = json.dumps({"uri": redact(uri)})

        def log_input(client: MlflowClient, run: str) -> None:
            from mlflow.entities import Dataset, DatasetInput

            data = DatasetInput(Dataset(name, digest[:36], kind, source), tags=[])
            client.log_inputs(run, [data])

        self._send("dataset", log_input)

    def note(self, text: str) -> None:
        """The run's description, Markdown, on top of its page."""
        self.tag("mlflow.note.content", text)

    def tag(self, key: str, value: str) -> None:
        shown = _cut(redact(str(value)))
        self._send("tag", lambda client, run: client.set_tag(run, key, shown))

    def model(self, folder: Path | str, name: str) -> str | None:
        """Log an exported checkpoint as a model that MLflow can serve (see
        `pipeline.mlflow_model`).

        Returns its address, `models:/m-...`, or None when that failed.
        """
        return self._send("model", lambda client, run: _log_model(client, run, Path(folder), name))

    def finish(self, status: str) -> None:
        """Close the run; tried even while the server is thought dead, so that a restarted one
        learns the end."""
        self._quiet_until = 0.0
        if self._dropped:
            self._report(f"{self._dropped} tracking calls were dropped while it did not answer")
        if self.problems:
            self.tag("adsc.tracking_problems", "; ".join(self.problems))
        self._send("end of run", lambda client, run: client.set_terminated(run, status))

    def close_abandoned(self, record: str | None) -> None:
        """Mark other runs of the same record that still say RUNNING as KILLED; for the holder of
        its lease only."""

        def close(client: MlflowClient, run: str) -> None:
            experiment = client.get_run(run).info.experiment_id
            same = f"tags.`adsc.record` = '{record}' and attributes.status = 'RUNNING'"
            for other in client.search_runs([experiment], same):
                if other.info.run_id != run:
                    client.set_terminated(other.info.run_id, "KILLED")

        if record and "'" not in record:
            self._send("abandoned runs", close)

    def _send(self, what: str, call: Callable[[MlflowClient, str], Any]) -> Any:
        """Run `call(client, run id)`; a failure is noted, never raised, and a dead server is left
        alone for a while."""
        if self.run_id is None or time.monotonic() < self._quiet_until:
            self._dropped += self.run_id is not None
            return None
        try:
            return call(_client(self.handle.tracking_uri), self.run_id)
        except _failures() as error:
            cause = _brief(error)
            if cause not in self._causes:
                self._causes.add(cause)
                self._report(f"{what} not tracked at {self.handle.tracking_uri}: {cause}")
            if not _refused(error):
                self._quiet_until = time.monotonic() + QUIET_SECONDS
            return None

    def _report(self, problem: str) -> None:
        problem = redact(problem)
        self.problems.append(problem)
        log.warning("%s", problem)


def _open_run(tracking_uri: str, experiment: str, name: str, tags: Mapping[str, str]) -> Tracker:
    """A tracker of a new run; where that fails, one that writes nowhere and says so in its
    problems."""

    def create(client: MlflowClient, _: str) -> str:
        found = client.get_experiment_by_name(experiment)
        shown = {key: _cut(redact(str(value))) for key, value in tags.items()}
        shown["mlflow.user"] = os.environ.get("USER") or f"uid {os.getuid()}"
        if found is None:
            raise TrackingError(f"experiment {experiment!r} is gone; `prepare` makes it")
        return client.create_run(found.experiment_id, tags=shown, run_name=name).info.run_id

    probe = Tracker(RunHandle(tracking_uri, "new"))
    opened = Tracker(RunHandle(tracking_uri, probe._send(f"run {name!r}", create)))
    opened.problems = probe.problems
    return opened


@lru_cache(maxsize=8)
def _client(tracking_uri: str) -> MlflowClient:
    # MLflow's own patience is minutes per call, and it reports its use to its makers: both can be
    # set from outside.
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def _failures() -> tuple[type[Exception], ...]:
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
    """Whether the fault is this one call's: the server said no to it, or a local file isn't
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


def _create_experiment(tracking_uri: str, experiment: str, artifacts: str | None) -> None:
    from mlflow.exceptions import MlflowException

    client = _client(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            client.create_experiment(experiment, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver was faster
                raise
    elif found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {experiment!r} at {redact(tracking_uri)} was deleted; choose another "
            f"name, or restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        )


def _log_model(client: MlflowClient, run_id: str, folder: Path, name: str) -> str:
    """`mlflow.pyfunc.log_model`, with explicit ids instead of an active run and global
    addresses."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    import adsc
    from pipeline import mlflow_model

    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name, source_run_id=run_id)
    status = LoggedModelStatus.FAILED
    try:
        with tempfile.TemporaryDirectory(prefix="adsc-model-") as scratch:
            target = Path(scratch) / "model"
            save_model(
                str(target),
                python_model=mlflow_model.__file__,
                artifacts={"checkpoint": str(folder)},
                code_paths=[str(Path(adsc.__file__).parent)],
                signature=mlflow_model.signature(),
                input_example=mlflow_model.example(),
                pip_requirements=[
                    f"{pkg}=={metadata.version(pkg).partition('+')[0]}" for pkg in MODEL_PACKAGES
                ],
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run_id,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                ),
            )
            client.log_model_artifacts(logged.model_id, str(target))
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(logged.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_uri


def _name(key: str) -> str:
    """A key that MLflow accepts: other characters become `_`, at most 250."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]


def _cut(value: str) -> str:
    """At most MAX_VALUE characters, and the cut says so."""
    mark = f" [cut: {len(value)} characters in all]"
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - len(mark)] + mark


def _brief(error: Exception) -> str:
    """Why, in one short line: of a network error only its cause, which stands last in its text."""
    text = str(error).strip()
    cause = re.search(r"\[Errno -?\d+\] [\w ]+|(?:read|connect) timed out", text, re.I)
    if cause and "://" in text:
        return f"no answer, {cause[0]}"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
