"""Starting from weights: strict, injective, reported, checked by features, without an optimizer."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_trials import config, run, write_trial
from torch import nn

from ablate.errors import LoadError
from ablate.recipes import openclip
from ablate.training import checkpoint, optim
from ablate.training.task import Task
from ablate.training.weight_files import find_unsound
from ablate.training.weights import load_weights
from ablate.trial.recipe import absolute


class Net(nn.Module):
    def __init__(self, *, head: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(40, 30)
        self.norm = nn.BatchNorm1d(30)
        self.head = nn.Linear(30, head)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def store(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path)
    return path


def other() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(Net().state_dict())


def test_all_tensors_arrive(tmp_path: Path, net: Net) -> None:
    """A file that fits is loaded whole, buffers included, and the report says so."""
    report = load_weights(net, store(tmp_path / "w.safetensors", other()))
    assert all(torch.equal(value, other()[name]) for name, value in net.state_dict().items())
    assert report.loaded_share == 1.0 and report.loaded_tensors == len(other())
    assert report.at_random == () and len(report.sha256) == 64
    json.dumps(report.to_dict())


ODD: dict[str, tuple[Any, str]] = {
    "names that are numbers": ({1: torch.ones(3)}, "holds no state dict"),
    "no values": ({n: t.to("meta") for n, t in other().items()}, "has no values"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_file_whose_tensors_are_no_plain_numbers_is_refused(
    kind: str, tmp_path: Path, net: Net
) -> None:
    """Each was an error of torch's own, or of ours."""
    content, words = ODD[kind]
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(LoadError, match=words):
        load_weights(net, tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_pointer_in_place_of_a_file_is_named(name: str, tmp_path: Path, net: Net) -> None:
    """Whatever its suffix; so is the index of a checkpoint in several files."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(LoadError, match="git lfs pull"):
        load_weights(net, tmp_path / name)
    (tmp_path / name).write_text('{"weight_map": {}}')
    with pytest.raises(LoadError, match="index of a checkpoint in several files"):
        load_weights(net, tmp_path / name)


def test_torch_files_are_read_as_plain_weights_only(tmp_path: Path, net: Net) -> None:
    """A .pt with a state_dict inside is read; one that would run code is refused."""
    torch.save({"state_dict": other(), "epoch": 3}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net.body.weight, other()["body.weight"])
    torch.save({"state_dict": Net()}, tmp_path / "code.pt")
    with pytest.raises(LoadError, match="Net among its tensors, which would run code"):
        load_weights(net, tmp_path / "code.pt")


def test_what_scripts_store_beside_the_tensors_is_read(tmp_path: Path, net: Net) -> None:
    """argparse's Namespace and numpy's scalars and arrays run no code."""
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "at": np.arange(3)}
    torch.save({"model": other(), **beside, "epoch": 3}, tmp_path / "w.pt")
    assert load_weights(net, tmp_path / "w.pt").taken == "model"


UNREADABLE: dict[str, tuple[Any, str | None, str]] = {
    "teacher or student": (
        {"teacher": other(), "student": other(), "epoch": 1}, None,
        "several state dicts: teacher, student. Say which: init_from.key: student",
    ),
    "deeper": (
        {"model": {"teacher": other(), "student": other()}}, None,
        "several state dicts: model.teacher, model.student. Say which: .* model.student",
    ),
    "a number among the tensors": (
        {**other(), "scale": 0.5}, None, r"holds no state dict .*; it holds scale \(float\), "
    ),
    "no such key": (
        {"teacher": other()}, "student", "has no 'student'; it holds teacher .state dict of 9"
    ),
    "no tensors": ({"epoch": 3, "name": "x"}, None, r"holds epoch \(int\), name \(str\)"),
    "one tensor": (torch.ones(3), None, "it holds one Tensor"),
    "a class": (
        {"net": Net()}, None, r"holds [\w.]*Net among its tensors, which would run code"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "key", "says"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_refused_file_is_told_by_what_it_holds(
    tmp_path: Path, net: Net, content: Any, key: str | None, says: str
) -> None:
    """What lies in it is listed, in words of our own and without switches that do not exist."""
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(LoadError, match=says) as told:
        load_weights(net, tmp_path / "w.pt", key=key)
    assert "weights_only" not in str(told.value) and "\x1b" not in str(told.value)


def test_of_several_state_dicts_the_one_asked_for_is_taken(tmp_path: Path, net: Net) -> None:
    """Without a key the usual one, and the report names what was left."""
    ema = {name: value + 1 for name, value in other().items()}
    torch.save({"model": other(), "model_ema": ema, "deep": {"net": ema}}, tmp_path / "w.pt")
    report = load_weights(net, tmp_path / "w.pt")
    assert (report.taken, report.others) == ("model", ("model_ema",))
    for key in ("model_ema", "deep.net"):
        assert load_weights(net, tmp_path / "w.pt", key=key).taken == key
        assert torch.equal(net.head.bias, ema["head.bias"])


def test_numbers_are_read_however_they_are_stored(tmp_path: Path, net: Net) -> None:
    """Sparse tensors and Parameters are the numbers that they hold."""
    stored = {
        name: value.to_sparse() if value.ndim == 2 else value for name, value in other().items()
    }
    torch.save({**stored, "head.bias": nn.Parameter(stored["head.bias"])}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert all(torch.equal(value, other()[name]) for name, value in net.state_dict().items())


def test_what_other_libraries_write_is_told_by_name(tmp_path: Path, net: Net) -> None:
    """A program of TorchScript and numpy's archive are no torch file of weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated, and there are many of them
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(LoadError, match="a TorchScript program; .* torch.jit.load"):
        load_weights(net, tmp_path / "w.pt")
    np.savez(tmp_path / "w.npz", bias=np.zeros(3))
    with pytest.raises(LoadError, match="numpy's archive"):
        load_weights(net, tmp_path / "w.npz")
    store(tmp_path / "w.safetensors", other())
    with pytest.raises(LoadError, match="no keys; leave init_from.key: model out"):
        load_weights(net, tmp_path / "w.safetensors", key="model")


def test_cut_files_and_folders_are_told_apart(tmp_path: Path, net: Net) -> None:
    """A cut file is cut; a folder is a folder, of ours, of torch's, or of something else."""
    torch.save(other(), tmp_path / "w.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-200])
    with pytest.raises(LoadError, match="it is cut, damaged, or something else"):
        load_weights(net, tmp_path / "cut.pt")
    for content, says in (
        ("<!DOCTYPE html><html>404", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("", "it is empty"),
    ):
        (tmp_path / "other.pt").write_text(content)
        with pytest.raises(LoadError, match=says):
            load_weights(net, tmp_path / "other.pt")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "x.distcp").touch()
    with pytest.raises(LoadError, match="is a folder, and weights are one file; it holds x.dis"):
        load_weights(net, tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").touch()
    with pytest.raises(LoadError, match="dcp_to_torch"):
        load_weights(net, tmp_path / "dcp")
    (tmp_path / "ours").mkdir()
    store(tmp_path / "ours" / "model.safetensors", other())
    assert load_weights(net, tmp_path / "ours").loaded_share == 1.0


UNSOUND: dict[str, tuple[Any, str]] = {
    "nan": (
        lambda t: t["body.weight"][0].fill_(torch.nan),
        "body.weight holds 40 values that are not finite .nan",
    ),
    "inf": (lambda t: t["head.bias"].fill_(torch.inf), "head.bias holds 3 values.*inf"),
    "variance": (lambda t: t["norm.running_var"][:2].fill_(-1.0), "2 variances below 0"),
    "whole numbers": (
        lambda t: t.update({"body.weight": t["body.weight"].to(torch.int8)}),
        "body.weight holds int8, not floating-point numbers",
    ),
    "zero": (lambda t: [v.zero_() for v in t.values() if v.ndim > 1], "all 2 matrices are 0"),
}


@pytest.mark.parametrize(("change", "says"), UNSOUND.values(), ids=UNSOUND.keys())
def test_values_are_looked_at_before_they_are_used(tmp_path: Path, change: Any, says: str) -> None:
    """What no trained model holds is refused by its name, on a model without memory too."""
    tensors = other()
    change(tensors)
    path = store(tmp_path / "w.safetensors", tensors)
    with torch.device("meta"):
        sketched = Net()
    for model in (Net(), sketched):
        with pytest.raises(LoadError, match=says), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_weights(model, path)


def test_a_temperature_in_place_of_its_logarithm_is_told() -> None:
    """14.3 is exp(2.66); 4.8, of a trained SigLIP, is a logarithm."""
    (said,) = find_unsound({"logit_scale": torch.tensor(14.3)})
    assert "Was its exponential stored? Write reset: [logit_scale]" in said
    assert not find_unsound({"logit_scale": torch.tensor([4.8])})


def test_a_wrapper_that_counts_its_steps_is_recognised(tmp_path: Path, net: Net) -> None:
    """torch.optim.swa_utils.AveragedModel: all names but one have the prefix."""
    torch.save({"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in other().items()}},
               tmp_path / "w.pt")  # fmt: skip
    with pytest.raises(LoadError, match=r"It takes 9 of 10 names; n_averaged would be for allow"):
        load_weights(net, tmp_path / "w.pt")


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "missing": (lambda t: t.pop("norm.bias"), {}, "missing in the file: norm.bias.*allow_missing"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2)), {}, "not in the model: extra"),
    "shape": (lambda t: t.update({"head.bias": torch.ones(9)}), {}, r"\(9,\), not \(3,\)"),
    "transposed": (
        lambda t: t.update({"body.weight": t["body.weight"].T}), {}, "transposed\\?"
    ),
    "too little": (
        lambda t: t.pop("body.weight"), {"allow_missing": ["body.*"]}, "only .*% of the parameters"
    ),
    "reset too much": (lambda t: None, {"reset": ["body.*"]}, "only .*% of the parameters"),
    "two into one": (
        lambda t: t.update({"old.bias": torch.ones(3)}),
        {"key_map": [("^old", "head")]},
        "sends both",
    ),
    "other file": (lambda t: None, {"sha256": "0" * 64}, "init_from asks for 000"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(
    tmp_path: Path, net: Net, change: Any, options: dict[str, Any], says: str
) -> None:
    """Each misfit is an error that names it, and the model is left as it was."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tensors = other()
    change(tensors)
    with pytest.raises(LoadError, match=says):
        load_weights(net, store(tmp_path / "w.safetensors", tensors), **options)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_forgotten_prefix_is_recognised(tmp_path: Path, net: Net) -> None:
    """`module.` on every name: the error says the key_map, which then works."""
    path = store(tmp_path / "w.safetensors", {f"module.{n}": t for n, t in other().items()})
    with pytest.raises(LoadError, match=r"key_map: \[\['\^module\\\\\.', ''\]\]"):
        load_weights(net, path)
    report = load_weights(net, path, key_map=[(r"^module\.", "")])
    assert report.loaded_share == 1.0 and report.renamed["module.head.bias"] == "head.bias"


def test_allowed_gaps_are_reported(tmp_path: Path) -> None:
    """A new head: skipped for its shape, with the rest loaded; the report names what is random."""
    net = Net(head=5)
    path = store(tmp_path / "w.safetensors", {**other(), "extra": torch.ones(1)})
    report = load_weights(
        net, path, on_shape="skip", allow_unexpected=["ext*"], reset=["norm.bias"], min_loaded=0.8
    )
    assert report.at_random == ("head.bias", "head.weight", "norm.bias")
    assert report.unexpected == ("extra",) and 0.8 < report.loaded_share < 0.99
    assert torch.equal(net.body.weight, other()["body.weight"])


def test_the_report_names_every_part(tmp_path: Path) -> None:
    """Renamed, missing, unexpected, mismatched, reset and cast tensors, each in its own list."""
    net = Net(head=5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tensors = other()
    tensors["trunk.weight"] = tensors.pop("body.weight").half()
    tensors["trunk.bias"] = tensors.pop("body.bias")
    del tensors["norm.num_batches_tracked"], tensors["norm.weight"]
    path = store(tmp_path / "w.safetensors", {**tensors, "old.scale": torch.ones(1)})
    report = load_weights(
        net,
        path,
        key_map=[(r"^trunk\.(weight|bias)$", r"body.\1")],
        reset=["norm.bias"],
        allow_missing=["norm.num_*", "norm.weight"],
        allow_unexpected=["old.*"],
        on_shape="skip",
        min_loaded=0.8,
    )
    assert report.renamed == {"trunk.weight": "body.weight", "trunk.bias": "body.bias"}
    assert report.missing == ("norm.num_batches_tracked", "norm.weight")
    assert report.unexpected == ("old.scale",)
    assert report.mismatched == ("head.bias", "head.weight")
    assert report.reset == ("norm.bias",) and report.cast == ("body.weight",)
    assert report.resized == () and report.loaded_tensors == 4
    assert report.loaded_share == pytest.approx(1230 / (1230 + 60 + 155))
    for name in report.at_random:
        assert torch.equal(net.state_dict()[name], before[name])
    assert torch.equal(net.body.weight, other()["body.weight"].half().float())


@pytest.mark.parametrize(("lacking", "loads"), [(9, True), (10, False)])
def test_99_percent_must_be_loaded(tmp_path: Path, lacking: int, loads: bool) -> None:
    """Globs may allow what they like: below 99 % of the parameters it takes min_loaded too."""
    net = nn.ModuleDict({"body": nn.Linear(990, 1, bias=False), "a": nn.Linear(9, 1, bias=False)})
    if lacking == 10:
        net["b"] = nn.Linear(2, 1, bias=False)
    path = store(tmp_path / "w.safetensors", {"body.weight": torch.ones(1, 990)})
    allowed: dict[str, Any] = {"allow_missing": ["a.*", "b.*"]}
    if loads:
        assert load_weights(net, path, **allowed).loaded_share == pytest.approx(990 / 999)
        return
    with pytest.raises(LoadError, match=r"only 98\.9% of the parameters.*min_loaded is 99\.0%"):
        load_weights(net, path, **allowed)
    assert load_weights(net, path, min_loaded=0.98, **allowed).loaded_share < 0.99


def test_a_trial_starts_from_weights_with_a_new_optimizer(tmp_path: Path, data: Path) -> None:
    """init_from loads weights alone: Adam's moments of the first run would make the first update
    another one (its step count switches bias correction off), so they must not come along."""
    first = write_trial(tmp_path / "first", data, epochs=1)
    assert run(first.folder) == [0]
    source = checkpoint.path_of(first.folder / "checkpoints", 6)
    path = str(source / "model.safetensors")
    tuned = write_trial(
        tmp_path / "tuned", data, epochs=1, init_from={"path": path}, warmup=0, wd=0.0, seed=1
    )
    assert run(tuned.folder) == [0]
    result = tuned.result(1)
    assert result is not None
    report = result["facts"]["init_from"]
    assert report["loaded_share"] == 1.0 and report["missing"] == []
    assert tuned.trace()[0]["logit_scale"] != 1 / 0.07
    after = checkpoint.load(checkpoint.path_of(tuned.folder / "checkpoints", 6))
    assert after.optimizer["text_projection/step"] == 6  # not 12
    moved = (
        safetensors.torch.load_file(path)["visual.conv1.weight"]
        - after.model["visual.conv1.weight"]
    )
    assert 0 < float(moved.abs().max()) < 6 * 1e-3 * 2


def test_moments_of_another_run_would_change_the_first_update() -> None:
    """Why fine-tuning must not load optimizer state: with it the first update is many times off,
    and load_state_dict would also bring the old learning rate and betas along."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(50))
    old = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(100):
        weight.grad = 100 * torch.ones(50)
        old.step()
    sizes = {}
    for state in (None, old.state_dict()):
        fresh = nn.Parameter(torch.zeros(50))
        new = torch.optim.AdamW([fresh], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
        if state is not None:
            new.load_state_dict(state)
            assert new.param_groups[0]["lr"] == 1.0 and new.param_groups[0]["betas"][1] == 0.999
            new.param_groups[0]["lr"] = 1e-3
        fresh.grad = -torch.ones(50)
        new.step()
        sizes[state is not None] = float(fresh.detach().mean())
    assert sizes[False] == pytest.approx(1e-3)
    assert sizes[True] < -0.5e-3  # it still walks the old way, against its own gradient


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `export` leaves it, of weights with running statistics of their own."""
    import open_clip

    folder = tmp_path_factory.mktemp("exported")
    openclip.model.register_models()
    torch.manual_seed(5)
    model = open_clip.create_model("tiny-rn-a", output_dict=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    openclip.export_model(config(), folder / "weights.safetensors", folder / "model")
    return folder / "model"


def fresh_model() -> nn.Module:
    import open_clip

    torch.manual_seed(9)
    model: nn.Module = open_clip.create_model("tiny-rn-a", output_dict=True)
    return model


def test_features_are_checked_after_loading(exported: Path) -> None:
    """Weights exported with their probe's features give the same features where they are loaded."""
    start = config(init_from={"path": str(exported / "open_clip_model.safetensors")})
    assert "equal" in openclip.weights.load_initial_weights(start, fresh_model())["features"]


def test_swapped_names_are_caught_by_the_features(tmp_path: Path, exported: Path) -> None:
    """Two tensors of one shape under each other's name load without complaint; features tell."""
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    path = folder / "open_clip_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    one, two = "visual.attnpool.q_proj.weight", "visual.attnpool.k_proj.weight"
    tensors[one], tensors[two] = tensors[two], tensors[one]
    store(path, tensors)
    with pytest.raises(LoadError, match="features differ.*image by"):
        openclip.weights.load_initial_weights(config(init_from={"path": str(path)}), fresh_model())


@pytest.mark.exhaustive
def test_a_second_load_in_a_fresh_process_gives_the_same_features(
    exported: Path, data: Path
) -> None:
    """Every tensor comes from the file, so another seed makes no difference; the second trial
    of a machine finds the other load in the cache."""
    loads = Path(os.environ["ABLATE_CACHE"]) / "loads"
    path = str(exported / "open_clip_model.safetensors")
    task = build(data, init_from={"path": path})
    report = task.facts["init_from"]
    assert report["reloaded"] == "equal features in a fresh process" and report["random"] == []
    there = set(loads.iterdir())
    again = build(data, init_from={"path": path}, lr=3e-3, seed=5)
    assert again.facts["init_from"]["reloaded"] == report["reloaded"]
    assert set(loads.iterdir()) == there


def build(data: Path, **changes: Any) -> Task:
    chosen = absolute(config(**changes), root=data)
    return openclip.build(chosen, rank=0, world_size=1, device=torch.device("cpu"))


def test_a_half_loaded_model_names_what_is_random(
    tmp_path: Path, exported: Path, data: Path
) -> None:
    """A file with one tower: refused; where it is allowed, the report says that features differ
    in a fresh process, and names every random tensor."""
    whole = safetensors.torch.load_file(exported / "open_clip_model.safetensors")
    half = {name: value for name, value in whole.items() if name.startswith("visual.")}
    path = str(store(tmp_path / "half.safetensors", half))
    with pytest.raises(LoadError, match="missing in the file"):
        build(data, init_from={"path": path})
    report = build(data, init_from={"path": path, "allow_missing": ["*"], "min_loaded": 0.1}).facts[
        "init_from"
    ]
    assert report["reloaded"].startswith("features differ in a fresh process (text by")
    assert "token_embedding.weight" in report["random"]
    assert not any(name.startswith("visual.") for name in report["random"])
    assert set(report["random"]) < set(report["missing"])  # constant ones are equal anyway


def test_parameters_that_silently_stay_random_are_an_error(exported: Path, data: Path) -> None:
    """A tower that the report calls loaded and that is not: the other load tells, by name."""
    chosen = config(init_from={"path": str(exported / "open_clip_model.safetensors")})
    model, _, _, facts = openclip.model.create_model(chosen, torch.device("cpu"))
    assert openclip.reload.check_load(chosen, model, facts["init_from"])["random"] == []
    for parameter in model.transformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    with pytest.raises(LoadError, match=r"features differ: text.*random.*transformer\.resblocks"):
        openclip.reload.check_load(chosen, model, facts["init_from"])


def test_positional_embeddings_can_be_interpolated(tmp_path: Path) -> None:
    """Another context length or image size: refused, or interpolated on request and reported."""
    import open_clip

    openclip.model.register_models()
    small = open_clip.create_model("tiny-rn-a", force_context_length=12)
    path = store(tmp_path / "w.safetensors", dict(small.state_dict()))
    with pytest.raises(LoadError, match="positional_embedding is"):
        openclip.weights.load_initial_weights(config(init_from={"path": str(path)}), fresh_model())
    start = config(init_from={"path": str(path), "on_shape": "interp_pos"})
    report = openclip.weights.load_initial_weights(start, fresh_model())
    assert report["resized"] == ("positional_embedding",)


def test_optimizer_state_of_another_model_never_slips_in() -> None:
    """Named state of one parameter more is refused instead of shifted by a position."""
    model, larger = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(larger.parameters())
    larger(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, numbers = optim.named_state(larger, optimizer)
    with pytest.raises(ValueError, match="no trainable parameter"):
        optim.load_named_state(model, torch.optim.AdamW(model.parameters()), tensors, numbers)
