"""Preflight on real probe gangs, and its judgement of clusters that are not all well."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablate import stores
from ablate.cluster import Attempt, Gang, GangEvent, LocalCluster
from ablate.preflight import _judge, examine, glance

GANG = Gang(workers=2)


def test_a_cluster_that_is_well_passes(tmp_path: Path) -> None:
    """Probe gangs on every seat report nodes, versions, data, disk and an all-reduce; no trace."""
    with LocalCluster(num_cpus=4, preload=("torch", "torch.distributed")) as cluster:
        findings = examine(cluster, gang=GANG, folder=tmp_path, data=[tmp_path], need_gib=0.001)
    levels = {finding.subject: finding.level for finding in findings}
    assert set(levels.values()) == {"ok"}, findings
    assert {"seats", "gang", "nodes", "torch", "data", "disk", "network"} <= set(levels)
    assert "2 of 2 gangs" in findings[0].message and "2 probe gangs" in findings[1].message
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """A shard that no node sees and a disk too small are errors with path and size."""
    shard = tmp_path / "cc3m-train-0000.tar"
    with LocalCluster(num_cpus=2, preload=("torch", "torch.distributed")) as cluster:
        findings = examine(cluster, gang=GANG, folder=tmp_path, data=[shard], need_gib=1e9)
    errors = {finding.subject: finding.message for finding in findings if finding.level == "error"}
    assert set(errors) == {"data", "disk"}
    assert str(shard) in errors["data"] and "1000000000.0 GiB" in errors["disk"]


def test_a_gang_that_cannot_fit_is_the_only_finding(tmp_path: Path) -> None:
    """Without room for one gang the resource that is short is named, and nothing is started."""
    with LocalCluster(num_cpus=1) as cluster:
        (finding,) = examine(cluster, gang=GANG, folder=tmp_path)
    assert finding.level == "error" and "CPU runs out" in finding.message


def test_a_probe_that_hangs_is_stopped(tmp_path: Path) -> None:
    """Probes that do not end in time are stopped, and that is an error, not a hang."""
    with LocalCluster(num_cpus=2) as cluster:
        findings = examine(cluster, gang=GANG, folder=tmp_path, timeout_s=0.0)
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
    gang = Gang(workers=2, gpus_per_worker=1)
    unknown = {f.subject: f for f in _judge([end], sights, gang=gang, need_gib=None)}["disk"]
    assert unknown.level == "ok" and unknown.message.endswith("is not known here")
    findings = _judge([end], sights, gang=gang, need_gib=1.0)
    errors = {finding.subject: finding.message for finding in findings if finding.level == "error"}
    assert set(errors) == {"torch", "data", "accelerators", "checkpoints"}
    assert errors["checkpoints"].endswith("no such bucket on n2")
    assert "2.14.1 on n1; 2.13.0 on n2" in errors["torch"]
    assert errors["data"] == "/d does not exist on n2"
    assert errors["accelerators"].endswith("on n2")


def test_a_glance_starts_nothing_and_says_what_is_short_where(tmp_path: Path) -> None:
    """What launch always looks at: seats, data, disk, versions; a full cluster is no error."""
    with LocalCluster(num_cpus=2) as cluster:
        findings = {f.subject: f for f in glance(cluster, gang=GANG, folder=tmp_path)}
        assert findings["seats"].message.startswith("1 of 1 gangs of 2 workers")
        assert {"seats", "disk", "torch", "ray", "mlflow"} <= set(findings)
        assert cluster.pids() == {} and list(tmp_path.iterdir()) == []
        trial = tmp_path / "trial"
        trial.mkdir()
        cluster.start(Attempt("trial", 1, trial, GANG, "cluster_entries:sleep"))
        assert [event.detail for event in cluster.wait(60) if event.kind != "placed"] == []
        findings = {f.subject: f for f in glance(cluster, gang=GANG, folder=tmp_path)}
    assert findings["seats"].level == "warning"
    assert "0 of 1 gangs" in findings["seats"].message
    assert "this machine has 0 CPU free: 0 of 2 workers, CPU runs out" in findings["seats"].message


def test_a_glance_names_what_no_trial_could_outlive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few seats and a store that cannot be written are errors; missing data is told."""
    monkeypatch.setattr(stores, "probe", lambda url: "AccessDenied")
    with LocalCluster(num_cpus=1) as cluster:
        findings = glance(
            cluster, gang=GANG, folder=tmp_path, data=[tmp_path / "x"], checkpoints="s3://b/x"
        )
    levels = {finding.subject: finding.level for finding in findings}
    assert levels["seats"] == levels["checkpoints"] == "error"
    assert levels["data"] == "warning"
