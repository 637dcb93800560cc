"""What can be known of a Ray cluster, or of this machine, before Ray itself is asked to start.

Ray's own answers come late (a head that is gone is waited for over ten minutes) or as tracebacks.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 5.0
"""Per try: a head that is there accepts in milliseconds, over any network that Ray can work on."""
SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""


class ClusterError(ValueError):
    """Ray can't be started or reached; the message says why and what to do."""


def check_head(address: str) -> None:
    """Whether anything listens at a cluster's address.

    Args:
        address: HOST:PORT or ray://HOST:PORT; `auto` and `local` are left to Ray.

    Raises:
        ClusterError: nothing does, or it is no address.
    """
    if address in ("auto", "local"):
        return
    found = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:.]+\]|[^/:\s]+):(\d{1,5})/?(?:\?.*)?", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ClusterError(
            f"{address!r} is not the address of a Ray cluster; write HOST:6379 on one of its "
            "machines, or ray://HOST:10001 elsewhere (`adsc submit` takes the dashboard's, "
            "http://HOST:8265)"
        )
    try:
        with socket.create_connection((found[1].strip("[]"), int(found[2])), CONNECT_SECONDS):
            pass
    except OSError as error:
        raise ClusterError(
            f"no Ray answers at {address} ({error.strerror or error}); start one, or leave the "
            "address out (and unset RAY_ADDRESS) to run on this machine alone"
        ) from None


def check_socket_room() -> None:
    """Whether the sockets of a Ray that is started here have room in their folder's path.

    Raises:
        ClusterError: they have not.
    """
    names = [name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    folder = os.environ[names[0]] if names else tempfile.gettempdir()
    session = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/dash_MetricsHead"
    room = SOCKET_BYTES - len(session)
    if len(os.fsencode(folder)) > room:
        raise ClusterError(
            f"{names[0] if names else 'the folder for temporary files'} is too long for Ray's "
            f"sockets ({folder}: {len(os.fsencode(folder))} bytes, at most {room}); set "
            "RAY_TMPDIR=/tmp, which moves Ray's own files alone"
        )


def job_config() -> Any:
    """Ray's settings for a run: its workers import from where this process does.

    Ray puts the folder in which the command was given in front of its workers' `sys.path`: a file
    `queue.py` or a folder `pipeline` there would be imported instead of the real one. Where this
    process imports from that folder itself (`python -m` in a checkout), workers do as well.
    """
    import ray

    config: Any = ray.job_config.JobConfig()
    if Path.cwd() not in {Path(path).absolute() for path in sys.path}:
        script = str(Path(sys.argv[0]).resolve().parent)
        config._py_driver_sys_path = [script] if script in sys.path else []
        # With a working directory of its own, a job's workers get no folder of the driver's.
        config._runtime_env_has_working_dir = lambda: True
    return config
