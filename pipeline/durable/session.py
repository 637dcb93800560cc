"""What a driver needs around its stages: Ray, the workflow's MLflow run, the code's commit.

Ray is an existing cluster, or one embedded in this machine for the time of a run. Two Rays on one
machine don't disturb each other, and their logs stay out of the display. Nothing here knows stages'
order or state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.durable.address import ClusterError, check_head, check_socket_room, job_config
from pipeline.durable.progress import PLAIN
from pipeline.durable.stage import RunContext, Stage
from pipeline.redact import redact
from pipeline.store import open_store
from pipeline.tracking import spool

if TYPE_CHECKING:
    from rich.console import Console

# Set before Ray is imported; what the user has set stays.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The default is to start a task that fills the memory again and again, for ever.
    "RAY_task_oom_retries": "1",
    # Idle workers hold half a gigabyte of imported torch each; the default keeps one a core.
    "RAY_num_workers_soft_limit": "1",
}


@contextlib.contextmanager
def ray_for(context: RunContext) -> Iterator[None]:
    """Ray for the length of a `with`; where this process has a Ray already, that one, untouched."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = context.address or os.environ.get("RAY_ADDRESS")
    set_auth_mode(own=not address)
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
                "the address out (and unset RAY_ADDRESS) to run on this machine alone"
            ) from error
        with contextlib.closing(_Shutdown()):
            yield
        return
    check_socket_room()
    port = free_port(context.dashboard_port)
    # With another Ray on this machine, Ray Train would ask all of them about its workers and fail.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        cores = max(os.cpu_count() or 1, math.ceil(context.most_workers * context.cpus_per_worker))
        _start_ray(
            context.dashboard_port,
            address="local",  # not a cluster that somebody started on this machine
            # One more than there is: stages wait for the workers that they ask for.
            num_cpus=cores + 1,
            include_dashboard=True,  # Ray Train asks it whether a controller is alive
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **setup,
        )
        with contextlib.closing(_Shutdown()):
            yield
    finally:
        if before is None:
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _start_ray(wanted_port: int | None, tries: int = 3, **options: Any) -> None:
    """Start Ray here; again where it took too long, which busy machines need.

    Raises:
        ClusterError: it still did not start.
    """
    import ray

    for left in reversed(range(tries)):
        try:
            with _safe_path():
                ray.init(**options)
            return
        except Exception as error:  # Ray raises this very class
            if not re.search("timed out|failed to start", str(error), re.IGNORECASE):
                raise
            ray.shutdown()
            if wanted_port is None:  # what was left of that try may still hold its port
                options["dashboard_port"] = free_port(None)
                address = f"http://127.0.0.1:{options['dashboard_port']}"
                os.environ["RAY_API_SERVER_ADDRESS"] = address
            if not left:
                raise ClusterError(
                    f"Ray did not start here in {tries} tries ({str(error).splitlines()[0]}): this "
                    "machine may be too busy; run the same command again"
                ) from error


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """For processes that are started meanwhile, Ray's daemons and what they start: Python doesn't
    import from the folder where the user stands, whose `queue.py` would end them."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before


def set_auth_mode(own: bool = False) -> None:
    """Choose Ray's authentication before Ray is imported, unless the user has: by token where there
    is one. Left unset, Ray itself and its clients take different modes, and refuse each other.

    Args:
        own: of a Ray that lives as long as this process: it gets a token that nobody else knows,
            since Ray's inner processes listen on every network of the machine.
    """
    token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    there = bool(token)
    with contextlib.suppress(RuntimeError):  # a user id without an account, and no HOME
        there = there or Path("~/.ray/auth_token").expanduser().is_file()
    if own and not there and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        there = True
    os.environ.setdefault("RAY_AUTH_MODE", "token" if there else "disabled")


class _Shutdown:
    def close(self) -> None:
        import ray

        ray.shutdown()


def free_port(wanted: int | None) -> int:
    """A port that nobody listens on: the wanted one, or any.

    Raises:
        ClusterError: the wanted one is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as error:
            if isinstance(error, OverflowError):
                raise ClusterError(f"port {wanted} is none: ports go from 1 to 65535") from None
            raise ClusterError(
                f"port {wanted} for Ray's dashboard is in use ({error.strerror}); choose another, "
                "or none to take a free one"
            ) from error
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def cancelling(refs: Sequence[Any]) -> Iterator[None]:
    """On an interrupt, cancel the tasks that still run, and let them give their leases back."""
    import ray

    try:
        yield
    except KeyboardInterrupt:
        for ref in refs:
            ray.cancel(ref)
        ray.wait(list(refs), num_returns=len(refs), timeout=30)
        raise


@contextlib.contextmanager
def tracked(context: RunContext, stages: Sequence[Stage], console: Console) -> Iterator[RunContext]:
    """The workflow's run in MLflow, around its stages' runs. What earlier processes could not send
    is sent before and after, and the console told."""
    if context.tracking_uri is None or context.parent_run_id is not None:
        yield context
        return
    from pipeline.tracking import tracker as tracking

    store = open_store(context.root)
    place = spool.folder(store.root, store.local("tracking"), context.cache)
    remote = store.local("") is None and "://" in context.tracking_uri
    artifacts = (
        f"{context.root}/mlflow" if remote and not context.tracking_uri.startswith("http") else None
    )
    known = place / "servers"
    try:
        uri = tracking.prepare(
            context.tracking_uri, context.experiment, artifacts, lambda said: _tell(console, said)
        )
        place.mkdir(parents=True, exist_ok=True)
        with known.open("a") as file:
            file.write(f"{redact(uri)}\n")
    except tracking.NoAnswer as error:
        uri = context.tracking_uri
        # An address that has never answered is a mistake; one that has will answer again.
        if not known.is_file() or redact(uri) not in known.read_text().splitlines():
            raise
        _tell(console, f"{error}. The run goes on, and MLflow is told later")
    params = {stage.name: stage.config.model_dump() for stage in stages}
    _tell(console, tracking.reconcile(place, uri))
    tags = {"adsc.root": context.root, "adsc.commit": context.commit or "unknown"}
    tags["mlflow.note.content"] = "\n".join(f"- {stage.title}" for stage in stages)
    tracker = tracking.start_workflow(
        uri, context.experiment, context.workflow, params, tags, place
    )
    status = "KILLED"
    try:
        yield dataclasses.replace(context, tracking_uri=uri, parent_run_id=tracker.id_for_children)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        tracker.finish(status)
        # What stages could not send while they ran.
        _tell(console, tracking.reconcile(place, uri))


def settle(root: str, tracking_uri: str | None, cache: str) -> str | None:
    """Send what earlier runs could not send to MLflow; None, without loading it, where all is
    sent."""
    store = open_store(root)
    place = spool.folder(store.root, store.local("tracking"), cache)
    if not any(place.glob("*.jsonl")):
        return None
    from pipeline.tracking import tracker as tracking

    return tracking.reconcile(place, tracking_uri or "")


def _tell(console: Console, text: str | None) -> None:
    if text:
        console.print(text, **PLAIN)
