"""Whether Ray's head answers, and the end when it does not: Ray's own comes without a word.

Ray ends every process that has not reached its head for RAY_gcs_rpc_server_reconnect_timeout_s
(60 s), the launch with exit code 1 and ranks by SIGKILL. Before that trials write a checkpoint, and
the launch ends as one that the cluster cannot run. Calls to the head hang until then, so nothing
asks it while it is silent.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable

# A head that restarts is back by then;
_PATIENCE_S = 20.0
# else trials have so long for a checkpoint. Both, and a poll, are well below Ray's 60 s.
_GRACE_S = 25.0
_POLL_S = 1.0
# How they ended is written down within this.
_WRITING_S = 3.0
_UNUSABLE = 3
"""Exit code of a launch that the cluster cannot run."""


async def watch_head(
    address: str, *, tell: Callable[[bool], None], leave: Callable[[float], bool]
) -> None:
    """Watch the head at ``host:port`` for ever.

    `tell` hears when it falls silent (True) or answers again; `leave` asks all ranks to stop within
    so many seconds and says whether any is left.
    """
    since: float | None = None
    asked_at = quiet_at = 0.0
    while True:
        await asyncio.sleep(_POLL_S)
        if await _answers(address):
            if since is not None:
                tell(False)
            since = None
            continue
        now = time.monotonic()
        if since is None:
            since, asked_at, quiet_at = now, 0.0, 0.0
            tell(True)
        if now - since < _PATIENCE_S:
            continue
        asked_at = asked_at or now
        if not leave(max(0.0, asked_at + _GRACE_S - now)):
            quiet_at = quiet_at or now
        if (quiet_at and now - quiet_at > _WRITING_S) or now - asked_at > _GRACE_S + _WRITING_S:
            _end(address, now - since)


def _end(address: str, silent_s: float) -> None:
    """Leave as Ray would: its calls hang, so nothing can be taken down in order."""
    print(
        f"Ray's head at {address} has not answered for {silent_s:.0f} s. Running trials were asked "
        "for a checkpoint; start Ray again and launch again to go on.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(_UNUSABLE)


async def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(
            asyncio.open_connection(host.strip("[]"), int(port)), 2 * _POLL_S
        )
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
