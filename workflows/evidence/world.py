"""What all arms of the evidence share: pictures, prepared data, a base; each made once, in a folder
that appears whole or not at all.
"""

import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.worker import Work, render_chunk
from pipeline.durable.identity import canonical
from pipeline.durable.progress import ProgressHandle
from pipeline.durable.record import Record
from pipeline.durable.stage import Input, Inputs, RunContext, StageContext
from pipeline.kinds.merge import MergeConfig
from pipeline.packaged import resolve
from pipeline.redact import flatten
from pipeline.stages.merge import merge
from pipeline.stages.prepare import prepare_data
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.training.loop import Sources, train
from pipeline.training.torchrun import FolderContext
from workflows.demo.fashion_grids import write_grids
from workflows.demo.tiny_base import TinyBaseConfig, start_decoder, train_tower
from workflows.evidence.config import (
    AdaptedConfig,
    EvidenceConfig,
)
from workflows.stamps.base import StampsBaseConfig, start_stamps
from workflows.stamps.scenes import ScenesConfig, write_scenes

log = logging.getLogger(__name__)

SPAWN = multiprocessing.get_context("spawn")


def claim(config: EvidenceConfig, out: Path) -> None:
    """Data and base in `out` are of one config: they are found by their names alone."""
    shared = ("data", "prepare", "base", "made")
    own = flatten({name: canonical(getattr(config, name)) for name in shared})
    file = out / "world.json"
    if not file.exists():
        file.write_text(json.dumps(own, indent=1))
    there = json.loads(file.read_text())
    if other := sorted(key for key in own | there if own.get(key) != there.get(key)):
        differences = "; ".join(
            f"{key} is {there.get(key)} there, {own.get(key)} here" for key in other
        )
        raise ValueError(
            f"{out} holds other data or another base: {differences}; take another --out"
        )


def make_world(config: EvidenceConfig, out: Path, each: Callable[..., Iterable[Any]]) -> None:
    """Pictures, base and prepared data below `out`."""
    quiet = ProgressHandle(stage="evidence")

    def pictures(folder: Path) -> None:
        folder.mkdir()
        if isinstance(config.data, ScenesConfig):
            write_scenes(folder, config.data, quiet, partial(each, chunksize=50))
        else:
            write_grids(folder, config.data, quiet, partial(each, chunksize=50))

    def prepared(folder: Path, base: str = "base") -> None:
        folder.mkdir()
        given = _input(out / "pictures"), _input(out / base)
        prepare_data(*given, config.prepare, folder, quiet, render=partial(_render, each=each))

    once(out / "pictures", pictures)
    if config.made is None:
        once(out / "base", lambda folder: shutil.copytree(resolve(config.base.source), folder))
        once(out / "prepared", prepared)
        return
    made, first = config.made, "tower" if isinstance(config.made, TinyBaseConfig) else "start"
    if isinstance(made, AdaptedConfig):
        once(out / first, lambda folder: shutil.copytree(resolve(made.source.source), folder))
    else:
        begin = _train_tower if isinstance(made, TinyBaseConfig) else _start_stamps
        once(out / first, lambda folder: _apart(begin, made, out, folder))
    once(out / "prepared", lambda folder: prepared(folder, first))
    once(out / "base", lambda folder: _apart(_train_base, config, out, folder))


def once(folder: Path, make: Callable[[Path], object]) -> None:
    """The folder appears whole or not at all."""
    if folder.exists():
        return
    began = time.monotonic()
    scratch = folder.with_name(folder.name + ".making")
    shutil.rmtree(scratch, ignore_errors=True)
    make(scratch)
    scratch.rename(folder)
    log.info("%s: %.0f s", folder.name, time.monotonic() - began)


def _apart(work: Callable[..., None], *arguments: Any) -> None:
    """In a process of its own: this one is forked later, and must not hold a device by then."""
    with ProcessPoolExecutor(1, mp_context=SPAWN, initializer=start_process) as pool:
        pool.submit(work, *arguments).result()


def start_log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def start_process() -> None:
    """The log of a process beside the command; it ends with the command, which may be killed: two
    that train in one folder are one too many."""
    start_log()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render(
    tasks: list[dict[str, Any]], work: Work, each: Callable[..., Iterable[Any]]
) -> Iterator[pa.Table]:
    """pipeline.stages.prepare's rows, by this machine's processes."""
    for tables in each(partial(_render_one, work=work), tasks):
        yield from tables


def _render_one(task: dict[str, Any], work: Work) -> list[pa.Table]:
    return list(render_chunk(task, work))


def _train_tower(made: TinyBaseConfig, out: Path, folder: Path) -> None:
    found = train_tower(context_of(folder, data=out / "pictures"), made.tower)
    log.info("tower: %s", found)


def _start_stamps(made: StampsBaseConfig, out: Path, folder: Path) -> None:
    start_stamps(context_of(folder, data=out / "pictures"), made.start)


def _train_base(config: EvidenceConfig, out: Path, folder: Path) -> None:
    """What `made.decoder` trains, tower frozen; a checkpoint of a killed training is gone on
    with."""
    made, workers = config.made, 0
    assert made is not None
    if isinstance(made, TinyBaseConfig):
        once(
            out / "start", lambda at: start_decoder(context_of(at, tower=out / "tower"), made.start)
        )
        workers = made.tower.workers
    context = FolderContext(out / "base-steps", data_workers=workers)
    train(made.decoder, Sources(base=out / "start", data=out / "prepared" / "train"), context)
    context.close()
    inputs = {"base": out / "start", "data": out / "prepared", "trained": context.checkpoints()[-1]}
    merge(context_of(folder, template=config.prepare.template, **inputs), MergeConfig())
    (folder / "probe.safetensors").unlink()


def context_of(out: Path, template: str = "", **inputs: Path) -> StageContext:
    """What a stage's body needs, around folders of this machine; nothing is tracked."""
    out.mkdir()
    return StageContext(
        name=out.stem,
        fingerprint="0" * 64,
        run=RunContext(root=str(out.parent), workflow="evidence"),
        inputs=Inputs({name: _input(place, template) for name, place in inputs.items()}),
        out=out,
        train_storage=(str(out.parent), "run"),
        track=Tracker(RunHandle("", None)),
        progress_handle=ProgressHandle(stage=out.stem),
    )


def _input(place: Path, template: str = "") -> Input:
    record = Record(
        stage=place.name,
        fingerprint="0" * 64,
        attempt="1",
        outputs={"template": template},
        uri=str(place.resolve()),
    )
    return Input(record)
