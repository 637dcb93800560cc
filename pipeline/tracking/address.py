"""Addresses of MLflow: what `--mlflow` and MLFLOW_TRACKING_URI may say, read without MLflow."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.redact import redact

VARIABLE = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
_ESCAPE = re.compile("%[0-9A-Fa-f]{2}")


class TrackingError(ValueError):
    """The tracking address can't be used; the message says why and what to write instead."""


def chosen(option: str | None) -> str | None:
    """The address that the option, else the environment, names; "off" in any spelling, None where
    neither says anything."""
    text = (option or "").strip() or os.environ.get(VARIABLE, "").strip()
    return "off" if text.casefold() == "off" else text or None


def default_uri(folder: Path | str) -> str:
    """An SQLite database in `folder`; `prepare` puts artifacts beside it.

    Raises:
        TrackingError: the folder's name would be read as another one.
    """
    database = Path(folder).absolute() / "mlflow.db"
    if "?" in str(database):
        raise TrackingError(
            f"MLflow's database can't be at {database}: in its address, ? ends the path. Choose "
            "another root, or name a server or nothing: --mlflow http://HOST:5000, --mlflow off"
        )
    check_path(str(database))
    return f"{_SQLITE}{database}"


def database_of(uri: str) -> Path | None:
    """The file of an SQLite address, None of any other."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]).absolute()


def page_address(uri: str, page: str) -> str:
    """Where a page of MLflow's (experiments/1, experiments/1/runs/0a1b) opens in a browser; empty
    for a database, which has no pages until `mlflow ui` serves it, and for an empty page."""
    served = uri.startswith(("http://", "https://"))
    return f"{redact(uri).rstrip('/')}/#/{page}" if served and page else ""


def check_path(path: str) -> None:
    """Raise a TrackingError where SQLAlchemy and MLflow would take a path for two places."""
    if found := _ESCAPE.search(path):
        raise TrackingError(
            f"MLflow's database can't be at {path}: {found[0]} is read as an escape by one of "
            "SQLAlchemy and MLflow and literally by the other. Choose another root, or name a "
            "server or nothing: --mlflow http://HOST:5000, --mlflow off"
        )


def explained(uri: str) -> str:
    """Why an address that is neither a server nor a database is none; empty for others."""
    word = uri.partition(":")[0].casefold()
    if word in ("databricks", "databricks-uc", "uc"):
        return (
            "Databricks' MLflow is not supported: its client, its names of experiments and its "
            "registry are others. Unset MLFLOW_TRACKING_URI or write --mlflow off; published "
            "checkpoints can be registered there by hand"
        )
    if word in ("none", "no", "false", "disabled", "0"):
        return f"{uri!r} is no address; --mlflow off tracks nothing"
    return ""
