"""`adsc serve` as a user has it: the command, HTTP with eight clients at once, Ctrl-C."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from adsc import PruningPlan
from pipeline.data.templates import begin_with_bos
from tests.adsc.serving.engine.cases import Prompt, Reference, picture
from tests.documents import ROOT

PLAN = "2:1/4,6:0;pool=tiles"
PATIENCE = 900  # seconds that a slow machine may take to load


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    said: list[str]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.process.poll() is None, "".join(self.said)
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)
        raise AssertionError("".join(self.said))


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint with a plan of its own, and an export's template."""
    found = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(checkpoint, found)
    config = json.loads((found / "config.json").read_text())
    config["adsc"] = PruningPlan.parse(PLAN).to_dict()
    (found / "config.json").write_text(json.dumps(config))
    begin_with_bos(found)
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "workflows.commands.entry", "serve", str(folder), "--port", str(port),
        "--max-model-len", "1024", "--max-num-seqs", "16", "--dtype", "float32",
        "--block-size", "32", "--limit-mm-per-prompt", '{"image": 4}',
    ]  # fmt: skip
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    said: list[str] = []
    assert process.stdout is not None
    stream = process.stdout
    threading.Thread(target=lambda: said.extend(stream), daemon=True).start()
    found = Server(process, f"http://127.0.0.1:{port}", said)
    try:
        found.wait()
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def chat(turns: list[tuple[str, str, tuple[int, ...]]], new: int) -> dict[str, Any]:
    """A request of turns (role, text, pictures), greedy."""
    messages = []
    for role, text, pictures in turns:
        parts: list[dict[str, Any]] = []
        for number in pictures:
            file = io.BytesIO()
            picture(number).save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
    return {
        "model": "tiny",
        "messages": messages,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "return_token_ids": True,
    }


CHATS: list[list[tuple[str, str, tuple[int, ...]]]] = [
    [("user", "what is it", (0,))],
    [("user", "what is the big round shape", ())],
    [("user", "what colour", (1, 2))],
    [("user", "what is it", (3,)), ("assistant", "round", ()), ("user", "what colour", ())],
    [("user", "is this the corner", (4, 5, 6))],
    [("user", "what is in this picture", (7,))],
    [("user", "what", (8,)), ("assistant", "left", ()), ("user", "and this", (9,))],
    [("user", "what shape in the top left corner", (10, 11, 0, 1))],
]


def as_prompt(turns: list[tuple[str, str, tuple[int, ...]]]) -> Prompt:
    """What our template makes of it, worked out by hand."""
    text, pictures = "", []
    for role, said, numbers in turns:
        pictures += numbers
        marks = "<image>\n" * len(numbers)
        text += f"USER: {marks}{said} ASSISTANT:" if role == "user" else f" {said}</s>"
    return Prompt(text, tuple(pictures))


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
    said = "".join(server.said)
    assert f"plan {PLAN}, " in said and "% less than dense" in said
    assert "KV pool: " in said and "run together (dense: " in said


def test_what_is_refused_is_the_clients_error(server: Server) -> None:
    scored = chat(CHATS[0], 1) | {"prompt_logprobs": 1}
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/v1/chat/completions", scored)
    assert caught.value.code == 400
    assert "leave prompt_logprobs out" in caught.value.read().decode()
    assert server.post("/v1/chat/completions", chat(CHATS[0], 2))["choices"]


def test_ctrl_c_ends_it(server: Server) -> None:
    """The last test of this server: a terminal sends the signal to the whole group."""
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(120) == 0
    assert "Traceback" not in "".join(server.said[-30:])
