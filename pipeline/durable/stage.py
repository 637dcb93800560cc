"""A stage: a kind with a config and inputs; and the context that the kind's body works with.

This module only describes: `pipeline.durable.attempt` runs a body, `pipeline.durable.graph` orders
stages.
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
from pipeline.tracking.headline import Headline

if TYPE_CHECKING:
    from pipeline.tracking.tracker import Tracker

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[ConfigT]):
    """A kind of stage: a body, and the identity of what it computes."""

    id: str
    """Chosen once and never changed, wherever the body moves: it identifies finished stages.
    Unique; letters, digits, `_`, `.` and `-`. The first kinds are named after their bodies at that
    time."""
    version: int
    """Raise it whenever the body computes something else: results of other versions are ignored."""
    body: Callable[[StageContext, ConfigT], Mapping[str, Any]] | str
    """A function at the top of a module: (context, config) to outputs, which are JSON. Or its full
    name: then its module is imported only when it runs, not when stages are listed."""
    config: type[ConfigT]
    """The config class of its stages."""
    complete: Callable[[StageContext, ConfigT, Record], Mapping[str, Any]] | str | None = None
    """Completes a finished stage (pipeline/durable/completion.py): (context, config, record) to the
    outputs that change, with `undone` while something is left. A function or its full name, as for
    `body`."""
    referring_id: str = ""
    """The id of stages whose config has references, where stores use another id for them; empty:
    the same id."""
    headline: Callable[[Record], Headline] | None = None
    """What of its record the workflow's MLflow run shows, so that workflows can be compared."""
    workers: bool = False
    """Whether its body works on the context's workers, and so on their GPUs."""

    def __post_init__(self) -> None:
        for id in self.ids:
            if not _KIND.fullmatch(id):
                raise IdentityError(
                    f"{id!r} is not a kind's id: use letters, digits, `_`, `.` and `-`"
                )

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids that identify results of this kind."""
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
    """A description, in one line."""
    kind: Kind[Any]
    """What it computes."""
    config: Config
    """Everything that decides what the body computes, apart from its inputs."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Inputs: the name used by the body -> the stage that produces it."""
    pinned: str | None = None
    """An address whose files (and outputs) are used instead of running the body."""
    digest: str = ""
    """Digest of the files at that address: other files are another result. Empty: the files are
    assumed never to change."""

    @property
    def kind_id(self) -> str:
        """The id that identifies results of this stage."""
        refers = any(references(self.config))
        return self.kind.ids[-1] if refers else self.kind.id

    def finished(self, store: Store, fingerprint: str) -> Record | None:
        """Its record, or None if it isn't finished; the adopted record if it is pinned."""
        if self.pinned is not None:
            return records.adopt(open_store(self.pinned), self.name, fingerprint)
        return records.load(store, self.name, fingerprint)

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with this stage alone."""
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
    raise RuntimeError(f"stage {context.name} has no body: its files are used in place")


ADOPTED = Kind(id="adopted", version=1, body=_adopted, config=Config)


def adopted(*, name: str, title: str, place: str, digest: str = "") -> Stage:
    """A stage whose files exist already, in a folder or on S3; `digest` is the digest of them."""
    root = open_store(place).root
    return Stage(name=name, title=title, kind=ADOPTED, config=Config(), pinned=root, digest=digest)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Where a workflow runs, and with what resources; not part of any fingerprint."""

    root: str
    """The store: a folder or s3://bucket/prefix."""
    workflow: str
    """The workflow's name, for display."""
    tracking_uri: str | None = None
    """MLflow; None disables tracking."""
    experiment: str = "adsc"
    """MLflow experiment."""
    parent_run_id: str | None = None
    """The workflow's MLflow run; the driver creates one if it is None."""
    run_page: str = ""
    """The page of the workflow's MLflow run below its server's address; the driver fills it in."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What the workflow's MLflow run has as parameters; the whole config is an artifact."""
    command: str = ""
    """The command line that started the run, for the same place."""
    num_workers: int | tuple[int, int] = 1
    """Ray Train workers of a training stage; (min, max) uses as many as the cluster has."""
    cpus_per_worker: float = 1
    """CPU cores of a worker."""
    gpus_per_worker: float = 0
    """GPUs of a worker."""
    data_workers: int = 0
    """Processes per training worker that build batches, on any machine of the cluster; 0 builds
    them in a thread of the worker."""
    stage_cpus: float = 0.1
    """CPU cores that the process of a stage reserves."""
    max_retries: int = 2
    """How often a stage is restarted after its process or machine was lost."""
    lease_seconds: float = 20
    """Seconds without a heartbeat after which another run may take over a stage."""
    address: str | None = None
    """An existing Ray cluster; None starts Ray on this machine, unless RAY_ADDRESS is set."""
    dashboard_port: int | None = None
    """The port of the embedded Ray's dashboard; None uses a free one."""
    cache: str = ""
    """Folder on each machine for copies of inputs from a remote store; empty: $ADSC_CACHE there,
    else ~/.cache/adsc."""
    cache_gib: float = 100
    """Size limit of these copies in GiB; unused copies are deleted, least recently used first."""
    commit: str | None = None
    """The code's git commit; the driver fills it in."""
    setup: str | None = None
    """The function that every Ray process calls first (`Workflow.setup`)."""

    @property
    def most_workers(self) -> int:
        """The largest number of workers of a training stage."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class InputError(ValueError):
    """A body used an input that its stage doesn't declare."""


class Input:
    """The result of an upstream stage."""

    def __init__(self, record: Record, cache: str = "", cache_gib: float = 100) -> None:
        self.record, self._cache, self._cache_gib = record, cache, cache_gib
        self._use: Use | None = None
        self.uri: str = record.uri
        self.fingerprint: str = record.fingerprint
        self.outputs: dict[str, Any] = record.outputs

    @cached_property
    def folder(self) -> Path:
        """The files on this machine: in place if the store is local, else a verified copy.

        Read only: other stages and later runs use the same files.
        """
        store = open_store(self.uri)
        place = store.local("")
        if place is not None:
            return place
        stage = records.folder(self.record.stage, self.fingerprint)
        name = f"{stage}-{self.record.attempt or 'pinned'}"

        def get(folder: Path) -> None:
            if self.record.files or not self.record.attempt:  # else there are no files
                store.download("", folder)
            records.verify(folder, self.record)

        limit = int(self._cache_gib * 2**30)
        self._use = fetch(cache_folder(self._cache), name, limit, get)
        return self._use.folder

    def __getstate__(self) -> dict[str, Any]:
        """Drop the local copy: another process, perhaps on another machine, fetches its own."""
        return {k: v for k, v in self.__dict__.items() if k != "folder"} | {"_use": None}


class Inputs(dict[str, Input]):
    """Inputs by the names declared by the stage."""

    def __missing__(self, name: str) -> NoReturn:
        declared = ", ".join(self) or "none"
        raise InputError(f"there is no input {name!r}; add it to the stage's needs ({declared})")


@dataclass(kw_only=True)
class StageContext:
    """What a body receives besides its config."""

    name: str
    fingerprint: str
    run: RunContext
    inputs: dict[str, Input]
    out: Path
    """A folder for all files of the stage; stored when the body returns."""
    train_storage: tuple[str, str]
    """(storage_path, name) for `ray.train.RunConfig`, the same for all attempts, so they resume."""
    track: Tracker
    progress_handle: ProgressHandle
    """`progress` for other processes: it can be pickled."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Report progress in any unit; cheap, from any thread of the stage's process."""
        self.progress_handle(done, total, note)
