"""Wait until a Ray has so many nodes: ``wait_for_nodes.py HOST:PORT NODES [SECONDS]``."""

from __future__ import annotations

import sys
import time

import ray


def main(address: str, nodes: int, timeout_s: float = 300.0) -> int:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            break
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            if time.monotonic() > deadline:
                print(f"no Ray at {address} after {timeout_s:.0f} s: {error}", file=sys.stderr)
                return 3
            time.sleep(1)
    while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
        if time.monotonic() > deadline:
            # A study may well run on fewer; what cannot be placed is said by `ablate launch`.
            print(f"only {alive} of {nodes} nodes after {timeout_s:.0f} s", file=sys.stderr)
            break
        time.sleep(0.5)
    print(f"Ray at {address}: {alive} of {nodes} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:])))
