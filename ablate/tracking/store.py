"""Tracking stores: which URI can be one, and opening an SQLite file with others around."""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
import sqlalchemy.orm
from filelock import FileLock

from ablate.errors import TrackingError
from ablate.masking import masked_url


def default_uri(runs: Path) -> str:
    """The tracking store that all studies in one folder share: an SQLite file, no server."""
    return f"sqlite:///{runs.absolute() / 'mlflow.db'}"


def checked(uri: str) -> str:
    """`uri`, if it can be a tracking store.

    Raises:
        TrackingError: it cannot, whatever the state of the network.
    """
    scheme = uri.split(":", 1)[0].lower() if "://" in uri else ""
    if scheme in ("http", "https"):
        return uri
    try:
        if scheme.split("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
            raise ValueError(f"unknown scheme {scheme!r}")
        sqlalchemy.engine.make_url(uri).get_dialect().import_dbapi()
    except (ValueError, ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise TrackingError(
            f"{masked_url(uri)!r} cannot be an MLflow tracking store: {error}. Give "
            "http(s)://host:port of a server, sqlite:////abs/mlflow.db, or "
            "postgresql://user@host/name with its driver installed; leave it out for a local file."
        ) from error
    return uri


def load_tables() -> None:
    """Load the database code of mlflow now, in the calling thread.

    It warns about itself while it loads, and a filter for warnings holds for all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        sqlalchemy.orm.configure_mappers()


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Let one process at a time create or migrate an SQLite store, with readers unhindered."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock"), timeout=30):
        connection = sqlite3.connect(path, timeout=5)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
        yield
