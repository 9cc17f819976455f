"""Ray's doors: a private Ray on loopback that is ours alone, and no open one is joined."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.ray_constants
import ray._private.worker
import ray.exceptions

from ablate.cluster.keeper.wire import Estate
from ablate.errors import ClusterError

# Joining a Ray that is open to the network is refused without this, set to 1.
INSECURE = "ABLATE_INSECURE_RAY"


# Only small messages pass through Ray's object store.
_OBJECT_STORE_BYTES = 80 * 2**20


def join(address: str) -> None:
    """Join a running Ray at ``auto`` or ``host:port``.

    Raises:
        ClusterError: there is none, or it is open to the network.
    """
    if "://" in address:
        raise ClusterError(
            f"{address} is an address for Ray Client; run where the Ray is, with auto or host:port"
        )
    try:
        ray.init(address=address, **_quiet())
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(f"no Ray to join at {address}: {error}") from error
    refuse_open_door(str(ray.get_runtime_context().gcs_address))


def start_private(num_cpus: float | None, num_gpus: int | None) -> Estate:
    """Start a Ray on this machine; what is to be cleared up should this process be killed."""
    before = psutil.Process().children(recursive=True)
    folder = _private_folder()
    with _removing(folder), _loopback_only():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            _system_config={
                # Ray would kill the agent when a rank fills the memory; the kernel takes the
                # rank itself.
                "memory_monitor_refresh_ms": 0,
                "prestart_worker_first_driver": False,
            },
            **_quiet(),
        )
    # Ray's own agents outlive a killed driver by a minute, its folder for ever.
    processes = psutil.Process().children(recursive=True)
    return Estate(
        owner=_identity(psutil.Process()),
        processes=tuple(_identity(process) for process in processes if process not in before),
        folder=str(folder),
    )


def _quiet() -> dict[str, Any]:
    """Ray would print its view of a lost node on standard output, where --json goes."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    worker: Any = ray._private.worker
    worker._worker_logs_enabled = False
    return {"log_to_driver": False, "logging_level": logging.ERROR}


def refuse_open_door(address: str) -> None:
    """Whoever reaches a Ray without authentication can run anything as us.

    Raises:
        ClusterError: the Ray is not on loopback, and this process does not authenticate.
    """
    host = address.rpartition(":")[0].strip("[]")
    if ipaddress.ip_address(host).is_loopback:
        return
    if os.environ.get("RAY_AUTH_MODE") == "token" or os.environ.get(INSECURE) == "1":
        return
    raise ClusterError(
        f"the Ray at {address} listens beyond this machine, and RAY_AUTH_MODE is not token: anyone "
        "who reaches the port can run programs as you. Start Ray with RAY_AUTH_MODE=token and a "
        "secret in RAY_AUTH_TOKEN on every node (launch/ has it for each place), or, on a network "
        f"that you trust, set {INSECURE}=1."
    )


def _identity(process: psutil.Process) -> tuple[int, float]:
    return process.pid, process.create_time()


def _private_folder() -> Path:
    """A folder for a private Ray's sockets and logs, after removing those of dead processes.

    The name is short: the path of a Unix socket holds 107 bytes.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > 24:
        base = Path("/tmp")
    for old in base.glob("ablate-ray-*-*"):
        owner = old.name.split("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"ablate-ray-{os.getpid()}-", dir=base))


@contextlib.contextmanager
def _removing(folder: Path) -> Iterator[None]:
    """Leave no folder behind when the start inside fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Start Ray on 127.0.0.1, with a token, silent.

    Ray replaces 127.0.0.1 by the address of a network card unless it believes that it cannot form
    a cluster (`ray._private.services.resolve_ip_for_localhost`), and listens on every card unless
    its address is exactly 127.0.0.1. Ray turns token authentication on when a token is there.
    """
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or _TOKEN,
    }
    before = {name: os.environ.get(name) for name in (*environment, "RAY_ADDRESS")}
    constants: Any = ray._private.ray_constants
    can_cluster = constants.ENABLE_RAY_CLUSTER
    os.environ.update(environment)
    os.environ.pop("RAY_ADDRESS", None)  # asked for a private one
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = can_cluster
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# One per process: Ray reads it once.
_TOKEN = secrets.token_hex(32)
