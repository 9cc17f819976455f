"""What a rank leaves behind when its code raises."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from small_trials import MODELS, make_data, run, write_trial


def add_models(folder: Path) -> None:
    import open_clip

    open_clip.add_model_config(folder)


def fill_the_handles(number: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path / "cache"))
    return make_data(tmp_path / "data")


def test_an_error_of_the_code_is_written_down_with_its_place(tmp_path: Path, data: Path) -> None:
    """A model that cannot be built raises the same each time: what and where, so that two attempts
    can be compared."""
    described = json.loads((MODELS / "tiny-test-rn.json").read_text())
    described["text_cfg"]["heads"] = 3
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-odd.json").write_text(json.dumps(described))
    trial = write_trial(tmp_path / "t", data, model="tiny-odd")
    prepare = partial(add_models, tmp_path / "models")
    said = []
    for attempt in (1, 2):
        assert run(trial.folder, prepare=prepare, ABLATE_ATTEMPT=str(attempt)) == [1]
        said.append(trial.error(attempt, 0))
    assert said[0] == said[1] and said[0] is not None
    assert said[0]["text"] == "AssertionError: embed_dim must be divisible by num_heads"
    assert "in __init__" in said[0]["place"]


def test_an_error_of_the_machine_is_not(tmp_path: Path, data: Path) -> None:
    """Too few open files say nothing about the trial."""
    trial = write_trial(tmp_path / "t", data)
    assert run(trial.folder, prepare=partial(fill_the_handles, 12), ABLATE_ATTEMPT="1") == [1]
    assert trial.error(1, 0) is None
