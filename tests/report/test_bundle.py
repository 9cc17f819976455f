"""What an export hands out works as it stands: each file is run, nothing in it replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import safetensors.torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trials import make_data
from synthetic import QUICK, study_of, write_study

from ablate.errors import AnalysisError
from ablate.records.files import read_rows
from ablate.records.folder import StudyRecord
from ablate.report.bundle import leave_defaults_out
from ablate.report.export import export_best, parse_cell
from ablate.trial import recipe as recipes

STUDY = """\
recipe: openclip
baseline:
  model: tiny-rn-a
  train_data: data/train/{00000..00002}.tar
  evaluations: [{kind: retrieval, path: 'data/train/00000.tar', every: 6}]
  precision: fp32
  batch_size: 16
  lr: 1.0e-3
  warmup: 2
  epochs: 6
  workers: 0
  checkpoint_frequency: 6
factors: {beta2: [0.999, 0.98]}
seeds: [0, 1, 2]
objective: {metric: retrieval_i2t_r10, margin: 0.1}
"""
CHANCE = 10 / 32


def environment(folder: Path) -> dict[str, str]:
    """With this interpreter's programs, one thread, no network."""
    tools = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([tools, os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ABLATE_CACHE": str(folder / "cache"),
    }


def ablate(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ablate", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(folder),
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real study of 36 steps a run that finds its captions again, and its export."""
    made = tmp_path_factory.mktemp("study")
    make_data(made / "data")
    (made / "pairs.yaml").write_text(STUDY)
    ablate(made, "launch", "pairs.yaml", "--yes", "--cluster", "local")
    ablate(made, "export", "runs/pairs", "--cell", "baseline")
    return made


@pytest.mark.slow
def test_train_sh_runs_to_the_peers_own_number_within_the_studys_band(folder: Path) -> None:
    """As it stands, by open_clip_train alone: its own recall is within three standard deviations
    of the study's seeds (or the margin), far above chance, and is what the script prints."""
    done = subprocess.run(
        ["bash", str(folder / "runs" / "pairs" / "best" / "train.sh")],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**environment(folder), "NAME": "peer"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    own = json.loads((folder / "logs" / "peer" / "checkpoints" / "results.jsonl").read_text())
    number = own["image_to_text_R@10"]
    assert done.stdout.strip().splitlines()[-1] == f"retrieval_i2t_r10 {number}"
    known = json.loads((folder / "runs/pairs/best/provenance.json").read_text())
    runs = list(known["cell"]["runs"].values())
    assert abs(number - fmean(runs)) <= max(3 * stdev(runs), 0.1)
    assert number > 2 * CHANCE


@pytest.mark.slow
def test_run_sh_is_the_trial_to_the_last_bit_also_after_a_stop(folder: Path) -> None:
    """Stopped by Ctrl-C and started again, every step and the result are the trial's."""
    best = folder / "runs" / "pairs" / "best"
    known = json.loads((best / "provenance.json").read_text())
    command = ["bash", str(best / "run.sh"), "--out", str(folder / "again"), "--json"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(folder), start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    trace = folder / "again" / "attempts" / "1" / "trace.jsonl"
    while process.poll() is None and len(read_rows(trace)) < 5:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), check=True, capture_output=True
    )
    ended = json.loads(done.stdout)
    trial = StudyRecord(folder / "runs" / "pairs").record(known["trial"])
    again = type(trial)(folder / "again")
    losses = [[row["loss"] for row in record.trace()] for record in (again, trial)]
    assert losses[0] == losses[1] and len(losses[0]) == 36
    assert ended["final"]["retrieval_i2t_r10"] == known["result"]["value"]
    assert len(again.attempts()) == 2


@pytest.mark.slow
def test_verify_keeps_what_is_whole_and_names_what_was_changed(folder: Path) -> None:
    """All five parts of a fresh export are kept; a changed setting is named with its field, a
    changed line and changed weights are found, and a loss that differs in one bit."""
    said = json.loads(ablate(folder, "export", "runs/pairs", "--verify", "--json"))
    checks = {check["part"]: check for check in said["checks"]}
    assert list(checks) == ["files", "setting", "train.sh", "model", "run.sh"]
    assert all(check["kept"] for check in checks.values()), said

    best = folder / "runs" / "pairs" / "best"
    config = best / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp32", "precision: amp_bf16"))
    (best / "train.sh").write_text((best / "train.sh").read_text().replace("--lr 0.001", "--lr 1"))
    weights = best / "model" / "open_clip_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["text_projection"] = tensors["text_projection"].flip(0)
    safetensors.torch.save_file(tensors, weights)
    note = best / "provenance.json"
    known = json.loads(note.read_text())
    known["first_losses"][0] *= 1 + 2**-52
    note.write_text(json.dumps(known))
    said = json.loads(ablate(folder, "export", "runs/pairs", "--verify", "--json", code=1))
    messages = {c["part"]: c["message"] for c in said["checks"] if not c["kept"]}
    assert set(messages) == {"files", "setting", "train.sh", "model", "run.sh"}
    assert 'precision is "amp_bf16" in config.yaml, and the trial had "fp32"' in messages["setting"]
    assert "another line" in messages["train.sh"]
    assert "features differ" in messages["model"]
    assert "step 1 of run.sh has loss" in messages["run.sh"]


@settings(max_examples=30)
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(["RN50", "ViT-B-32"]),
            "beta1": st.sampled_from([0.9, 0.8]),
            "eps": st.sampled_from([1e-6, 1e-8]),
            "opt": st.just("timm/lamb"),
            "warmup": st.integers(0, 10000),
            "precision": st.sampled_from(["amp", "fp32"]),
        },
    )
)
def test_the_minimal_setting_resolves_to_the_full_one(changes: dict[str, Any]) -> None:
    """What is left out comes back by itself, and nothing that is kept could be left out."""
    kind = recipes.load("openclip").Config
    if "beta1" in changes:
        changes = {**changes, "beta2": 0.98}  # timm takes both or none
    full = kind(train_data="x.tar", lr=1e-3, **changes).model_dump(mode="json")
    minimal = leave_defaults_out(kind, full)
    assert kind(**minimal).model_dump(mode="json") == full
    assert set(minimal) <= {"train_data", "lr", *changes}
    assert leave_defaults_out(kind, minimal) == minimal


def test_each_file_says_what_it_is(tmp_path: Path) -> None:
    """The bundle is complete; scripts are bash, the rest is YAML that holds the setting."""
    study = study_of(tmp_path, QUICK)
    paths = export_best(study, write_study(tmp_path, study, diverged={}))
    found = {path.name for path in paths.folder.iterdir()}
    assert found == {
        "config.yaml", "config.full.yaml", "run.sh", "train.sh", "requirements.txt", "slurm.sh",
        "sky.yaml", "provenance.json", "README.md", "architecture", "on_cpus.py",
    }  # fmt: skip
    for name in ("run.sh", "train.sh", "slurm.sh"):
        subprocess.run(["bash", "-n", str(paths.folder / name)], check=True)
    short, full = (
        yaml.safe_load((paths.folder / name).read_text())["baseline"]
        for name in ("config.yaml", "config.full.yaml")
    )
    kind = recipes.load("openclip").Config
    assert len(short) < 12 < 40 < len(full)
    assert kind(**short).model_dump() == kind(**full).model_dump()
    assert yaml.safe_load((paths.folder / "sky.yaml").read_text())["run"] == "bash train.sh"
    readme = (paths.folder / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in ("run.sh", "train.sh", "provenance.json"))


@pytest.mark.parametrize(("tasks", "launcher"), [("2", "python3 -m"), ("3", "torchrun")])
def test_under_slurm_a_process_of_srun_is_a_worker(
    tmp_path: Path, tasks: str, launcher: str
) -> None:
    """Where srun has started as many processes as workers, each of them starts the trainer; else
    torchrun does, and srun's number is not taken for a rank."""
    study = study_of(tmp_path, QUICK)
    paths = export_best(study, write_study(tmp_path, study, diverged={}))
    assert "#SBATCH --ntasks=2" in (paths.folder / "slurm.sh").read_text()
    done = subprocess.run(
        ["bash", str(paths.script), "--dry-run"],
        env={**environment(tmp_path), "SLURM_PROCID": "1", "SLURM_NTASKS": tasks},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(launcher)


def test_a_cell_is_named_by_its_levels() -> None:
    """FACTOR=LEVEL words, also joined by commas; baseline names none; else the form is said."""
    assert parse_cell(["beta2=0.98", "wd=0.2"]) == {"beta2": "0.98", "wd": "0.2"}
    assert parse_cell(["beta2=0.98, wd=0.2"]) == {"beta2": "0.98", "wd": "0.2"}
    assert parse_cell(["baseline"]) == {}
    with pytest.raises(AnalysisError, match="FACTOR=LEVEL"):
        parse_cell(["beta2"])
