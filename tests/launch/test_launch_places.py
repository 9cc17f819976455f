"""Each launch place says with --dry-run what it would do; the whole text is the expectation.

``UPDATE_GOLDEN=1 pytest tests/launch`` writes the files anew; a reviewer reads the difference.
"""

from __future__ import annotations

import base64
import contextlib
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from postgres_server import running

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


def dry_run(place: str, *arguments: str, **values: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "ABLATE", "RAY"))}
    return subprocess.run(
        ["bash", str(LAUNCH / PLACES[place][0]), *arguments],
        env=kept | values,
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


def test_an_array_of_one_study_is_refused() -> None:
    """Its jobs would be several controllers of one folder."""
    done = dry_run("slurm", "--dry-run", STUDY, SLURM_ARRAY_JOB_ID="7", SLURM_JOB_ID="8")
    assert done.returncode == 2 and "submit without --array" in done.stderr and not done.stdout


def test_nodes_of_different_sizes_are_one_ray_and_components_are_refused() -> None:
    """The step asks every node for as many CPUs as the smallest has, and the gang must fit these;
    a job of several components has nodes that the study would never see."""
    sizes = {"SLURM_JOB_ID": "8", "SLURM_JOB_NUM_NODES": "5"}
    done = dry_run("slurm", "--dry-run", STUDY, **sizes, SLURM_JOB_CPUS_PER_NODE="72(x3),36,128")
    assert done.returncode == 0, done.stderr
    assert f"check_nodes.py {STUDY} 5 36 0" in done.stdout
    assert "--nodes=5" in done.stdout and "--cpus-per-task=36" in done.stdout
    done = dry_run("slurm", "--dry-run", STUDY, **sizes, SLURM_HET_SIZE="2")
    assert done.returncode == 2 and "2 components" in done.stderr and not done.stdout


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
    notice = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "105", "RAY_JOB_STOP_WAIT_TIME_S": "150"}
    wanted |= notice  # what the pods' grace leaves for checkpoints
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == wanted
    cloud = manifest("cloud")
    for commands in (cloud["head_start_ray_commands"], cloud["worker_start_ray_commands"]):
        words = shlex.split(commands[-1])
        assert {f"{k}={v}" for k, v in RAY_SETTINGS.items()} <= set(words)
    compose = yaml.safe_load((LAUNCH / "compose.yaml").read_text())
    assert compose["services"]["ray"]["env_file"] == ["ray.env"]


def manifest(place: str, **values: str) -> dict[str, Any]:
    """The (first) document inside a dry run's here-document."""
    said = dry_run(place, "--dry-run", STUDY, **values).stdout
    inside = said.split("\n", 1)[1].rsplit({"kuberay": "MANIFEST", "cloud": "CONFIG"}[place], 1)[0]
    document: dict[str, Any] = next(yaml.safe_load_all(inside))
    return document


def test_the_rayjob_has_the_fields_of_its_definition() -> None:
    """Every field of the manifest exists in KubeRay 1.7's RayJob, with a value of its kind; an
    unknown field and a number where a string belongs are found."""
    definition = json.loads((HERE / "rayjob_fields.json").read_text())["spec"]
    check = jsonschema.Draft202012Validator(definition)
    job = manifest("kuberay")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert [error.message for error in check.iter_errors(job["spec"])] == []
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray=={version}" in (LAUNCH / "constraints.txt").read_text().splitlines()
    (worker,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    worker["template"]["spec"]["tolerance"] = []
    worker["rayStartParams"]["num-cpus"] = 0
    assert len(list(check.iter_errors(job["spec"]))) == 2


def test_values_reach_the_manifest() -> None:
    """Queue, priority, labels, selectors and two sizes of the cluster are values, not edits."""
    job = manifest(
        "kuberay",
        ABLATE_QUEUE="research",
        ABLATE_PRIORITY="batch",
        ABLATE_NODES="8",
        ABLATE_LEAST_NODES="2",
        ABLATE_NODE_SELECTOR='{"gpu": "h100"}',
        ABLATE_NODE_LABELS='{"rack": "r1"}',
    )
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    (worker,) = cluster["workerGroupSpecs"]
    assert (worker["minReplicas"], worker["maxReplicas"]) == (2, 8)
    assert worker["labels"] == {"rack": "r1"}
    spec = worker["template"]["spec"]
    assert (spec["priorityClassName"], spec["nodeSelector"]) == ("batch", {"gpu": "h100"})


KUBECTL = """\
#!/bin/sh
# Plays a cluster: `create` takes the manifest, `get` prints the next state.
case "$1" in
  create) cat > "$PLAY/manifest" ;;
  get) cat "$PLAY/${5##*.status.}" 2>/dev/null ;;
esac
"""


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0, ""),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 130, "was stopped"),
        *(
            (
                {
                    "jobDeploymentStatus": "Failed",
                    "message": f"Job entrypoint command failed with exit code {code}, "
                    "last available logs (truncated to 20,000 chars): ...",
                },
                code,
                "exit code",
            )
            for code in (1, 2, 3, 130)
        ),
        ({"jobDeploymentStatus": "Failed", "message": "Ray head pod not found."}, 3, "head pod"),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "bad name"}, 3, "bad name"),
        ({"jobDeploymentStatus": "Suspended"}, 3, "suspended"),
    ],
)
def test_each_end_of_a_job_has_its_exit_code(
    tmp_path: Path, state: dict[str, str], code: int, said: str
) -> None:
    """What KubeRay says of a job's end becomes `ablate launch`'s exit code; none waits for ever.

    (kubectl is played here: no API server. What Ray's job server says of an exit code is measured
    in test_job_server.py.)
    """
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    for name, value in state.items():
        (tmp_path / f"{name}}}").write_text(value)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PLAY": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(LAUNCH / "kuberay" / "launch.sh"), STUDY],
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "kind: RayJob" in (tmp_path / "manifest").read_text()


def test_ray_accepts_the_cloud_file() -> None:
    """Ray's own validator of cluster files accepts what `ray up` gets."""
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(manifest("cloud")))


def test_the_image_has_what_gpus_need() -> None:
    """NVIDIA's runtime gives devices to what asks for them; torchcompile needs a compiler, NCCL the
    verbs library, or it falls back to TCP and says nothing."""
    image = (LAUNCH / "Dockerfile").read_text()
    assert "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility" in image
    assert {"gcc", "g++", "libibverbs1", "ibverbs-providers"} <= set(image.split())
    options = yaml.safe_load((LAUNCH / "cloud" / "aws.yaml").read_text())["docker"]["run_options"]
    assert {"--gpus all", "--ulimit memlock=-1"} <= set(options)


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
    """The command of compose.yaml, run here on a PostgreSQL with a password: strangers, MLflow's
    own default password and other host names are turned away; the password from the secret file
    opens, and what was written is still there when the server comes back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"]["mlflow"]
    shell, options, script = service["command"]
    (tmp_path / "secrets").mkdir()
    for name in ("postgres", "mlflow"):
        (tmp_path / "secrets" / name).write_text(name * 8)
    with running(password="postgres" * 8) as database:
        database.url_of("mlflow")
        for given, here in (
            ("$$", "$"),
            ("/run/secrets", str(tmp_path / "secrets")),
            ("--host 0.0.0.0", "--host 127.0.0.1"),
            ("5000", str(port)),
            ("/shared/mlflow", str(tmp_path / "artifacts")),
            ("//mlflow:", "//ablate:"),  # the user that the test's server has
            ("@postgres/", f"@127.0.0.1:{database.port}/"),
        ):
            assert given in script
            script = script.replace(given, here)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "HOME": str(tmp_path), "PATH": path}
        login = f"admin:{'mlflow' * 8}"
        target = "/api/2.0/mlflow/experiments/search?max_results=5"
        with serving([shell, options, script], env, port, tmp_path / "log"):
            assert ask(port, target) == 401
            assert ask(port, target, login="admin:password1234") == 401
            assert ask(port, target, login=login, host="evil.example") == 403
            made = "/api/2.0/mlflow/experiments/create"
            assert ask(port, made, login=login, content={"name": "kept"}) == 200
        with serving([shell, options, script], env, port, tmp_path / "log"):
            named = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=kept"
            assert ask(port, named, login=login) == 200
    assert (tmp_path / "auth.ini").stat().st_mode & 0o077 == 0


@contextlib.contextmanager
def serving(command: list[str], env: dict[str, str], port: int, log: Path) -> Iterator[None]:
    """The MLflow server of a command, until the block ends."""
    with (
        open(log, "wb") as said,
        subprocess.Popen(
            command, env=env, stdout=said, stderr=said, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 180
            while ask(port, "/health") != 200:
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def ask(port: int, target: str, *, login: str = "", host: str = "", content: object = None) -> int:
    """Status of a GET, or of a POST with content; 0 while nobody answers."""
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{target}", data=data)
    if data:
        request.add_header("Content-Type", "application/json")
    for name, value in (*(headers.items() if login else ()), *([("Host", host)] if host else ())):
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
