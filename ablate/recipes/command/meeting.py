"""When the ranks' commands may begin: once the port of their meeting is free for rank 0's own.

The cluster keeps the port of rank 0 open until rank 0's command takes it, so that nobody else can.
Until then the kernel answers there, and a command of another rank that came early would be
connected to nobody.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping

from ablate.trial.session import Session

_LISTENING = "ABLATE_STORE_FD"
"""Rank 0's environment: the open port."""
_KEPT = "ABLATE_PULSE_FD"
"""In every rank's environment where a cluster of ours started it."""


def meet(session: Session, env: MutableMapping[str, str]) -> None:
    """Wait until every rank is here, and leave the port of the meeting to the command.

    What only this process uses is taken out of `env`. How long a rank may wait is for the cluster
    to say, as before a first step.
    """
    listening = env.pop(_LISTENING, None)
    if env.pop(_KEPT, None) is None:
        return
    if listening is not None:
        _let_in(socket.socket(fileno=int(listening)), session.world_size - 1)
    elif session.world_size > 1:
        _wait_outside((env["MASTER_ADDR"], int(env["MASTER_PORT"])))


def _let_in(door: socket.socket, others: int) -> None:
    with door:
        peers = [door.accept()[0] for _ in range(others)]
    for peer in peers:
        peer.sendall(b"!")  # the door is closed
    for peer in peers:
        peer.recv(1)  # the other side closes first: no end of it stays at our port
        peer.close()


def _wait_outside(door: tuple[str, int]) -> None:
    with socket.create_connection(door) as peer:
        if not peer.recv(1):
            raise ConnectionError(f"rank 0 at {door[0]}:{door[1]} left before all ranks were there")
