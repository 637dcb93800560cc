"""The record of a finished stage: it exists if and only if the stage finished, and never changes.

It states what was computed, from which inputs, and where the files are; it names no machine to run
on and holds no credentials. This module alone defines the layout of the store.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.durable.identity import SHORT
from pipeline.redact import clean
from pipeline.store import Store, StoreError, file_sha256, open_store

SCHEMA = 1


def folder(stage: str, fingerprint: str) -> str:
    """The key of a stage's folder: `train-0123456789ab`."""
    return f"{stage}-{fingerprint[:SHORT]}"


def record_key(stage: str, fingerprint: str) -> str:
    return f"{folder(stage, fingerprint)}/record.json"


def lease_key(stage: str, fingerprint: str) -> str:
    return f"{folder(stage, fingerprint)}/lease.json"


def attempt_key(stage: str, fingerprint: str, attempt: str) -> str:
    return f"{folder(stage, fingerprint)}/attempts/{attempt}"


def failure_key(stage: str, fingerprint: str, attempt: str) -> str:
    return f"{folder(stage, fingerprint)}/failures/{attempt}.json"


class File(BaseModel):
    """One file of a finished stage."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    path: str
    """Relative to the stage's folder, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str
    """Checksum of the content."""

    @classmethod
    def read(cls, folder: Path, path: Path) -> File:
        """The file at `path`, named relative to `folder` with forward slashes."""
        name = path.relative_to(folder).as_posix()
        return cls(path=name, size=path.stat().st_size, sha256=file_sha256(path))


class Source(BaseModel):
    """One input: its fingerprint, and its address at that time."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    fingerprint: str
    """Fingerprint of the stage that produced it."""
    uri: str
    """Address of its files at that time."""


class Record(BaseModel):
    """What a finished stage computed. `uri`, the address of its files, isn't stored: stores can
    move."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    schema_version: int = SCHEMA
    """Version of this schema."""
    stage: str
    """Name of the stage."""
    fingerprint: str
    """Hash of the config, the kind and the fingerprints of the inputs."""
    attempt: str
    """The attempt whose files are the result."""
    outputs: dict[str, Any] = {}
    """The body's return value, as JSON."""
    files: tuple[File, ...] = ()
    """Every file of the attempt."""
    inputs: dict[str, Source] = {}
    """The inputs, by the names that the body uses."""
    config: Any = None
    """The stage's whole config."""
    version: int = 0
    """Version of the stage's kind."""
    body: str = ""
    """Id of the stage's kind."""
    commit: str | None = None
    """Git commit of the code; null if unknown."""
    started: str = ""
    """Time in UTC, ISO 8601."""
    finished: str = ""
    """Time in UTC, ISO 8601."""
    seconds: float = 0.0
    """Wall time of the attempt."""
    run_id: str | None = None
    """Its run in MLflow."""
    workflow_run: str = ""
    """The page of the workflow's run in MLflow, below the server's address; empty if unknown."""
    gpus: float = 0.0
    """GPUs of its workers (with an elastic number: at most); 0 for a stage without workers."""
    host: str = ""
    """The machine that ran it."""
    notes: tuple[str, ...] = ()
    """Remarks on the attempt, such as a tracking server that was unavailable."""
    uri: str = Field(default="", exclude=True)

    @property
    def summary(self) -> str:
        """How long the attempt took, its notes, and what is left, in one line."""
        parts = (f"done in {self.seconds:.0f} s", *self.notes, sentence(self))
        return "; ".join(filter(None, parts))


def load(store: Store, stage: str, fingerprint: str) -> Record | None:
    """The record of a finished stage, with later completions; None if it isn't finished.

    Raises:
        StoreError: a file that is not a record, or one of a later schema.
    """
    key = record_key(stage, fingerprint)
    data = store.read(key)
    if data is None:
        return None
    record = _parse(data, store.uri(key))
    if record.fingerprint != fingerprint:
        raise StoreError(
            f"{store.uri(key)} belongs to fingerprint {record.fingerprint}, not {fingerprint}: "
            "move that folder elsewhere and rerun"
        )
    record = record.model_copy(
        update={"uri": store.uri(attempt_key(stage, fingerprint, record.attempt))}
    )
    return merged(store, folder(stage, fingerprint), record)


def _parse(data: bytes, uri: str) -> Record:
    try:
        content = json.loads(data)
        if content.get("schema_version", 0) > SCHEMA:
            raise StoreError(
                f"{uri} was written by a later version of adsc (schema "
                f"{content['schema_version']}, this one reads up to {SCHEMA}): use that version, "
                "or another root"
            )
        return Record.model_validate(content)
    except StoreError:
        raise
    except (ValueError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"{uri} is not a record ({type(error).__name__}): delete it and rerun"
        ) from error


def publish(store: Store, record: Record) -> Record:
    """Create the record once; returns the one that stands, ours or that of an earlier writer."""
    text = json.dumps(clean(record.model_dump()), indent=1, ensure_ascii=False, allow_nan=False)
    store.create(record_key(record.stage, record.fingerprint), text.encode())
    winner = load(store, record.stage, record.fingerprint)
    if winner is None:
        raise StoreError(
            f"{store.uri(folder(record.stage, record.fingerprint))} was deleted while in use"
        )
    return winner


def adopt(store: Store, stage: str, fingerprint: str) -> Record:
    """The record for a pinned address: a finished stage's folder (with its outputs) or plain files.

    `store` is opened at that address.
    """
    data = store.read("record.json")
    if data is not None:
        record = _parse(data, store.uri("record.json"))
        update = {
            "uri": store.uri(f"attempts/{record.attempt}"),
            "fingerprint": fingerprint,
            "stage": stage,
        }
        return record.model_copy(update=update)
    if not store.list(""):
        raise StoreError(
            f"stage {stage} is pinned to {store.root}, which is empty: check the address"
        )
    return Record(stage=stage, fingerprint=fingerprint, attempt="", uri=store.root)


def input_records(record: Record) -> list[Record]:
    """The records of a stage's inputs: from the store of the stage itself, which may have moved
    since, otherwise from the recorded address; inputs that are in neither are left out."""
    inputs = []
    here = record.uri.rpartition("/attempts/")[0].rpartition("/")[0]
    for source in record.inputs.values():
        home, attempts, attempt = source.uri.rpartition("/attempts/")
        if not attempts:
            continue
        stage = home.rpartition("/")[2]
        for place in dict.fromkeys([f"{here}/{stage}" if here else home, home]):
            with contextlib.suppress(StoreError):  # a store that has moved
                if (data := open_store(place).read("record.json")) is not None:
                    update = {"uri": f"{place}/attempts/{attempt}"}
                    inputs.append(_parse(data, place).model_copy(update=update))
                    break
    return inputs


def workflow_run(records: Iterable[Record]) -> str:
    """The page of the latest workflow's run that computed one of them; empty if unknown."""
    latest = max(records, key=lambda it: (bool(it.workflow_run), it.finished), default=None)
    return latest.workflow_run if latest else ""


def manifest(out: Path) -> tuple[File, ...]:
    """All files below a folder, sorted by path."""
    return tuple(File.read(out, path) for path in sorted(out.rglob("*")) if path.is_file())


def verify(place: Path, record: Record) -> None:
    """Compare downloaded files with the record's checksums.

    Raises:
        StoreError: a file is missing or differs.
    """
    actual = {file.path: file.sha256 for file in manifest(place)}
    for file in record.files:
        if actual.get(file.path) != file.sha256:
            raise StoreError(
                f"{record.uri}/{file.path} is not the file that stage {record.stage} wrote (its "
                "checksum differs): delete that stage's folder and rerun"
            )


def sweep(store: Store, record: Record) -> None:
    """Delete the attempts that a finished stage's record doesn't name: they are unreachable."""
    home = f"{folder(record.stage, record.fingerprint)}/attempts"
    for entry in store.list(home):
        if not entry.key.startswith(f"{home}/{record.attempt}/"):
            store.delete(entry.key)
    place = store.local(home)
    if place is not None and place.is_dir():  # a killed process leaves its folder as well
        for left in place.iterdir():
            if left.name != record.attempt:
                shutil.rmtree(left, ignore_errors=True)


UNDONE = "undone"
"""The key in a stage's outputs; absent or empty if nothing is left to do."""


def completed_key(home: str) -> str:
    """The key of a completion's outputs in a stage's folder."""
    return f"{home}/completed.json"


def undone(record: Record) -> dict[str, str]:
    """What is left to do -> why it failed."""
    if record.outputs.get(UNDONE):
        return dict(record.outputs[UNDONE])
    # Exports of versions without UNDONE: a model to be registered, tracked, without a version.
    config = record.config if isinstance(record.config, Mapping) else {}
    wanted = config.get("log_model") and "mlflow_version" in record.outputs and record.run_id
    if wanted and record.outputs["mlflow_version"] is None and UNDONE not in record.outputs:
        return {"register the model in MLflow": "see adsc.tracking_problems of its run"}
    return {}


def merged(store: Store, home: str, record: Record) -> Record:
    """The record with the outputs of a later completion."""
    if not undone(record):
        return record
    data = store.read(completed_key(home))
    if data is None:
        return record
    return record.model_copy(update={"outputs": {**record.outputs, **json.loads(data)}})


def sentence(record: Record) -> str:
    """What is left undone, for a stage's summary; empty if nothing is."""
    left = "; ".join(f"{what} ({why})" for what, why in undone(record).items())
    return f"not done: {left}; the next run with MLflow tries again" if left else ""
