"""A run of mae or swav that is killed goes on as if it never was: masks, crops, queue, rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_mae
import test_swav
from picture_data import make_pictures
from small_trials import run, start, wait_for

from ablate.records.folder import TrialRecord
from ablate.trial.identity import identify
from ablate.trial.recipe import load

FIELDS = {
    "mae": {**test_mae.TINY, "epochs": 12, "warmup_epochs": 1, "evaluations": []},
    "swav": {**test_swav.TINY, "epochs": 12, "epoch_queue_starts": 1, "evaluations": []},
}


def write(folder: Path, name: str, root: Path) -> TrialRecord:
    config = load(name).Config(**FIELDS[name]).model_dump(mode="json")
    folder.mkdir()
    content = {
        "format": 1,
        "id": identify(name, config, workers=1),
        "seed": config["seed"],
        "recipe": name,
        "config": config,
        "gang": {"workers": 1, "cpus_per_worker": 1},
        "objective": {"metric": "none", "direction": "maximize"},
        "root": str(root),
    }
    (folder / "trial.json").write_text(json.dumps(content))
    return TrialRecord(folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FIELDS)
def test_a_killed_run_goes_on_exactly(name: str, data: Path, tmp_path: Path) -> None:
    """SIGKILL after the fourth epoch: the next attempt goes on from its checkpoint, and every
    step's loss and gradient norm are those of a run of the same seed that was let alone."""
    root = make_pictures(tmp_path / "data")
    whole, cut = (write(tmp_path / each, name, root) for each in ("whole", "cut"))
    assert run(whole.folder) == [0]
    ranks = start(cut.folder)
    wait_for(lambda: list(cut.folder.glob("checkpoints/step-000012/manifest.json")), "epoch 4")
    ranks.kill()
    assert cut.result(1) is None, "it was through before it was killed"
    assert run(cut.folder) == [0]
    certificate = json.loads((cut.folder / "attempts" / "2" / "resumed.json").read_text())
    assert certificate["step"] >= 12
    columns = ("step", "lr", "loss", "grad_norm")
    expected = [tuple(row[c] for c in columns) for row in whole.trace()]
    assert [tuple(row[c] for c in columns) for row in cut.trace()] == expected
    assert len(expected) == 36
