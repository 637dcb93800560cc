"""`adsc serve`: fetch and verify a checkpoint, print its plan and costs, run vLLM's own server.

The server is a separate process of this Python; `adsc.serving` applies the plan in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import IO, Any

SERVER = "vllm.entrypoints.openai.api_server"
LIMIT = 100 << 30  # bytes of fetched checkpoints under ~/.cache/adsc
GRACE, PATIENCE = 10.0, 60.0  # seconds that a server has to end after Ctrl-C, and once asked
MEMORY = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
CPU_CACHE = "4"  # GiB of KV cache on a CPU
TEXT = 100  # text tokens of the request whose cost is printed
INSTALL = """vLLM is not installed here. It needs a separate environment; in the repository:
  make vllm                                  (with a GPU: make vllm ENGINE=vllm==0.32.0)
  .venv-vllm/bin/adsc serve CHECKPOINT"""


class ServingError(RuntimeError):
    """The server could not be started, or ended on its own."""


def check_engine() -> None:
    """Raise ServingError, with the lines that install it, where vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(INSTALL)


def serve(options: argparse.Namespace) -> int:
    """Fetch, print plan and costs, and serve until Ctrl-C; returns the exit code.

    Raises:
        ServingError: a port in use, a server that failed.
        ValueError: no such checkpoint or plan, or one that is not served.
    """
    from workflows.commands import terminal

    check_port(options.host, options.port)
    place = fetched(options)
    console = terminal.console()
    for line in described(place, options.plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return run(command(place, options))


def check_port(host: str, port: int) -> None:
    """Raise ServingError for a port that another program listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"can't listen on {host}:{port} ({error.strerror}): choose another --port, or end "
                "what listens there"
            ) from None


def fetched(options: Any) -> str:
    """The options' checkpoint: a folder of this machine, verified where it has a manifest; or a hub
    id, as it was given."""
    given: str = options.checkpoint
    if given.startswith("models:/"):
        if importlib.util.find_spec("mlflow") is None:
            raise ValueError(
                f"{given} is MLflow's, which is not installed here: pip install mlflow, or fetch "
                "the checkpoint elsewhere and give its folder"
            )
        from pipeline.tracking.address import chosen
        from pipeline.tracking.mlflow_registry import fetch_checkpoint

        return str(fetch_checkpoint(chosen(options.mlflow), given))
    if "://" in given:
        return str(_pulled(given, options.expect))
    folder = Path(given)
    if not folder.is_dir():
        if given.count("/") == 1 and not given.startswith((".", "/", "~")):
            return given
        raise ValueError(
            f"there is no folder {given!r}: give a checkpoint's folder, a hub id (owner/name), "
            "s3://bucket/prefix or models:/name@alias"
        )
    from pipeline.publishing.manifest import MANIFEST, verify_folder

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: there is no config.json")
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    return str(folder)


def _pulled(address: str, expect: str) -> Path:
    """A published checkpoint, copied and verified once for each content."""
    from pipeline.publishing.manifest import MANIFEST, digest
    from pipeline.publishing.publish import pull
    from pipeline.store import cache, open_store

    store = open_store(address)
    text = store.read(MANIFEST)
    if text is None:
        raise ValueError(
            f"no checkpoint is published at {address}: `adsc export FOLDER {address}` publishes one"
        )
    name = f"checkpoint-{digest(text)[:16]}"
    use = cache.fetch(cache.folder(), name, LIMIT, lambda at: pull(store, at, expect))
    _IN_USE.append(use)
    return use.folder


_IN_USE: list[Any] = []  # keeps copies from being deleted while they are served


def described(place: str, plan: str | None) -> list[str]:
    """The plan served and the cost of one image, as lines for the terminal.

    Raises:
        ValueError: the plan is unknown, malformed or not served.
    """
    from transformers import AutoConfig

    from adsc.serving.settings import FIELD, served_plan

    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    if plan is not None:
        setattr(config, FIELD, plan)
    served = served_plan(config)
    if served is None:
        return [f"{place}: no plan; served dense, as vLLM serves any model (--plan gives it one)"]
    from adsc import estimate_cost

    cost = estimate_cost(config, served.plan, text_tokens=TEXT)
    dense = estimate_cost(config, None, text_tokens=TEXT)
    less = cost.versus(dense)
    choices = ", ".join(served.choices)
    return [
        f"{place}: plan {served.text}, {cost.average_vision_tokens:.1f} of {served.image.tokens} "
        "vision tokens an image, averaged over layers",
        f"one image with {TEXT} text tokens: {cost.flops / 1e9:.4g} GFLOP "
        f"({100 * less.flops:.1f} % less than dense), {cost.kv_cache_bytes / 2**20:.3g} MiB of KV "
        f"({100 * less.kv_cache_bytes:.1f} % less)",
        f'a request may choose another plan by "vllm_xargs": {{"adsc_plan": NAME}}: {choices}',
    ]


def command(place: str, options: argparse.Namespace) -> list[str]:
    """The command line of vLLM's server."""
    words = [
        sys.executable,
        "-P",
        "-m",
        SERVER,
        "--host",
        options.host,
        "--port",
        str(options.port),
    ]
    return words + engine_arguments(place, options.plan, options.engine)


def engine_arguments(place: str, plan: str | None, given: list[str]) -> list[str]:
    """vLLM's options for a checkpoint under a plan, those that were given included."""
    words = ["--model", place]
    if not any(word.startswith("--served-model-name") for word in given):
        name = (Path(place).resolve() if Path(place).is_dir() else Path(place)).name
        words += ["--served-model-name", name]
    if plan is not None:
        if any(word.startswith("--hf-overrides") for word in given):
            raise ValueError('--plan and --hf-overrides: give the plan in both as {"adsc": "64"}')
        words += ["--hf-overrides", json.dumps({"adsc": plan})]
    return words + given


def environment(words: list[str]) -> dict[str, str]:
    """The server's environment. On a CPU vLLM asks for 92 % of the memory, unless a flag or this
    variable, which overrules the flags, says otherwise."""
    found = dict(os.environ)
    if not any(word.startswith(MEMORY) for word in words):
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE)
    return found


def run(words: list[str]) -> int:
    """Run the server until it ends, until Ctrl-C, which a terminal sends to it as well, or until
    SIGTERM, which a service manager may send to this process alone.

    Raises:
        ServingError: it ended on its own; the message is its last error.
    """
    errors: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, errors="replace", env=environment(words)
    ) as server:
        assert server.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(server.stderr, errors), daemon=True)
        reader.start()
        before = signal.signal(signal.SIGTERM, lambda number, _: server.send_signal(number))
        try:
            code = server.wait()
        except KeyboardInterrupt:
            _end(server)
            return 0
        finally:
            signal.signal(signal.SIGTERM, before)
            # Before the pipe is closed: processes of the server may still write to it.
            reader.join(timeout=5)
    if code in (0, -signal.SIGINT, -signal.SIGTERM):
        return 0
    why = errors[0] if errors else "its messages are above"
    raise ServingError(f"vLLM's server ended with {code}: {why}")


def _end(server: subprocess.Popen[str]) -> None:
    """Wait for a server that Ctrl-C has reached; hand a signal on that this process alone got; then
    insist."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    for number, seconds in zip(signals, (GRACE, PATIENCE, PATIENCE), strict=True):
        try:
            server.wait(seconds)
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            server.send_signal(number)
    server.wait()


def _pass_on(stream: IO[str], errors: deque[str]) -> None:
    """Print a server's messages as they come, and remember its last error."""
    for line in stream:
        sys.stderr.write(line)
        head, colon, rest = line.strip().rpartition("Error: ")
        if head.endswith("Validation"):
            continue  # the next line has the reason
        if line.strip().startswith("Value error, "):
            errors.append(line.strip().removeprefix("Value error, "))
        elif colon and not rest.startswith("Engine core initialization failed"):
            errors.append(f"{head.split()[-1] if head else ''}Error: {rest}")
