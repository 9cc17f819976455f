"""A run of any recipe that is killed goes on as if it never was, alone and with two ranks; and
what two ranks make of a batch is what one makes of it, where the arithmetic says so."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_mae
import test_mae_later_stages
import test_swav
import test_timesformer
import test_video_retrieval
from picture_data import list_few, make_pictures
from small_trials import run, start

from ablate.records.files import read_json
from ablate.records.folder import TrialRecord
from ablate.trial.identity import identify
from ablate.trial.recipe import load
from tests.training.interruptions import after_step, measured

PICTURES: dict[str, Any] = {"epochs": 6, "evaluations": []}
LATER = {**test_mae_later_stages.LATER, **PICTURES, "warmup_epochs": 1}
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("mae", {**test_mae.TINY, **PICTURES, "warmup_epochs": 1}),
    "finetune": ("mae", {**LATER, "stage": "finetune", "mixup": 0.8, "cutmix": 1.0}),
    "linprobe": ("mae", {**LATER, "stage": "linprobe", "lr": 0.5}),
    "swav": ("swav", {**test_swav.TINY, **PICTURES, "epoch_queue_starts": 1}),
    "timesformer": ("timesformer", {**test_timesformer.FIELDS, "max_epoch": 6, "eval_period": 6}),
    "video_retrieval": (
        "video_retrieval",
        {**test_video_retrieval.FIELDS, "batch_size": 22, "epochs": 6, "eval_every": 6},
    ),
}
"""6 epochs of 3 steps each with one rank."""


@pytest.fixture(scope="session")
def root(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures and of clips."""
    from ablate.training.data.emoji_video import prepare_emoji_video

    folder = tmp_path_factory.mktemp("root")
    clips = prepare_emoji_video(folder / "clips").folder
    test_timesformer.link_few(clips, clips)
    list_few(clips)
    make_pictures(folder / "pictures")
    return folder


def write(folder: Path, name: str, root: Path, *, workers: int, **changes: Any) -> TrialRecord:
    """A trial folder; the step's samples are shared by the workers."""
    recipe, fields = FIELDS[name]
    fields = {**fields, **changes}
    if recipe != "timesformer":  # whose batch_size is of all workers
        fields["batch_size"] //= workers
    config = load(recipe).Config(**fields).model_dump(mode="json")
    folder.mkdir()
    content = {
        "format": 1,
        "id": identify(recipe, config, workers=workers),
        "seed": config["seed"],
        "recipe": recipe,
        "config": config,
        "gang": {"workers": workers, "cpus_per_worker": 1},
        "objective": {"metric": "none", "direction": "maximize"},
        "root": str(root / ("pictures" if recipe in ("mae", "swav") else "clips")),
    }
    (folder / "trial.json").write_text(json.dumps(content))
    return TrialRecord(folder)


def files_of_last(trial: TrialRecord) -> dict[str, str]:
    """Hashes of model and optimizer in the last checkpoint."""
    last = sorted((trial.folder / "checkpoints").glob("step-*"))[-1]
    files = read_json(last / "manifest.json")["files"]
    return {name: files[f"{name}.safetensors"]["sha256"] for name in ("model", "optimizer")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", FIELDS)
def test_a_killed_run_goes_on_exactly(name: str, workers: int, root: Path, tmp_path: Path) -> None:
    """SIGKILL of every rank within an epoch, after the optimizer's step: the next attempt goes on
    from its checkpoint, and each number of each step, masks, crops, queue and mixed labels with
    them, is that of a run of the same seed that was let alone; so are weights and moments."""
    changes = {} if workers < 3 else {"batch_size": 24 if name == "video_retrieval" else 18}
    whole, cut = (
        write(tmp_path / each, name, root, workers=workers, **changes) for each in ("whole", "cut")
    )
    assert run(whole.folder, workers=workers) == [0] * workers
    ranks = start(cut.folder, workers=workers, prepare=partial(after_step, 14))
    ranks.wait_for_a_death()
    assert cut.result(1) is None, "it was through before it was killed"
    assert run(cut.folder, workers=workers) == [0] * workers
    certificate = read_json(cut.folder / "attempts" / "2" / "resumed.json")
    # The last epoch's checkpoint may still have been on its way to the disk.
    assert certificate["step"] in (3, 6, 9, 12)
    expected = measured(whole.trace())
    assert len(expected) == 18 and measured(cut.trace()) == expected
    assert files_of_last(cut) == files_of_last(whole)


SAME = {
    # Every patch is hidden, so no draw decides which; the mask is else each rank's own.
    "mae": {"mask_ratio": 1.0},
    # What draws in a step, and so from a rank's own generator, is off.
    "finetune": {"mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "drop_path": 0.0},
    "timesformer": {"drop_path_rate": 0.0},
    # A frozen tower's BatchNorm has fixed statistics.
    "video_retrieval": {"freeze_vision": True},
}
APART = ("mae", "linprobe", "swav")
"""Masks are drawn by each rank, and BatchNorm sees each rank's samples, as with the peers."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SAME)
def test_two_ranks_make_of_a_batch_what_one_makes(name: str, root: Path, tmp_path: Path) -> None:
    """Where neither a rank's own draws nor BatchNorm are in the step, loss and gradient norm of
    two ranks with half of the batch each are those of one with the whole, but for the rounding of
    sums in another order, which the 18 steps carry on: below one in a thousand."""
    found = []
    for workers in (1, 2):
        trial = write(tmp_path / str(workers), name, root, workers=workers, **SAME[name])
        assert run(trial.folder, workers=workers) == [0] * workers
        found.append([(row["loss"], row["grad_norm"]) for row in trial.trace()])
    one, two = found
    assert len(one) == 18
    for here, there in zip(one, two, strict=True):
        assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", APART)
def test_ranks_draw_and_normalise_for_themselves(name: str, root: Path, tmp_path: Path) -> None:
    """Masks of each rank are its own, and BatchNorm's statistics are of its own samples: two ranks
    are another run than one with the same global batch, from the first step on."""
    found = []
    for workers in (1, 2):
        trial = write(tmp_path / str(workers), name, root, workers=workers, epochs=1)
        assert run(trial.folder, workers=workers) == [0] * workers
        found.append(trial.trace()[0]["loss"])
    assert found[0] != pytest.approx(found[1], rel=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FIELDS)
def test_a_foreign_optimizer_state_is_named(name: str, root: Path, tmp_path: Path) -> None:
    """Broken off in the middle with all kept, a run is the one without a break, bit for bit, and no
    marker speaks of it; with the moments of a run of another seed it is another run from there on,
    and resume_jump says so. Of a probe it cannot: the gradients of an epoch of so few pictures add
    up to nothing, so updates have no direction to leave."""

    def go(kind: str, **changes: Any) -> TrialRecord:
        trial = write(tmp_path / kind, name, root, workers=1, **changes)
        assert run(trial.folder) == [0]
        return trial

    none, other = go("none"), go("other", seed=5)
    kept = go("kept", interruption={"at": 0.6})
    broken = {"at": 0.6, "optimizer": "foreign", "optimizer_from": str(other.folder)}
    foreign = go("foreign", interruption=broken)
    numbers = [
        [(row["loss"], row["grad_norm"]) for row in t.trace()] for t in (none, kept, foreign)
    ]
    assert numbers[1] == numbers[0] and files_of_last(kept) == files_of_last(none)
    assert numbers[2][:11] == numbers[0][:11] and numbers[2] != numbers[0]
    flags = [(trial.result(1) or {})["flags"] for trial in (kept, foreign)]
    turns = [[row.get("update_turn") for row in t.trace()][5:12] for t in (kept, foreign)]
    assert ["RESUME_JUMP" in each for each in flags] == [False, name != "linprobe"], turns
