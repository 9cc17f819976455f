"""Study files: what is accepted, and what is said about what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ablate.errors import StudyError
from ablate.study import Study, json_schema, load_setting, load_study, parse_study
from ablate.study.ladder import rungs
from ablate.trial.identity import identify
from ablate.trial.recipe import Role, fields_of, load, names, no_identity

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))

GOOD = """\
recipe: openclip
baseline:
  model: RN50
  train_data: data/train.tar
  imagenet_val: data/val
  beta2: 0.999
  precision: fp32
factors:
  precision: [fp32, amp_bf16]
  beta2: [0.98]
  contrastive_loss:
    default: {}
    local_gather: {local_loss: true, gather_with_grad: true}
design: one_at_a_time
seeds: [0, 1]
gang: {workers: 2}
"""


def parse(text: str) -> Study:
    return parse_study(text, path="s.yaml", root="/r")


def refusal(text: str) -> str:
    with pytest.raises(StudyError) as caught:
        parse(text)
    return str(caught.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_in_the_repository_loads(path: Path) -> None:
    """Each file in studies/ is a valid study, or a setting to train alone, which has no factors."""
    if path.name == "retrieval_weights.yaml":
        assert not load_setting(path).factors
    else:
        assert load_study(path).factors


def test_a_good_study_is_resolved() -> None:
    """Levels get names, the level that changes nothing is the baseline, one is added if missing."""
    study = parse(GOOD)
    assert [factor.name for factor in study.factors] == ["precision", "beta2", "contrastive_loss"]
    assert study.baseline_levels() == {
        "precision": "fp32",
        "beta2": "0.999",
        "contrastive_loss": "default",
    }
    cell = study.cell({"contrastive_loss": "local_gather"})
    config = study.config(cell, seed=1)
    assert (config["local_loss"], config["gather_with_grad"], config["seed"]) == (True, True, 1)
    assert config["eps"] == 1e-8, "the default of open_clip for RN50 is made explicit"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("beta2: 0.999", "bata2: 0.999"),
            "s.yaml:6: baseline.bata2: unknown key 'bata2'; did you mean 'beta2'?",
        ),
        (
            ("seeds: [0, 1]", "seed: [0, 1]"),
            "s.yaml:15: seed: unknown key 'seed'; did you mean 'seeds'?",
        ),
        (
            ("design: one_at_a_time", "design: one_at_time"),
            "s.yaml:14: design: design 'one_at_time' is not known; did you mean 'one_at_a_time'?",
        ),
        (("recipe: openclip", "recipe: opnclip"), "s.yaml:1: recipe: 'opnclip' is no recipe"),
        (("[fp32, amp_bf16]", "[fp32, amp_bf17]"), "s.yaml:9: factors.precision[1].precision:"),
        (("[0.98]", "[]"), "s.yaml:10: factors.beta2: the factor has no level"),
        (("[0.98]", "[0.98, 0.98]"), "level '0.98' is the same experiment as level '0.98'"),
        (
            ("[0.98]", "[0.999]"),
            "s.yaml:10: factors.beta2: the only level, '0.999', is the baseline itself",
        ),
        (
            ("  beta2: [0.98]", "  betta2: [0.98]"),
            "s.yaml:10: factors.betta2: 'betta2' is no field of the openclip recipe; "
            "did you mean 'beta2'?",
        ),
        (
            ("local_loss: true,", "precision: amp_bf16,"),
            "factors 'precision' and 'contrastive_loss' both set precision",
        ),
        (("[0, 1]", "[0, 0]"), "s.yaml:15: seeds: seed 0 is listed twice"),
        (("[0, 1]", "[]"), "s.yaml:15: seeds: no seed is listed"),
        (
            ("[0, 1]", "[0, 1099511627776]"),
            "s.yaml:15: seeds: seeds are whole numbers from 0 to 2147483647, not 1099511627776",
        ),
        (
            ("seeds: [0, 1]", "seeds: [0, 1]\nobjective: {margin: 5}"),
            "s.yaml:16: objective.margin: imagenet_top1 is a share between 0 and 1, and no two "
            "differ by more than 5; write 0.05 for 5 points",
        ),
        (
            ("precision: fp32\n", "precision: fp32\n  seed: 3\n"),
            "baseline.seed: a seed is a replicate",
        ),
        (("workers: 2", "workers: 0"), "s.yaml:16: gang.workers:"),
        (
            ("workers: 2", "worker: 2"),
            "s.yaml:16: gang.worker: unknown key 'worker'; did you mean 'workers'?",
        ),
        (
            ("beta2: 0.999\n", "beta2: 0.999\n  beta2: 0.98\n"),
            "s.yaml:7: baseline.beta2: the key stands here a second time",
        ),
        (
            ("[0.98]", "{low: 0.9, high: 0.99}"),
            "s.yaml:10: factors.beta2: a range can only be searched",
        ),
        (
            ("[0.98]", "{low: 0.9, high: 1.2}"),
            "s.yaml:10: factors.beta2.high: beta2 should be less than 1, not 1.2",
        ),
        (("[0.98]", "{lo: 0.9, high: 0.99}"), "a range is {low: ..., high: ...}"),
        (
            ("  beta2: [0.98]", "  warmup: {low: 0.5, high: 9}"),
            "s.yaml:10: factors.warmup.low: warmup is a whole number in the baseline, and 0.5",
        ),
        (("recipe: openclip", "recipe: [openclip"), "s.yaml:"),
        (
            ("precision: fp32\n", "precision: fp32\n  epochs: true\n"),
            "s.yaml:8: baseline.epochs: input should be a number",
        ),
        (
            ("[0.98]", "[0.98, false]"),
            "s.yaml:10: factors.beta2[1].beta2: input should be a number",
        ),
        (
            ("data/val", "${DATA}/val"),
            "s.yaml:5: baseline.imagenet_val: ${DATA} looks like a template that was not filled in",
        ),
    ],
)
def test_a_wrong_study_is_refused_with_line_and_advice(
    change: tuple[str, str], expected: str
) -> None:
    """Each mistake is told with file, line, what is wrong and what is likely meant."""
    assert change[0] in GOOD
    assert expected in refusal(GOOD.replace(change[0], change[1], 1))


def test_a_validator_s_own_words_are_not_handed_on() -> None:
    """No factor at all, and factors in a list: what to write, and no word of dictionaries."""
    head, _, rest = GOOD.partition("factors:\n")
    _, _, tail = rest.partition("design:")
    said = refusal(f"{head}factors: {{}}\ndesign:{tail}")
    assert "s.yaml:8: factors: is empty; write at least 1" in said
    said = refusal(f"{head}factors: [beta2]\ndesign:{tail}")
    assert "s.yaml:8: factors: write a mapping, NAME: ..., not ['beta2']" in said


def test_all_problems_are_told_at_once() -> None:
    """Two mistakes in one file give two lines, in the file's order."""
    text = GOOD.replace("beta2: 0.999", "beta2: high").replace("precision: fp32\n", "prcision: 1\n")
    lines = refusal(text).splitlines()
    assert [line.split(":")[1] for line in lines] == ["6", "7"]


def test_all_problems_are_told_at_once_whatever_else_is_missing() -> None:
    """A missing required key, a wrong design and a wrong baseline field hide no other mistake; a
    field that is wrong in the baseline accuses no factor falsely."""
    text = GOOD.replace("beta2: 0.999", "beta2: high").replace("precision: [", "precison: [")
    said = refusal(text.replace("seeds: [0, 1]\n", "").replace("one_at_a", "one_a"))
    assert "seeds: is missing" in said and "'one_a_time' is not known" in said
    assert "s.yaml:6: baseline.beta2" in said and "did you mean 'precision'?" in said
    assert len(said.splitlines()) == 4


@pytest.mark.parametrize("number", [1, 3])
def test_a_number_of_seeds_means_the_first_ones(number: int) -> None:
    """`seeds: 3` is [0, 1, 2]."""
    found = parse(GOOD.replace("seeds: [0, 1]", f"seeds: {number}"))
    assert found.seeds == tuple(range(number))


@pytest.mark.parametrize("given", ["0", "-3", "true", "1e9"])
def test_a_number_of_seeds_that_makes_no_sense_is_refused(given: str) -> None:
    """None, fewer, a word or a billion: the line and what to write."""
    assert "s.yaml:15: seeds" in refusal(GOOD.replace("seeds: [0, 1]", f"seeds: {given}"))


def test_a_common_name_of_a_field_suggests_ours() -> None:
    """`learning_rate` as a factor or in the baseline is answered with lr."""
    assert "did you mean 'lr'?" in refusal(GOOD.replace("  beta2: [", "  learning_rate: ["))
    assert "did you mean 'lr'?" in refusal(GOOD.replace("  beta2: 0", "  learning_rate: 0"))


def test_every_key_of_the_schema_says_what_it_means() -> None:
    """An editor shows a description for each key of a study, and of its nested keys."""
    schema = json_schema()
    for name, entry in schema["properties"].items():
        assert entry.get("description"), name
    for title in ("GangSpec", "Budget", "Objective", "SequentialSeeds", "Search", "Prune"):
        for name, entry in schema["$defs"][title]["properties"].items():
            assert entry.get("description") or "const" in entry, f"{title}.{name}"
    assert {"type": "integer", "minimum": 1, "maximum": 1000} in schema["properties"]["seeds"][
        "anyOf"
    ]


def test_yaml_scalars_mean_what_they_look_like() -> None:
    """1e-3 is a number, and level names such as `on` and `no` stay text."""
    text = GOOD.replace("  beta2: [0.98]", "  lr: [1e-3, 2e-3]\n  beta2: {on: 0.98, no: 0.9}")
    study = parse(text)
    assert [level.name for level in study.factor("lr").levels][-2:] == ["0.001", "0.002"]
    assert [level.name for level in study.factor("beta2").levels] == ["0.999", "on", "no"]


def test_an_alias_bomb_is_refused() -> None:
    """Nested YAML aliases that would expand to a billion values end in a message, soon."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 10):
        bomb += f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(9))}]\n"
    assert "is no study" in refusal(bomb)


def test_a_python_object_in_yaml_is_refused() -> None:
    """A tag that would build a Python object is an error, not an object."""
    assert "is not read" in refusal(GOOD.replace("[0, 1]", "!!python/name:os.system []"))


@example("0[:")
@example("constrained-float:")
@given(st.text(max_size=200))
def test_any_text_ends_in_a_study_error(text: str) -> None:
    """Whatever a file holds, the user gets a StudyError with the file's name, never a crash."""
    with pytest.raises(StudyError, match=r"^s\.yaml:\d+:"):
        parse(text)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    """A mistyped path lists the study files that are there."""
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    with pytest.raises(StudyError, match="Found there: .*quickstart.yaml"):
        load_study(tmp_path / "quikstart.yaml")


def test_the_id_depends_on_every_field_that_counts_and_on_no_other() -> None:
    """The resolved configuration, the workers and the recipe make the id; ignored fields do not."""
    base: dict[str, Any] = {"lr": 0.1, "workers": 2}
    first = identify("r", base, workers=2, not_identity={"workers"})
    assert first == identify("r", {**base, "workers": 8}, workers=2, not_identity={"workers"})
    assert first != identify("r", {**base, "lr": 0.2}, workers=2, not_identity={"workers"})
    assert first != identify("r", base, workers=4, not_identity={"workers"})
    assert first != identify("q", base, workers=2, not_identity={"workers"})


@pytest.mark.parametrize(
    ("recipe", "text", "before"),
    [
        ("openclip", "{model: RN50, train_data: x.tar, beta2: 0.98}", "7da7afaaa652"),
        ("mae", "{data_path: x, val_path: y}", "082daf7bacd8"),
    ],
)
def test_a_field_that_came_later_leaves_the_ids_of_earlier_trials(recipe, text, before):
    """A study that ran before the field was there goes on with its trials; at any other value the
    field makes another experiment."""
    config = load(recipe).Config(**yaml.safe_load(text))
    content = config.model_dump(mode="json")
    ignored = no_identity(type(config), content)
    later = fields_of(type(config), Role.LATER)
    assert later and later <= ignored
    assert identify(recipe, content, workers=1, not_identity=ignored) == before
    for name in later:
        other = {**content, name: "another"}
        assert name not in no_identity(type(config), other)


def test_written_defaults_and_left_out_defaults_are_one_experiment() -> None:
    """Writing a default out does not change a trial's id."""
    study = parse(GOOD)
    explicit = parse(GOOD.replace("  beta2: 0.999\n", "  beta2: 0.999\n  eps: 1.0e-8\n"))
    cell, other = study.cell({}), explicit.cell({})
    assert study.trial(cell, seed=0).id == explicit.trial(other, seed=0).id


def test_the_schema_knows_every_field_of_every_recipe() -> None:
    """The JSON schema lists the keys of a study and the fields of each recipe's baseline."""
    schema = json_schema()
    assert {"recipe", "baseline", "factors", "design", "seeds"} <= set(schema["properties"])
    for name in names():
        fields = set(schema["$defs"][f"baseline-{name}"]["properties"])
        assert fields == set(load(name).Config.model_fields) - {"seed"}


NUISANCE = """\
nuisance:
  settings: {lr: {low: 1.0e-4, high: 1.0e-2, log: true}}
  points: 3
"""


def test_a_nuisance_range_is_cut_evenly_and_lists_are_crossed() -> None:
    """Three points of a logarithmic range include its ends; two lists give all combinations; a
    range beside another setting gives a fixed number of different points."""
    study = parse(GOOD + NUISANCE)
    assert [levels["lr"] for levels in study.candidates.levels] == ["0.0001", "0.001", "0.01"]
    assert study.candidates.seeds == (1000,)
    assert [factor.name for factor in study.nuisance] == ["lr"]
    assert "lr" not in [factor.name for factor in study.compared]
    lists = "nuisance: {settings: {lr: [1.0e-3, 2.0e-3], wd: [0.1, 0.2, 0.3]}}\n"
    assert len(parse(GOOD + lists).candidates.levels) == 6
    both = NUISANCE.replace("log: true}", "log: true}, wd: [0.1, 0.2]").replace("3", "5")
    points = parse(GOOD + both).candidates.levels
    assert len(points) == 5 and {levels["wd"] for levels in points} == {"0.1", "0.2"}
    assert points == parse(GOOD + both).candidates.levels, (
        "the same for every cell and every launch"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NUISANCE.replace("lr:", "lrr:"), "'lrr' is no field of the recipe; did you mean 'lr'?"),
        (NUISANCE.replace("lr:", "beta2:"), "factor 'beta2' sets beta2, too; compare it or tune"),
        (NUISANCE.replace("  points: 3\n", ""), "lr is a range: say how many points to try"),
        ("nuisance: {settings: {lr: [1.0e-3]}}\n", "list at least two values"),
        ("nuisance: {settings: {lr: [1.0e-3, 2.0e-3]}, points: 4}\n", "points is for ranges"),
        (NUISANCE + "  seeds: [0]\n", "seed 0 is one of the study's seeds"),
        (NUISANCE.replace("lr:", "model:"), "model is not a number; list the values to try"),
    ],
)
def test_a_wrong_nuisance_is_refused(text: str, expected: str) -> None:
    """What is wrong with it, and what to write."""
    assert expected in refusal(GOOD + text)


def test_a_search_takes_no_nuisance_and_no_added_seeds() -> None:
    """A search tunes by itself, and compares cells over all their seeds."""
    text = GOOD.replace("design: one_at_a_time", "design: search")
    assert "a search chooses among all settings by itself" in refusal(text + NUISANCE)
    text = text.replace("seeds: [0, 1]", "seeds: {min: 2, max: 4}")
    assert "search compares cells over all their seeds" in refusal(text)


def test_controls_name_levels_that_there_are() -> None:
    """A control must be a level of a factor; the nearest name is given."""
    assert "did you mean 'contrastive_loss'?" in refusal(
        GOOD + "controls: {contrastive_los: [default]}\n"
    )
    assert "did you mean 'local_gather'?" in refusal(
        GOOD + "controls: {contrastive_loss: [local_gathr]}\n"
    )


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("{at: best}", "better than the run is"),
        ("{at: best_by_heldout}", "needs heldout"),
        ("{metric: knn_top1, at: best_by_heldout, heldout: knn_top1}", "the metric itself"),
        ("{at: best_by_heldout, heldout: imagenet_top1}", "cannot choose for imagenet_top1"),
        ("{at: best_by_heldout, heldout: knn_topl}", "did you mean 'knn_top1'?"),
        ("{at: mean_last_k, k: 1}", "greater than or equal to 2"),
    ],
)
def test_the_best_of_what_is_reported_is_refused(objective: str, expected: str) -> None:
    """A run counts with its last evaluations, or with the one that other data choose."""
    assert expected in refusal(f"{GOOD}objective: {objective}\n")


@pytest.mark.parametrize(
    ("rung", "expected"),
    [
        ("{}", "ladder[0]: the rung changes nothing"),
        ("{beta2: 0.9}", "factor 'beta2' sets beta2"),
        ("{epoch: 1}", "did you mean 'epochs'?"),
    ],
)
def test_a_rung_changes_fields_that_all_cells_share(rung: str, expected: str) -> None:
    """What it cannot change is told with its place."""
    assert expected in refusal(f"{GOOD}ladder: [{rung}]\n")


def test_every_rung_is_a_study_of_its_own() -> None:
    """The same question of another baseline, under a name of its own, that a folder can hold."""
    study = parse(f"{GOOD}confirm: true\nladder: [{{epochs: 1}}, {{epochs: 2, accum_freq: 2}}]\n")
    (first, one), (second, two) = rungs(study)
    assert (first, second) == ("epochs=1", "epochs=2, accum_freq=2")
    assert [one.name, two.name] == [f"{study.name}-rung1", f"{study.name}-rung2"]
    assert one.baseline == {**study.baseline, "epochs": 1} and not one.confirm
    assert one.factors == study.factors and one.seeds == study.seeds
    assert rungs(one) == [], "a rung has none"
