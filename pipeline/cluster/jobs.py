"""Jobs of a Ray cluster: submit, follow and stop the run of a workflow through the job server.

The code installed here is uploaded with a job; the environment isn't: it comes from the cluster's
image and is compared before anything runs (pipeline/cluster/preflight.py). Credentials are never
sent. This module keeps no state: job ids follow from what is computed, and the store records
finished stages, so resubmitting a cancelled or lost job resumes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.durable.workflow import Workflow

PREFIX = "adsc"
MAX_CODE = 200 * 2**20
"""Bytes of code; Ray's head keeps uploads in memory and refuses 500 MiB."""
FORWARDED = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION",
    "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
)  # fmt: skip
"""Environment variables of this machine passed on to a job; none of them is a credential."""
STOP_SECONDS = 20
"""Seconds between asking a job to stop and killing it, in which it releases its leases."""
_START_SECONDS = 30  # a head that has just started accepts no jobs for a while
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


class JobError(ValueError):
    """A job can't be submitted or found: the message has the value, the rule and the way out."""


class JobFailed(RuntimeError):
    """A job that was followed ended without success."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The request to the job server. It must hold no secret: every user of the cluster sees it."""

    family: str
    """The job's id without its number; the same for the same stages on the same store."""
    entrypoint: str
    """Shell command on the head."""
    metadata: dict[str, str]
    """Shown by `adsc status`."""
    environment: dict[str, str]
    """Environment variables of all the job's processes."""
    packages: tuple[str, ...]
    """Names of the packages uploaded with the job."""


def plan_submission(
    workflow: Workflow,
    changes: Sequence[str],
    root: str,
    *,
    shared_root: bool = False,
    mlflow: str | None = None,
    options: Sequence[str] = (),
    python: str = "python",
    any_versions: bool = False,
    driver: str,
    packages: tuple[str, ...],
) -> Submission:
    """A submission, checked as far as possible before anything is sent.

    Args:
        workflow: with its changes already applied.
        changes: the same changes as KEY=VALUE, for the command on the cluster.
        options: further arguments for `adsc run`, such as --workers 8.
        driver: the module that runs on the cluster's head.
        packages: names of the packages to upload with the job.

    Raises:
        JobError: a store or tracking that nodes can't share; anything that looks like a credential.
        GraphError: the stages are not a valid graph.
    """
    from pipeline.cluster import preflight
    from pipeline.commit import git_commit
    from pipeline.durable import graph
    from pipeline.durable.identity import SHORT, digest
    from pipeline.store import check_for_runs, open_store
    from pipeline.tracking.address import explained

    store = open_store(root)
    check_for_runs(store.root)
    if store.local("") is not None and not shared_root:
        raise JobError(
            f"--root {root} is a folder of this machine, which the cluster's nodes don't see; "
            "choose s3://bucket/prefix, or add --shared-root if every node mounts it at "
            f"{store.root}"
        )
    if mlflow is None and store.local("") is None:
        raise JobError(
            f"--root {root} needs an MLflow server, because nodes can't share a database file; "
            "add --mlflow http://HOST:5000, or --mlflow off"
        )
    if mlflow and mlflow.startswith("sqlite") and not shared_root:
        raise JobError(
            f"--mlflow {mlflow} is a file of one machine, which the cluster's nodes don't share; "
            "add --mlflow http://HOST:5000, or --mlflow off"
        )
    if mlflow and (reason := explained(mlflow)):
        raise JobError(f"--mlflow {mlflow}: {reason}")
    prints = graph.fingerprints(workflow.stages())
    words = [f"--set={change}" for change in changes]
    words += [f"--root={store.root}", *([f"--mlflow={mlflow}"] if mlflow else []), *options]
    given = {
        "root": store.root,
        "expected": None if any_versions else preflight.versions(),
    }
    entrypoint = shlex.join([python, "-m", driver, json.dumps(given), "run", workflow.name, *words])
    environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    environment |= {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    if commit := git_commit():
        environment["ADSC_COMMIT"] = commit
    submission = Submission(
        family=f"{PREFIX}-{workflow.name}-{digest({'root': store.root, 'stages': prints})[:SHORT]}",
        # exec: the job's signals reach Python and not a shell.
        entrypoint=f"exec {entrypoint}",
        metadata={
            "workflow": workflow.name,
            "root": store.root,
            "mlflow": mlflow or "",
            "changes": json.dumps(list(changes)),
            "commit": commit or "",
        },
        environment=environment,
        packages=packages,
    )
    _refuse_secrets(submission, changes)
    return submission


def _refuse_secrets(submission: Submission, changes: Sequence[str]) -> None:
    from pipeline.redact import HIDDEN, flatten, redact

    shown = flatten(dict(change.split("=", 1) for change in changes))
    found = [f"--set {key}" for key, value in shown.items() if HIDDEN in value]
    found += [name for name, value in submission.environment.items() if redact(value) != value]
    if not found and redact(submission.entrypoint) != submission.entrypoint:
        found.append("the command")
    if found:
        raise JobError(
            f"{', '.join(found)} looks like a credential, and every user of the cluster can read "
            "it; give it to the nodes themselves instead (a role, a mounted secret)"
        )


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray's job client for the duration of a `with`.

    Raises:
        JobError: nothing answers at the address, or it refuses the client.
    """
    if not address:
        raise JobError("no cluster: add --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JobError(
            f"--address {address} is not the address of a job server; use that of the cluster's "
            "dashboard, such as http://HEAD:8265"
        )
    if parts.username or parts.password:
        raise JobError("--address has credentials; put Ray's token into ~/.ray/auth_token instead")
    # Ray's client waits for minutes if a firewall drops its packets.
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except OSError as error:
        raise JobError(
            f"nothing answers at {address} ({error.strerror or error}); check that the cluster "
            "is running and that the port is reachable (kubectl port-forward, ray dashboard)"
        ) from None
    from pipeline.durable.session import set_auth_mode

    set_auth_mode()
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # They log uploads and closed connections at INFO.
    for name in ("modules.dashboard_sdk", "modules.job.sdk"):
        logging.getLogger(f"ray.dashboard.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    # Ray prefers this variable to the client's argument.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address.rstrip("/")
    try:
        verify: Any = os.environ.get("REQUESTS_CA_BUNDLE", True)
        try:
            client = JobSubmissionClient(address.rstrip("/"), verify=verify)
        except (RuntimeError, KeyError, ValueError) as error:  # it isn't a Ray server
            raise ConnectionError(str(error)) from None
        yield client
    except AuthenticationError:
        mode = os.environ["RAY_AUTH_MODE"]
        why = (
            "the token here is not the cluster's"
            if mode == "token"
            else f"it requires a token, and RAY_AUTH_MODE is {mode} here"
        )
        raise JobError(
            f"the cluster at {address} refused the connection: {why}; set RAY_AUTH_MODE=token and "
            "put the cluster's token into ~/.ray/auth_token (or name its file in "
            "RAY_AUTH_TOKEN_PATH)"
        ) from None
    except (requests.RequestException, ConnectionError) as error:
        raise JobError(
            f"the job server at {address} stopped answering or is not one "
            f"({type(error).__name__}); check that this is the dashboard of a Ray cluster"
        ) from None
    finally:
        if before is None:
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def adsc_jobs(client: Any, family: str = PREFIX) -> list[Any]:
    """The cluster's jobs of a family, oldest first."""
    jobs = [job for job in client.list_jobs() if (job.submission_id or "").startswith(f"{family}-")]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def start(client: Any, submission: Submission) -> tuple[str, bool]:
    """Submit, unless the same job is already running: the job's id, and whether it is new."""
    deadline = time.monotonic() + _START_SECONDS
    with _copied(submission.packages) as code:
        while True:
            before = adsc_jobs(client, submission.family)
            for job in before:
                if job.status not in ENDED:
                    return job.submission_id, False
            numbers = [int(job.submission_id.rpartition("-")[2]) for job in before]
            name = f"{submission.family}-{max(numbers, default=0) + 1}"
            try:
                client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=name,
                    metadata=dict(submission.metadata),
                    runtime_env={
                        "working_dir": str(code),
                        "env_vars": dict(submission.environment),
                    },
                )
            except RuntimeError as error:
                # Another client has just submitted the same job, or the head has just started.
                transient = any(text in str(error) for text in ("already", "No available agent"))
                if not transient or time.monotonic() > deadline:
                    raise JobError(f"the job server refused {name}: {last_line(error)}") from None
                time.sleep(0.5)
            else:
                return name, True


@contextlib.contextmanager
def _copied(packages: Sequence[str]) -> Iterator[Path]:
    """A folder with copies of the packages and nothing else. As a job's working directory it takes
    precedence over installed packages on all nodes."""
    with tempfile.TemporaryDirectory(prefix="adsc-code-") as folder:
        for name in packages:
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(package_folder(name), Path(folder) / name, ignore=ignore)
        yield Path(folder)


def package_folder(name: str) -> Path:
    """The folder of an installed package.

    Raises:
        JobError: it isn't installed, or is too large to upload.
    """
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise JobError(f"the package {name} is not installed here, so it can't be uploaded")
    folder = Path(spec.origin).parent
    files = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    if sum(sizes.values()) > MAX_CODE:
        largest = max(sizes, key=lambda path: sizes[path])
        raise JobError(
            f"{folder} has {sum(sizes.values()) >> 20} MiB, but at most {MAX_CODE >> 20} MiB can "
            f"be uploaded with a job; its largest file is {largest}: keep data in the store"
        )
    return folder


def follow(client: Any, job: str, write: Callable[[str], object]) -> str:
    """Pass on a job's output until it ends, across lost connections; returns its last status."""
    import asyncio

    import aiohttp

    passed = 0

    async def tail() -> None:
        nonlocal passed
        position = 0
        async for chunk in client.tail_job_logs(job):
            # A new connection starts from the beginning.
            write(chunk[max(0, passed - position) :])
            position += len(chunk)
            passed = max(passed, position)

    # An ended job's output is read in one call: Ray's server closes a tail of it after seconds.
    pause = 0.0
    while (status := str(job_details(client, job).status.value)) not in ENDED:
        time.sleep(pause)  # the connection was lost; `job_details` shows whether the job is too
        pause = 1.0
        with contextlib.suppress(aiohttp.ClientError, RuntimeError):
            asyncio.run(tail())
    with contextlib.suppress(RuntimeError):  # its node is lost, and the output with it
        write(client.get_job_logs(job)[passed:])
    return status


def job_details(client: Any, job: str) -> Any:
    """The job's details.

    Raises:
        JobError: the server failed, or doesn't know the job.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error) and "does not exist" not in str(error):
            raise JobError(f"the job server failed: {last_line(error)}") from None
        newest = [job.submission_id for job in adsc_jobs(client)][-5:]
        raise JobError(
            f"the cluster knows no job {job!r}; its newest are {', '.join(newest) or 'none'}. A "
            "restarted cluster forgets its jobs: submit again to resume from the store's finished "
            "stages"
        ) from None


def last_line(error: Exception) -> str:
    """The last meaningful line of an error's text, without Ray's traceback."""
    lines = str(error).replace("\\n", "\n").strip().rstrip("\"}'.").strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
