"""Tracking stores: which URI can be one, and opening an SQLite file with others around."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sqlite3
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import sqlalchemy
import sqlalchemy.orm
from alembic.script import ScriptDirectory
from filelock import FileLock

from ablate.errors import TrackingError
from ablate.records.masking import masked_url, reason_of


def default_uri(runs: Path) -> str:
    """The tracking store that all studies in one folder share: an SQLite file, no server."""
    return f"sqlite:///{runs.absolute() / 'mlflow.db'}"


def checked(uri: str) -> str:
    """`uri`, if it can be a tracking store.

    Raises:
        TrackingError: it cannot, whatever the state of the network.
    """
    scheme = uri.split(":", 1)[0].lower() if "://" in uri else ""
    try:
        if scheme in ("http", "https"):
            if urlsplit(uri).hostname:
                return uri
            raise ValueError("it names no host")
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


_MIRRORS: set[Path] = set()
"""SQLite stores that this process has opened."""


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def _trust_the_disk(connection: object, _: object) -> None:
    """Let a mirror's transactions reach the disk when the disk likes, in their order.

    MLflow makes several of every request, and waits for the disk after each. A machine that loses
    its power loses the last of them, and the next launch tells them again from the folder.
    """
    if isinstance(connection, sqlite3.Connection):
        files = [Path(file).resolve() for *_, file in connection.execute("PRAGMA database_list")]
        if _MIRRORS.intersection(files):
            connection.execute("PRAGMA synchronous=NORMAL")


def load_tables() -> None:
    """Load the database code of mlflow now, in the calling thread.

    It warns about itself while it loads, and a filter for warnings holds for all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        sqlalchemy.orm.configure_mappers()


def artifacts_beside(path: Path) -> str:
    """Where the artifacts of an SQLite store's experiments lie, as a URI."""
    return path.absolute().with_name("mlartifacts").as_uri()


def artifacts_of(study: str, *, uri: str, runs: Path) -> str | None:
    """Where a study's artifacts go, as a URI; None where the store is a server, which decides.

    Left to itself, MLflow puts those of a database into the working directory.
    """
    if uri.startswith("http"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else runs
    return (folder.absolute() / "mlartifacts" / study).as_uri()


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Let one process at a time create or migrate an SQLite store, with readers unhindered."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if not uri.startswith("sqlite:///"):
        if not uri.startswith("http"):
            _connect_once(uri)
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock"), timeout=30):
        if not _is_whole(path):
            _create(path)
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        _MIRRORS.add(path.resolve())
        yield


def _connect_once(uri: str) -> None:
    """Hear what a database says to a stranger: MLflow tries fifteen times, with longer and longer
    pauses, before it tells.

    Raises:
        TrackingError: it cannot be reached, or lets nobody in.
    """
    url = sqlalchemy.engine.make_url(uri)
    limited = url.get_backend_name() in ("postgresql", "mysql")
    engine = sqlalchemy.create_engine(
        url,
        poolclass=sqlalchemy.pool.NullPool,
        connect_args={"connect_timeout": _CONNECTING_S} if limited else {},
    )
    try:
        with engine.connect():
            pass
    except sqlalchemy.exc.DBAPIError as error:
        raise TrackingError(reason_of(error.orig or error)) from error


_CONNECTING_S = 5
"""What a database has time to answer a connection."""

_CREATING_S = 5.0
"""Another program that creates the tables itself writes at least so often."""


def _is_whole(path: Path) -> bool:
    """False where there is no store, or an empty one whose tables were never all made.

    MLflow makes its tables one by one in some sixty migrations, and cannot go on after an
    interrupted one.
    """
    while path.exists() and path.stat().st_size:
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
            if _holds_something(connection) or _revision(connection) == _newest_revision():
                return True
        if time.time() - path.stat().st_mtime > _CREATING_S:
            return False
        time.sleep(0.2)
    return False


def _holds_something(connection: sqlite3.Connection) -> bool:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    kept = {"runs": "1", "experiments": "experiment_id != 0", "registered_models": "1"}
    return any(
        connection.execute(f"SELECT 1 FROM {table} WHERE {which} LIMIT 1").fetchone()
        for table, which in kept.items()
        if table in tables
    )


def _revision(connection: sqlite3.Connection) -> str | None:
    try:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
    return str(found[0]) if found else None


def _newest_revision() -> str | None:
    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations"
    return ScriptDirectory(str(migrations)).get_current_head()


def _create(path: Path) -> None:
    """Make a store under another name, so that it is there with all of its tables or not at all."""
    load_tables()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = path.with_name(path.name + ".new")
    _remove(new)
    store = SqlAlchemyStore(f"sqlite:///{new}", artifacts_beside(path))
    store.engine.dispose()
    _remove(path)  # and its journal, which would be read as the new file's
    os.replace(new, path)


def _remove(path: Path) -> None:
    for ending in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
