"""Preflight on real probe gangs, and its judgement of clusters that are not all well."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import QUICK, study_of

from ablate.cluster.contract import Attempt, GangEvent, Shape
from ablate.cluster.local import LocalCluster
from ablate.runner import surroundings
from ablate.runner.preflight import disk_needed, examine, glance, judge

SHAPE = Shape(workers=2)


def test_a_cluster_that_is_well_passes(tmp_path: Path) -> None:
    """Probe gangs on every seat report nodes, versions, data, disk and an all-reduce; no trace."""
    with LocalCluster(num_cpus=4, preload=("torch", "torch.distributed")) as cluster:
        findings = examine(cluster, shape=SHAPE, folder=tmp_path, data=[tmp_path], need_gib=0.001)
    levels = {finding.subject: finding.level for finding in findings}
    assert set(levels.values()) == {"ok"}, findings
    assert {"seats", "gang", "nodes", "torch", "data", "disk", "network"} <= set(levels)
    assert {"shared memory", "limits", "interfaces", "clock"} <= set(levels)
    assert "2 of 2 gangs" in findings[0].message and "2 probe gangs" in findings[1].message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_the_same_wherever_a_node_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study folder and data that were named from here, on machines that work elsewhere."""
    with LocalCluster(num_cpus=2) as cluster:
        examine(cluster, shape=SHAPE, folder=tmp_path)  # the keeper works where it was started
        (tmp_path / "data").mkdir()
        monkeypatch.chdir(tmp_path)
        found = examine(cluster, shape=SHAPE, folder=Path("runs"), data=[Path("data")])
    assert [f for f in found if f.level == "error"] == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """A shard that no node sees and a disk too small are errors with path and size."""
    shard = tmp_path / "cc3m-train-0000.tar"
    with LocalCluster(num_cpus=2, preload=("torch", "torch.distributed")) as cluster:
        findings = examine(cluster, shape=SHAPE, folder=tmp_path, data=[shard], need_gib=1e9)
    errors = {finding.subject: finding.message for finding in findings if finding.level == "error"}
    assert set(errors) == {"data", "disk"}
    assert str(shard) in errors["data"] and "1000000000.0 GiB" in errors["disk"]


def test_a_gang_that_cannot_fit_is_the_only_finding(tmp_path: Path) -> None:
    """Without room for one gang the resource that is short is named, and nothing is started."""
    with LocalCluster(num_cpus=1) as cluster:
        (finding,) = examine(cluster, shape=SHAPE, folder=tmp_path)
    assert finding.level == "error" and "CPU runs out" in finding.message


def test_a_probe_that_hangs_is_stopped(tmp_path: Path) -> None:
    """Probes that do not end in time are stopped, and that is an error, not a hang."""
    with LocalCluster(num_cpus=2) as cluster:
        findings = examine(cluster, shape=SHAPE, folder=tmp_path, timeout_s=0.0)
    assert [finding.level for finding in findings] == ["ok", "error"]
    assert findings[1].subject == "gang"


def test_nodes_that_differ_are_named() -> None:
    """Versions, data and accelerators that differ between nodes name the nodes that differ."""
    end = GangEvent("preflight-0", 1, "exited", "ended", 0.0, exit_codes=(0, 0))
    common = {"free_gib": 100.0, "all_reduce_s": 0.002, "store": ""}
    sights = [
        {"node": "n1", "versions": {"torch": "2.14.1"}, "missing": [], "gpus": 1, **common},
        {"node": "n2", "versions": {"torch": "2.13.0"}, "missing": ["/d"], "gpus": 0, **common}
        | {"store": "no such bucket"},
    ]
    shape = Shape(workers=2, gpus_per_worker=1)
    unknown = {f.subject: f for f in judge([end], sights, shape=shape, need_gib=None)}["disk"]
    assert unknown.level == "ok" and unknown.message.endswith("is not known here")
    findings = judge([end], sights, shape=shape, need_gib=1.0)
    errors = {finding.subject: finding.message for finding in findings if finding.level == "error"}
    assert set(errors) == {"torch", "data", "accelerators", "checkpoints"}
    assert errors["checkpoints"].endswith("no such bucket on n2")
    assert "2.14.1 on n1; 2.13.0 on n2" in errors["torch"]
    assert errors["data"] == "/d does not exist on n2"
    assert errors["accelerators"].endswith("on n2")


def test_a_node_whose_settings_would_break_a_gang_is_named() -> None:
    """Little shared memory, few open files, locked memory beside InfiniBand, an interface that is
    not there, a clock that is off: each with its node and what to do; names as NCCL reads them."""
    well = {
        "shm_gib": 8.0, "open_files": 65536, "locked_memory": None, "infiniband": True,
        "interfaces": ["lo", "eth0"], "named_interfaces": {"NCCL_SOCKET_IFNAME": "eth"},
        "time": 105.0,
    }  # fmt: skip
    ok = [{"node": "n1", **well}, {"node": "n2", **well, "shm_gib": None}]
    ok += [{"node": "n3", **well, "named_interfaces": {"NCCL_SOCKET_IFNAME": "^docker,lo"}}]
    assert {f.level for f in surroundings.judge(ok, between=(100.0, 110.0))} == {"ok"}
    for changed, subject, words in (
        ({"shm_gib": 0.06}, "shared memory", "--shm-size"),
        ({"open_files": 1024}, "limits", "ulimit -n"),
        ({"locked_memory": 65536}, "limits", "ulimit -l"),
        ({"named_interfaces": {"NCCL_SOCKET_IFNAME": "=eth"}}, "interfaces", "=eth names no"),
        ({"time": 90.0}, "clock", "10 s behind"),
        ({"time": 140.0}, "clock", "30 s ahead"),
    ):
        seen = [*ok, {"node": "n4", **well, **changed}]
        found = [f for f in surroundings.judge(seen, between=(100.0, 110.0)) if f.level != "ok"]
        assert [f.subject for f in found] == [subject]
        assert found[0].message.startswith("n4: ") and words in found[0].message


def test_shared_memory_is_compared_with_what_the_loaders_of_a_node_hold() -> None:
    """By the ranks that a node holds: eight of 0.6 GiB each do not fit where two do; a study with
    small batches needs no whole GiB."""
    node = {"open_files": 65536, "locked_memory": None, "infiniband": False, "interfaces": ["lo"],
            "named_interfaces": {}, "time": 105.0}  # fmt: skip
    seen = [{"node": "n1", **node, "shm_gib": 4.0}] * 2 + [
        {"node": "n2", **node, "shm_gib": 4.0}
    ] * 8

    def said(shared_gib: float) -> str:
        found = surroundings.judge(seen, between=(100.0, 110.0), shared_gib=shared_gib)
        return "; ".join(f.message for f in found if f.level != "ok")

    assert said(0.4) == ""
    assert said(0.6).startswith("n2: 4.0 GiB free in /dev/shm")
    assert "8 ranks take 4.8 GiB" in said(0.6) and "--shm-size=6g" in said(0.6)
    seen = [{**sight, "shm_gib": 0.06} for sight in seen]
    assert said(0.001) == ""


def test_launch_compares_the_disk_before_it_starts(tmp_path: Path) -> None:
    """What the checkpoints of the trials to run take against what is free, in one warning; where
    there is room for any model, none is sketched."""
    study = study_of(tmp_path, QUICK)
    assert disk_needed(study, trials=7, free_gib=24.0 * 7) is None
    need = disk_needed(study, trials=8, free_gib=24.0 * 7)
    assert need is not None and 0.1 < need < 24.0
    with LocalCluster(num_cpus=2) as cluster:
        for asked, level in ((1e-3, "ok"), (1e6, "warning")):
            findings = glance(cluster, shape=SHAPE, folder=tmp_path, need_gib=asked)
            (disk,) = (f for f in findings if f.subject == "disk")
            assert disk.level == level
    assert "up to 1000000.0 GiB" in disk.message


def test_a_glance_starts_nothing_and_says_what_is_short_where(tmp_path: Path) -> None:
    """What launch always looks at: seats, data, disk, versions; a full cluster is no error."""
    with LocalCluster(num_cpus=2) as cluster:
        findings = {f.subject: f for f in glance(cluster, shape=SHAPE, folder=tmp_path)}
        assert findings["seats"].message.startswith("1 of 1 gangs of 2 workers")
        assert {"seats", "disk", "torch", "ray", "mlflow"} <= set(findings)
        assert cluster.pids() == {} and list(tmp_path.iterdir()) == []
        trial = tmp_path / "trial"
        trial.mkdir()
        cluster.start(Attempt("trial", 1, trial, SHAPE, "cluster_entries:sleep"))
        assert [event.detail for event in cluster.wait(60) if event.kind != "placed"] == []
        findings = {f.subject: f for f in glance(cluster, shape=SHAPE, folder=tmp_path)}
    assert findings["seats"].level == "warning"
    assert "0 of 1 gangs" in findings["seats"].message
    assert "this machine has 0 CPU free: 0 of 2 workers, CPU runs out" in findings["seats"].message


def test_a_glance_names_what_no_trial_could_outlive(tmp_path: Path) -> None:
    """Too few seats and a store that cannot be written are errors; missing data is told."""
    with LocalCluster(num_cpus=1) as cluster:
        findings = glance(
            cluster, shape=SHAPE, folder=tmp_path, data=[tmp_path / "x"], checkpoints="gs://b/x"
        )
    levels = {finding.subject: finding.level for finding in findings}
    assert levels["seats"] == levels["checkpoints"] == "error"
    assert levels["data"] == "warning"
