"""The session of a driver: Ray, the workflow's MLflow run, and the code's commit.

Ray is an existing cluster, or a local one for the duration of a run. Two Rays on one machine don't
interfere, and their logs stay out of the display. Nothing here depends on the order or state of
stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.durable.address import ClusterError, check_head, check_socket_room, job_config
from pipeline.durable.progress import PLAIN
from pipeline.durable.stage import RunContext, Stage
from pipeline.redact import clean, redact
from pipeline.store import open_store
from pipeline.tracking import spool
from pipeline.tracking.address import page_address

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.durable.record import Record
    from pipeline.tracking.tracker import Tracker

# Set before Ray is imported; the user's settings take precedence.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # By default, a task that runs out of memory is retried forever.
    "RAY_task_oom_retries": "1",
    # An idle worker holds half a gigabyte of imported torch; the default keeps one per core.
    "RAY_num_workers_soft_limit": "1",
}


@contextlib.contextmanager
def ray_for(context: RunContext) -> Iterator[None]:
    """Ray for the duration of a `with`; if this process has one already, it is used unchanged."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = context.address or os.environ.get("RAY_ADDRESS")
    set_auth_mode(embedded=not address)
    import ray

    if ray.is_initialized():
        yield
        return
    setup: dict[str, Any] = {}
    if context.setup is not None:
        setup["runtime_env"] = {"worker_process_setup_hook": context.setup}
    if not (address or "").startswith("ray://"):  # a client's workers start elsewhere
        setup["job_config"] = job_config()
    if address:
        check_head(address)
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **setup)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray answers at {address} ({str(error).splitlines()[0]}); start one, or leave "
                "the address out (and unset RAY_ADDRESS) to run on this machine only"
            ) from error
        with _connected():
            yield
        return
    check_socket_room()
    port = free_port(context.dashboard_port)
    # With another Ray on this machine, Ray Train would query both about its workers and fail.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        cores = max(os.cpu_count() or 1, math.ceil(context.most_workers * context.cpus_per_worker))
        _start_ray(
            context.dashboard_port,
            address="local",  # not another cluster on this machine
            # One extra: stages hold their share of a core while they wait for workers.
            num_cpus=cores + 1,
            include_dashboard=True,  # Ray Train queries it whether a controller is alive
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **setup,
        )
        with _connected():
            yield
    finally:
        if before is None:
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _start_ray(wanted_port: int | None, tries: int = 3, **options: Any) -> None:
    """Start Ray here; retry if it took too long, as it may on busy machines.

    Raises:
        ClusterError: it did not start in any of the tries.
    """
    import ray

    for left in reversed(range(tries)):
        try:
            with _safe_path():
                ray.init(**options)
            return
        except Exception as error:  # Ray raises a bare Exception
            if not re.search("timed out|failed to start", str(error), re.IGNORECASE):
                raise
            ray.shutdown()
            if wanted_port is None:  # leftovers of the failed try may still hold its port
                options["dashboard_port"] = free_port(None)
                address = f"http://127.0.0.1:{options['dashboard_port']}"
                os.environ["RAY_API_SERVER_ADDRESS"] = address
            if not left:
                raise ClusterError(
                    f"Ray did not start here in {tries} tries ({str(error).splitlines()[0]}): this "
                    "machine may be too busy; rerun the same command"
                ) from error


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Keep processes started meanwhile, Ray's daemons and their children, from importing from the
    current folder: a file `queue.py` there would break them."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before


def set_auth_mode(embedded: bool = False) -> None:
    """Choose Ray's authentication before Ray is imported, unless the user has: by token if there is
    one. If it is unset, Ray and its clients choose different modes and refuse each other.

    Args:
        embedded: for a Ray that lives as long as this process: it gets a secret token, because
            Ray's internal processes listen on every network interface of the machine.
    """
    has_token = bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys())
    with contextlib.suppress(RuntimeError):  # a user id without an account, and no HOME
        has_token = has_token or Path("~/.ray/auth_token").expanduser().is_file()
    if embedded and not has_token and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        has_token = True
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """For the duration of a `with`, SIGTERM interrupts as Ctrl-C does, so that leases are released;
    Ray's own handler prints a stack and ends the process. Then Ray is shut down."""
    import ray

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if is_main else None
    try:
        yield
    finally:
        ray.shutdown()
        if is_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def free_port(wanted: int | None) -> int:
    """A free port: the wanted one, or any.

    Raises:
        ClusterError: the wanted one is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as error:
            if isinstance(error, OverflowError):
                raise ClusterError(f"{wanted} is not a port: use 1 to 65535") from None
            raise ClusterError(
                f"port {wanted} for Ray's dashboard is in use ({error.strerror}); choose another, "
                "or leave out --dashboard-port to use a free one"
            ) from error
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def cancelling(refs: Sequence[Any]) -> Iterator[None]:
    """On an interrupt, cancel the running tasks and wait until they have released their leases."""
    import ray

    try:
        yield
    except KeyboardInterrupt:
        for ref in refs:
            ray.cancel(ref)
        ray.wait(list(refs), num_returns=len(refs), timeout=30)
        raise


@contextlib.contextmanager
def tracked(
    context: RunContext, stages: Sequence[Stage], console: Console
) -> Iterator[tuple[RunContext, Tracker]]:
    """The workflow's run in MLflow, parent of its stages' runs, and a context that names it. Data
    that earlier processes could not send is sent before and after, and reported on the console."""
    from pipeline.tracking import tracker as tracking

    if context.tracking_uri is None or context.parent_run_id is not None:
        yield context, tracking.Tracker(tracking.RunHandle("", None))
        return
    store = open_store(context.root)
    place = spool.folder(store.root, store.local("tracking"), context.cache)
    remote = store.local("") is None and "://" in context.tracking_uri
    artifacts = (
        f"{context.root}/mlflow" if remote and not context.tracking_uri.startswith("http") else None
    )
    known = place / "servers"
    try:
        uri = tracking.prepare(
            context.tracking_uri, context.experiment, artifacts, lambda text: _print(console, text)
        )
        place.mkdir(parents=True, exist_ok=True)
        with known.open("a") as file:
            file.write(f"{redact(uri)}\n")
    except tracking.TrackingUnavailable as error:
        uri = context.tracking_uri
        # An address that never answered is a mistake; one that has will answer again.
        if not known.is_file() or redact(uri) not in known.read_text().splitlines():
            raise
        _print(console, f"{error}. The run continues, and tracking data is sent later")
    _print(console, tracking.reconcile(place, uri))
    tracker = tracking.start_workflow(
        uri, context.experiment, context.workflow, context.parameters, _tags(context, stages), place
    )
    configs = {stage.name: stage.config.model_dump(mode="json") for stage in stages}
    tracker.text("config.json", json.dumps(clean(configs), indent=1))
    _print(console, page_address(uri, tracker.page))
    status = "KILLED"
    try:
        found = dataclasses.replace(
            context,
            tracking_uri=uri,
            parent_run_id=tracker.id_for_children,
            run_page=tracker.page,
        )
        yield found, tracker
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        tracker.finish(status)
        # Send what the stages could not send while they ran.
        _print(console, tracking.reconcile(place, uri))


def _tags(context: RunContext, stages: Sequence[Stage]) -> dict[str, str]:
    """Tags of the workflow's run; those of MLflow fill the columns Source and Version."""
    tags = {
        "adsc.root": context.root,
        "adsc.commit": context.commit or "unknown",
        "adsc.command": context.command,
        # MLflow shows what follows the last slash: the options are in `adsc.command`.
        "mlflow.source.name": " ".join(context.command.split()[:3]) or context.workflow,
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": "\n".join(f"- {stage.title}" for stage in stages),
    }
    return tags | ({"mlflow.source.git.commit": context.commit} if context.commit else {})


def log_headline(track: Tracker, stages: Sequence[Stage], finished: Mapping[str, Record]) -> None:
    """Log what workflows are compared by, from the records of all stages, whenever they ran:
    seconds of each, GPU-hours, and what their kinds choose (`Kind.headline`)."""
    records = [finished[stage.name] for stage in stages]
    for stage, record in zip(stages, records, strict=True):
        if stage.kind.headline is not None:
            headline = stage.kind.headline(record)
            track.metrics(headline.metrics)
            track.params(headline.params)
            if headline.data is not None:
                track.dataset(*headline.data)
    # Last: MLflow lists metrics in the order in which they came.
    track.metrics({"gpu_hours": sum(record.seconds * record.gpus for record in records) / 3600})
    track.metrics({"seconds": {record.stage: record.seconds for record in records}})


def send_pending(root: str, tracking_uri: str | None, cache: str) -> str | None:
    """Send the tracking data that earlier runs could not send; returns a report. None, without
    importing MLflow, if nothing is pending."""
    store = open_store(root)
    place = spool.folder(store.root, store.local("tracking"), cache)
    if not any(place.glob("*.jsonl")):
        return None
    from pipeline.tracking import tracker as tracking

    return tracking.reconcile(place, tracking_uri or "")


def _print(console: Console, text: str | None) -> None:
    if text:
        console.print(text, **PLAIN)
