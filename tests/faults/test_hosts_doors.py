"""What a stranger on the network finds at a Ray that launch/ has started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hosts import Hosts, unavailable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.drill,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available"),
]

LISTENING = """
import json, psutil
found = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
print(json.dumps([[c.laddr.ip, c.laddr.port] for c in found]))
"""

KNOCK = """
import http.client, json, os, socket, sys
address, ports = sys.argv[1], json.loads(sys.argv[2])
said = {}
for port in ports:
    try:
        socket.create_connection((address, port), 5).close()
    except OSError as error:
        said[port] = [0, str(error)]
        continue
    for target in ("/", "/api/version", "/api/jobs/", "/api/cluster_status"):
        asked = http.client.HTTPConnection(address, port, timeout=5)
        try:
            asked.request("GET", target)
            answer = asked.getresponse()
            said[port] = [answer.status, answer.read(300).decode(errors="replace")]
        except (OSError, http.client.HTTPException) as error:
            said.setdefault(port, [-1, type(error).__name__])
        if said[port][0] == 200:
            break
print(json.dumps(said))
"""

JOIN = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, _skip_env_hook=True)
except BaseException as error:
    print("refused:", type(error).__name__, str(error).splitlines()[0])
else:
    print("JOINED", len(ray.nodes()))
"""


def test_a_stranger_finds_no_dashboard_and_no_way_in(tmp_path: Path) -> None:
    """From another host of the network every port of the head's is tried: none is the dashboard's
    or the job server's, none answers a plain request, and a driver without the token is refused
    where one with it joins."""
    with Hosts(cpus=(0, 1), folder=tmp_path) as hosts:
        hosts.wait_for_nodes()
        listening = json.loads(say(hosts, 0, ["-c", LISTENING]))
        ports = sorted({port for ip, port in listening if not ip.startswith("127.")})
        assert len(ports) > 2, "Ray listens there"
        assert not {8265, 52365} & set(ports), "dashboard and agent are off"
        heard = json.loads(say(hosts, 1, ["-c", KNOCK, hosts.address(0), json.dumps(ports)]))
        print(heard)
        assert {port: said for port, said in heard.items() if said[0] == 200} == {}
        assert say(hosts, 1, ["-c", JOIN, hosts.ray_address]).startswith("JOINED 2")
        hosts.environment = {
            name: value for name, value in hosts.environment.items() if "_AUTH_" not in name
        }
        without = say(hosts, 1, ["-c", JOIN, hosts.ray_address])
        assert "JOINED" not in without, without


def say(hosts: Hosts, host: int, command: list[str]) -> str:
    """What a Python program on a host prints."""
    with hosts.run(host, [sys.executable, *command]) as program:
        assert program.stdout is not None
        said = program.stdout.read().decode()
        program.wait(120)
    return said
