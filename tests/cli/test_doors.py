"""Attacks on what belongs to no single room; each promise of SECURITY.md has its test.

Elsewhere: Ray's token and addresses (test_ray_cluster, test_cluster), MLflow's (test_tracking),
shards (training/test_shard_names), pages and tables (report/test_report, browser/), exported
commands (analysis/test_export), object stores (training/test_remote).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from synthetic import QUICK, study_of, write_study

from ablate.errors import StudyError
from ablate.records.masking import flat, masked
from ablate.records.provenance import installed
from ablate.runner import doctor
from ablate.study import load_study, parse_study
from ablate.trial.recipe import load

REPOSITORY = Path(__file__).parents[2]
STUDY = """
recipe: openclip
baseline: {model: RN50, train_data: x.tar}
factors: {beta2: [0.9, 0.98]}
seeds: [0]
"""


# --------------------------------------------------------------------------- study files


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [touch owned]",
        "a: !!python/object/new:subprocess.Popen [[touch, owned]]",
        '!!python/object/apply:builtins.exec [\'open("owned", "w")\']',
        "a: !include /etc/passwd",
        "a: &x [*x]",
    ],
)
def test_a_study_file_makes_no_objects(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tags of the language, of other loaders, and loops end in a message; nothing runs."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError):
        parse_study(STUDY + text, path="s.yaml")
    with pytest.raises(StudyError):
        parse_study(text, path="s.yaml")
    assert os.listdir(tmp_path) == []


def test_a_study_file_has_a_size(tmp_path: Path) -> None:
    """A file that no person wrote is refused before it is parsed; a device is not read for ever."""
    (tmp_path / "s.yaml").write_text(STUDY + "#" * 1_000_001)
    with pytest.raises(StudyError, match="at most 1000000"):
        load_study(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "a/b", "", ".hidden", "a\nb", "a\0b", "x" * 65, "%2e%2e"]
)
def test_a_study_name_is_a_plain_name(name: str) -> None:
    """It becomes a folder and part of a URL."""
    with pytest.raises(StudyError, match="name"):
        parse_study(STUDY + yaml.safe_dump({"name": name}), path="s.yaml")


@pytest.mark.parametrize(
    "url", ["pipe:touch owned", "s3://key:hunter2@bucket/x", "http://169.254.169.254/", "/etc"]
)
def test_checkpoints_go_to_object_stores_alone(url: str) -> None:
    """Anything else is refused with the line, and a password in it is not repeated."""
    with pytest.raises(StudyError, match="s.yaml:6: checkpoints") as error:
        parse_study(STUDY + f"checkpoints: {url}\n", path="s.yaml")
    assert "hunter2" not in str(error.value)


# --------------------------------------------------------------------------- commands


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_no_value_of_a_field_becomes_another_word(value: str) -> None:
    """A command that is written out and read back by a shell's rules is the same list of words."""
    recipe = load("openclip")
    try:
        config = recipe.Config(model="RN50", train_data=f"{value}.tar", train_num_samples=1)
    except ValueError:
        return  # refused: it cannot be a shard
    words = recipe.command(config, workers=1)
    # One that begins with a dash stands in one word with its flag, or it would be a flag itself.
    alone = "--train-data=" if value.startswith("-") else ""
    assert f"{alone}{value}.tar" in words
    assert shlex.split(shlex.join(words)) == words


def test_no_script_or_service_of_ours_goes_through_a_shell_or_a_pickle() -> None:
    """Also under launch/: no shell=True, os.system, eval or pickle in any Python file."""
    pattern = re.compile(
        r"shell\s*=\s*True|os\.(?:system|popen)\(|(?<![\w.])(?:eval|exec)\(|\bpickle\.|"
        r"weights_only\s*=\s*False|yaml\.(?:load|unsafe_load|full_load)\(|allow_pickle\s*=\s*True"
    )
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for folder in ("ablate", "launch")
        for path in (REPOSITORY / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


# --------------------------------------------------------------------------- secrets and files


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("MLFLOW_TRACKING_PASSWORD", "hunter2"),
        ("RAY_AUTH_TOKEN", "hunter2"),
        ("HF_TOKEN", "hunter2"),
        ("WANDB_API_KEY", "hunter2"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/hunter2.json"),
        ("HTTPS_PROXY", "http://me:hunter2@proxy:3128"),
        ("DATA", "s3://b/x?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2/eu"),
    ],
)
def test_secrets_of_an_environment_are_masked(name: str, value: str) -> None:
    """By the name of a variable, or inside a URL; also deep inside what is shown."""
    content = {"fingerprint": {"env": {name: value}, "listed": [{name: value}]}}
    assert "hunter2" not in str(masked("", content))
    assert "hunter2" not in str(flat(content))


def test_what_is_written_is_its_owners_alone(tmp_path: Path) -> None:
    """Whatever umask the shell has, no file or folder that a verb makes can be read by others."""
    small = "factors: {beta2: [0.999, 0.98]}\nseeds: [0, 1]\n"
    study = study_of(tmp_path, QUICK[: QUICK.index("factors:")] + small)
    record = write_study(tmp_path, study, effects={}, diverged={})
    before = set(tmp_path.rglob("*"))
    for verb in ("rebuild", "export"):
        subprocess.run(
            [sys.executable, "-m", "ablate.cli", verb, str(record.folder)],
            check=True,
            umask=0,
            cwd=tmp_path,
            capture_output=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
    made = set(tmp_path.rglob("*")) - before
    assert {"mlflow.db", "optuna.db", "provenance.json"} <= {p.name for p in made}
    readable = [path for path in made if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert readable == []


# --------------------------------------------------------------------------- services


def test_the_page_ends_with_its_command(tmp_path: Path) -> None:
    """`ablate ui` that is terminated leaves no server, no worker and no port behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ablate.cli", "ui", str(tmp_path), "--port", str(port)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    env.pop("MLFLOW_TRACKING_URI", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            said = ""
            while "MLflow UI:" not in said:
                line = process.stdout.readline()
                assert line, f"it ended: {said}"
                said += line
            family = psutil.Process(process.pid).children(recursive=True)
            assert family, "no server runs"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
    raise AssertionError(f"something still answers on port {port}")


@pytest.mark.parametrize(
    ("package", "version", "advisory"),
    [
        ("ray", "2.51.2", "CVE-2023-48022"),
        ("mlflow", "3.7.0", "CVE-2026-2033"),
        ("torch", "2.9.1", "CVE-2026-24747"),
    ],
)
def test_a_version_with_a_known_flaw_is_an_error(package: str, version: str, advisory: str) -> None:
    """The doctor names the package, what is installed, the flaw, and what to do."""
    found = doctor.examine_versions(lambda name: version if name == package else installed(name))
    findings = {finding.subject: finding for finding in found}
    assert findings[package].level == "error"
    assert version in findings[package].message and advisory in findings[package].message
    assert all(item.level == "ok" for name, item in findings.items() if name != package)
