"""`adsc serve` as a user has it: the command, HTTP with eight clients at once, Ctrl-C, SIGTERM."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.adsc.serving.engine.cases import Reference, picture
from tests.adsc.serving.engine.chats import CHATS, PLAN, Turns, as_prompt, chat
from tests.documents import ROOT

PATIENCE = 900  # seconds that a slow machine may take to load


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    output: list[str]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=PATIENCE) as page:
            lines = page.read().decode().splitlines()
        return sum(float(it.split()[-1]) for it in lines if it.startswith(f"vllm:{name}{{"))

    def wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.process.poll() is None, "".join(self.output)
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)
        raise AssertionError("".join(self.output))


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[Server]:
    with served(exported) as found:
        yield found


@contextmanager
def served(exported: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "workflows.commands.entry", "serve", str(exported),
        "--port", str(port), "--max-model-len", "1024", "--max-num-seqs", "16",
        "--dtype", "float32", "--block-size", "32", "--limit-mm-per-prompt", '{"image": 4}',
    ]  # fmt: skip
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    output: list[str] = []
    assert process.stdout is not None
    stream = process.stdout
    threading.Thread(target=lambda: output.extend(stream), daemon=True).start()
    found = Server(process, f"http://127.0.0.1:{port}", output)
    try:
        found.wait()
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_eight_clients_at_once(server: Server, reference: Reference) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(lambda it: server.post("/v1/chat/completions", chat(it, 10)), CHATS)
        )
    wanted = reference.answers(PLAN, [as_prompt(it) for it in CHATS], new=10)
    got = [tuple(answer["choices"][0]["token_ids"]) for answer in answers]
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [it.wide for it in wanted]
    assert got == [it.tokens for it in wanted]


def test_it_tells_plan_costs_and_what_the_pool_holds(server: Server) -> None:
    output = "".join(server.output)
    assert f"plan {PLAN}, " in output and "% less than dense" in output
    assert "KV pool: " in output and "run together (dense: " in output


def test_what_is_refused_is_the_clients_error(server: Server) -> None:
    scored = chat(CHATS[0], 1) | {"prompt_logprobs": 1}
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/v1/chat/completions", scored)
    assert caught.value.code == 400
    assert "leave prompt_logprobs out" in caught.value.read().decode()
    assert server.post("/v1/chat/completions", chat(CHATS[0], 2))["choices"]


def test_a_picture_by_its_address(server: Server, reference: Reference, tmp_path: Path) -> None:
    """As a data URL; an address that has no picture is the client's error."""
    picture(7).save(tmp_path / "seven.png")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as pictures:
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        turns: Turns = [("user", "what is in this picture", (7,))]
        body = chat(turns, 10)
        address = body["messages"][0]["content"][0]["image_url"]
        address["url"] = f"http://127.0.0.1:{pictures.server_port}/seven.png"
        (wanted,) = reference.answers(PLAN, [as_prompt(turns)], new=10)
        answer = server.post("/v1/chat/completions", body)
        assert tuple(answer["choices"][0]["token_ids"]) == wanted.tokens
        address["url"] += ".none"
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post("/v1/chat/completions", body)
        assert 400 <= caught.value.code < 600
        pictures.shutdown()


def test_clients_that_hang_up_leave_nothing_behind(server: Server, reference: Reference) -> None:
    host = server.address.removeprefix("http://")
    for number in range(8):
        connection = http.client.HTTPConnection(host, timeout=PATIENCE)
        body = json.dumps(chat(CHATS[number], 700) | {"stream": True})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        if number % 2:  # the others hang up before anything is read
            connection.getresponse().readline()
        connection.close()
    end = time.monotonic() + PATIENCE
    while server.metric("num_requests_running") + server.metric("num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(1)
    assert server.metric("kv_cache_usage_perc") == 0
    (wanted,) = reference.answers(PLAN, [as_prompt(CHATS[2])], new=10)
    answer = server.post("/v1/chat/completions", chat(CHATS[2], 10))
    assert tuple(answer["choices"][0]["token_ids"]) == wanted.tokens


def test_ctrl_c_ends_it(server: Server) -> None:
    """The last test of this server: a terminal sends the signal to the whole group."""
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(120) == 0
    assert "Traceback" not in "".join(server.output[-30:])


def test_a_service_manager_ends_it(exported: Path) -> None:
    """SIGTERM reaches the command alone; what it started ends, too."""
    with served(exported) as server:
        server.process.terminate()
        assert server.process.wait(120) == 0
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                os.killpg(server.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.5)
        raise AssertionError("a process of the server is left")
