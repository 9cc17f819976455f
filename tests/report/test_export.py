"""The export: the best cell and not the luckiest run, and files that say what they are."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import QUICK, study_of, write_study

from ablate.errors import AnalysisError, CheckpointError
from ablate.records.folder import StudyRecord
from ablate.report.best import recommend
from ablate.report.export import export_best
from ablate.report.script import train_script
from ablate.study.table import read_table
from ablate.trial.recipe import load
from ablate.trial.upstream import Upstream

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


def dry_run(script: Path) -> list[str]:
    """The words of the line that `script` would run."""
    read = 'eval "words=($(bash "$1" --dry-run))"; printf "%s\\0" "${words[@]}"'
    done = subprocess.run(
        ["bash", "-ec", read, "read", str(script)], capture_output=True, check=True
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
    choice = recommend(table)
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
    assert recommend(table).cell.name != "wd=0.2"


LOSSES = (
    QUICK[: QUICK.index("factors:")]
    + """\
factors:
  contrastive_loss:
    default: {}
    local_gather: {local_loss: true, gather_with_grad: true}
    local_only: {local_loss: true}
  wd: [0.1, 0.2]
CONTROLS
design: DESIGN
seeds: [0, 1, 2]
objective: {margin: 0.01}
gang: {workers: 2}
"""
)


@pytest.mark.parametrize("design", ["one_at_a_time", "full_factorial"])
@pytest.mark.parametrize(
    ("controls", "lucky", "why"),
    [
        ("[local_gather, local_only]", "local_only", "contrastive_loss=local_only is a control"),
        ("[local_gather]", "local_only", "gives a biased gradient"),
        ("[local_gather]", "local_gather", "the same experiment as contrastive_loss=default"),
    ],
)
def test_a_control_is_never_handed_out(tmp_path, design, controls, lucky, why):
    """The best mean of a control, declared or known by the recipe, is told and not handed out;
    asked for by name, what is known against it is said."""
    text = LOSSES.replace("DESIGN", design)
    text = text.replace("CONTROLS", f"controls: {{contrastive_loss: {controls}}}")
    study = study_of(tmp_path, text)
    record = write_study(tmp_path, study, effects={("contrastive_loss", lucky): 0.1}, diverged={})
    table = read_table(study, record, curves=False)
    leader = max(table.cells, key=lambda cell: cell.mean)
    assert ("contrastive_loss", lucky) in leader.levels, "the study was made so"
    choice = recommend(table)
    assert dict(choice.cell.levels)["contrastive_loss"] == "default"
    assert any(leader.name in text and why in text for text in choice.warnings)
    asked = export_best(study, record, cell={"contrastive_loss": lucky})
    assert any(why in text for text in asked.warnings)


def test_a_setting_of_which_a_run_diverged_is_never_handed_out(tmp_path):
    """Neither by the mean with the diverged run at chance nor by its survivors does it win."""
    study = study_of(tmp_path, TWO)
    record = write_study(
        tmp_path, study, effects={("wd", "0.2"): 0.6}, diverged={("wd", "0.2"): (0,)}
    )
    table = read_table(study, record, curves=False)
    scores = {cell.name: cell.score(table.chance) for cell in table.cells}
    assert max(scores, key=scores.get) == "wd=0.2", "the study was made so"
    choice = recommend(table)
    assert choice.cell.name != "wd=0.2"
    assert "1 of its 3 runs diverged" in choice.warnings[0]


def test_nothing_sound_is_an_error_that_names_the_way_out(tmp_path):
    """When a run of every setting diverged, nothing is handed out unless it is asked by name."""
    study = study_of(tmp_path, TWO)
    gone = {("baseline", ""): (0,), ("beta2", "0.98"): (1,), ("wd", "0.2"): (2,)}
    record = write_study(tmp_path, study, effects={}, diverged=gone)
    assert recommend(read_table(study, record, curves=False)).cell is None
    with pytest.raises(AnalysisError, match="no setting to hand out.*--cell"):
        export_best(study, record)
    asked = export_best(study, record, cell={"wd": "0.2"})
    assert "known against it: 1 of its 3 runs diverged" in asked.warnings


def test_no_winner_is_said_plainly(tmp_path):
    """Without a shown difference the sentence says that there is no clear winner."""
    study = study_of(tmp_path, TWO)
    record = write_study(tmp_path, study, effects={}, diverged={}, noise=0.02)
    choice = recommend(read_table(study, record, curves=False))
    assert choice.rivals
    assert "no clear winner" in choice.sentence or "No other setting" in choice.sentence


def test_a_clear_winner_is_said_with_its_interval(tmp_path):
    """A large planted effect is exported as shown to be better than the baseline."""
    study = study_of(tmp_path, TWO)
    record = write_study(
        tmp_path, study, effects={("beta2", "0.98"): 0.06}, diverged={}, noise=0.002
    )
    choice = recommend(read_table(study, record, curves=False))
    assert choice.cell.name == "beta2=0.98" and choice.rivals == ()
    assert "shown to be better than the baseline" in choice.sentence
    low, high = choice.over_baseline.ci
    assert low < 0.06 < high


@pytest.mark.parametrize(
    ("effect", "said"),
    [(0.004, "baseline, by less than the margin"), (0.009, "baseline, perhaps by less than the")],
)
def test_a_winner_by_little_is_no_open_question(tmp_path, effect: float, said: str):
    """A difference that is shown is said to be shown, whether it is below the margin of .01 or
    cannot be told from it."""
    study = study_of(tmp_path, TWO)
    record = write_study(
        tmp_path, study, effects={("beta2", "0.98"): effect}, diverged={}, noise=0.0005
    )
    sentence = recommend(read_table(study, record, curves=False)).sentence
    assert f"It is shown to be better than the {said}" in sentence, sentence
    assert "no clear winner" not in sentence


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
    choice = recommend(read_table(study, record, curves=False))
    assert choice.cell.name != "beta2=0.98"
    assert "1 of 3 cells" in choice.warnings[0]


def test_nothing_complete_is_an_error_with_a_next_step(tmp_path):
    """Without a scored cell the export says what to do."""
    study = study_of(tmp_path, TWO)
    with pytest.raises(AnalysisError, match="Launch the study again"):
        export_best(study, StudyRecord(tmp_path / "empty"))


def test_the_command_holds_every_value_and_reads_back(tmp_path):
    """bash accepts train.sh, and what it runs is the recipe's command, word for word."""
    study = study_of(tmp_path, TWO)
    record = write_study(tmp_path, study, effects={("beta2", "0.98"): 0.06}, diverged={})
    paths = export_best(study, record)
    assert paths.model is None and "is not here" in paths.warnings[-1]
    subprocess.run(["bash", "-n", str(paths.script)], check=True)
    provenance = json.loads(paths.provenance.read_text())
    recipe = load("openclip")
    config = recipe.Config(**provenance["config"])
    upstream = recipe.upstream(config, workers=2, root=tmp_path)
    assert provenance["command"] == upstream.command(workers=2)
    launcher, arguments = 6, len(upstream.arguments)
    words = dry_run(paths.script)
    assert words[:launcher] == provenance["command"][:launcher]
    assert words[launcher] in (upstream.module, upstream.on_cpus)
    here = {f"local-dir:{paths.folder}/architecture": "local-dir:architecture"}
    given = words[launcher + 1 :][:arguments]
    assert [here.get(word, word) for word in given] == provenance["command"][launcher + 1 :]
    assert words[launcher + 1 + arguments :: 2] == ["--logs", "--name"]
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


@settings(max_examples=60)
@given(
    words=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)),
    comments=st.lists(st.text(st.characters(codec="utf-8"))),
    root=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
)
def test_no_word_or_comment_escapes_the_script(words, comments, root, tmp_path_factory):
    """Whatever users write, bash sees the same words, and comments and folders run nothing."""
    script = tmp_path_factory.mktemp("script") / "train.sh"
    upstream = Upstream(
        name="trainer 1",
        module="trainer",
        arguments=tuple(words),
        parser="",
        log_flags=("--logs", "--name"),
        checkpoint="last.pt",
        results="results.jsonl",
    )
    text = train_script(upstream, comments, root=root, workers=2, name="run", metric="top1")
    script.write_bytes(text.replace(f"root={shlex.quote(root)}", "root=/").encode())
    found = dry_run(script)
    assert found[7:-4] == words and found[6] == "trainer"
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
    chosen = recommend(read_table(study, record, curves=False)).trial
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

    words = dry_run(paths.script)
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
