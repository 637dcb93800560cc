"""The graph of stages: checked, compared with the store, and handed to Ray.

Ray orders, places and retries; the store holds the truth. Deliberately not an engine: no scheduler,
no state of its own, no dynamic graphs.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from pipeline import record as records
from pipeline.cluster import ray_for
from pipeline.config import Config
from pipeline.identity import IdentityError, body_name, canonical, digest, fingerprint
from pipeline.lease import alive
from pipeline.progress import Board, Display, ProgressHandle
from pipeline.record import Record
from pipeline.stage import RunContext, Stage, StageFailed, StageInterrupted, execute
from pipeline.store import Store, open_store

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


class GraphError(ValueError):
    """Stages that don't make a graph; the message lists everything that is wrong."""


class RunFailed(RuntimeError):
    """Some stages failed, after all others that could run were done."""

    def __init__(self, failures: Mapping[str, StageFailed], skipped: Sequence[str]) -> None:
        super().__init__(dict(failures), list(skipped))
        self.failures, self.skipped = dict(failures), list(skipped)

    def __str__(self) -> str:
        lines = []
        for failure in self.failures.values():
            lines.append(f"{failure.stage} failed: {failure.message}")
            lines.append(f"  details: {failure.details}")
        if self.skipped:
            lines.append(f"not run, because they need it: {', '.join(self.skipped)}")
        if any(failure.retry_helps for failure in self.failures.values()):
            lines.append("A process or machine was lost: the same command goes on from here.")
        else:
            lines.append("The same command will fail again: change what the message names first.")
        return "\n".join(lines)


class State(NamedTuple):
    """A stage before a run."""

    name: str
    state: str
    """cached; running (elsewhere); waiting (for a stage that runs elsewhere); or to run"""
    path: str


def lint(stages: Sequence[Stage]) -> list[Stage]:
    """The stages in an order in which each comes after its needs.

    Raises:
        GraphError: all at once, names, unknown needs, cycles, bodies and values without identity.
    """
    problems, names = [], [stage.name for stage in stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{names.count(name)} stages are called {name}")
    for stage in stages:
        if not _NAME.fullmatch(stage.name):
            problems.append(
                f"{stage.name!r} is not a stage's name: use lower case letters, digits, - and _"
            )
        for need, source in stage.needs.items():
            if source not in names:
                problems.append(
                    f"{stage.name} needs {source!r} (as {need!r}), which is not a stage; stages are "
                    + ", ".join(names)
                )
        if not isinstance(stage.config, Config):
            problems.append(f"{stage.name}: its config is not a Config but {stage.config!r}")
        try:
            canonical(stage.config, f"{stage.name}.config")
            body_name(stage.body)
        except IdentityError as error:
            problems.append(f"{stage.name}: {error}")
    by_name = {stage.name: stage for stage in stages}
    order: list[str] = []
    try:
        needs = {stage.name: list(stage.needs.values()) for stage in stages}
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        problems.append("stages need each other in a circle: " + " -> ".join(error.args[1]))
    if problems:
        raise GraphError("\n".join(problems))
    return [by_name[name] for name in order]


def fingerprints(stages: Sequence[Stage]) -> dict[str, str]:
    """The fingerprint of each stage; a pinned stage is what it is pinned to."""
    prints: dict[str, str] = {}
    for stage in lint(stages):
        if stage.pinned is not None:
            prints[stage.name] = digest({"pinned": stage.pinned.rstrip("/")})
            continue
        prints[stage.name] = fingerprint(
            config=stage.config,
            inputs={need: prints[source] for need, source in stage.needs.items()},
            version=stage.version,
            body=body_name(stage.body),
        )
    return prints


def state(store: Store, stages: Sequence[Stage]) -> list[State]:
    """What a run would do, in its order; takes a few beats of a lease where one is held."""
    prints = fingerprints(stages)
    ordered = lint(stages)
    found = _finished(store, ordered, prints)
    leases = {s.name: records.lease_key(s.name, prints[s.name]) for s in ordered}
    fresh = alive(store, [key for name, key in leases.items() if name not in found])
    rows: list[State] = []
    elsewhere: set[str] = set()
    for stage in ordered:
        path = store.uri(records.folder(stage.name, prints[stage.name]))
        if stage.name in found:
            rows.append(State(stage.name, "cached", found[stage.name].uri))
        elif leases[stage.name] in fresh:
            elsewhere.add(stage.name)
            rows.append(State(stage.name, "running", path))
        elif elsewhere & set(stage.needs.values()):
            elsewhere.add(stage.name)
            rows.append(State(stage.name, "waiting", path))
        else:
            rows.append(State(stage.name, "to run", path))
    return rows


def run(
    stages: Sequence[Stage], context: RunContext, console: Console | None = None
) -> dict[str, Record]:
    """Run what isn't finished and return the record of every stage.

    Args:
        console: where progress and the table at the end go; `Console(quiet=True)` for nowhere.

    Raises:
        GraphError, StoreError, ClusterError, TrackingError: before anything runs.
        RunFailed: stages failed; their siblings finished, what needs them did not run.
    """
    console = console or Console()
    ordered, prints = lint(stages), fingerprints(stages)
    store = open_store(context.root)
    found = _finished(store, ordered, prints)
    todo = [stage for stage in ordered if stage.name not in found]
    cached = set(found)
    if todo:
        store.check_writable()
        context = dataclasses.replace(
            context, root=store.root, commit=context.commit or _git_commit()
        )
        with _tracked(context, ordered) as context, ray_for(context):
            found |= _submit(todo, prints, context, found, console)
    table = Table("stage", "", "files", box=None, padding=(0, 2, 0, 0))
    for stage in ordered:
        record = found[stage.name]
        done = "cached" if stage.name in cached else f"{record.seconds:.0f} s"
        table.add_row(stage.name, done, record.uri)
    console.print(table)
    return {stage.name: found[stage.name] for stage in ordered}


def _finished(
    store: Store, stages: Sequence[Stage], prints: Mapping[str, str]
) -> dict[str, Record]:
    found = {}
    for stage in stages:
        if stage.pinned is not None:
            found[stage.name] = records.adopt(
                open_store(stage.pinned), stage.name, prints[stage.name]
            )
        elif record := records.load(store, stage.name, prints[stage.name]):
            found[stage.name] = record
    return found


def _task(
    stage: Stage,
    fingerprint: str,
    context: RunContext,
    progress: ProgressHandle,
    needs: Sequence[str],
    *made: Record,
) -> Record:
    return execute(stage, fingerprint, context, progress, dict(zip(needs, made, strict=True)))


def _submit(
    todo: Sequence[Stage],
    prints: Mapping[str, str],
    context: RunContext,
    found: Mapping[str, Record],
    console: Console,
) -> dict[str, Record]:
    import ray

    board = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
    task = ray.remote(_task).options(
        num_cpus=context.stage_cpus,
        max_retries=context.max_retries,
        retry_exceptions=[StageInterrupted],
    )
    refs: dict[str, Any] = {}
    for stage in todo:
        # Top-level arguments: Ray waits for them, and hands on the error of one that failed.
        made = [refs.get(source) or found[source] for source in stage.needs.values()]
        handle = ProgressHandle(stage=stage.name, board=board)
        refs[stage.name] = task.options(name=stage.name).remote(
            stage, prints[stage.name], context, handle, list(stage.needs), *made
        )
    pending = {ref: name for name, ref in refs.items()}
    needs = {stage.name: set(stage.needs.values()) for stage in todo}
    done: dict[str, Record] = {}
    failures: dict[str, StageFailed] = {}
    skipped: list[str] = []
    try:
        with Display(console, {stage.name: stage.title for stage in todo}) as display:
            while pending:
                ready, _ = ray.wait(list(pending), timeout=0.5)
                display.update(ray.get(board.all.remote()))
                for ref in ready:
                    name = pending.pop(ref)
                    try:
                        done[name] = ray.get(ref)
                        display.end(name, f"done in {done[name].seconds:.0f} s", "green")
                    except ray.exceptions.RayError as error:
                        if needs[name] & (failures.keys() | set(skipped)):
                            skipped.append(name)
                            display.end(name, "not run", "yellow")
                        else:
                            failures[name] = _failure(name, error, prints[name], context)
                            display.end(name, f"failed: {failures[name].message}", "red")
    except KeyboardInterrupt:
        for ref in pending:
            ray.cancel(ref)  # the stage's process gives its lease back
        ray.wait(list(pending), num_returns=len(pending), timeout=10)
        raise
    if failures:
        raise RunFailed(failures, skipped)
    return done


def _failure(name: str, error: Any, print_: str, context: RunContext) -> StageFailed:
    cause = getattr(error, "cause", None)
    if isinstance(cause, StageFailed):
        return cause
    details = open_store(context.root).uri(records.folder(name, print_))
    first = str(error).strip().splitlines()[0]
    return StageFailed(
        name, f"its process was lost ({type(error).__name__}: {first})", True, details
    )


@contextmanager
def _tracked(context: RunContext, stages: Sequence[Stage]) -> Iterator[RunContext]:
    """The workflow's run in MLflow, around its stages' runs."""
    if context.tracking_uri is None or context.parent_run_id is not None:
        yield context
        return
    from pipeline import tracking

    remote = open_store(context.root).local("") is None and "://" in context.tracking_uri
    artifacts = (
        f"{context.root}/mlflow" if remote and not context.tracking_uri.startswith("http") else None
    )
    uri = tracking.prepare(context.tracking_uri, context.experiment, artifacts)
    params = {stage.name: stage.config.model_dump() for stage in stages}
    run_id = tracking.start_workflow(
        uri, context.experiment, context.workflow, params, {"adsc.root": context.root}
    )
    status = "KILLED"
    try:
        yield dataclasses.replace(context, tracking_uri=uri, parent_run_id=run_id)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        tracking.finish_workflow(uri, run_id, status)


def _git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
