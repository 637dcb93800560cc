"""Answers of a vLLM engine to the questions of an evaluation.

vLLM's pins are not ours, so it runs in a process of its own environment (`make vllm`), one for a
checkpoint under one plan: `adsc.serving.offline`. Prompts are rendered and tokenized here, as for
transformers; the engine lays out and reads the pictures itself.
"""

import base64
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from adsc.named import DENSE
from pipeline.data.pictures import decode_picture
from pipeline.data.templates import special_tokens
from pipeline.evaluation.generation import Answer, GenerationError, Question, render_prompt

VARIABLE = "ADSC_VLLM_PYTHON"
"""The Python of vLLM's environment, where it isn't `.venv-vllm` beside this one."""


class EngineError(RuntimeError):
    """vLLM's process ended."""


def engine_python() -> str:
    """The Python that has vLLM and adsc.

    Raises:
        ValueError: there is none.
    """
    beside = Path(sys.prefix).parent / ".venv-vllm" / "bin" / "python"
    if (named := os.environ.get(VARIABLE)) is not None:
        if Path(named).is_file():
            return named
        raise ValueError(f"{VARIABLE} names {named}, and there is no such file on this machine")
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    if beside.is_file():
        return str(beside)
    raise ValueError(
        f"vLLM is not installed on this machine: `make vllm` makes its environment ({beside}); for "
        f"one elsewhere set {VARIABLE} to its Python"
    )


class Engine:
    """A vLLM process; it ends with this one.

    Args:
        folder: of the checkpoint.
        plan: in its text form; empty for dense.

    Raises:
        EngineError: the checkpoint could not be loaded.
    """

    def __init__(self, folder: Path, plan: str):
        dtype = AutoConfig.from_pretrained(folder).dtype
        words = [engine_python(), "-m", "adsc.serving.offline", str(folder), plan or DENSE]
        words.append(str(dtype or "float32").removeprefix("torch."))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._line()  # it is ready

    def answer(self, processor: Any, questions: Sequence[Question], most: int) -> list[Answer]:
        """Greedy answers of up to `most` tokens, in the order of the questions.

        Raises:
            GenerationError: the engine refused a question, or its logits are not numbers.
            EngineError: the process ended.
        """
        start = time.perf_counter()
        texts = [render_prompt(question, processor) for question in questions]
        ids = processor.tokenizer(texts, **special_tokens(processor, texts))["input_ids"]
        prompts = [
            {"ids": own, "images": [_packed(picture) for picture in question.pictures]}
            for own, question in zip(ids, questions, strict=True)
        ]
        found = self._ask({"prompts": prompts, "most": most})
        seconds = time.perf_counter() - start
        answers = []
        for question, text, own, one in zip(questions, texts, ids, found, strict=True):
            words = len(own) - len(question.pictures)
            answers.append(
                Answer(
                    text=processor.tokenizer.decode(
                        one["tokens"], skip_special_tokens=True
                    ).strip(),
                    prompt=text,
                    text_tokens=words,
                    vision_tokens=one["prompt"] - words,
                    generated_tokens=len(one["tokens"]),
                    finished=one["finished"],
                    seconds=seconds,
                )
            )
        return answers

    def close(self) -> None:
        """End the process and give its memory back."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ask(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its output has ended, too
            stdin.write(json.dumps(batch) + "\n")
            stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        if "error" in found:
            raise GenerationError(f"vLLM: {found['error']}")
        answers: list[dict[str, Any]] = found["answers"]
        return answers

    def _line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        code = self._process.wait()
        self._log.seek(0)
        lines = [it.strip() for it in self._log if it.strip()]
        raise EngineError(f"vLLM ended with {code}: {lines[-1] if lines else 'no message'}")


def _packed(picture: bytes) -> tuple[int, int, str]:
    image = decode_picture(picture)
    return image.width, image.height, base64.b64encode(image.tobytes()).decode()
