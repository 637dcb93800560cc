"""Answers of every arm to every question, spread over Ray actors, in shards that outlive them.

A shard is some consecutive questions of one split, answered by one arm: one Parquet file in the
store, which appears whole or not at all. All attempts of a stage share the shards, so a run that
was killed repeats only those that were not finished. What a shard holds follows from the question
list: more workers compute the same batches. Scores and intervals are the stage's.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoProcessor

import adsc
from pipeline.data.prepared import split_folder
from pipeline.durable.stage import Input
from pipeline.evaluation.engine import Engine
from pipeline.evaluation.generation import (
    Answer,
    Question,
    Questions,
    build_inputs,
    generate_batch,
    to_device,
)
from pipeline.evaluation.methods import MethodConfig, build_method
from pipeline.evaluation.scoring import RULES
from pipeline.evaluation.speed import measure_and_count
from pipeline.store import Store, open_store

SCHEMA = pa.schema(
    {
        "arm": pa.string(),
        "split": pa.string(),
        "number": pa.int64(),
        "record": pa.string(),
        "kind": pa.string(),
        "prompt": pa.string(),
        "expected": pa.string(),
        "answer": pa.string(),
        "score": pa.float64(),
        "text_tokens": pa.int32(),
        "vision_tokens": pa.int32(),
        "generated_tokens": pa.int32(),
        "finished": pa.bool_(),
        "seconds": pa.float64(),
        "batch_size": pa.int32(),
    }
)
"""A sample. `number` is the question's in its split; `seconds` is the wall time of the batch of
`batch_size` questions in which it was answered."""
MAX_FAILURES = 20
"""So many questions that can't be answered end the work: whatever it is, it hits them all."""


class AnswersFailed(RuntimeError):
    """Questions that could not be answered, by id: there is no result without them."""

    def __init__(self, failures: Sequence[tuple[str, str]], answered: int, total: int) -> None:
        super().__init__(list(failures), answered, total)
        self.failures, self.answered, self.total = list(failures), answered, total

    def __str__(self) -> str:
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.failures[:5])
        more = len(self.failures) - 5
        return (
            f"{len(self.failures)} answers failed, {self.answered} of {self.total} are kept: "
            + shown
            + (f"; and {more} more" if more > 0 else "")
            + ". Fix or leave out these questions, or lower evaluate.batch_size if memory ran "
            "out; finished shards are not repeated"
        )


class Shard(NamedTuple):
    """A piece of work: some questions of a split for one arm."""

    arm: str
    split: str
    part: int
    questions: range

    @property
    def key(self) -> str:
        return f"answers/{self.arm}/{self.split}-{self.part:05d}.parquet"


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """Everything that a worker needs; it can be pickled."""

    storage: str
    """Where shards are kept: a folder or s3://."""
    inputs: Mapping[str, Input]
    """`data`, `base` and the checkpoints."""
    rules: Mapping[str, str]
    """Splits to evaluate -> the key of scoring.RULES."""
    arms: Mapping[str, tuple[str, MethodConfig]]
    """Arm -> the input with its checkpoint, and its method."""
    chat_template: str | None
    """Formats the questions; None uses the base's processor."""
    batch_size: int
    max_new_tokens: int
    compiled: bool = False
    """Whether decoder layers are compiled."""
    engine: str = "transformers"


Respond = Callable[[Sequence[Question]], list[Answer]]


class Worker:
    """The Ray actor: holds one checkpoint at a time; shards in order load each only once."""

    def __init__(self, job: EvaluationJob) -> None:
        self._job = job
        self._store = open_store(job.storage)
        self._processor: Any = AutoProcessor.from_pretrained(job.inputs["base"].folder)
        if job.chat_template is not None:
            self._processor.chat_template = job.chat_template
        self._questions = lru_cache(maxsize=None)(
            lambda split: Questions(split_folder(job.inputs["data"].folder, split))
        )
        self._loaded: tuple[str, Any] | None = None
        self._engine: tuple[str, Engine] | None = None

    def answer(self, shard: Shard) -> list[tuple[str, str]]:
        """Answer a shard and store it.

        Returns:
            Questions that failed, with the reason; if there are any, nothing is stored.
        """
        respond = self._respond(shard.arm)
        questions = self._questions(shard.split)
        rows: list[dict[str, Any]] = []
        failures: list[tuple[str, str]] = []
        size, tokenizer = self._job.batch_size, self._processor.tokenizer
        for numbers in questions.batches(shard.questions, size, tokenizer):
            try:
                rows += self._batch(respond, shard, questions, numbers)
            # Whatever a model or a picture raises is counted, and fails the stage.
            except Exception as error:  # noqa: BLE001
                failures += self._culprits(respond, shard, questions, numbers, error)
            if len(failures) >= MAX_FAILURES:
                break
        if not failures:
            rows.sort(key=lambda row: row["number"])
            buffer = io.BytesIO()
            table = pa.Table.from_pylist(rows, schema=SCHEMA)
            pq.write_table(table, buffer, compression="zstd")
            self._store.create(shard.key, buffer.getvalue())
        return failures

    def measure(self, checkpoint: str, split: str, arms: Sequence[str], **sizes: int) -> Any:
        """pipeline.evaluation.speed.measure_and_count of these arms' methods on the first questions
        of a split, with pictures where there are any."""
        self._close_engine()
        model = self._model(checkpoint)
        questions = self._questions(split)
        chosen = questions.load(questions.first(sizes.pop("batch")))
        inputs = to_device(build_inputs(chosen, self._processor), model)
        methods = [build_method(self._job.arms[arm][1], model) for arm in arms]
        return measure_and_count(model, inputs, methods, **sizes)

    def _respond(self, arm: str) -> Respond:
        """What answers a batch for an arm."""
        checkpoint, method = self._job.arms[arm]
        most = self._job.max_new_tokens
        if self._job.engine == "transformers":
            model = self._model(checkpoint)
            adsc.attach(model, build_method(method, model))
            return partial(generate_batch, model, self._processor, max_new_tokens=most)
        if self._engine is None or self._engine[0] != arm:
            self._close_engine()
            folder = self._job.inputs[checkpoint].folder
            self._engine = arm, Engine(folder, str(method.plan))
        return partial(self._engine[1].answer, self._processor, most=most)

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine[1].close()
        self._engine = None

    def _model(self, checkpoint: str) -> Any:
        if self._loaded is None or self._loaded[0] != checkpoint:
            self._loaded = None  # the old one's memory first
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = adsc.from_pretrained(self._job.inputs[checkpoint].folder).to(device).eval()
            if self._job.compiled:
                adsc.compile_layers(model)
            self._loaded = checkpoint, model
        return self._loaded[1]

    def _batch(
        self, respond: Respond, shard: Shard, questions: Questions, numbers: Sequence[int]
    ) -> list[dict[str, Any]]:
        loaded = questions.load(numbers)
        rule = RULES[self._job.rules[shard.split]]
        answers = respond(loaded)
        return [
            {
                "arm": shard.arm,
                "split": shard.split,
                "number": number,
                "record": question.record,
                "kind": question.kind,
                "prompt": answer.prompt,
                "expected": question.expected,
                "answer": answer.text,
                "score": rule(answer.text, question.expected),
                "text_tokens": answer.text_tokens,
                "vision_tokens": answer.vision_tokens,
                "generated_tokens": answer.generated_tokens,
                "finished": answer.finished,
                "seconds": answer.seconds,
                "batch_size": len(numbers),
            }
            for number, question, answer in zip(numbers, loaded, answers, strict=True)
        ]

    def _culprits(
        self,
        respond: Respond,
        shard: Shard,
        questions: Questions,
        numbers: Sequence[int],
        error: Exception,
    ) -> list[tuple[str, str]]:
        """The questions of a batch that fail by themselves; all of it if none does."""
        failures = []
        for number in numbers:
            try:
                self._batch(respond, shard, questions, [number])
            except Exception as own:  # noqa: BLE001
                failures.append((number, own))
            if len(failures) >= MAX_FAILURES:
                break
        return [
            (
                f"{shard.arm}/{shard.split}/{questions.entries[number].record} (question {number})",
                f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}",
            )
            for number, reason in failures or [(number, error) for number in numbers]
        ]


def shards_of(arms: Sequence[str], sizes: Mapping[str, int], size: int) -> list[Shard]:
    """All work, arm by arm; those of one checkpoint should be neighbours."""
    return [
        Shard(arm, split, part, range(start, min(start + size, count)))
        for arm in arms
        for split, count in sizes.items()
        for part, start in enumerate(range(0, count, size))
    ]


def answer_all(
    job: EvaluationJob,
    shards: Sequence[Shard],
    workers: Sequence[Any],
    report: Callable[[int, int, str], None],
) -> None:
    """Answer the shards that the store lacks, on all workers.

    Raises:
        AnswersFailed: with the ids, once all other shards are stored (or too many failed).
    """
    import ray

    total = sum(len(shard.questions) for shard in shards)
    todo = unfinished(open_store(job.storage), shards)
    done = total - sum(len(shard.questions) for shard in todo)
    failures: list[tuple[str, str]] = []
    waiting, free = list(reversed(todo)), list(workers)
    running: dict[Any, tuple[Any, Shard]] = {}
    report(done, total, "questions")
    while waiting or running:
        while waiting and free and len(failures) < MAX_FAILURES:
            worker, shard = free.pop(), waiting.pop()
            running[worker.answer.remote(shard)] = worker, shard
        if not running:
            break
        (ready,), _ = ray.wait(list(running))
        worker, shard = running.pop(ready)
        free.append(worker)
        failed = ray.get(ready)
        failures += failed
        done += 0 if failed else len(shard.questions)
        report(done, total, f"questions, {shard.arm}")
    if failures:
        raise AnswersFailed(failures, done, total)


def unfinished(store: Store, shards: Sequence[Shard]) -> list[Shard]:
    """Those without a file."""
    have = {entry.key for entry in store.list("answers")}
    return [shard for shard in shards if shard.key not in have]


def read_answers(storage: str, shards: Sequence[Shard]) -> Iterator[pa.Table]:
    """The samples of each shard, one shard in memory at a time."""
    store = open_store(storage)
    for shard in shards:
        data = store.read(shard.key)
        if data is None:
            raise FileNotFoundError(f"{store.uri(shard.key)} is gone: run the stage again")
        yield pq.read_table(io.BytesIO(data))


def start_workers(job: EvaluationJob, count: int, cpus: float, gpus: float) -> list[Any]:
    """Actors, each with its own copy of a checkpoint."""
    import ray

    remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(Worker)
    return [remote.remote(job) for _ in range(count)]


def stop_workers(workers: Sequence[Any]) -> None:
    """Give their memory and cores back at once."""
    import ray

    for worker in workers:
        ray.kill(worker)


def write_samples(storage: str, shards: Sequence[Shard], file: Path) -> None:
    """All shards as one Parquet file, a row group each."""
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for table in read_answers(storage, shards):
            writer.write_table(table)
