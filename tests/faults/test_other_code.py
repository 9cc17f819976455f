"""A node that would train something else under the same name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from drills import Stage, study_text
from hosts import Nodes
from test_drills_controller import launching, lay_out, summary, wait_for

import ablate
from ablate.records.folder import StudyRecord
from ablate.runner.hold import read_controller

pytestmark = [pytest.mark.slow, pytest.mark.drill]


def test_a_node_with_other_code_is_refused_by_name(stage: Stage, tmp_path: Path) -> None:
    """Of two nodes one has a copy of ablate with a line more: nothing is trained there, the launch
    says which node it is and what differs, and all trials complete on the other."""
    text = study_text(workers=1, epochs=1).replace("seeds: [0]", "seeds: [0, 1]")
    copy = tmp_path / "copy"
    shutil.copytree(Path(ablate.__file__).parent, copy / "ablate")
    with open(copy / "ablate" / "words.py", "a") as file:
        file.write("\n# A line more.\n")
    study_folder = tmp_path / "study"
    study_folder.mkdir()
    lay_out(stage, study_folder, text)
    record = StudyRecord(study_folder / "runs" / "drill")
    path = os.pathsep.join([str(copy), *(path for path in sys.path if path)])
    with Nodes(cpus=(0, 1, 1), folder=tmp_path, variables={2: {"PYTHONPATH": path}}) as nodes:
        command = ["launch", "drill.yaml", "--yes", "--address", nodes.ray_address]
        with launching(study_folder, nodes.environment, command) as controller:
            notes: list[str] = []

            def said() -> bool:
                told = (read_controller(record) or {"notes": []})["notes"]
                notes.extend(note for note in told if "is not used" in note)
                return bool(notes)

            wait_for(said, controller)
            assert controller.wait(180) == 0, (study_folder / "launch.log").read_text()[-3000:]
    assert nodes.ids[2][:6] in notes[0] and "ablate's files" in notes[0]
    used = {node for trial in record.records() for end in trial.ends() for node in end["nodes"]}
    assert len(used) == 1 and nodes.ids[1][:6] in used.pop()
    run = summary(study_folder, record)
    stage.check(run)
    assert run.status.outcomes == {"completed": 4}
