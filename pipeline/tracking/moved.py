"""A tracking database that was moved or copied with its store.

MLflow writes absolute places of artifacts into its database. Where that is the SQLite file of a
store, and the store has moved, MLflow would make the old folder again and write there. `heal` makes
the places follow the file. A database that `prepare` didn't lay out is left alone.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.tracking.address import database_of

ARTIFACTS = "mlflow-artifacts"
"""The folder beside the database that `prepare` names when it makes an experiment."""
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_TAGS = ("adsc.record", "adsc.root")


def heal(database: Path) -> str | None:
    """Have all that lay beside the database lie beside it again: what was changed, as a sentence;
    None where it has not moved."""
    if not database.is_file():
        return None
    try:
        return _heal(database)
    except sqlite3.Error:
        return None  # MLflow, which opens it next, says what is wrong with it


def _heal(database: Path) -> str | None:
    new = (database.parent / ARTIFACTS).as_uri()
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        tables = {
            (table, row[1])
            for table in {table for table, _ in _COLUMNS} | {"tags"}
            for row in connection.execute(f"PRAGMA table_info({table})")
        }
        if ("experiments", "artifact_location") not in tables:
            return None
        found = connection.execute("SELECT DISTINCT artifact_location FROM experiments")
        olds = [old for (old,) in found if old and _is_elsewhere(old, new)]
        for old in olds:
            for table, column in _COLUMNS:
                if (table, column) in tables:
                    _replace(connection, table, column, old, new)
            before, after = _folder(old).parent, database.parent
            for key in _TAGS:
                where = f" AND key = '{key}'"
                _replace(connection, "tags", "value", str(before), str(after), where)
    if not olds:
        return None
    return (
        f"MLflow's database was at {_folder(olds[0]).parent} before and is at {database.parent} "
        "now: its runs, models and artifacts were pointed to the new place"
    )


def current(uri: str, spool: Path) -> str:
    """The address of a journal's database, which may have moved together with the journals."""
    old = database_of(uri)
    if old is None or old.is_file():
        return uri
    here = spool.absolute().parent / old.name
    return f"sqlite:///{here}" if here.is_file() else uri


def moved_path(path: Path, old_uri: str, new_uri: str) -> Path:
    """Where a file of a moved store is now; the same path where it is no such file."""
    old, new = database_of(old_uri), database_of(new_uri)
    if old is None or new is None or path.exists() or not path.is_relative_to(old.parent):
        return path
    return new.parent / path.relative_to(old.parent)


def _is_elsewhere(old: str, new: str) -> bool:
    if not old.rstrip("/").endswith(f"/{ARTIFACTS}") or urlsplit(old).scheme not in ("", "file"):
        return False
    before, after = _folder(old), _folder(new)
    # The same folder by another name, through a link or a mount, has not moved.
    return os.path.realpath(before.parent) != os.path.realpath(after.parent)


def _folder(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path) if uri.startswith("file:") else uri)


def _replace(
    connection: sqlite3.Connection, table: str, column: str, old: str, new: str, where: str = ""
) -> None:
    """Change the beginning of values, `old` or what is below it, to `new`."""
    connection.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
        f"WHERE ({column} = ? OR substr({column}, 1, ?) = ?){where}",
        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
    )
