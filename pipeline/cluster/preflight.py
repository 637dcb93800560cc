"""Checks of every node of a cluster before a workflow starts there.

Two things go wrong on clusters that don't on one machine: a node has other package versions than
the machine that submits, and a node doesn't see the store. A Ray task checks both on each node that
is alive. Nodes that an autoscaler adds later aren't checked; nothing is installed or repaired here.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from pipeline.store import StoreError, open_store

PACKAGES = ("ray", "torch", "transformers", "peft", "mlflow")
"""Packages whose versions affect a workflow's results, or whether its processes can communicate."""
_TIMEOUT = 180.0  # seconds for all nodes: each starts a process and imports this module


class PreflightError(ValueError):
    """The cluster can't run the workflow; the message names every node with its problem."""


def versions() -> dict[str, str]:
    """Versions of the packages here, without a build's suffix such as +cpu."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def check(root: str, expected: Mapping[str, str] | None) -> dict[str, str]:
    """Check each node of the cluster that this process is connected to.

    Args:
        root: the store's address; every node has to read what this process wrote there.
        expected: `versions()` of the machine that submitted; None compares nothing.

    Returns:
        Address of each node -> its versions, for the log.

    Raises:
        PreflightError: all problems of all nodes at once.
        StoreError: this process itself can't write to the store.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    store = open_store(root)
    key = f".preflight-{uuid.uuid4().hex}"
    store.create(key, b"written by the driver")
    try:
        probe: Any = ray.remote(num_cpus=0, max_retries=1)(_probe)
        probes: dict[Any, str] = {}
        for node in ray.nodes():
            if node["Alive"]:
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ref = probe.options(scheduling_strategy=place, name="preflight").remote(root, key)
                probes[ref] = node["NodeManagerAddress"] + f" ({node['NodeID'][:6]})"
        ray.wait(list(probes), num_returns=len(probes), timeout=_TIMEOUT)
        problems, fit = [], {}
        for ref, name in probes.items():
            try:
                installed, unread = ray.get(ref, timeout=0.1)
            except ray.exceptions.RayError as error:
                line = str(error).strip().splitlines()[-1]
                problems.append(f"node {name} did not answer ({type(error).__name__}: {line})")
                continue
            wrong = [unread] if unread else []
            wrong += [
                f"{package} is {installed.get(package, 'none')} there and {wanted} here"
                for package, wanted in (expected or {}).items()
                if installed.get(package, "none") != wanted
            ]
            problems += [f"node {name}: {it}" for it in wrong]
            if not wrong:
                fit[name] = ", ".join(f"{package} {it}" for package, it in installed.items())
    finally:
        store.delete(key)
    if problems:
        raise PreflightError(
            "the cluster can't run this workflow:\n  "
            + "\n  ".join(problems)
            + "\nUse one image on all nodes and the same versions on your machine "
            "(constraints.txt), and a store that every node can read and write; --any-versions "
            "skips the comparison of versions"
        )
    return fit


def _probe(root: str, key: str) -> tuple[dict[str, str], str]:
    """Run on a node: its versions, and the reason if it can't read what the driver wrote."""
    try:
        seen = open_store(root).read(key)
    except StoreError as error:
        return versions(), str(error)
    missing = f"it does not see what the driver wrote to {root}: use a store all nodes share"
    return versions(), "" if seen is not None else missing
