"""The plan: the warnings that know the field, and who is asked before money is spent."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from small_trials import add_models, make_data

from ablate.analysis.results import Result
from ablate.cluster.local import LocalCluster
from ablate.errors import PlanError
from ablate.recipes import openclip
from ablate.records.files import free_gib
from ablate.records.folder import StudyRecord
from ablate.runner import agenda, controller
from ablate.runner.plan import probe
from ablate.runner.plan.cost import makespan_s, over_disk
from ablate.runner.plan.plan import plan
from ablate.runner.plan.resolution import noise_of
from ablate.study import parse_study
from ablate.training import optim

STUDY = """\
name: planned
recipe: openclip
baseline:
  {model: RN50, train_data: "t-{0..9}.tar", train_num_samples: 1024, imagenet_val: val,
   precision: amp_bf16, batch_size: 64, epochs: 10, warmup: 4}
factors:
  beta2: [0.999, 0.98]
seeds: [0, 1, 2]
gang: {workers: 2}
"""
STUDY_OF_A_COMMAND = """
recipe: command
baseline:
  command: python train.py --lr {lr} --seed {seed}
  metrics: {top1: maximize}
  lr: 0.1
factors: {lr: [0.2]}
seeds: 2
objective: {metric: top1}
"""


def notes(text: str, folder: Path) -> list[str]:
    study = parse_study(text, path="planned.yaml", root=folder)
    return list(plan(study, StudyRecord(folder / "runs" / "planned")).notes)


def test_a_sound_study_has_no_warning(tmp_path: Path) -> None:
    """80 steps, warmup of 4, amp_bf16 with BatchNorm in fp32 on GPUs, three seeds: only that the
    data are not here is told, of each field."""
    told = notes(STUDY.replace("workers: 2}", "workers: 2, gpus_per_worker: 1}"), tmp_path)
    assert [line.partition(":")[0] for line in told] == ["train_data", "imagenet_val"]
    assert all(line.endswith("not on this machine: a launch here would refuse") for line in told)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("warmup: 4", "warmup: 9"), "warmup 9 is 11% of the 80 steps: above 10%"),
        (("warmup: 4", "warmup: 80"), "warmup 80 covers the whole run of 80 steps"),
        (("amp_bf16", "pure_bf16"), "pure_bf16 keeps BatchNorm's running statistics in bf16"),
        (
            ("[0.999, 0.98]", "[0.999, 0.98]\n  loss: {default: {}, local: {local_loss: true}}"),
            "loss=local: local_loss without gather_with_grad gives a biased gradient",
        ),
        (
            ("[0.999, 0.98]", "[0.999, 0.98]\n  loss: {default: {}, g: {gather_with_grad: true}}"),
            "loss=g is not run: it is the same experiment as loss=default",
        ),
        (("[0, 1, 2]", "[0]"), "1 seed cannot show any difference, however large"),
        (("[0, 1, 2]", "{min: 2, max: 2}"), "2 seeds at most cannot show any difference after"),
    ],
)
def test_each_trap_of_the_field_is_warned_of(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    """One change to the sound study, one warning."""
    assert any(expected in note for note in notes(STUDY.replace(*change), tmp_path))


@pytest.mark.parametrize(
    ("momentum", "kept", "expected"),
    [
        (0.1, torch.bfloat16, 0.99),
        (0.01, torch.bfloat16, 0.83),
        (0.001, torch.bfloat16, 0.5),
        (0.01, torch.float32, 1.0),
    ],
)
def test_batch_norm_in_bf16_stalls_as_the_warning_says(
    momentum: float, kept: torch.dtype, expected: float
) -> None:
    """The running variance of data with variance 1, begun at 0.5: it arrives in fp32 alone."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(8, momentum=momentum).to(kept)
    norm.running_var.fill_(0.5)
    for _ in range(1200):
        norm(torch.randn(256, 8).to(kept))
    assert float(norm.running_var.float().mean()) == pytest.approx(expected, abs=0.015)


def test_a_begun_trial_is_not_resumed_with_another_beta2(tmp_path: Path) -> None:
    """After beta2 of the baseline was edited, begun trials start anew, and the plan says why."""
    record = StudyRecord(tmp_path / "runs" / "planned")
    old = parse_study(STUDY, path="planned.yaml", root=tmp_path)
    folder = record.write_trial(old.trial(old.cell({}), seed=0).to_json())
    record.new_attempt(folder)
    edited = STUDY.replace("[0.999, 0.98]", "[0.95, 0.98]").replace(
        "warmup: 4}", "warmup: 4, beta2: 0.95}"
    )
    found = [note for note in notes(edited, tmp_path) if "do not resume" in note]
    assert len(found) == 1 and "had another beta2" in found[0]


def test_torch_overwrites_the_betas_that_one_asks_for() -> None:
    """What the warning rests on: load_state_dict keeps the saved beta2, not the new one."""
    weight = torch.nn.Parameter(torch.zeros(2))
    saved = torch.optim.AdamW([weight], betas=(0.9, 0.999)).state_dict()
    new = torch.optim.AdamW([weight], betas=(0.9, 0.95))
    new.load_state_dict(saved)
    assert new.param_groups[0]["betas"] == (0.9, 0.999)


NEEDS_NO_DATA = """\
recipe: command
baseline: {command: "echo {lr} {seed}", metrics: [accuracy], lr: 1}
factors: {lr: [1, 2]}
seeds: [0, 1, 2]
"""


def launch_in_terminal(folder: Path, answer: bytes) -> tuple[int, str]:
    """`ablate launch` with a terminal as its standard input; exit code and what it printed."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            [sys.executable, "-m", "ablate.cli", "launch", "planned.yaml", "--cluster", "local"],
            cwd=folder, stdin=theirs, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout + done.stderr


def test_launch_asks_before_it_spends_and_refuses_where_nobody_can_answer(tmp_path: Path) -> None:
    """With a terminal the number of trials is shown and a no ends it; without one, and without
    --yes, nothing starts and the message says what to do."""
    (tmp_path / "planned.yaml").write_text(NEEDS_NO_DATA)
    code, said = launch_in_terminal(tmp_path, b"n\n")
    assert code == 130 and "Start 6 trials for a cost that is not known yet" in said
    done = subprocess.run(
        [sys.executable, "-m", "ablate.cli", "launch", "planned.yaml"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Give --yes to start them" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_costs_less_than_the_limit_is_not_asked_for(tmp_path: Path) -> None:
    """The plan's p90 decides: below budget.ask_above launch starts, above it asks."""
    from ablate.cli.run import may_start

    study = parse_study(STUDY, path="planned.yaml", root=tmp_path)
    made = plan(study, StudyRecord(tmp_path / "none"), samples_per_s=1000.0)
    assert made.cost is not None
    spend = made.cost.worker_hours_p90  # 6 trials of 10,240 samples on 2 workers
    assert spend == pytest.approx(6 * 10240 / 1000 * 2 / 3600)
    assert may_start(made, ask_above=spend * 1.01)
    if not sys.stdin.isatty():
        with pytest.raises(PlanError, match="above budget.ask_above"):
            may_start(made, ask_above=spend * 0.99)


def test_plan_probes_each_shape_once_with_real_steps(tmp_path: Path) -> None:
    """`plan --probe` trains a few steps of two shapes (precision changes the pace, beta2 does not)
    with the real worker, keeps the paces, and then knows cost, makespan and disk without running
    anything again."""
    data = make_data(tmp_path / "data")
    text = STUDY.replace("RN50", "tiny-rn-a").replace(
        '"t-{0..9}.tar"', '"data/train/{00000..00002}.tar"'
    )
    text = text.replace("imagenet_val: val", "imagenet_val: data/val, workers: 0").replace(
        "batch_size: 64", "batch_size: 8"
    )
    text = text.replace("amp_bf16", "fp32").replace("workers: 2}", "workers: 1}")
    text = text.replace(
        "beta2: [0.999, 0.98]", "beta2: [0.999, 0.98]\n  precision: [fp32, amp_bf16]"
    )
    assert data.is_dir()
    study = parse_study(text, path="planned.yaml", root=tmp_path)
    record = StudyRecord(tmp_path / "runs" / "planned")
    trials = agenda.planned(study, record)
    assert len({probe.shape_of(study, trial) for trial in trials}) == 2
    with LocalCluster(num_cpus=1, preload=("ablate.recipes.openclip:PRELOAD",)) as cluster:
        found = probe.measure(study, record, trials, cluster, entry=controller.WORKER, steps=12)
        assert probe.measure(study, record, trials, cluster, entry="nowhere:main") == found
    assert len(found) == 2 and not list(
        (tmp_path / "runs" / "planned" / "probes" / "trials").iterdir()
    )
    for pace in found.values():
        assert 0 < pace.step_s_p50 <= pace.step_s_p90
        assert pace.evaluation_s > 0 and pace.other_s > 0
    made = plan(study, record, concurrency=2)
    assert made.cost is not None and "each of 2 shapes" in made.cost.basis
    config = trials[0].config
    steps, evaluations = 1024 // 8 * 10, 5
    assert (config["epochs"], config["zeroshot_frequency"]) == (10, 2)
    expected = [
        found[probe.shape_of(study, t)].trial_s(steps=steps, evaluations=evaluations)
        for t in trials
    ]
    assert made.cost.worker_hours_p50 == pytest.approx(sum(p50 for p50, _ in expected) / 3600)
    assert made.cost.worker_hours_p90 == pytest.approx(sum(p90 for _, p90 in expected) / 3600)
    tight = parse_study(text + "budget: {gpu_hours: 1.0e-4}\n", path="planned.yaml", root=tmp_path)
    assert any("budget.gpu_hours leaves 0.0001 h" in note for note in plan(tight, record).notes)


@given(st.lists(st.floats(0, 100), max_size=12), st.integers(1, 5))
def test_a_makespan_lies_between_its_bounds(durations: list[float], seats: int) -> None:
    """At least the longest and the even share of all, at most their sum."""
    span = makespan_s(durations, seats)
    bound = max([sum(durations) / seats, *durations, 0.0])
    assert span >= bound - 1e-9
    assert span <= sum(durations) / seats + max([*durations, 0.0]) + 1e-9


def test_a_crossing_resolves_more_than_one_cell_against_another(tmp_path: Path) -> None:
    """A main effect of a 2 x 2 x 2 crossing averages four pairs: half the detectable difference."""
    text = STUDY.replace("[0.999, 0.98]", "[0.999, 0.98]\n  wd: [0.2, 0.1]\n  lr: [5.0e-4, 2.0e-3]")
    crossed = parse_study(text + "design: full_factorial\n", path="s.yaml", root=tmp_path)
    made = plan(crossed, StudyRecord(tmp_path / "none"))
    assert made.detectable is not None and len(made.resolution) == 3
    assert all(size == pytest.approx(made.detectable / 2) for _, _, size in made.resolution)
    single = plan(parse_study(text, path="s.yaml", root=tmp_path), StudyRecord(tmp_path / "none"))
    assert {size for _, _, size in single.resolution} == {single.detectable}


def test_the_noise_of_few_runs_is_taken_at_its_upper_bound() -> None:
    """Seeds of two cells with variances 1 and 4: the pooled deviation, at what a chi-squared of 4
    degrees of freedom leaves above it in one case of five."""
    values = {"a": (1.0, 2.0, 3.0), "b": (2.0, 4.0, 6.0)}
    ended = [
        Result((("lr", level),), seed, "completed", value)
        for level, seen in values.items()
        for seed, value in enumerate(seen)
    ]
    quantile = stats.chi2(4).ppf(0.2)
    assert noise_of(ended) == pytest.approx((2.5 * 4 / quantile) ** 0.5)
    assert noise_of(ended[:2]) is None


def test_the_plan_counts_what_the_real_optimizer_decays(tmp_path: Path) -> None:
    """RN50's groups, built without memory, are those of the optimizer that trains it: of each
    weight decay and rule, with the cells that have it, also for scripts."""
    text = STUDY.replace("[0.999, 0.98]", "[0.999, 0.98]\n  wd: [0.2, 0.0]")
    text = text.replace("seeds:", "  param_groups: [open_clip, open_clip_next]\nseeds:")
    study = parse_study(text, path="planned.yaml", root=tmp_path)
    record = StudyRecord(tmp_path / "none")
    made = plan(study, record, deep=True)
    real = openclip.model.create_model(openclip.Config(**study.baseline), torch.device("cpu"))[0]
    told = {}
    for groups in made.groups:
        told |= dict.fromkeys(groups.cells, groups.counts)
        assert groups.counts["hash"] in groups.sentence
    assert list(told) == ["baseline", "beta2=0.98", "wd=0.0", "param_groups=open_clip_next"]
    for trial in agenda.planned(study, record):
        config = openclip.Config(**trial.config)
        optimizer, _ = openclip.step.make_optimizer(config, real)
        counts = told[study.change_name(dict(trial.cell.levels))]
        assert [
            {
                "weight_decay": group["weight_decay"],
                "tensors": len(group["params"]),
                "parameters": sum(p.numel() for p in group["params"]),
            }
            for group in optimizer.param_groups
        ] == [counts["no_decay"], counts["decay"]]
    assert told["baseline"]["no_decay"]["tensors"] == 213
    assert told["baseline"]["hash"] != told["param_groups=open_clip_next"]["hash"]
    assert made.to_json()["groups"][0]["cells"] == ("baseline", "beta2=0.98")
    assert plan(study, record).groups == ()


@pytest.mark.parametrize(
    ("fields", "checkpoints"),
    [
        ("", 3),  # the last two and the best
        ("epochs: 2", 3),
        ("epochs: 2, checkpoint_minutes: 0", 2),
        ("keep_every: 5", 3 + 2),
        ("checkpoint_frequency: 4", 3),
        ("checkpoint_frequency: 6", 3),  # two of them may be written within an epoch
        ("checkpoint_frequency: 6, checkpoint_minutes: 0", 2),
    ],
)
def test_the_plan_says_what_checkpoints_take(tmp_path: Path, fields: str, checkpoints: int) -> None:
    """Weights, both moments and no more, for each trial that is still to run, and whether the
    disk holds them; nothing is said where no model was sketched."""
    text = STUDY.replace("warmup: 4}", f"warmup: 4, {fields}}}" if fields else "warmup: 4}")
    if "epochs" in fields:
        text = text.replace("epochs: 10, ", "")
    study = parse_study(text, path="planned.yaml", root=tmp_path)
    record = StudyRecord(tmp_path / "runs")
    done = record.write_trial(agenda.planned(study, record)[0].to_json())
    outcome = {"outcome": "completed", "value": 0.2, "wall_s": 3.0, "final": {}}
    record.write_outcome(done, outcome)
    numbers = 141_313 + 101_865_824  # RN50's parameters, as its groups count them
    size = 3 * 4 * numbers / 2**30
    made = plan(study, record, deep=True)
    assert made.disk_gib == pytest.approx(5 * checkpoints * size, rel=1e-3)
    full = over_disk(record.folder, made.disk_gib, free_gib=free_gib(record.folder))
    assert [note for note in made.notes if "GiB" in note] == full
    enough = 5.1 * checkpoints * size
    assert over_disk(record.folder, made.disk_gib, free_gib=enough) == []
    (note,) = over_disk(record.folder, made.disk_gib, free_gib=4.9 * checkpoints * size)
    assert str(record.folder) in note and f"up to {made.disk_gib:.1f} GiB" in note
    assert plan(study, record).disk_gib is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fused": True, "precision": "pure_bf16"},
        {"precision": "bf16"},
        {"siglip": True},
        {"lock_image": True, "lock_image_freeze_bn_stats": True},
        {"opt": "timm/lamb", "eps": 1e-6, "lr": 1e-3},
        {"model": "tiny-test-vit", "force_custom_text": True, "force_patch_dropout": 0.5},
    ],
)
def test_the_sketch_of_a_model_has_its_parameters(fields: dict[str, object]) -> None:
    """Whatever shapes the model, names, sizes and groups are those of the model that is trained."""
    add_models()
    config = openclip.Config(**{"model": "tiny-rn-a", "precision": "fp32", **fields})
    real = openclip.model.create_model(config, torch.device("cpu"))[0]
    optimizer, groups = openclip.step.make_optimizer(config, real)
    sketched = openclip.sketch(config)
    assert sketched.groups == optim.describe(groups)
    assert sketched.disk_bytes == 3 * optim.state_bytes(real, optimizer)


def test_a_parameter_in_no_group_or_in_two_is_refused() -> None:
    """An optimizer that would leave one out, or step it twice, is refused with its name."""
    model = torch.nn.Linear(2, 2)
    undecayed, decayed = optim.group_parameters(model, rule="open_clip", weight_decay=0.2)
    optim.refuse_uneven(model, (undecayed, decayed))
    both = replace(decayed, parameters=(*decayed.parameters, undecayed.parameters[0]))
    less = replace(decayed, parameters=decayed.parameters[1:])
    for changed, count in ((both, 2), (less, 0)):
        with pytest.raises(ValueError, match=rf"1 trainable parameters .* \(in {count}\)"):
            optim.refuse_uneven(model, (undecayed, changed))


@pytest.mark.parametrize(
    ("opt", "says"),
    [
        ("timm/lamb", "be made with eps None"),
        ("timm/lamp", "be made with .*lamp"),
        ("timm/adafactor", "take a step with eps None"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused(tmp_path: Path, opt: str, says: str) -> None:
    """Before any trial has started: unknown to timm, or without a setting that it needs, which
    some optimizers meet only when they step."""
    study = parse_study(
        STUDY.replace("warmup: 4}", f"warmup: 4, lr: 1.0e-3, opt: {opt}}}")
        .replace("RN50", "tiny-rn-a")
        .replace("beta2: [0.999, 0.98]", "lr: [1.0e-3, 2.0e-3]"),
        path="planned.yaml",
        root=tmp_path,
    )
    with pytest.raises(PlanError, match=f"opt: {opt} cannot {says}"):
        plan(study, StudyRecord(tmp_path / "none"), deep=True)


def test_only_ways_that_are_open_are_advised_to_know_the_cost(tmp_path: Path) -> None:
    """A program that says no steps can be neither probed nor counted: its first trial tells."""
    command = parse_study(STUDY_OF_A_COMMAND, path="planned.yaml", root=tmp_path)
    made = plan(command, StudyRecord(tmp_path / "none"))
    assert made.cost is None and "Launch and ask again after the first trial" in made.cost_note
    assert "--probe" not in made.cost_note and "--samples-per-s" not in made.cost_note
    ours = parse_study(STUDY, path="planned.yaml", root=tmp_path)
    usual = plan(ours, StudyRecord(tmp_path / "none")).cost_note
    assert "--probe, give the throughput of one gang with --samples-per-s, or launch" in usual


def test_what_cannot_be_counted_is_said(tmp_path: Path) -> None:
    """Without the files that an architecture needs (here a text tower of a hub that is not
    reached) the plan stands, with the reason in a note."""
    text = STUDY.replace("model: RN50", "model: roberta-ViT-B-32")
    study = parse_study(text, path="planned.yaml", root=tmp_path)
    made = plan(study, StudyRecord(tmp_path / "none"), deep=True)
    assert made.groups == () and made.disk_gib is None
    assert any(re.search("cannot be counted here: .+", note) for note in made.notes)


def test_weights_that_do_not_fit_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """The plan tries init_from on every model: names the misfit and the mend, or what is loaded."""
    import open_clip

    openclip.model.register_models()
    state = open_clip.create_model("tiny-rn-a").state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "ddp.pt")
    text = {name: value for name, value in state.items() if not name.startswith("visual.")}
    torch.save(text, tmp_path / "text.pt")

    def planned(init_from: str) -> list[str]:
        file = STUDY.replace("RN50", "tiny-rn-a").replace(
            "  beta2: [0.999, 0.98]",
            f"  start: {{scratch: {{}}, given: {{init_from: {init_from}}}}}",
        )
        study = parse_study(file, path="planned.yaml", root=tmp_path)
        made = plan(study, StudyRecord(tmp_path / "none"))
        return [note for note in made.notes if note.startswith("start=given")]

    with pytest.raises(PlanError, match=r"start=given: .*ddp\.pt does not .*Did you mean key_map"):
        planned("{path: ddp.pt}")
    with pytest.raises(PlanError, match=r"missing in the file: visual\..*only 70\.6% of"):
        planned("{path: text.pt}")
    assert (
        "100.0% of the parameters" in planned(r'{path: ddp.pt, key_map: [["^module\\.", ""]]}')[0]
    )
    (told,) = planned('{path: text.pt, allow_missing: ["visual.*"], min_loaded: 0.5}')
    assert "123 at their random initialisation: visual.attnpool" in told
    assert "not on this machine" in planned("{path: elsewhere.pt}")[0]


def test_a_misspelt_model_is_refused_with_each_name_counted_once() -> None:
    """Also when open_clip is loaded, which then knows the same models and those that were added."""
    import open_clip

    openclip.model.register_models()
    config = openclip.Config(model="RN5O", train_data="t.tar")
    with pytest.raises(ValueError, match=rf"mean 'RN50'\? \({len(open_clip.list_models())} names"):
        openclip.check(config, workers=1, gpus=0)
