"""Each launch place says with --dry-run what it would do; the whole text is the expectation.

``UPDATE_GOLDEN=1 pytest tests/launch`` writes the files anew; a reviewer reads the difference.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
PLACES = {
    "local": ["local.sh"],
    "slurm": ["slurm.sh"],
    "kuberay": ["kuberay/launch.sh"],
    "cloud": ["cloud/launch.sh"],
}
ARGUMENTS = ["--tracking-uri", "http://mlflow:5000/it's here"]
STUDY = "/shared/studies/rn50_cc3m.yaml"
RAY_SETTINGS = dict(
    line.split("=", 1)
    for line in (LAUNCH / "ray.env").read_text().splitlines()
    if line and not line.startswith("#")
)


def dry_run(place: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "ABLATE", "RAY"))}
    return subprocess.run(
        ["bash", str(LAUNCH / PLACES[place][0]), *arguments],
        env=kept,
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_dry_run_says_everything(place: str) -> None:
    """--dry-run prints the commands and files of a place, and does nothing."""
    done = dry_run(place, "--dry-run", STUDY, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace(str(LAUNCH), "launch")
    golden = HERE / "golden" / f"{place}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(said)
    assert said == golden.read_text()


@pytest.mark.parametrize("place", PLACES)
def test_arguments_survive_quoting(place: str) -> None:
    """The `ablate launch` line that a place runs has exactly the arguments that were given."""
    said = dry_run(place, "--dry-run", STUDY, *ARGUMENTS).stdout
    words: list[str] = []
    for line in said.splitlines():
        if "ablate launch" in line.replace("\\ ", " ") and not line.lstrip().startswith("#"):
            words = shlex.split(line)
            if words[0] == "entrypoint:":
                words = shlex.split(json.loads(line.split(":", 1)[1]))
            elif words[:2] == ["ray", "exec"]:
                words = shlex.split(words[3])
    assert STUDY in words and words[-2:] == ARGUMENTS


@pytest.mark.parametrize("place", PLACES)
def test_a_place_without_a_study_explains_itself(place: str) -> None:
    """Without a study a place prints how it is used and exits with 2."""
    done = dry_run(place)
    assert done.returncode == 2
    assert "[--dry-run] STUDY" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("place", ["slurm", "cloud"])
def test_no_secret_is_shown(place: str) -> None:
    """A dry run names the token's place, never a token."""
    said = dry_run(place, "--dry-run", STUDY).stdout
    assert "random hexadecimal digits>" in said
    assert not re.search(r"\b[0-9a-f]{64}\b", said)


def test_ray_is_told_the_same_everywhere() -> None:
    """launch/ray.env holds in every place: authentication, no usage statistics, patience."""
    assert RAY_SETTINGS["RAY_AUTH_MODE"] == "token"
    job = manifest("kuberay")
    groups = [job["spec"]["rayClusterSpec"]["headGroupSpec"]]
    groups += job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    wanted = {name: value for name, value in RAY_SETTINGS.items() if name != "RAY_AUTH_MODE"}
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == wanted
    cloud = manifest("cloud")
    for commands in (cloud["head_start_ray_commands"], cloud["worker_start_ray_commands"]):
        words = shlex.split(commands[-1])
        assert {f"{k}={v}" for k, v in RAY_SETTINGS.items()} <= set(words)
    compose = yaml.safe_load((LAUNCH / "compose.yaml").read_text())
    assert compose["services"]["ray"]["env_file"] == ["ray.env"]


def manifest(place: str) -> dict[str, Any]:
    """The document inside a dry run's here-document."""
    said = dry_run(place, "--dry-run", STUDY).stdout
    inside = said.split("\n", 1)[1].rsplit({"kuberay": "MANIFEST", "cloud": "CONFIG"}[place], 1)[0]
    document: dict[str, Any] = yaml.safe_load(inside)
    return document


# The fields of ray.io/v1 that we use (KubeRay CRD API reference), and their kind.
RAYJOB = {
    "entrypoint": str,
    "submissionMode": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": dict,
}
RAYCLUSTER = {
    "rayVersion": str,
    "authOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
}
HEAD = {"serviceType": str, "rayStartParams": dict, "template": dict}
WORKERS = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}


def test_the_rayjob_has_the_fields_of_its_definition() -> None:
    """Every field of the manifest exists in KubeRay's RayJob, with a value of its kind."""
    job = manifest("kuberay")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    checks = [(job["spec"], RAYJOB), (cluster, RAYCLUSTER), (cluster["headGroupSpec"], HEAD)]
    checks += [(group, WORKERS) for group in cluster["workerGroupSpecs"]]
    for given, allowed in checks:
        assert {name: type(value) for name, value in given.items()} == allowed
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # Ray's own flags are strings there, quoted or they become numbers.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert all(isinstance(value, str) for value in limits.values())
        assert all(isinstance(entry["value"], str) for entry in container["env"])
    assert cluster["authOptions"] == {"mode": "token"}
    version = cluster["rayVersion"]
    assert f"ray=={version}" in (LAUNCH / "constraints.txt").read_text().splitlines()


def test_ray_accepts_the_cloud_file() -> None:
    """Ray's own validator of cluster files accepts what `ray up` gets."""
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(manifest("cloud")))


def test_compose_opens_one_port_on_loopback_and_holds_no_password() -> None:
    """Only MLflow is published, on loopback; secrets are files, MLflow asks for a login."""
    text = (LAUNCH / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:5000:5000"]
    assert "--app-name basic-auth" in text and "--allowed-hosts" in text
    assert "password1234" not in text
    environments = [service.get("environment", {}) for service in services.values()]
    secret = [name for env in environments for name in env if "PASSWORD" in name or "TOKEN" in name]
    assert all(name.endswith(("_FILE", "_PATH")) for name in secret)


@pytest.mark.parametrize("script", sorted(LAUNCH.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    """Every script parses, and stops at the first error unless it is only sourced."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text or not text.startswith("#!")


def test_a_manifest_with_a_hole_is_refused() -> None:
    """A value without a place and a place without a value are errors that name it."""
    template = LAUNCH / "kuberay" / "rayjob.yaml"
    command = ["python3", str(LAUNCH / "render.py"), str(template)]
    hole = subprocess.run([*command, "--", "true"], capture_output=True, text=True, check=False)
    assert hole.returncode == 1 and "no value for ${NAME}" in hole.stderr
    extra = subprocess.run(
        [*command, "COLOUR=blue", "--", "true"], capture_output=True, text=True, check=False
    )
    assert extra.returncode == 1 and "no place for COLOUR" in extra.stderr


@pytest.mark.slow
def test_the_composed_mlflow_asks_for_the_password_that_was_drawn(tmp_path: Path) -> None:
    """The command of compose.yaml, run here: strangers, MLflow's own default password and other
    host names are turned away; the password from the secret file opens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"]["mlflow"]
    shell, options, script = service["command"]
    (tmp_path / "secrets").mkdir()
    for name in ("postgres", "mlflow"):
        (tmp_path / "secrets" / name).write_text(name * 8)
    for given, here in (
        ("$$", "$"),
        ("/run/secrets", str(tmp_path / "secrets")),
        ("--host 0.0.0.0", "--host 127.0.0.1"),
        ("5000", str(port)),
        ("/shared/mlflow", str(tmp_path / "artifacts")),
    ):
        assert given in script
        script = script.replace(given, here)
    script, stores = re.subn(
        r"store=postgresql://\S+ ?.*", f"store=sqlite:///{tmp_path}/db", script
    )
    assert stores == 1
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "HOME": str(tmp_path), "PATH": path}
    with (
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(
            [shell, options, script], env=env, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while ask(port, "/health") != 200:
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.2)
            target = "/api/2.0/mlflow/experiments/search?max_results=5"
            assert ask(port, target) == 401
            assert ask(port, target, login="admin:password1234") == 401
            assert ask(port, target, login=f"admin:{'mlflow' * 8}", host="evil.example") == 403
            assert ask(port, target, login=f"admin:{'mlflow' * 8}") == 200
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "auth.ini").stat().st_mode & 0o077 == 0


def ask(port: int, target: str, *, login: str = "", host: str = "") -> int:
    """Status of a GET; 0 while nobody answers."""
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{target}")
    for name, value in (*(headers.items() if login else ()), *([("Host", host)] if host else ())):
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
