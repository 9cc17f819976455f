"""The nodes of a Ray: which are there, which were, and how many gangs they hold."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import ray
import ray._private.state
import ray._private.worker
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from ablate.cluster.contract import Capacity, Shape
from ablate.cluster.seats import count_gangs, count_seats, explain_shortage

ACCELERATOR = "ray.io/accelerator-type"
"""Ray's label of the kind of a node's accelerators."""
HEAD = "node:__internal_head__"
"""Ray's own resource of the node that its head is on."""
FORGET_S = 600.0
"""A node that went is expected back, or replaced, for so long."""
AHEAD = 16
"""Where Ray's autoscaler is at work, so many gangs are asked for beyond what the nodes hold: what
it could add is known to it alone."""


# Ray's head answers at once, or is away.
_ASK_S = 5


class Nodes:
    """What is known of each node, by Ray's id of it.

    Any thread may ask: a look replaces the whole picture at once.
    """

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}
        self._last: dict[str, float] = {}
        """When each was last alive, on the monotonic clock."""
        self._looked = 0.0
        self.aside: frozenset[str] = frozenset()
        """Nodes on which nothing more is placed."""
        self.draining: frozenset[str] = frozenset()
        """Nodes that will be taken away soon."""
        self.notes: dict[str, str] = {}
        """Why a node is not used, for people, by node."""
        self.silent = False
        """Ray's head does not answer: what was last seen counts."""
        self.ends = ""
        """Why nothing more is placed at all, for people."""
        self.grows = False
        """Ray's autoscaler adds nodes for what is asked of them."""

    def look(self) -> dict[str, dict[str, Any]]:
        """Ray's facts of the nodes that are alive now, and are not about to leave."""
        if self.silent:
            alive = {n: self._seen[n] for n, at in self._last.items() if at == self._looked}
        else:
            alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            self.note(alive, now=time.monotonic())
        return {node: facts for node, facts in alive.items() if node not in self.draining}

    def note(self, alive: Mapping[str, dict[str, Any]], *, now: float) -> None:
        """Remember the nodes that are alive; forget those that went long ago or were replaced."""
        seen, last = dict(self._seen), dict(self._last)
        gone = [node for node in seen if node not in alive]
        for node, facts in alive.items():
            if node not in seen:
                likes = [old for old in gone if _size(seen[old]) == _size(facts)]
                for replaced in likes[:1]:
                    gone.remove(replaced)
                    del seen[replaced], last[replaced]
        for node in gone:
            if now - last[node] > FORGET_S:
                del seen[node], last[node]
        last.update(dict.fromkeys(alive, now))
        self._last, self._looked = last, now
        seen.update(alive)
        if seen.keys() == self._seen.keys():
            return
        hosts = Counter(str(facts["NodeManagerHostname"]) for facts in seen.values())
        self._names = {
            node: host if hosts[host] == 1 else f"{host}/{node[:6]}"
            for node, facts in seen.items()
            for host in [str(facts["NodeManagerHostname"])]
        }
        self._seen = seen

    def look_for_autoscaler(self) -> None:
        """See whether an autoscaler (its second version, the usual one) reports to Ray's head."""
        gcs = ray._private.worker.global_worker.gcs_client
        reply = GetClusterStatusReply.FromString(gcs.get_cluster_status(timeout_s=_ASK_S))
        self.grows = reply.HasField("autoscaling_state")

    def usable(self) -> set[str]:
        """Nodes on which something may be placed now."""
        return self.look().keys() - self.aside

    def name(self, node: str) -> str:
        """A node's host name; with a piece of its id where several nodes share one machine."""
        return self._names[node]

    def door(self, node: str) -> tuple[str, int]:
        """Address of a node, and the port of its raylet."""
        if node not in self._seen:
            self.look()
        facts = self._seen[node]
        return str(facts["NodeManagerAddress"]), int(facts["NodeManagerPort"])

    def holds_seats(self, node: str) -> bool:
        """Whether anything could be placed on a node."""
        return bool(self._seen[node]["Resources"].get("CPU", 0.0) > 0)

    def home(self, own: str) -> dict[str, str]:
        """Nodes without which a launch on the node `own` cannot go on, and what each is to it."""
        heads = [node for node, facts in self._seen.items() if HEAD in facts["Resources"]]
        return {**dict.fromkeys(heads, "Ray's head is on it"), own: "this launch runs on it"}

    def refuse(self, node: str, why: str) -> None:
        """Use a node no more, even if it is the last."""
        self.aside |= {node}
        self.notes[node] = f"{self.name(node)} is not used: {why}"

    def set_aside(self, name: str, shape: Shape) -> bool:
        """Use a node no more, unless then no such gang could ever be placed."""
        named = {node for node in self.look() if self.name(node) == name}
        aside = self.aside | named
        left = [f["Resources"] for n, f in self._seen.items() if n not in aside and _has(f, shape)]
        if not self.grows and not count_gangs(shape, left):
            return False
        self.aside = aside
        return True

    def total(self, shape: Shape) -> int:
        """How many gangs of a shape fit on the nodes that are there or expected back."""
        seen = [(node, facts) for node, facts in self._seen.items() if _has(facts, shape)]
        return count_gangs(shape, [facts["Resources"] for n, facts in seen if n not in self.aside])

    def capacity(self, shape: Shape, idle: Iterable[tuple[str, Shape]]) -> Capacity:
        """How many gangs fit. `idle`: seats (node, what its worker takes) that are given up, or
        over, to whoever comes."""
        alive, seen, names, aside = self.look(), self._seen, self._names, self.aside
        usable = {n: facts for n, facts in seen.items() if n not in aside and _has(facts, shape)}
        known = {names[node]: facts["Resources"] for node, facts in usable.items()}
        notes = (*self.notes.values(), *_mixed(usable.values(), shape))
        holds = count_gangs(shape, list(known.values()))
        total = holds + AHEAD if self.grows else holds
        left_over = {} if self.silent else ray._private.state.available_resources_per_node()
        free = {
            node: {kind: float(left.get(kind, 0.0)) for kind in ("CPU", "GPU")}
            for node, left in left_over.items()
            if node in alive and node in usable
        }
        for node, held in idle:
            if node in free:
                free[node]["CPU"] += held.cpus_per_worker
                free[node]["GPU"] += held.gpus_per_worker
        answering = [facts["Resources"] for node, facts in usable.items() if node in alive]
        return Capacity(
            total,
            min(total, count_gangs(shape, list(free.values()))),
            "; ".join([explain_shortage(shape, known), *notes]) if not total else "",
            explain_shortage(shape, {names[n]: left for n, left in free.items()}, now=True),
            away=total - count_gangs(shape, answering),
            notes=notes,
            machines=sum(count_seats(shape, facts["Resources"]) > 0 for facts in usable.values()),
            silent=self.silent,
            ends=self.ends,
        )


def _has(facts: Mapping[str, Any], shape: Shape) -> bool:
    """Whether a node has the labels that a gang asks for."""
    labels = facts.get("Labels", {})
    return all(labels.get(name) == value for name, value in shape.labels)


def _mixed(nodes: Iterable[Mapping[str, Any]], shape: Shape) -> list[str]:
    """A note, where trials of one study may land on accelerators of several kinds."""
    kinds = {facts.get("Labels", {}).get(ACCELERATOR) for facts in nodes} - {None}
    if not shape.gpus_per_worker or len(kinds) < 2:
        return []
    return [
        f"trials may land on {' or '.join(sorted(kinds))}, which differ in speed, memory and "
        f"rounding: gang.labels: {{{ACCELERATOR}: {min(kinds)}}} keeps them to one"
    ]


def _size(facts: Mapping[str, Any]) -> tuple[float, float]:
    """What a node holds: one of the same size can stand in for it."""
    resources = facts["Resources"]
    return float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0))
