"""What a rank is given of its machine: accelerators that are free, and a network interface."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence

import psutil

from ablate.errors import ClusterError

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str | None:
    """The network interface that holds an address, None when no interface does.

    Gloo and NCCL otherwise listen on the interface that the host's name happens to resolve to.
    """
    # The whole of 127.0.0.0/8 is loopback, but the interface lists 127.0.0.1 alone.
    wanted = {address, "127.0.0.1"} if address.startswith("127.") else {address}
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address in wanted for entry in addresses):
            return name
    return None


def variables_of(interface: str | None) -> dict[str, str]:
    """What tells gloo and NCCL of it; a plain name is a beginning to NCCL: eth1 would mean eth10
    too."""
    gloo, nccl = INTERFACE_VARIABLES
    return {gloo: interface, nccl: f"={interface}"} if interface else {}


async def wait_until_free(
    devices: Sequence[str], idle: dict[str, float], *, timeout_s: float = 30.0
) -> None:
    """Wait until no process holds memory on the accelerators; nothing to ask without nvidia-smi.

    A killed process's GPU memory is returned by the driver some time after the process is gone.
    `idle` keeps the least MiB in use that were ever seen on each device.

    Raises:
        ClusterError: a device is still in use after the timeout; says by which processes.
    """
    if not devices or shutil.which("nvidia-smi") is None:
        return
    deadline = time.monotonic() + timeout_s
    while users := await _device_users(devices, idle):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{socket.gethostname()}: accelerator still in use after {timeout_s:.0f} s by "
                + "; ".join(users)
            )
        await asyncio.sleep(0.2)


# Stays on a device of its own accord once a client has used it.
_RESIDENT = "nvidia-cuda-mps-server"
# A tool that hangs on a sick device says nothing about who uses it.
_ANSWER_S = 10.0
# A share of a device's memory beyond what it has in use when idle; a desktop takes less.
_HELD = 0.1


async def _device_users(devices: Sequence[str], idle: dict[str, float]) -> list[str]:
    """A line for each process on the devices, or for the memory that one holds which is not seen
    from here (a container has process numbers of its own, and lists none); none where devices
    cannot be asked, e.g. MIG slices.

    Raises:
        ClusterError: the tool hangs, as it does on a device that has fallen off its bus.
    """
    listed, memory = await asyncio.gather(
        _ask(devices, "--query-compute-apps=pid,used_memory,gpu_uuid,process_name"),
        _ask(devices, "--query-gpu=uuid,memory.used,memory.total"),
    )
    users = [line for line in listed if _RESIDENT not in line]
    for line in memory if not listed else ():
        name, *sizes = (part.strip().removesuffix(" MiB") for part in line.split(","))
        if len(sizes) != 2 or not all(size.isdigit() for size in sizes):
            continue  # "[N/A]"
        used, total = sizes
        idle[name] = min(float(used), idle.get(name, float(used)))
        if float(used) - idle[name] > _HELD * float(total):
            users.append(f"a process that cannot be seen here: {used} of {total} MiB of {name}")
    return users


async def _ask(devices: Sequence[str], query: str) -> list[str]:
    """Lines of nvidia-smi's answer; none where it has none."""
    process = await asyncio.create_subprocess_exec(
        "nvidia-smi",
        f"--id={','.join(devices)}",
        query,
        "--format=csv,noheader",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _ANSWER_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise ClusterError(
            f"{socket.gethostname()}: nvidia-smi does not answer within {_ANSWER_S:.0f} s for "
            f"accelerators {', '.join(devices)}: look at the machine's kernel log (dmesg)"
        ) from None
    if process.returncode:
        return []
    return [line for line in map(str.strip, output.decode().splitlines()) if line]
