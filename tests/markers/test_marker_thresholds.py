"""Thresholds from a study file, and what the package needs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from marker_traces import judged, rows_of

from ablate.markers import (
    RULES,
    ThresholdError,
    Thresholds,
    check_thresholds,
    describe_thresholds,
    thresholds_schema,
)


@pytest.mark.parametrize(
    ("given", "place", "words"),
    [
        ({"loss_spik": {}}, ("loss_spik",), "did you mean 'loss_spike'"),
        ({"loss_spike": {"sigm": 4}}, ("loss_spike", "sigm"), "did you mean 'sigma'"),
        ({"loss_spike": 4}, ("loss_spike",), "must map thresholds to values"),
        ({"loss_spike": {"sigma": "4"}}, ("loss_spike", "sigma"), "must be a number, not '4'"),
        ({"loss_spike": {"sigma": True}}, ("loss_spike", "sigma"), "must be a number, not True"),
        ({"loss_spike": {"hits": 1.5}}, ("loss_spike", "hits"), "must be a whole number"),
        ({"loss_spike": {"window": 0}}, ("loss_spike", "window"), "must be at least 1"),
        ({"divergence": {"stop": 1}}, ("divergence", "stop"), "must be true or false"),
        ({"divergence": {"rise": -1.0}}, ("divergence", "rise"), "at least 0"),
        ({"divergence": {"rise": float("nan")}}, ("divergence", "rise"), "finite"),
    ],
)
def test_a_wrong_threshold_is_refused_with_the_nearest_name(
    given: dict[str, object], place: tuple[str, ...], words: str
) -> None:
    """The place, what was given and what is allowed are said."""
    ((found, message),) = check_thresholds(given)
    assert found == place and words in message
    with pytest.raises(ThresholdError, match=".".join(("markers", *place))):
        Thresholds(given)  # type: ignore[arg-type]


def test_features_that_become_fewer_as_a_run_learns_have_not_collapsed() -> None:
    """The image tower of a real run whose score rose from 0.8 to 7.3 %; of one that ends with an
    eighth of its best the same marker speaks, though it has more than eight dimensions."""

    def names(ranks: list[float]) -> list[str]:
        steps = range(46, 46 * len(ranks) + 1, 46)
        evals = [{"step": s, "image_feature_rank": r} for s, r in zip(steps, ranks, strict=True)]
        rows = rows_of(loss=np.linspace(4.5, 1.0, 300))
        return [item.flag for item in judged(rows, evals).events]

    assert names([43.2, 16.5, 11.6, 11.0, 11.0, 11.1]) == []
    assert names([90.0, 60.0, 40.0, 20.0, 11.0, 11.0]) == ["FEATURE_COLLAPSE"]


def test_state_cannot_be_set_by_a_study() -> None:
    """Only thresholds may be overridden, not what a rule remembers."""
    assert list(check_thresholds({"loss_spike": {"seen": 3}}))


def test_every_default_passes_its_own_check() -> None:
    """The defaults written into a study file change nothing."""
    defaults = describe_thresholds()
    assert list(check_thresholds(defaults)) == []
    assert set(defaults) == {rule.name for rule in RULES}
    assert [rule.state() for rule in Thresholds(defaults).rules()] == [
        rule.state() for rule in Thresholds().rules()
    ]


def test_a_threshold_changes_the_judgement() -> None:
    """A stricter sum finds what the default lets pass."""
    loss = 2.0 + 0.06 * np.random.default_rng(0).standard_normal(1500)
    loss[1000:1006] += 0.13
    rows = rows_of(loss=loss)
    assert judged(rows).verdict.name == "STABLE"
    stricter = judged(rows, loss_spike={"name_sum": 3.5})
    assert stricter.verdict.name == "SPIKY"
    assert stricter.to_dict()["thresholds"] == {"loss_spike": {"name_sum": 3.5}}


def test_the_schema_names_every_threshold() -> None:
    """Editors are told each threshold with type, default and the rule's first sentence."""
    schema = thresholds_schema()
    for marker, values in describe_thresholds().items():
        entry = schema["properties"][marker]
        assert set(entry["properties"]) == set(values)
        assert entry["description"]
        assert entry["additionalProperties"] is False


def test_markers_need_nothing_that_trains() -> None:
    """The package comes without torch, ray, mlflow, optuna, pandas, matplotlib or tensorboard."""
    code = (
        "import sys, ablate.markers, ablate.markers.foreign, ablate.markers.diagnosis, "
        "ablate.report.pictures.timeline, ablate.report.replay\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pandas', 'matplotlib', 'tensorboard'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
