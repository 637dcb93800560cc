"""A stage: a kind with a config and inputs, and what the kind's body gets to work with.

Only descriptions stand here: `pipeline.durable.attempt` runs a body, `pipeline.durable.graph` puts
stages in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from pipeline.config import Config
from pipeline.durable import record as records
from pipeline.durable.identity import IdentityError, body_name, canonical
from pipeline.durable.progress import ProgressHandle
from pipeline.durable.record import Record
from pipeline.durable.reference import references
from pipeline.store import Store, open_store
from pipeline.store.cache import Use, fetch
from pipeline.store.cache import folder as cache_folder

if TYPE_CHECKING:
    from pipeline.tracking.tracker import Tracker

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[ConfigT]):
    """What stages do: a body, and the identity of what it computes."""

    id: str
    """Chosen once and never changed, wherever the body moves: finished stages are known by it.
    Unique; letters, digits, `_`, `.` and `-`. The first kinds have the names that their bodies
    had then."""
    version: int
    """To be raised whenever the body computes something else: results of old versions are left."""
    body: Callable[[StageContext, ConfigT], Mapping[str, Any]] | str
    """A function at the top of a module: (context, config) to outputs, which are JSON. Or its full
    name: then its module is imported when it runs, and whoever lists stages does without."""
    config: type[ConfigT]
    """The class of its stages' configs."""
    complete: Callable[[StageContext, ConfigT, Record], Mapping[str, Any]] | str | None = None
    """Does what a finished stage could not do (pipeline/durable/completion.py): (context, config,
    record) to the outputs that change, `undone` among them while something is left. A function or
    its full name, as `body`."""
    referring_id: str = ""
    """The id of stages whose config has references, where stores know such stages by an id of
    their own; empty: the same id."""

    def __post_init__(self) -> None:
        for id in self.ids:
            if not _KIND.fullmatch(id):
                raise IdentityError(
                    f"{id!r} is not a kind's id: use letters, digits, `_`, `.` and `-`"
                )

    @property
    def ids(self) -> tuple[str, ...]:
        """All by which results of this kind are known."""
        return (self.id, self.referring_id) if self.referring_id else (self.id,)

    def stage(
        self, *, name: str, title: str, config: ConfigT, needs: Mapping[str, str] | None = None
    ) -> Stage:
        """A stage of this kind; see the fields of `Stage`. The stages that its config refers to are
        added to its needs."""
        referred = {reference.stage: reference.stage for reference in references(config)}
        return Stage(
            name=name, title=title, kind=self, config=config, needs={**(needs or {}), **referred}
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a workflow."""

    name: str
    """Lower case letters, digits, `-` and `_`; the folder in the store starts with it."""
    title: str
    """One line for people."""
    kind: Kind[Any]
    """What it does."""
    config: Config
    """All that decides what the body computes, apart from its inputs."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Inputs: the name that the body uses, and the stage that makes it."""
    pinned: str | None = None
    """An address whose files (and outputs) are taken instead of running the body."""
    digest: str = ""
    """Of what lies at that address: other files there are another result. Empty: what is there is
    taken never to change."""

    @property
    def kind_id(self) -> str:
        """The id by which results of this stage are known."""
        refers = any(references(self.config))
        return self.kind.ids[-1] if refers else self.kind.id

    def finished(self, store: Store, fingerprint: str) -> Record | None:
        """Its record, None if it isn't finished; of a pinned stage, the record of what is there."""
        if self.pinned is not None:
            return records.adopt(open_store(self.pinned), self.name, fingerprint)
        return records.load(store, self.name, fingerprint)

    def problems(self) -> Iterator[str]:
        """What is wrong with this stage by itself."""
        if not _NAME.fullmatch(self.name):
            yield f"{self.name!r} is not a stage's name: use lower case letters, digits, - and _"
        if not isinstance(self.config, self.kind.config):
            yield (
                f"{self.name}: stages of the kind {self.kind.id} take a "
                f"{self.kind.config.__name__}, not {self.config!r}"
            )
        for reference in references(self.config):
            if self.needs.get(reference.stage) != reference.stage:
                yield (
                    f"{self.name}: its config refers to {reference.stage}, which isn't among its "
                    f"needs; add {{{reference.stage!r}: {reference.stage!r}}}"
                )
        for identify in (
            lambda: canonical(self.config, f"{self.name}.config"),
            lambda: body_name(self.kind.body),
        ):
            try:
                identify()
            except IdentityError as error:
                yield f"{self.name}: {error}"


def _adopted(context: StageContext, config: Config) -> dict[str, Any]:
    raise RuntimeError(f"stage {context.name} has no body: its files are taken from where they lie")


ADOPTED = Kind(id="adopted", version=1, body=_adopted, config=Config)


def adopted(*, name: str, title: str, place: str, digest: str = "") -> Stage:
    """A stage whose files are there already, in a folder or on S3; `digest` is theirs."""
    root = open_store(place).root
    return Stage(name=name, title=title, kind=ADOPTED, config=Config(), pinned=root, digest=digest)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Where and on what a workflow runs; no part of any fingerprint."""

    root: str
    """The store: a folder or s3://bucket/prefix."""
    workflow: str
    """The workflow's name, for people."""
    tracking_uri: str | None = None
    """MLflow; None tracks nothing."""
    experiment: str = "adsc"
    """MLflow experiment."""
    parent_run_id: str | None = None
    """The workflow's MLflow run; made by the driver where it is None."""
    num_workers: int | tuple[int, int] = 1
    """Ray Train workers of a training stage; (fewest, most) takes as many as the cluster has."""
    cpus_per_worker: float = 1
    """CPU cores of a worker."""
    gpus_per_worker: float = 0
    """GPUs of a worker."""
    data_workers: int = 0
    """Processes that make batches for each training worker, on any machine of the cluster; 0 makes
    them in a thread of the worker."""
    stage_cpus: float = 0.1
    """The share of a core that a stage's own process reserves."""
    max_retries: int = 2
    """How often a stage starts again after its process or machine was lost."""
    lease_seconds: float = 20
    """After so long without a sign of life others take a stage over."""
    address: str | None = None
    """An existing Ray cluster; None starts Ray on this machine, unless RAY_ADDRESS is set."""
    dashboard_port: int | None = None
    """The port of the embedded Ray's dashboard; None takes a free one."""
    cache: str = ""
    """Where inputs from a remote store are kept on each machine; empty takes what ADSC_CACHE says
    there, else ~/.cache/adsc."""
    cache_gib: float = 100
    """GiB that these copies may take; those that nobody uses go, least recently used first."""
    commit: str | None = None
    """The code's git commit; the driver fills it in."""
    setup: str | None = None
    """What every process of Ray's calls first (`Workflow.setup`)."""

    @property
    def most_workers(self) -> int:
        """The largest number of workers that a training may have."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class InputError(ValueError):
    """A body asked for an input that its stage doesn't declare."""


class Input:
    """What an upstream stage made."""

    def __init__(self, record: Record, cache: str = "", cache_gib: float = 100) -> None:
        self.record, self._cache, self._cache_gib = record, cache, cache_gib
        self._use: Use | None = None
        self.uri: str = record.uri
        self.fingerprint: str = record.fingerprint
        self.outputs: dict[str, Any] = record.outputs

    @cached_property
    def folder(self) -> Path:
        """The files on this machine: in place where the store is local, else a checked copy.

        Read only: other stages and later runs use the same files.
        """
        store = open_store(self.uri)
        place = store.local("")
        if place is not None:
            return place
        stage = records.folder(self.record.stage, self.fingerprint)
        name = f"{stage}-{self.record.attempt or 'pinned'}"

        def get(folder: Path) -> None:
            if self.record.files or not self.record.attempt:  # else there is nothing to get
                store.download("", folder)
            records.verify(folder, self.record)

        limit = int(self._cache_gib * 2**30)
        self._use = fetch(cache_folder(self._cache), name, limit, get)
        return self._use.folder

    def __getstate__(self) -> dict[str, Any]:
        """Another process, perhaps of another machine, asks for its own copy."""
        return {k: v for k, v in self.__dict__.items() if k != "folder"} | {"_use": None}


class Inputs(dict[str, Input]):
    """Inputs by the names that the stage declares."""

    def __missing__(self, name: str) -> NoReturn:
        declared = ", ".join(self) or "none"
        raise InputError(f"there is no input {name!r}; add it to the stage's needs ({declared})")


@dataclass(kw_only=True)
class StageContext:
    """What a body gets besides its config."""

    name: str
    fingerprint: str
    run: RunContext
    inputs: dict[str, Input]
    out: Path
    """A folder for everything that the stage makes; stored when the body returns."""
    train_storage: tuple[str, str]
    """(storage_path, name) for `ray.train.RunConfig`, the same for all attempts: they resume."""
    track: Tracker
    progress_handle: ProgressHandle
    """`progress` for other processes: it can be pickled."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Report progress in any unit; cheap, from any thread of the stage's process."""
        self.progress_handle(done, total, note)
