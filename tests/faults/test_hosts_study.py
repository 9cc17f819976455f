"""A study whose gangs span hosts, and a host that dies."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from drills import Stage, allowed_s, study_text
from hosts import Hosts, Nodes, ranks, unavailable
from test_drills_controller import furthest, launching, lay_out, summary, wait_for

from ablate.records.folder import StudyRecord
from ablate.runner.hold import read_controller

pytestmark = [pytest.mark.slow, pytest.mark.drill]
TEXT = study_text(workers=2)
KILLED_HOST_S = 15.0


@pytest.mark.parametrize("place", [Hosts, pytest.param(Nodes, marks=pytest.mark.drill)])
def test_a_study_survives_the_death_of_a_host(
    stage: Stage,
    tmp_path: Path,
    place: type[Hosts] | type[Nodes],
    record_property: Callable[[str, object], None],
) -> None:
    """Of three hosts one with a rank of a training is killed: `ablate launch` trains on with the
    other two, and the report is that of one machine that nothing befell."""
    if place is Hosts and unavailable():
        pytest.skip(unavailable())
    whole = stage.undisturbed(TEXT)
    study_folder = tmp_path / "study"
    study_folder.mkdir()
    lay_out(stage, study_folder, TEXT)
    record = StudyRecord(study_folder / "runs" / "drill")
    with place(cpus=(0, 1, 1, 1), folder=tmp_path) as hosts:
        if isinstance(hosts, Hosts):
            hosts.wait_for_nodes()
        inside = ["sh", "-c", 'cd "$0" && exec "$@" >launch.log 2>&1', str(study_folder)]
        launch = ["launch", "drill.yaml", "--yes", "--address", hosts.ray_address]
        controller = hosts.run(0, [*inside, sys.executable, "-m", "ablate.cli", *launch])
        assert controller.stdout is not None
        controller.stdout.close()
        try:
            wait_for(lambda: furthest(record) >= 2, controller)
            victim = next(host for host in (1, 2, 3) if ranks(hosts.processes(host)))
            [struck] = [t for t in record.records() if t.attempts() and t.outcome() is None]
            faulted = time.time()
            hosts.kill(victim)
            wait_for(lambda: struck.first_row(2) is not None, controller)
            again_s = (struck.first_row(2) or {})["time"] - faulted
            record_property("training_again_s", round(again_s, 1))
            print(f"{place.__name__}: training again after {again_s:.1f} s")
            code = controller.wait(120)
        finally:
            controller.kill()
            controller.wait()
    assert code == 0, (study_folder / "launch.log").read_text()[-3000:]
    assert again_s < allowed_s(KILLED_HOST_S)
    assert [end["kind"] for end in struck.ends()] == ["lost", "ended"]
    stage.check(summary(study_folder, record), same_as=whole)


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available")
def test_doctor_asks_every_host_and_names_the_one_that_is_not_ready(
    stage: Stage, tmp_path: Path
) -> None:
    """Of three hosts, each asked by a rank of a gang there, one may open too few files."""
    lay_out(stage, tmp_path, TEXT)
    with Hosts(cpus=(0, 1, 1), folder=tmp_path / "hosts", first={2: "ulimit -n 2048"}) as hosts:
        hosts.wait_for_nodes()
        asked = [sys.executable, "-m", "ablate.cli", "doctor", "--cluster", "drill.yaml"]
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(tmp_path), *asked]
        with hosts.run(0, [*inside, "--address", hosts.ray_address]) as doctor:
            said = doctor.communicate(timeout=200)[0].decode()
    assert doctor.returncode == 0, said
    assert re.search(r"ok +nodes +2 probed: host1, host2", said), said
    assert re.search(r"limits +host2: .*2,?048", said), said
    assert "host1:" not in said and re.search(r"ok +clock", said), said


def test_a_machine_whose_environment_is_broken_is_set_aside(stage: Stage, tmp_path: Path) -> None:
    """On one of two machines every rank ends before its first step: after a few tries all trials
    are trained on the other, and the launch says which machine it is."""
    text = study_text(workers=1, epochs=1).replace("seeds: [0]", f"seeds: {list(range(6))}")
    study_folder = tmp_path / "study"
    study_folder.mkdir()
    lay_out(stage, study_folder, text)
    record = StudyRecord(study_folder / "runs" / "drill")
    broken = {2: {"ABLATE_PATIENCE_S": "no number"}}
    with Nodes(cpus=(0, 1, 1), folder=tmp_path, variables=broken) as hosts:
        command = ["launch", "drill.yaml", "--yes", "--address", hosts.ray_address]
        with launching(study_folder, hosts.environment, command) as controller:
            notes: list[str] = []

            def said() -> bool:
                told = (read_controller(record) or {"notes": []})["notes"]
                notes.extend(note for note in told if "is set aside" in note)
                return bool(notes)

            wait_for(said, controller)
            assert controller.wait(120) == 0, (study_folder / "launch.log").read_text()[-3000:]
    assert "ValueError: could not convert" in notes[0]
    nodes = [(end["nodes"], end["kind"]) for t in record.records() for end in t.ends()]
    [good] = {node for (node,), kind in nodes if kind == "ended"}
    tried = [node for (node,), _ in nodes if node != good]
    assert 3 <= len(tried) <= 8 and len(set(tried)) == 1
    run = summary(study_folder, record)
    stage.check(run)
    assert run.status.outcomes == {"completed": 12}
