"""Several hosts on one machine: a network, pid and mount namespace each, joined by a bridge.

The bridge lives in a namespace of its own and there is no default route, so nothing can leave.
Ray's folder is a private mount per host, or the hosts' sockets would collide. Needs root and
iproute2; ``unavailable()`` says what is missing. `Nodes` is what is left without them: Ray's nodes
side by side on this machine, which can be killed and not be cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

REPOSITORY = Path(__file__).parents[2]
RAY_PORT = 6379


def unavailable() -> str:
    """Why hosts cannot be made here; empty when they can."""
    missing = [tool for tool in ("ip", "bridge", "unshare", "nsenter") if not shutil.which(tool)]
    if missing:
        return f"needs {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], check=False)
    return "" if tried.returncode == 0 else "network namespaces are not permitted here"


def ray_environment() -> dict[str, str]:
    """What launch/ray.env sets, and a token."""
    lines = (REPOSITORY / "launch" / "ray.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {**settings, "RAY_AUTH_TOKEN": "ab" * 32}


class Hosts:
    """``with Hosts(cpus=(0, 2, 2), folder=...)``: Ray's head on host 0, a node on each other.

    `first`: a shell command that a host runs before its Ray.
    """

    def __init__(
        self, cpus: Sequence[int], folder: Path, first: Mapping[int, str] | None = None
    ) -> None:
        self.cpus = tuple(cpus)
        self.folder = folder
        self.first = dict(first or {})
        # Interface and namespace names are short, and two runs must not meet.
        self.tag = f"ab{os.getpid() % 100_000}"
        self.started: dict[int, subprocess.Popen[bytes]] = {}
        self.logs: list[IO[bytes]] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            **ray_environment(),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

    def __enter__(self) -> Hosts:
        try:
            self._wire()
            self._run_ray(0)
            self._wait_for_head()
            for host in range(1, len(self.cpus)):
                self._run_ray(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in list(self.started):
            self.kill(host)
        for name in [self.namespace(h) for h in range(len(self.cpus))] + [self.switch]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        for log in self.logs:
            log.close()

    @property
    def switch(self) -> str:
        return f"{self.tag}sw"

    def namespace(self, host: int) -> str:
        return f"{self.tag}h{host}"

    @property
    def ray_address(self) -> str:
        return f"{self.address(0)}:{RAY_PORT}"

    def address(self, host: int) -> str:
        return f"10.77.0.{10 + host}"

    def _wire(self) -> None:
        switch = self.switch
        _do(f"ip netns add {switch}")
        _do(f"ip -n {switch} link add br0 type bridge")
        _do(f"ip -n {switch} link set br0 up")
        for host in range(len(self.cpus)):
            name = self.namespace(host)
            _do(f"ip netns add {name}")
            _do(f"ip link add eth0 netns {name} type veth peer name p{host} netns {switch}")
            _do(f"ip -n {switch} link set p{host} master br0 up")
            _do(f"ip -n {name} addr add {self.address(host)}/24 dev eth0")
            _do(f"ip -n {name} link set eth0 up")
            _do(f"ip -n {name} link set lo up")

    def _run_ray(self, host: int) -> None:
        private = self.folder / f"ray{host}"
        private.mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        role = (
            ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
            if host == 0
            else [f"--address={self.address(0)}:{RAY_PORT}"]
        )
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role]
        ray += [f"--node-ip-address={self.address(host)}", f"--num-cpus={self.cpus[host]}"]
        ray += ["--object-store-memory=80000000", "--disable-usage-stats", "--block"]
        # The machine stays when its Ray ends.
        prepare = 'mount --bind "$0" /tmp/ray && hostname "$1" && shift && "$@"; exec sleep 3600'
        prepare = f"{self.first.get(host, 'true')} && {prepare}"
        isolate = "unshare --uts --mount --pid --fork --kill-child --mount-proc"
        log = open(self.folder / f"host{host}.log", "wb")
        self.logs.append(log)
        self.started[host] = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace(host), *isolate.split()]
            + ["sh", "-c", prepare, str(private), f"host{host}", *ray],
            env=self.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_for_head(self) -> None:
        probe = f"import socket; socket.create_connection(('{self.address(0)}', {RAY_PORT}), 1)"
        command = ["ip", "netns", "exec", self.namespace(0), sys.executable, "-S", "-c", probe]
        deadline = time.monotonic() + 60
        while subprocess.run(command, check=False, capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / "host0.log").read_text()
            time.sleep(0.1)

    def wait_for_nodes(self) -> None:
        """Until every host has joined Ray."""
        look = (
            "import ray, time\n"
            f"ray.init(address={self.ray_address!r}, log_to_driver=False)\n"
            f"while sum(node['Alive'] for node in ray.nodes()) < {len(self.cpus)}:\n"
            "    time.sleep(0.1)\n"
        )
        with self.run(0, [sys.executable, "-c", look]) as looking:
            try:
                assert looking.wait(60) == 0
            finally:
                looking.kill()

    def init(self, host: int) -> int:
        """Pid, as seen from outside, of a host's first process."""
        for process in psutil.Process(self.started[host].pid).children(recursive=True):
            status = Path(f"/proc/{process.pid}/status").read_text()
            inner = next(line for line in status.splitlines() if line.startswith("NSpid")).split()
            if inner[2:] == ["1"]:
                return process.pid
        raise AssertionError(f"host {host} has no first process")

    def run(self, host: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command inside a host."""
        enter = f"nsenter -t {self.init(host)} -n -m -p -u"
        return subprocess.Popen(
            [*enter.split(), *command], env=self.environment, stdout=subprocess.PIPE
        )

    def processes(self, host: int) -> list[psutil.Process]:
        """Everything that runs on a host."""
        return psutil.Process(self.started[host].pid).children(recursive=True)

    def rank(self, host: int) -> psutil.Process:
        """The rank that runs on a host."""
        (rank,) = ranks(self.processes(host))
        return rank

    def kill(self, host: int) -> None:
        """The power plug: every process of the host at once."""
        process = self.started.pop(host)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def tell(self, host: int) -> None:
        """SIGTERM to `ray start`, as a kubelet or a spot script sends it; until it has ended."""
        children = psutil.Process(self.init(host)).children()
        (start,) = [each for each in children if "ray.scripts.scripts" in each.cmdline()]
        start.terminate()
        start.wait(60)

    def cut(self, host: int) -> None:
        """The cable: the host's own card sees no carrier."""
        _do(f"ip -n {self.switch} link set p{host} down")

    def silence(self, host: int) -> None:
        """The switch drops every packet of the host, whose card sees a carrier."""
        _do(f"ip netns exec {self.switch} bridge link set dev p{host} state 0")

    def hang(self, host: int) -> None:
        """Ray's own process there stands still, and nothing else does."""
        for process in self._raylets(host):
            process.suspend()

    def _raylets(self, host: int) -> list[psutil.Process]:
        return [process for process in self.processes(host) if process.name() == "raylet"]

    def mend(self, host: int) -> None:
        """Undo cut(), silence() or hang()."""
        for process in self._raylets(host):
            process.resume()
        _do(f"ip -n {self.switch} link set p{host} up")
        _do(f"ip netns exec {self.switch} bridge link set dev p{host} state 3")


_NODES = """
import json, sys, time
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
cluster, nodes = Cluster(), []

def add(cpus, env):
    node = cluster.add_node(
        num_cpus=cpus, env_vars=env, include_dashboard=False, object_store_memory=80_000_000
    )
    nodes.append(node)
    return node.all_processes["raylet"][0].process.pid, node.node_id

def drain(hosts, notice_s):
    until_ms = time.time_ns() // 1_000_000 + 1000 * notice_s
    gcs = ray._raylet.GcsClient(address=cluster.address)
    spot = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    return [gcs.drain_node(nodes[host].node_id, spot, "spot", until_ms) for host in hosts]

def behead():
    return nodes[0].all_processes["gcs_server"][0].process.kill()

made = [add(*each) for each in json.loads(sys.argv[1])]
print(json.dumps([cluster.address, made]), flush=True)
for line in sys.stdin:
    asked, given = json.loads(line)
    print(json.dumps(globals()[asked](*given)), flush=True)
cluster.shutdown()
"""


class Nodes:
    """``with Nodes(cpus=(0, 1, 1), folder=...)``: the same on `ray.cluster_utils.Cluster`.

    `variables` are set on a node alone.
    """

    def __init__(
        self,
        cpus: Sequence[int],
        folder: Path,
        variables: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        self.nodes = [(each, dict((variables or {}).get(n, {}))) for n, each in enumerate(cpus)]
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            **ray_environment(),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

    def __enter__(self) -> Nodes:
        with open(self.folder / "nodes.log", "wb") as log:
            self.cluster = subprocess.Popen(
                [sys.executable, "-c", _NODES, json.dumps(self.nodes)],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.ray_address, made = self._answer()
        self.raylets, self.ids = [pid for pid, _ in made], [node for _, node in made]
        return self

    def __exit__(self, *_: object) -> None:
        tree = psutil.Process(self.cluster.pid).children(recursive=True)
        try:
            self.cluster.communicate(timeout=60)
        except subprocess.TimeoutExpired:  # its head was killed
            self.cluster.kill()
            self.cluster.communicate()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def run(self, host: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE)

    def processes(self, host: int) -> list[psutil.Process]:
        """Everything that a node started."""
        return psutil.Process(self.raylets[host]).children(recursive=True)

    def drain(self, *hosts: int, notice_s: int) -> None:
        """Tell Ray, as `ray drain-node` does, that nodes will be taken away."""
        for accepted, why in self._ask("drain", hosts, notice_s):
            assert accepted, why

    def add(self, cpus: int) -> None:
        """One node more."""
        pid, node = self._ask("add", cpus, {})
        self.raylets.append(pid)
        self.ids.append(node)

    def behead(self) -> None:
        """Kill Ray's head alone; all nodes stay for now."""
        self._ask("behead")

    def _ask(self, what: str, *given: object) -> Any:
        assert self.cluster.stdin is not None
        self.cluster.stdin.write(json.dumps([what, given]).encode() + b"\n")
        self.cluster.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.cluster.stdout is not None
        said = self.cluster.stdout.readline()
        if not said:
            self.__exit__()
            raise AssertionError((self.folder / "nodes.log").read_text())
        return json.loads(said)

    def kill(self, host: int) -> None:
        """Every process of the node at once."""
        for process in [psutil.Process(self.raylets[host]), *self.processes(host)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def ranks(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that are ranks: session leaders that a keeper forked."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            keepers = [p for p in (process, process.parent()) if p is not None]
            if all("ablate.cluster.keeper" in keeper.cmdline() for keeper in keepers) and (
                os.getsid(process.pid) == process.pid
            ):
                found.append(process)
    return found


def _do(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
