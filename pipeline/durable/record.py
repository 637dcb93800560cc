"""The record of a finished stage: it is there if the stage finished, and is never rewritten.

It says what was computed, from what and where the files are; it names no machine to run on and
carries no credentials. Where things lie in the store is written down here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
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
        """What lies at `path`, named relative to `folder` with forward slashes."""
        name = path.relative_to(folder).as_posix()
        return cls(path=name, size=path.stat().st_size, sha256=file_sha256(path))


class Source(BaseModel):
    """One input: what it was, and where it lay at that time."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    fingerprint: str
    """Of the stage that made it."""
    uri: str
    """Where its files were."""


class Record(BaseModel):
    """What a finished stage did. `uri`, where its files lie, isn't written: stores can move."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    schema_version: int = SCHEMA
    """Version of this form."""
    stage: str
    """Name of the stage."""
    fingerprint: str
    """Hash of the config, the kind and the fingerprints of the inputs."""
    attempt: str
    """Which attempt's files count."""
    outputs: dict[str, Any] = {}
    """What the body returned, as JSON."""
    files: tuple[File, ...] = ()
    """Every file of the attempt."""
    inputs: dict[str, Source] = {}
    """The stages that this one needed, by the name that its body has for them."""
    config: Any = None
    """The stage's whole config."""
    version: int = 0
    """Version of the stage's kind."""
    body: str = ""
    """Id of the stage's kind."""
    commit: str | None = None
    """Git commit of the code; null where it isn't known."""
    started: str = ""
    """Time in UTC, ISO 8601."""
    finished: str = ""
    """Time in UTC, ISO 8601."""
    seconds: float = 0.0
    """Wall time of the attempt."""
    run_id: str | None = None
    """Its run in MLflow."""
    host: str = ""
    """The machine that ran it."""
    notes: tuple[str, ...] = ()
    """What people should know of the attempt, such as a tracking server that was away."""
    uri: str = Field(default="", exclude=True)

    @property
    def summary(self) -> str:
        """How long the attempt took, its notes, and what is left, in one line."""
        parts = (f"done in {self.seconds:.0f} s", *self.notes, sentence(self))
        return "; ".join(filter(None, parts))


def load(store: Store, stage: str, fingerprint: str) -> Record | None:
    """The record of a finished stage, with what was made up for since; None where it isn't
    finished.

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
            "move that folder away and run again"
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
                f"{uri} was written by a later version (schema {content['schema_version']}, this "
                f"one reads up to {SCHEMA}): use that version, or another root"
            )
        return Record.model_validate(content)
    except StoreError:
        raise
    except (ValueError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"{uri} is not a record ({type(error).__name__}): delete it and run again"
        ) from error


def publish(store: Store, record: Record) -> Record:
    """Create the record, once: ours, or that of whoever was first."""
    text = json.dumps(clean(record.model_dump()), indent=1, ensure_ascii=False, allow_nan=False)
    store.create(record_key(record.stage, record.fingerprint), text.encode())
    winner = load(store, record.stage, record.fingerprint)
    if winner is None:
        raise StoreError(
            f"{store.uri(folder(record.stage, record.fingerprint))} was deleted while in use"
        )
    return winner


def adopt(store: Store, stage: str, fingerprint: str) -> Record:
    """The record for a pinned place: a finished stage's folder (with its outputs), or plain files.

    `store` is opened at the pinned address.
    """
    data = store.read("record.json")
    if data is not None:
        found = _parse(data, store.uri("record.json"))
        update = {
            "uri": store.uri(f"attempts/{found.attempt}"),
            "fingerprint": fingerprint,
            "stage": stage,
        }
        return found.model_copy(update=update)
    if not store.list(""):
        raise StoreError(
            f"stage {stage} is pinned to {store.root}, where there is nothing: check it"
        )
    return Record(stage=stage, fingerprint=fingerprint, attempt="", uri=store.root)


def behind(record: Record) -> list[Record]:
    """The records of a stage's inputs: in the store of the stage itself, which may have moved since
    they were written down, or else as far as they are still where they were."""
    found = []
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
                    found.append(_parse(data, place).model_copy(update=update))
                    break
    return found


def manifest(out: Path) -> tuple[File, ...]:
    """All files below a folder, by path."""
    return tuple(File.read(out, path) for path in sorted(out.rglob("*")) if path.is_file())


def verify(place: Path, record: Record) -> None:
    """Compare downloaded files with the record's checksums.

    Raises:
        StoreError: a file is missing or differs.
    """
    found = {file.path: file.sha256 for file in manifest(place)}
    for file in record.files:
        if found.get(file.path) != file.sha256:
            raise StoreError(
                f"{record.uri}/{file.path} is not the file that stage {record.stage} made (its "
                "checksum differs): delete that stage's folder and run again"
            )


def sweep(store: Store, record: Record) -> None:
    """Delete the attempts that a finished stage doesn't name: nobody can reach them any more."""
    home = f"{folder(record.stage, record.fingerprint)}/attempts"
    for entry in store.list(home):
        if not entry.key.startswith(f"{home}/{record.attempt}/"):
            store.delete(entry.key)
    place = store.local(home)
    if place is not None and place.is_dir():  # a process that was killed left its folder as well
        for left in place.iterdir():
            if left.name != record.attempt:
                shutil.rmtree(left, ignore_errors=True)


UNDONE = "undone"
"""The key of a stage's outputs; absent or empty where all was done."""


def completed_key(home: str) -> str:
    """Of the outputs that a completion made, in a stage's folder."""
    return f"{home}/completed.json"


def undone(record: Record) -> dict[str, str]:
    """What is left to do, and why it could not be done."""
    if record.outputs.get(UNDONE):
        return dict(record.outputs[UNDONE])
    # Exports of versions that did not say so: asked for, tracked, and not there.
    config = record.config if isinstance(record.config, Mapping) else {}
    asked = config.get("log_model") and "mlflow_version" in record.outputs and record.run_id
    if asked and record.outputs["mlflow_version"] is None and UNDONE not in record.outputs:
        return {"register the model in MLflow": "see adsc.tracking_problems of its run"}
    return {}


def merged(store: Store, home: str, record: Record) -> Record:
    """The record with what was made up for later."""
    if not undone(record):
        return record
    data = store.read(completed_key(home))
    if data is None:
        return record
    return record.model_copy(update={"outputs": {**record.outputs, **json.loads(data)}})


def sentence(record: Record) -> str:
    """For a stage's summary; empty where all was done."""
    left = "; ".join(f"{what} ({why})" for what, why in undone(record).items())
    return f"not done: {left}; the next run with MLflow tries it again" if left else ""
