"""Checks of a Ray cluster's address, or of this machine, before Ray starts.

Ray's own errors come late (it waits over ten minutes for a missing head) or as tracebacks.
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
"""Timeout of a connection: a running head accepts within milliseconds."""
SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""


class ClusterError(ValueError):
    """Ray can't be started or reached; the message has the reason and the way out."""


def check_head(address: str) -> None:
    """Check that something listens at a cluster's address.

    Args:
        address: HOST:PORT or ray://HOST:PORT; `auto` and `local` are left to Ray.

    Raises:
        ClusterError: nothing does, or it isn't an address.
    """
    if address in ("auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:.]+\]|[^/:\s]+):(\d{1,5})/?(?:\?.*)?", address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ClusterError(
            f"{address!r} is not the address of a Ray cluster; write HOST:6379 on one of its "
            "machines, or ray://HOST:10001 elsewhere (`adsc submit` takes the dashboard's, "
            "http://HOST:8265)"
        )
    try:
        with socket.create_connection((match[1].strip("[]"), int(match[2])), CONNECT_SECONDS):
            pass
    except OSError as error:
        raise ClusterError(
            f"no Ray answers at {address} ({error.strerror or error}); start one, or leave the "
            "address out (and unset RAY_ADDRESS) to run on this machine only"
        ) from None


def check_socket_room() -> None:
    """Check that the temporary folder's path is short enough for Ray's sockets.

    Raises:
        ClusterError: it is too long.
    """
    names = [name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    folder = os.environ[names[0]] if names else tempfile.gettempdir()
    session = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/dash_MetricsHead"
    room = SOCKET_BYTES - len(session)
    if len(os.fsencode(folder)) > room:
        raise ClusterError(
            f"{names[0] if names else 'the folder for temporary files'} is too long for Ray's "
            f"sockets ({folder}: {len(os.fsencode(folder))} bytes, at most {room}); set "
            "RAY_TMPDIR=/tmp, which moves only Ray's files"
        )


def job_config() -> Any:
    """Ray's settings for a run: its workers import from the same folders as this process.

    Ray puts the current folder in front of its workers' `sys.path`: a file `queue.py` or a folder
    `pipeline` there would shadow the real one. If this process itself imports from that folder
    (`python -m` in a checkout), workers do as well.
    """
    import ray

    config: Any = ray.job_config.JobConfig()
    if Path.cwd() not in {Path(path).absolute() for path in sys.path}:
        script = str(Path(sys.argv[0]).resolve().parent)
        config._py_driver_sys_path = [script] if script in sys.path else []
        # If the job has a working directory, Ray adds no folder of the driver.
        config._runtime_env_has_working_dir = lambda: True
    return config
