"""The exported model in MLflow's registry: one version for the same weights, found by its alias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from mlflow.tracking import MlflowClient
from synthetic import QUICK, study_of, write_study

from ablate.api import open_tracker
from ablate.cli import app
from ablate.errors import AnalysisError, TrackingError
from ablate.records.folder import StudyRecord
from ablate.report.best import recommend
from ablate.report.export import export_best
from ablate.report.push import push_model
from ablate.runner.agenda import planned
from ablate.study import Study
from ablate.study.table import read_table
from ablate.tracking.mlflow.registry import register

TWO = QUICK[: QUICK.index("factors:")] + "factors: {beta2: [0.999, 0.98]}\nseeds: [0, 1]\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study on paper, mirrored, with a real checkpoint of the run that is handed out."""
    import open_clip

    from ablate.recipes import openclip
    from ablate.training import checkpoint

    folder = tmp_path_factory.mktemp("study")
    study = study_of(folder, TWO)
    record = write_study(folder, study, diverged={})
    openclip.model.register_models()
    model = open_clip.create_model("tiny-rn-a", output_dict=True)
    run = recommend(read_table(study, record, curves=False)).run
    home = record.record(run.id).folder / "checkpoints"
    checkpoint.save(home, checkpoint.Snapshot(run.step, model.state_dict(), {}, {}))
    return study, record, export_best(study, record)


def tell(study: Study, record: StudyRecord) -> None:
    """Bring MLflow up to date with the study."""
    with open_tracker(study, record, None, behind=pytest.fail) as mirror:
        mirror.update(planned(study, record), ())


def test_the_model_is_registered_once_as_best(exported: Any) -> None:
    """It belongs to its trial's run, carries the measurements and the data, and is one version
    however often it is registered; the store must know the trial."""
    study, record, paths = exported
    runs = record.folder.parent
    with pytest.raises(TrackingError, match="ablate rebuild"):
        register(paths.folder, runs=runs)
    tell(study, record)
    assert register(paths.folder, runs=runs) == f"{study.name}@1"
    assert register(paths.folder, runs=runs) == f"{study.name}@1"
    known = json.loads(paths.provenance.read_text())
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    version = client.get_model_version_by_alias(study.name, "best")
    run = client.get_run(version.run_id)
    assert run.data.tags["trial_id"] == known["trial"]
    data = {item.tags[0].value: item.dataset.name for item in run.inputs.dataset_inputs}
    assert data == {"train_data": "data/train", "imagenet_val": "data/val"}
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    measured = {metric.key: metric.value for metric in model.metrics}
    assert measured["imagenet_top1"] == known["result"]["value"]
    assert {metric.dataset_name for metric in model.metrics} == {"data/val"}
    assert model.params == known["levels"] and str(model.status) == "READY"


def test_a_model_is_pushed_as_a_repository_holds_it(exported: Any, tmp_path: Path) -> None:
    """Into a folder: the files that would be uploaded, weights to the bit, card included; a folder
    with anything else is left alone."""
    _, _, paths = exported
    assert push_model(paths.model, str(tmp_path / "repo")) == str(tmp_path / "repo")
    push_model(paths.model, str(tmp_path / "repo"))
    found = {path.name: path for path in (tmp_path / "repo").iterdir()}
    assert set(found) == {path.name for path in paths.model.iterdir()}
    assert (tmp_path / "repo" / "README.md").read_text().startswith("---\nlibrary_name: open_clip")
    one, two = (
        safetensors.torch.load_file(folder / "open_clip_model.safetensors")
        for folder in (paths.model, tmp_path / "repo")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    with pytest.raises(AnalysisError, match="other files \\(mine\\)"):
        push_model(paths.model, str(tmp_path / "other"))


def test_the_command_registers_unless_told_not_to_and_pushes_where_told(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`--no-register` leaves the registry alone; without it the same export is `best`; and
    `--push-to` writes what would be uploaded."""
    study, record, _ = exported
    tell(study, record)
    client = MlflowClient(f"sqlite:///{record.folder.parent / 'mlflow.db'}")
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)

    def export(*options: str) -> dict[str, Any]:
        arguments = ["ablate", "export", str(record.folder), "--json", *options]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == 0
        shown = capsys.readouterr()
        said: dict[str, Any] = json.loads(shown.out)
        return said

    said = export("--no-register", "--push-to", str(tmp_path / "repo"))
    assert "registered" not in said and client.search_registered_models() == []
    assert said["pushed"] == str(tmp_path / "repo")
    assert (tmp_path / "repo" / "open_clip_model.safetensors").is_file()
    said = export()
    assert said["registered"] == f"{study.name}@1" and "pushed" not in said
    assert client.get_model_version_by_alias(study.name, "best").version in ("1", 1)
