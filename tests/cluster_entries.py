"""What the ranks of the cluster tests do: entries, without arguments, environment only."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _say(name: str, text: str = "") -> None:
    """Leave a file in the attempt's folder, complete or not at all."""
    folder = Path(os.environ["ABLATE_TRIAL"]) / "attempts" / os.environ["ABLATE_ATTEMPT"]
    part = folder / f".{name}"
    part.write_text(text)
    part.rename(folder / name)


def _rank() -> int:
    return int(os.environ["RANK"])


def _wait_forever() -> None:
    while True:
        time.sleep(60)


def succeed() -> int:
    print("done", flush=True)
    return 0


def see_collector() -> int:
    """0 where garbage is collected."""
    return 0 if gc.isenabled() else 1


def write_environment() -> int:
    _say(f"env-{_rank()}.json", json.dumps(dict(os.environ)))
    return 0


def write_environment_and_wait() -> int:
    """Leave the environment, and end when the file GO exists."""
    write_environment()
    return wait_for_file()


def sleep() -> int:
    _say(f"up-{_rank()}")
    _wait_forever()
    return 0


def checkpoint_on_term() -> int:
    """Rank 0 takes a little longer than the others to end, as a rank that writes does."""

    def leave(*_: object) -> None:
        if _rank() == 0:
            time.sleep(0.3)
            _say("saved")
        sys.exit(75)

    signal.signal(signal.SIGTERM, leave)
    _say(f"up-{_rank()}")
    _wait_forever()
    return 0


def ignore_term() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _say(f"up-{_rank()}")
    _wait_forever()
    return 0


def crash() -> int:
    raise ValueError("no such augmentation")


def crash_rank_1() -> int:
    if _rank() == 1:
        print("about to fail")
        return 3
    _wait_forever()
    return 0


def leave_alone() -> int:
    """Rank 1 has written a result that ends the trial; rank 0 waits for it in a collective."""
    if _rank() == 1:
        return 73
    return sleep()


def hide_the_log() -> int:
    """Put a pipe that nobody writes to in the log's place, as a mount that hangs, and fail."""
    log = Path(os.environ["ABLATE_TRIAL"], "attempts", os.environ["ABLATE_ATTEMPT"], "log-0.txt")
    log.unlink()
    os.mkfifo(log)
    return 3


def _breed() -> list[int]:
    """A child, a grandchild whose parent is gone, a daemon in its own session, and a fork."""
    sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleeper)
    forked = os.fork()
    if forked == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _wait_forever()
    return [child.pid, _disown(sleeper, False), _disown(sleeper, True), forked]


def _disown(command: list[str], own_session: bool) -> int:
    """Start a process from a parent that ends at once; its pid."""
    program = (
        "import subprocess, sys; null = subprocess.DEVNULL; "
        f"started = subprocess.Popen({command!r}, stdout=null, stderr=null, "
        f"start_new_session={own_session}); print(started.pid)"
    )
    return int(subprocess.check_output([sys.executable, "-S", "-c", program]))


def breed_and_sleep() -> int:
    _say(f"pids-{_rank()}.json", json.dumps(_breed()))
    _wait_forever()
    return 0


def breed_and_return() -> int:
    _say(f"pids-{_rank()}.json", json.dumps(_breed()))
    return 0


def record_interval() -> int:
    """Leave when this rank began and ended, to see which gangs ran at the same time."""
    began = time.monotonic()
    time.sleep(0.3)
    _say(f"interval-{_rank()}.json", json.dumps([began, time.monotonic()]))
    return 0


def wait_for_file() -> int:
    """End in order as soon as the file GO exists."""
    _say(f"up-{_rank()}")
    while not Path(os.environ["GO"]).exists():
        time.sleep(0.01)
    return 0


def all_reduce() -> int:
    """One gloo all-reduce over the store whose socket the cluster opened."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    rank, world = _rank(), int(os.environ["WORLD_SIZE"])
    listener = os.environ.get("ABLATE_STORE_FD")
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0,
        timeout=timedelta(seconds=60),
        master_listen_fd=None if listener is None else int(listener),
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    value = torch.tensor([float(rank + 1)])
    dist.all_reduce(value)
    import psutil

    listening = [
        c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN
    ]
    _say(
        f"sum-{rank}.json",
        json.dumps(
            {
                "sum": value.item(),
                "threads": torch.get_num_threads(),
                "listening": listening,
                "time": time.time(),
            }
        ),
    )
    dist.destroy_process_group()
    return 0


def train_and_stop() -> int:
    """Rank 1 stops itself, as a process that waits for a terminal does; rank 0 waits for it."""
    if _rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return sleep()


def train_and_hang() -> int:
    """Three steps, and then a fourth that never ends."""
    from ablate.trial.pulse import Pulse

    pulse = Pulse()
    for _ in range(3):
        pulse.step(0.01)
        time.sleep(0.01)
    return sleep()


def train_and_evaluate() -> int:
    """A step, and an evaluation that takes longer than any step may."""
    from ablate.trial.pulse import Pulse

    pulse = Pulse()
    pulse.step(0.01)
    with pulse.evaluating():
        time.sleep(float(os.environ["ABLATE_PATIENCE_S"]) + 3)
    pulse.step(0.01)
    return 0


def train_and_hang_evaluating() -> int:
    """A first evaluation that is long, batch by batch, and then hangs within a batch."""
    from ablate.trial.pulse import Pulse, part_ended

    patience_s = 3 * float(os.environ["ABLATE_EVALUATION_PATIENCE_S"])
    with Pulse().evaluating():
        for _ in range(7):
            time.sleep(0.2 * patience_s)
            part_ended()
        print("seven batches", flush=True)
        return sleep()
