"""Which configurations are provably one experiment: the rules, and the real loss on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablate.recipes.openclip import Config
from ablate.recipes.openclip.config import FAST
from ablate.recipes.openclip.same import RULES
from ablate.trial import same

FLAGS = list(product((False, True), repeat=2))
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"opt": "adamw"},
    "clip": {"opt": "adamw", "grad_clip_norm": 0.2},
    "sgd": {"opt": "timm/sgd", "momentum": 0.0},
}


def config(**fields: Any) -> dict[str, Any]:
    given = {"train_data": "x-{0000..0001}.tar", "precision": "fp32", "lr": 5e-4} | fields
    return Config(**given).model_dump()


def loss_flags(local: bool, gather: bool) -> dict[str, bool]:
    return {"local_loss": local, "gather_with_grad": gather}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What ClipLoss really does on 2 and on 4 gloo ranks."""
    script = Path(__file__).with_name("clip_loss_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), "2", "4"],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_rules_agree_with_the_real_loss(ranks: list[dict[str, Any]], setting: str) -> None:
    """For all pairs of loss flags: called the same exactly when four steps of training on 2 and
    4 ranks end in the same parameters."""
    assert [report["workers"] for report in ranks] == [2, 4]
    for report in ranks:
        for one, two in combinations(FLAGS, 2):
            a, b = (
                np.array(report["parameters"][f"{setting}/{local}/{gather}"])
                for local, gather in (one, two)
            )
            # Four AdamW steps move a parameter by 0.04; the flags' float32 sums differ by 1e-6.
            equal = bool(np.abs(a - b).max() < 4e-5)
            claimed = same.same_experiment(
                config(**SETTINGS[setting], **loss_flags(*one)),
                config(**SETTINGS[setting], **loss_flags(*two)),
                rules=RULES,
                workers=report["workers"],
            )
            assert (claimed is not None) == equal, (report["workers"], one, two)


def test_gradients_on_ranks_have_the_documented_scale(ranks: list[dict[str, Any]]) -> None:
    """Against gather_with_grad: 1/W without flags, the same with both, another direction with
    local_loss alone (the negative control)."""
    for report in ranks:
        gradients = {
            flags: np.array(report["gradients"][f"adamw/{flags[0]}/{flags[1]}"]) for flags in FLAGS
        }
        true = gradients[False, True]

        def cosine(x: np.ndarray, true: np.ndarray = true) -> float:
            return float(x @ true / np.linalg.norm(x) / np.linalg.norm(true))

        plain, both, local = gradients[False, False], gradients[True, True], gradients[True, False]
        scale = np.linalg.norm(plain) / np.linalg.norm(true)
        assert scale == pytest.approx(1 / report["workers"], rel=1e-4)
        assert cosine(plain) > 1 - 1e-5
        assert np.allclose(both, true, rtol=1e-3, atol=1e-6)
        assert cosine(local) < 0.995


def test_three_of_four_loss_flags_are_one_experiment() -> None:
    """Under AdamW without clipping, with the reasons named; local_loss alone stands apart."""
    cells = {flags: config(**loss_flags(*flags)) for flags in FLAGS}
    groups = {
        json.dumps(same.simplify(cell, rules=RULES, workers=8)[0], sort_keys=True): flags
        for flags, cell in cells.items()
    }
    assert len(groups) == 2
    both = same.same_experiment(cells[False, False], cells[True, True], rules=RULES, workers=8)
    assert both is not None and not both.is_exact
    assert [rule.name for rule in both.rules] == ["local_slices", "gradient_scale"]
    assert all(": " in reason for reason in both.reasons)
    assert (
        same.same_experiment(cells[True, False], cells[False, True], rules=RULES, workers=8) is None
    )


def test_one_worker_has_nothing_to_gather() -> None:
    """With a single worker all four are equal bit for bit."""
    for one, two in combinations(FLAGS, 2):
        found = same.same_experiment(
            config(**loss_flags(*one)), config(**loss_flags(*two)), rules=RULES, workers=1
        )
        assert found is not None and found.is_exact
        assert [rule.name for rule in found.rules] == ["one_worker"]


@pytest.mark.parametrize(
    "fields",
    [{"grad_clip_norm": 1.0}, {"precision": "amp"}, {"opt": "timm/lamb"}, {"accum_freq": 2}],
)
def test_what_sees_the_gradients_size_separates_them(fields: dict[str, Any]) -> None:
    """Clipping, fp16 with its scaler, another optimizer: the scale of the gradient matters."""
    one, two = (config(**fields, gather_with_grad=gather) for gather in (False, True))
    assert same.same_experiment(one, two, rules=RULES, workers=8) is None


@pytest.mark.parametrize(
    ("one", "two", "rule"),
    [
        ({"skip_scheduler": True, "warmup": 500}, {"skip_scheduler": True}, "no_schedule"),
        (
            {"skip_scheduler": True},
            {"lr_scheduler": "const", "warmup": 0},
            "no_schedule",
        ),
        ({"wd": 0.0, "param_groups": "timm"}, {"wd": 0.0}, "nothing_decays"),
        ({"fused": True}, {"fused": False}, "same_formula"),
        ({"speed": "exact"}, dict.fromkeys(FAST, False), "fields_of_speed"),
    ],
)
def test_each_rule_is_named(one: dict[str, Any], two: dict[str, Any], rule: str) -> None:
    """A pair that one rule makes equal reports that rule alone."""
    found = same.same_experiment(config(**one), config(**two), rules=RULES, workers=2)
    assert found is not None
    assert [used.name for used in found.rules] == [rule]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"warmup": 500}, {"warmup": 1000}),
        ({"wd": 0.1, "param_groups": "timm"}, {"wd": 0.1}),
        ({"seed": 1}, {"seed": 2}),
        ({"precision": "fp32"}, {"precision": "amp_bf16"}),
        ({"batch_size": 64, "accum_freq": 2}, {"batch_size": 128}),
    ],
)
def test_different_experiments_stay_different(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Nothing is merged on a hunch: accumulation changes BatchNorm's batches, for one."""
    assert same.same_experiment(config(**one), config(**two), rules=RULES, workers=2) is None


def test_sameness_is_an_equivalence() -> None:
    """Simplifying twice changes nothing more, and equal configurations need no rule."""
    for flags in FLAGS:
        cell = config(**loss_flags(*flags), skip_scheduler=True, fused=True)
        simple, _ = same.simplify(cell, rules=RULES, workers=4)
        assert same.simplify(simple, rules=RULES, workers=4) == (simple, ())
        found = same.same_experiment(cell, cell, rules=RULES, workers=4)
        assert found is not None and found.rules == () and found.is_exact


def test_no_rule_reads_another_field() -> None:
    """A rule's fields are complete: a configuration that refuses any other field is rewritten all
    the same, and no other field is rewritten."""

    class Guarded(dict[str, Any]):
        allowed: frozenset[str] = frozenset()

        def __getitem__(self, name: str) -> Any:
            assert name in self.allowed, name
            return super().__getitem__(name)

        def get(self, name: str, default: Any = None) -> Any:
            assert name in self.allowed, name
            return super().get(name, default)

    changes: list[dict[str, Any]] = [
        *(loss_flags(*flags) | more for flags in FLAGS for more in SETTINGS.values()),
        {"skip_scheduler": True, "wd": 0.0, "fused": True, "accum_freq": 2, "siglip": True},
        {"lr_scheduler": "const", "warmup": 0, "precision": "amp"},
    ]
    for fields, workers in product(changes, (1, 2)):
        given = Guarded(config(**fields))
        for rule in RULES:
            given.allowed = rule.fields
            assert set(rule.rewrite(given, workers)) <= rule.fields, rule.name
