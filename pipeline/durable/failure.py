"""Failures as text that survives process boundaries, with the address of the details.

It also decides whether a retry can help: yes if a process or machine was lost, never if the body
refused its config or data.
"""

from __future__ import annotations

import contextlib
import errno
import json
import traceback
from collections.abc import Mapping, Sequence

from pipeline.durable import record as records
from pipeline.store import Store, StoreError, StoreUnavailable


class StageFailed(RuntimeError):
    """A stage's body failed. Holds only text, so that it survives any process boundary."""

    def __init__(self, stage: str, message: str, retry_helps: bool, details: str) -> None:
        super().__init__(stage, message, retry_helps, details)
        self.stage, self.message = stage, message
        self.retry_helps = retry_helps
        """Whether the same command may succeed next time, for example after a lost machine."""
        self.details = details
        """Address of the traceback."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.message} (details: {self.details})"


class StageInterrupted(StageFailed):
    """A stage lost a process or a machine that it used: Ray restarts it."""


class RunFailed(RuntimeError):
    """Some stages failed; all others that could run are done."""

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
            lines.append("This may be temporary: rerun the same command to resume.")
        else:
            lines.append("A retry would not help: fix what the message names, then rerun.")
        return "\n".join(lines)


def of_body(
    store: Store, stage: str, fingerprint: str, attempt: str, error: Exception
) -> StageFailed:
    """Store the traceback, and return the error for the driver."""
    key = records.failure_key(stage, fingerprint, attempt)
    text = "".join(traceback.format_exception(error))
    cause = getattr(error, "cause", None)  # of a Ray task that the body started
    shown = cause if isinstance(cause, Exception) else error
    message = str(shown).strip() or "no message"
    if isinstance(shown, OSError) and shown.errno in (errno.ENOSPC, errno.EDQUOT):
        place = shown.filename or "where the stage writes"
        message = f"the disk is full ({place}): free some space, or choose another --root"
    elif not isinstance(shown, ValueError):
        message = f"{type(shown).__name__}: {message}"
    message = records.clean(message)
    content = records.clean({"stage": stage, "message": message, "traceback": text})
    with contextlib.suppress(ValueError):  # the store itself may be what failed
        store.create(key, json.dumps(content, indent=1).encode())
    kind = StageInterrupted if _is_transient(error) else StageFailed
    return kind(stage, message, kind is StageInterrupted, store.uri(key))


def _is_transient(error: Exception) -> bool:
    """Whether a process, a machine or the store was lost, here or in a cause within Ray Train."""
    from ray import exceptions

    below = [getattr(error, "controller_failure", None), getattr(error, "cause", None)]
    below += getattr(error, "worker_failures", {}).values()
    if any(isinstance(it, Exception) and it is not error and _is_transient(it) for it in below):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(
        error,
        exceptions.RayActorError
        | exceptions.WorkerCrashedError
        | exceptions.NodeDiedError
        | exceptions.ObjectLostError
        | exceptions.OutOfMemoryError
        | StoreUnavailable,
    )


def of_task(stage: str, error: Exception, folder: str) -> StageFailed:
    """The stage's failure within an error of Ray's, or the permanent loss of its process."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, StageFailed):
        return cause
    if isinstance(cause, StoreError):
        return StageFailed(stage, str(cause), isinstance(cause, StoreUnavailable), folder)
    first = str(error).strip().partition("\n")[0]
    message = f"its process was lost ({type(error).__name__}: {first})"
    return StageFailed(stage, message, True, folder)
