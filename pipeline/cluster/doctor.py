"""Checks of this machine, or of every node of a cluster, before a workflow; each with a way out.

Nothing is installed or repaired. One object is written to the store and deleted again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pipeline.redact import redact
from pipeline.store import StoreError, open_store
from pipeline.store.cache import folder

PYTHON = (3, 11)
PACKAGES = ("torch", "transformers", "peft", "ray", "mlflow", "boto3", "pyarrow", "optuna")
"""Distributions that a workflow imports."""
FREE = 4 << 30
"""Bytes of disk, and of memory, that the demo needs."""
_SECONDS = 180.0  # for all nodes: each starts a process


class Finding(NamedTuple):
    """The result of one check."""

    what: str
    state: Literal["ok", "note", "missing"]
    """`note`: works, with a limit; `missing`: a workflow fails."""
    found: str
    way_out: str = ""
    """What to do about a note or a missing part."""


def examine(root: str, cache: str) -> list[Finding]:
    """Check this machine.

    Args:
        root: the store's address.
        cache: folder of the copies of remote files; empty for the default.
    """
    return [
        _python(),
        *_packages(),
        *_devices(),
        _store(root),
        *_disks({"temporary files": tempfile.gettempdir(), "cache": str(folder(cache))}),
        _memory(),
    ]


def examine_driver(
    address: str | None, tracking_uri: str | None, port: int | None
) -> list[Finding]:
    """Check what only the machine that starts a workflow needs: Ray, MLflow, a dashboard port.

    Args:
        address: address of a Ray cluster; None for a local Ray.
        tracking_uri: address of MLflow; None disables tracking.
        port: port of the dashboard; None uses a free one.
    """
    return [_ray(address, port), _mlflow(tracking_uri)]


def examine_nodes(root: str, cache: str) -> dict[str, list[Finding]]:
    """Check every node of the cluster that this process is connected to; results by address."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=1)(examine)
    nodes: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ref = task.options(scheduling_strategy=place, name="doctor").remote(root, cache)
            nodes[ref] = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
    ray.wait(list(nodes), num_returns=len(nodes), timeout=_SECONDS)
    found: dict[str, list[Finding]] = {}
    for ref, name in nodes.items():
        try:
            found[name] = ray.get(ref, timeout=0.1)
        except ray.exceptions.RayError as error:
            line = str(error).strip().splitlines()[-1]
            way_out = "install this version of adsc there, and check the node's Ray logs"
            found[name] = [Finding("answer", "missing", f"{type(error).__name__}: {line}", way_out)]
    return found


def _python() -> Finding:
    text = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] < PYTHON:
        least = ".".join(map(str, PYTHON))
        return Finding("Python", "missing", text, f"install Python {least} or newer")
    return Finding("Python", "ok", text)


def _packages() -> Iterator[Finding]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("packages", "missing", ", ".join(missing), "pip install 'adsc[pipeline]'")
    yield Finding("packages", "ok", ", ".join(found))


def _devices() -> Iterator[Finding]:
    """GPUs as torch sees them, and attention kernels."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        way_out = "check `nvidia-smi` if there should be one" if built else "install torch for CUDA"
        yield Finding("GPU", "note", f"none; torch {torch.__version__} computes on CPUs", way_out)
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding("GPU", "ok", f"{about.name}, {about.total_memory >> 30} GiB")
    if importlib.util.find_spec("flash_attn") is None:
        way_out = "pip install 'adsc[gpu]' for train.attention = flash_attention_2"
        yield Finding("attention", "note", "sdpa; no flash-attn", way_out)
    else:
        yield Finding("attention", "ok", f"flash-attn {metadata.version('flash-attn')}, sdpa")


def _store(root: str) -> Finding:
    """Whether objects can be written there, with conditional writes."""
    try:
        open_store(root).check_writable()
    except (StoreError, OSError) as error:
        return Finding("store", "missing", redact(str(error)), "choose another --root, or fix it")
    return Finding("store", "ok", f"{redact(root)}: writable, conditional")


def _disks(folders: dict[str, str]) -> Iterator[Finding]:
    for name, place in folders.items():
        there = Path(place).absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.0f} GiB free at {place}"
        if free < FREE:
            move = "TMPDIR" if name == "temporary files" else "ADSC_CACHE"
            yield Finding(name, "note", text, f"free some space, or set {move} to another folder")
        else:
            yield Finding(name, "ok", text)


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    text = f"{free / 2**30:.1f} GiB free, {os.cpu_count()} cores"
    if free < FREE:
        return Finding("memory", "note", text, f"the demo needs {FREE >> 30} GiB: free some memory")
    return Finding("memory", "ok", text)


def _ray(address: str | None, port: int | None) -> Finding:
    from pipeline.durable.address import ClusterError, check_head, check_socket_room
    from pipeline.durable.session import free_port

    try:
        if address:
            check_head(address)
            return Finding("Ray", "ok", f"a cluster answers at {address}")
        check_socket_room()
        free_port(port)
    except ClusterError as error:
        what, _, way_out = str(error).partition("; ")
        return Finding("Ray", "missing", what, way_out)
    return Finding("Ray", "ok", "is started on this machine for each run")


def _mlflow(uri: str | None) -> Finding:
    from pipeline.tracking.address import database_of, explained

    if uri is None:
        return Finding("MLflow", "note", "off: nothing is tracked", "leave out --mlflow off")
    shown = redact(uri)
    if (file := database_of(uri)) is not None:
        if os.access(file if file.exists() else _existing(file), os.W_OK):
            return Finding("MLflow", "ok", f"a database at {file}")
        return Finding("MLflow", "missing", f"{file} can't be written", "choose another --root")
    if problem := explained(uri):
        return Finding("MLflow", "missing", problem, "give a server, http://HOST:5000")
    if not uri.startswith(("http://", "https://")):
        return Finding("MLflow", "note", f"{shown}: not checked", "")
    parts = urlsplit(uri)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # 401 will do
    try:
        with urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=10) as answer:
            answer.read(100)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            text = f"{shown} answers {error.code}"
            return Finding("MLflow", "missing", text, "give the root address of an MLflow server")
    except (OSError, ValueError) as error:
        text = f"no answer at {shown}: {redact(str(error))}"
        way_out = "start it (`mlflow server`), or give another: --mlflow http://HOST:5000"
        return Finding("MLflow", "missing", text, way_out)
    return Finding("MLflow", "ok", f"a server answers at {shown}")


def _existing(file: Path) -> Path:
    """The nearest folder above a file that exists."""
    return next(folder for folder in file.parents if folder.exists())
