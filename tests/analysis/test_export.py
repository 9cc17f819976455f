"""The export: the best cell and not the luckiest run, and files that say what they are."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import QUICK, study_of, write_study

from ablate import recipes
from ablate.analysis.best import choose
from ablate.analysis.export import export_best, shell_script
from ablate.analysis.table import read_table
from ablate.errors import AnalysisError, CheckpointError
from ablate.records import StudyRecord

TWO = (
    QUICK[: QUICK.index("factors:")]
    + """\
factors:
  beta2: [0.999, 0.98]
  wd: [0.1, 0.2]
design: one_at_a_time
seeds: [0, 1, 2]
objective: {margin: 0.01}
gang: {workers: 2}
"""
)


def run_script(script: Path, folder: Path) -> list[str]:
    """The words that `script` starts torchrun with."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    fake = tools / "torchrun"
    fake.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


def test_the_best_cell_is_the_best_mean_not_the_best_run(tmp_path):
    """A setting with one lucky seed loses against a setting with the better mean."""
    study = study_of(tmp_path, TWO)
    effects = {("beta2", "0.98"): 0.03}
    record = write_study(tmp_path, study, effects=effects, diverged={}, noise=0.001)
    table = read_table(study, record, curves=False)
    lucky = table.cell({"wd": "0.2"}).trials[1]
    path = record.record(lucky.id).folder / "outcome.json"
    outcome = json.loads(path.read_text())
    path.write_text(json.dumps({**outcome, "value": 0.36}))
    table = read_table(study, record, curves=False)
    assert max(row.value for row in table.rows) == 0.36
    choice = choose(table)
    assert choice.cell.name == "beta2=0.98"
    assert choice.trial.value == sorted(choice.cell.values())[1], "the median seed"


def test_a_setting_that_loses_runs_is_scored_for_them(tmp_path):
    """A cell whose surviving run is the best of all does not win when its others diverged."""
    study = study_of(tmp_path, TWO)
    record = write_study(
        tmp_path, study, effects={("wd", "0.2"): 0.2}, diverged={("wd", "0.2"): (0, 1)}
    )
    table = read_table(study, record, curves=False)
    assert max(table.rows, key=lambda row: row.value or 0).levels[1] == ("wd", "0.2")
    assert choose(table).cell.name != "wd=0.2"


def test_no_winner_is_said_plainly(tmp_path):
    """Without a shown difference the sentence says that there is no clear winner."""
    study = study_of(tmp_path, TWO)
    record = write_study(tmp_path, study, effects={}, diverged={}, noise=0.02)
    choice = choose(read_table(study, record, curves=False))
    assert choice.rivals
    assert "no clear winner" in choice.sentence or "No other setting" in choice.sentence


def test_a_clear_winner_is_said_with_its_interval(tmp_path):
    """A large planted effect is exported as shown to be better than the baseline."""
    study = study_of(tmp_path, TWO)
    record = write_study(
        tmp_path, study, effects={("beta2", "0.98"): 0.06}, diverged={}, noise=0.002
    )
    choice = choose(read_table(study, record, curves=False))
    assert choice.cell.name == "beta2=0.98" and choice.rivals == ()
    assert "shown to be better than the baseline" in choice.sentence
    low, high = sorted(-end for end in choice.over_baseline.ci)
    assert low < 0.06 < high


def test_cells_without_all_their_seeds_are_not_compared(tmp_path):
    """An incomplete cell cannot win, and is named in a warning."""
    study = study_of(tmp_path, TWO)
    record = write_study(
        tmp_path,
        study,
        effects={("beta2", "0.98"): 0.06},
        diverged={},
        missing=[("beta2", "0.98", 2)],
    )
    choice = choose(read_table(study, record, curves=False))
    assert choice.cell.name != "beta2=0.98"
    assert "1 of 3 cells" in choice.warnings[0]


def test_nothing_complete_is_an_error_with_a_next_step(tmp_path):
    """Without a scored cell the export says what to do."""
    study = study_of(tmp_path, TWO)
    with pytest.raises(AnalysisError, match="Launch it again"):
        export_best(study, StudyRecord(tmp_path / "empty"))


def test_the_command_holds_every_value_and_reads_back(tmp_path):
    """bash accepts train.sh, and what it runs is the recipe's command, word for word."""
    study = study_of(tmp_path, TWO)
    record = write_study(tmp_path, study, effects={("beta2", "0.98"): 0.06}, diverged={})
    paths = export_best(study, record)
    assert paths.model is None and "is not here" in paths.warnings[-1]
    subprocess.run(["bash", "-n", str(paths.script)], check=True)
    words = run_script(paths.script, tmp_path)
    provenance = json.loads(paths.provenance.read_text())
    recipe = recipes.load("openclip")
    config = recipe.Config(**provenance["config"])
    assert ["torchrun", *words] == recipe.command(config, workers=2) == provenance["command"]
    assert config.beta2 == 0.98 and config.seed == provenance["seed"]
    text = paths.script.read_text()
    for part in (provenance["trial"], study.name, "torch 2.14.1", "0.98"):
        assert part in text


def test_the_configuration_is_a_study_to_go_on_from(tmp_path):
    """config.yaml with factors added is a study whose baseline is the best cell."""
    study = study_of(tmp_path, TWO)
    record = write_study(tmp_path, study, effects={("beta2", "0.98"): 0.06}, diverged={})
    paths = export_best(study, record)
    next_text = paths.config.read_text() + "factors:\n  lr: [0.001, 0.002]\n"
    following = study_of(tmp_path, next_text, name="next")
    provenance = json.loads(paths.provenance.read_text())
    trial = following.trial(following.cell({}), seed=provenance["seed"])
    assert trial.id == provenance["trial"], "the same experiment"
    assert yaml.safe_load(paths.config.read_text())["baseline"]["beta2"] == 0.98


def test_checksums_cover_every_file(tmp_path):
    """provenance.json lists each exported file with its SHA-256."""
    study = study_of(tmp_path, TWO)
    paths = export_best(study, write_study(tmp_path, study, diverged={}))
    listed = json.loads(paths.provenance.read_text())["files"]
    found = {
        str(path.relative_to(paths.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths.folder.rglob("*")
        if path.is_file() and path != paths.provenance
    }
    assert listed == found


def test_exporting_again_replaces_the_folder(tmp_path):
    """A second export leaves nothing of the first, and no temporary folder."""
    study = study_of(tmp_path, TWO)
    record = write_study(tmp_path, study, diverged={})
    first = export_best(study, record)
    (first.folder / "stale").touch()
    asked = export_best(study, record, cell={"wd": "0.2"}, seed=1)
    assert not (asked.folder / "stale").exists()
    assert json.loads(asked.provenance.read_text())["levels"]["wd"] == "0.2"
    assert not list(record.folder.glob(".best*"))
    with pytest.raises(AnalysisError, match="baseline; beta2=0.98; wd=0.2"):
        export_best(study, record, cell={"wd": "0.7"})
    with pytest.raises(AnalysisError, match="no completed run with seed 9"):
        export_best(study, record, cell={"wd": "0.2"}, seed=9)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)),
    comments=st.lists(st.text(st.characters(codec="utf-8"))),
    root=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
)
def test_no_word_or_comment_escapes_the_script(words, comments, root, tmp_path_factory):
    """Whatever users write, bash sees the same words, and comments and folders run nothing."""
    folder = tmp_path_factory.mktemp("script")
    script = folder / "train.sh"
    text = shell_script(["torchrun", *words], comments, root=root)
    script.write_bytes(text.replace(f"root={shlex.quote(root)}", "root=/").encode())
    assert run_script(script, folder) == words
    printed = subprocess.run(
        ["bash", "-c", f'root={shlex.quote(root)}; printf "%s" "$root"'], capture_output=True
    )
    assert f"\nroot={shlex.quote(root)}\n" in text and printed.stdout == root.encode()


@pytest.mark.slow
def test_the_model_loads_in_open_clip_with_the_weights_that_were_trained(tmp_path):
    """best/model is the median seed's last checkpoint, and the architecture trains from scratch."""
    import open_clip
    import torch

    from ablate.recipes import openclip
    from ablate.training import checkpoint

    study = study_of(tmp_path, TWO)
    record = write_study(tmp_path, study, effects={("beta2", "0.98"): 0.06}, diverged={})
    chosen = choose(read_table(study, record, curves=False)).trial
    openclip.model.register_models()
    torch.manual_seed(5)
    model = open_clip.create_model("tiny-rn-a", output_dict=True)
    home = record.record(chosen.id).folder / "checkpoints"
    saved = checkpoint.save(home, checkpoint.Snapshot(chosen.step, model.state_dict(), {}, {}))

    paths = export_best(study, record)
    assert paths.model == paths.folder / "model"
    loaded = open_clip.create_model(f"local-dir:{paths.model}", output_dict=True)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{paths.model}")
    images, texts = torch.rand(2, 3, 32, 32), tokenizer(["a cat", "a dog"])
    with torch.inference_mode():
        ours, theirs = model.eval()(images, texts), loaded.eval()(images, texts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    words = run_script(paths.script, tmp_path)
    architecture = words[words.index("--model") + 1]
    assert architecture == f"local-dir:{paths.folder}/architecture"
    fresh = open_clip.create_model(architecture, output_dict=True)
    assert fresh.state_dict().keys() == loaded.state_dict().keys()
    assert not torch.equal(fresh.visual.conv1.weight, loaded.visual.conv1.weight)

    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\1")
    with pytest.raises(CheckpointError, match="checksum"):
        export_best(study, record)
    assert (paths.folder / "model").is_dir(), "the old export is left as it was"
