"""The graph of stages: checked, compared with the store, and submitted to Ray.

Ray orders, places and retries; the store is the source of truth. This is deliberately not an
engine: no scheduler, no state of its own, no dynamic graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.commit import git_commit
from pipeline.durable import record as records
from pipeline.durable.attempt import execute
from pipeline.durable.completion import is_due
from pipeline.durable.failure import RunFailed, StageFailed, StageInterrupted, of_task
from pipeline.durable.identity import digest, fingerprint
from pipeline.durable.lease import alive
from pipeline.durable.progress import PLAIN, Board, Display, ProgressHandle, table
from pipeline.durable.record import Record, sentence, undone
from pipeline.durable.session import cancelling, log_headline, ray_for, tracked
from pipeline.durable.stage import Kind, RunContext, Stage
from pipeline.store import Store, check_for_runs, open_store
from pipeline.tracking import gauges

if TYPE_CHECKING:
    from rich.console import Console


class GraphError(ValueError):
    """The stages are not a valid graph; the message lists everything that is wrong."""


class State(NamedTuple):
    """The state of a stage before a run."""

    name: str
    state: str
    """cached; incomplete (cached, but something is left undone); running (elsewhere); waiting (for
    a stage running elsewhere); or to run."""
    path: str
    record: Record | None
    """Of a finished stage."""

    @property
    def row(self) -> dict[str, str]:
        """What is shown of it."""
        return {"name": self.name, "state": self.state, "path": self.path}


def topological_order(stages: Sequence[Stage]) -> list[Stage]:
    """The stages in topological order, checked: each comes after its needs.

    Raises:
        GraphError: all problems at once: names, unknown needs, cycles, kinds that share an id,
            bodies and values without identity.
    """
    problems, names = [], [stage.name for stage in stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{names.count(name)} stages are called {name}")
    for stage in stages:
        problems += stage.problems()
        for need, source in stage.needs.items():
            if source not in names:
                problems.append(
                    f"{stage.name} needs {source!r} (as {need!r}), which is not a stage; there are "
                    + ", ".join(names)
                )
    problems += _shared_ids(stage.kind for stage in stages)
    by_name = {stage.name: stage for stage in stages}
    order: list[str] = []
    try:
        needs = {stage.name: list(stage.needs.values()) for stage in stages}
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        problems.append("stages need each other in a cycle: " + " -> ".join(error.args[1]))
    if problems:
        raise GraphError("\n".join(problems))
    return [by_name[name] for name in order]


def _shared_ids(kinds: Iterable[Kind[Any]]) -> Iterator[str]:
    """Problems of kinds that share an id: they would reuse each other's results."""
    known: dict[str, list[Kind[Any]]] = {}
    for kind in kinds:
        for id in kind.ids:
            if kind not in known.setdefault(id, []):
                known[id].append(kind)
    for id, same in known.items():
        if len(same) > 1:
            which = " and ".join(f"{kind.body!r} in version {kind.version}" for kind in same)
            yield f"{len(same)} kinds have the id {id}: {which}; give each a unique id"


def fingerprints(stages: Sequence[Stage]) -> dict[str, str]:
    """The fingerprint of each stage; that of a pinned stage covers its address and its digest."""
    prints: dict[str, str] = {}
    for stage in topological_order(stages):
        if stage.pinned is not None:
            content = {"digest": stage.digest} if stage.digest else {}
            prints[stage.name] = digest({"pinned": stage.pinned.rstrip("/"), **content})
            continue
        prints[stage.name] = fingerprint(
            config=stage.config,
            inputs={need: prints[source] for need, source in stage.needs.items()},
            version=stage.kind.version,
            kind=stage.kind_id,
        )
    return prints


def finished(store: Store, stages: Sequence[Stage]) -> dict[str, Record]:
    """The records of the stages that are finished, by name, in topological order."""
    prints = fingerprints(stages)
    found = ((s.name, s.finished(store, prints[s.name])) for s in topological_order(stages))
    return {name: record for name, record in found if record is not None}


def state(store: Store, stages: Sequence[Stage]) -> list[State]:
    """What a run would do, in order; takes a few heartbeats if a lease is held."""
    ordered, prints = topological_order(stages), fingerprints(stages)
    done = finished(store, stages)
    leases = {s.name: records.lease_key(s.name, prints[s.name]) for s in ordered}
    fresh = alive(store, [key for name, key in leases.items() if name not in done])
    rows, elsewhere = list[State](), set[str]()
    for stage in ordered:
        path = store.uri(records.folder(stage.name, prints[stage.name]))
        if record := done.get(stage.name):
            left = stage.kind.complete and undone(record)
            word, path = "incomplete" if left else "cached", record.uri
        elif leases[stage.name] in fresh:
            word = "running"
        else:
            word = "waiting" if elsewhere & set(stage.needs.values()) else "to run"
        if word in ("running", "waiting"):
            elsewhere.add(stage.name)
        rows.append(State(stage.name, word, path, record))
    return rows


def run(
    stages: Sequence[Stage],
    context: RunContext,
    console: Console | None = None,
    states: Sequence[State] | None = None,
) -> dict[str, Record]:
    """Run unfinished stages, complete what was left undone, and return every stage's record.

    Args:
        console: prints progress and the final table; `Console(quiet=True)` prints nothing.
        states: what `state` found in the same store, which is then not read again.

    Raises:
        GraphError, StoreError, ClusterError, TrackingError: before anything runs.
        RunFailed: stages failed; independent stages finished, dependent stages did not run.
    """
    console = console or _console()
    ordered, prints = topological_order(stages), fingerprints(stages)
    store = open_store(context.root)
    if states is None:
        done = finished(store, stages)
    else:
        done = {state.name: state.record for state in states if state.record}
    due = {s.name for s in ordered if s.name in done and is_due(s, done[s.name], context)}
    todo = [stage for stage in ordered if stage.name not in done or stage.name in due]
    cached = done.keys() - due
    if todo:
        fresh = [stage.name for stage in todo if stage.name not in due]
        for word, group in (("cached", sorted(cached)), ("to run", fresh)):
            console.print(f"{word}: {', '.join(group) or 'nothing'}", **PLAIN)
        if due:
            console.print(f"to complete: {', '.join(sorted(due))}", **PLAIN)
        check_for_runs(store.root)
        store.check_writable()
        context = replace(context, root=store.root, commit=git_commit())
        with tracked(context, ordered, console) as (context, track):
            with ray_for(context):
                done |= _submit(todo, prints, context, done, console)
            log_headline(track, ordered, done)
    result = {stage.name: done[stage.name] for stage in ordered}
    took = {n: "cached" if n in cached else f"{it.seconds:.0f} s" for n, it in result.items()}
    console.print(table([(n, took[n], it.uri) for n, it in result.items()]), **PLAIN)
    for name, record in result.items():
        if left := sentence(record):
            console.print(f"{name}: {left}", **PLAIN)
    return result


def _console() -> Console:
    from rich.console import Console

    return Console()


def _task(
    stage: Stage,
    fingerprint: str,
    context: RunContext,
    progress: ProgressHandle,
    *upstream: Record,
) -> Record:
    inputs = dict(zip(stage.needs, upstream, strict=True))
    return execute(stage, fingerprint, context, progress, inputs)


def _submit(
    todo: Sequence[Stage],
    prints: Mapping[str, str],
    context: RunContext,
    finished: Mapping[str, Record],
    console: Console,
) -> dict[str, Record]:
    import ray

    board: Any = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
    remote: Any = ray.remote
    task = remote(
        num_cpus=context.stage_cpus,
        max_retries=context.max_retries,
        retry_exceptions=[StageInterrupted],
    )(_task)
    refs: dict[str, Any] = {}
    for stage in todo:
        # If an upstream stage failed, Ray passes on its error instead of starting the task.
        upstream = [refs.get(source) or finished[source] for source in stage.needs.values()]
        handle = ProgressHandle(stage=stage.name, board=board)
        refs[stage.name] = task.options(name=stage.name).remote(
            stage, prints[stage.name], context, handle, *upstream
        )
    names = {ref: name for name, ref in refs.items()}
    needs = {stage.name: set(stage.needs.values()) for stage in todo}
    done: dict[str, Record] = {}
    failures: dict[str, StageFailed] = {}
    skipped: list[str] = []
    states = dict.fromkeys(finished, "cached") | dict.fromkeys(refs, "to run")
    display = Display(console, {stage.name: stage.title for stage in todo})
    with display, cancelling(list(refs.values())):
        while names:
            ready, _ = ray.wait(list(names), num_returns=len(names), timeout=0.5)
            with suppress(ray.exceptions.RayError):  # losing the board's machine is harmless
                reports = ray.get(board.all.remote(), timeout=5)
                display.update(reports)
                states |= {name: it.state for name, it in reports.items() if name in needs}
            for name in [names.pop(ref) for ref in list(names) if ref in ready]:
                try:
                    done[name] = ray.get(refs[name])
                    display.end(name, done[name].summary, "green")
                except ray.exceptions.RayError as error:
                    if needs[name] & (failures.keys() | set(skipped)):
                        skipped.append(name)
                        display.end(name, "not run", "yellow")
                    else:
                        home = records.folder(name, prints[name])
                        failures[name] = of_task(name, error, f"{context.root}/{home}")
                        display.end(name, f"failed: {failures[name].message}", "red")
            states |= dict.fromkeys(done, "done") | dict.fromkeys(failures, "failed")
            gauges.stage_states(context.workflow, states | dict.fromkeys(skipped, "not run"))
    if failures:
        raise RunFailed(failures, skipped)
    return done
