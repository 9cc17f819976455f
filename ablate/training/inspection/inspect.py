"""Did it learn? What changed between two checkpoints, and whether their features are any good.

A falling loss does not show that a model learns, nor a flat one that it does not: weights may be
loaded in part, a tower may be frozen by mistake, an optimizer may hold a stale copy of the
parameters, features may have collapsed. So the weights and the features themselves are looked at:
``movement`` compares two sets of tensors, :func:`inspect` also needs labelled images.

The verdict is ``learning`` when nearest neighbours, a linear probe or a measure of the recipe's own
became better on the same images, by a paired bootstrap interval over images that leaves out zero
(Bonferroni over the three); ``collapsed`` when features no longer tell images apart or weights
are not finite; ``not learning`` when a gain that counts is ruled out; else ``undecided``, as
without images to look at.

Fitted BatchNorm statistics alone make a random network far better (on the emoji, neighbours rise
from 10 to 44 %), and they follow the data at a learning rate of nothing too. So when only one
side's have seen a batch, both sides' are fitted to the same images before they are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ablate.errors import AblateError, CheckpointError, LoadError
from ablate.records.folder import TrialRecord
from ablate.training import checkpoint
from ablate.training.evaluations import scores
from ablate.training.evaluations.health import averaging, batch_norms
from ablate.training.evaluations.scores import Score
from ablate.training.inspection.movement import (
    Comparison,
    Module,
    at_initialisation,
    compare_weights,
    is_unrelated,
    like_initialisation,
    name_some,
)
from ablate.training.inspection.specimen import Specimen
from ablate.training.optim import named_state
from ablate.training.task import Learner
from ablate.training.weight_files import read_weights
from ablate.trial.recipe import ability, able, absolute, load

Verdict = Literal["learning", "not learning", "collapsed", "undecided"]

IMAGES = 2048
"""Images that features are judged on, unless told otherwise."""
RECORD_IMAGES = 1024
RECORD_PROMPTS = 2048
"""Bounds of the summary that each trial's record gets; a text costs about as much as an image."""
PROBE_ITERATIONS = 50
LEAST_RANK = 2.0
LEAST_SPREAD = 0.25
"""Below these effective dimensions, or this share of an even spread (the markers' threshold) when
it fell there, features count as collapsed."""
LEAST_GAIN = 0.1
"""Share of images: "not learning" is said only where a larger gain is ruled out. Eighty images of
five classes leave an interval of 0.15 to either side, which would call young features unlearnt."""
LEAST_KEPT = 0.25
"""Features with less than this share of A's effective dimensions have collapsed when neighbours or
the probe became worse (on the emoji, a run that diverged kept 0.13, a sound one doubled them)."""
FITTING_IMAGES = 256
"""BatchNorm statistics are fitted to so many images, of tens of positions each."""


# --------------------------------------------------------------------------- what is compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One side of a comparison."""

    title: str
    tensors: Mapping[str, torch.Tensor] | None
    """None: the initial weights of the configuration."""
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    zero_gradients: Mapping[str, int] = field(default_factory=dict)
    known_seed: bool = False
    """Whether it comes from the configuration's own initial weights."""
    trial: Path | None = None
    """Folder of the trial it belongs to."""


def open_weights(path: Path, *, first: bool, key: str | None = None) -> Weights:
    """A trial folder, one of its checkpoints, a .safetensors file or a torch file of tensors.

    A trial folder stands for its initial weights when it comes `first`, else for its newest
    checkpoint. Torch files are read with ``weights_only``, which runs no code;
    `key` names the state dict in one that holds several.

    Raises:
        CheckpointError: there is nothing, or it is damaged.
    """
    if (path / "trial.json").is_file():
        if first:
            return Weights(title=f"{path.name}, initial weights", tensors=None, trial=path)
        there = [checkpoint.path_of(path / "checkpoints", step)
                 for step in reversed(checkpoint.steps(path / "checkpoints"))]  # fmt: skip
        newest = next((each for each in there if checkpoint.fault(each) is None), None)
        if newest is None:
            raise CheckpointError(f"{path} has no whole checkpoint yet")
        path = newest
    if (path / "study.json").is_file():
        raise CheckpointError(f"{path} is a whole study; give one of its trials: {path}/trials/ID")
    if path.is_dir():
        problem = checkpoint.fault(path)
        if problem is not None:
            raise CheckpointError(
                f"{path} is no whole checkpoint: {problem}. Give a trial folder, "
                "TRIAL/checkpoints/step-..., or a .safetensors or .pt file"
            )
        whole = checkpoint.load(path)
        trial = path.resolve().parent.parent
        return Weights(
            title=f"{trial.name}, step {whole.step}",
            tensors=whole.judged,
            moments=whole.optimizer,
            zero_gradients=whole.state.get("zero_gradients", {}),
            known_seed=(trial / "trial.json").is_file(),
            trial=trial if (trial / "trial.json").is_file() else None,
        )
    try:
        asked = None if path.suffix == ".safetensors" else key  # the other file may have several
        found = read_weights(path, key=asked, asked_by="--key")
    except LoadError as error:
        raise CheckpointError(str(error)) from error
    title = f"{path.name}, its {found.taken}" if found.others or asked else path.name
    return Weights(title=title, tensors=_without_wrapper(found.tensors))


def _without_wrapper(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as the model has them, without what DDP and torch.compile put before them."""
    for prefix in ("module.", "_orig_mod."):
        wrapped = sum(name.startswith(prefix) for name in tensors)
        if tensors and wrapped >= 0.9 * len(tensors):  # a wrapper may count its own steps
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)


# --------------------------------------------------------------------------- the inspection


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What one side's features are worth on the images that were looked at.

    Scores and values are of the model that is compared, with fitted BatchNorm statistics where one
    side's have seen no batch; rank and spread always of the weights as they are.
    """

    knn: Score | None
    """None: no class has two images, so none has a neighbour of its own."""
    linear: Score | None
    """None likewise."""
    own: Mapping[str, Score]
    """What the specimen's recipe can ask beside these, by the measure's name."""
    rank: float
    spread: float
    values: torch.Tensor
    """Samples x dimensions; not part of the record."""
    answers: Mapping[str, torch.Tensor]
    """Of each measure, whether each image was right; not part of the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What was found between A and B."""

    a: str
    b: str
    verdict: Verdict
    reasons: tuple[str, ...]
    flags: tuple[str, ...]
    not_judged: tuple[str, ...]
    """What could not be looked at, each with the reason."""
    modules: tuple[Module, ...]
    parameters: int
    """Tensors of parameters that both have."""
    moved: int
    frozen: int
    """Tensors that the configuration freezes."""
    features: tuple[Features, Features] | None
    gains: Mapping[str, Score]
    """Of each measure, by how much B is better, on the same images."""
    cka: float | None
    images: int
    classes: int
    chance: float | None
    labels: torch.Tensor | None
    class_names: Sequence[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the features themselves."""
        content: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "verdict", "reasons", "flags", "not_judged", "a", "b", "parameters", "moved",
                "frozen", "images", "classes", "chance", "cka",
            )
        }  # fmt: skip
        if self.features is not None:
            content["features"] = {
                side: {
                    "knn": asdict(found.knn) if found.knn else None,
                    "linear": asdict(found.linear) if found.linear else None,
                    **{name: asdict(score) for name, score in found.own.items()},
                    "rank": found.rank,
                    "spread": found.spread,
                }
                for side, found in zip("ab", self.features, strict=True)
            }
        content["gains"] = {name: asdict(score) for name, score in self.gains.items()}
        content["modules"] = [asdict(module) for module in self.modules]
        content["seconds"] = round(self.seconds, 3)
        return content


def inspect_paths(
    a: Path,
    b: Path | None = None,
    *,
    key: str | None = None,
    data: str | None = None,
    model: str | None = None,
    recipe: str | None = None,
    images: int = IMAGES,
    device: str = "cpu",
) -> Inspection:
    """Compare two checkpoints, or the initial weights and the newest checkpoint of a trial.

    `key` names the state dict in torch files that hold several. The model and the images come from
    the trial that either belongs to; `model` names one for files from elsewhere, of the recipe
    `recipe` where several have models; `data` other labelled images (a folder of class folders, or
    shards). `device` computes the features: a CPU unless it is told, for a GPU here may be a
    running trial's.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        DataError: `data` cannot be used.
    """
    for path in (a, b):
        if path is not None and not path.exists():
            raise CheckpointError(
                f"{path} does not exist; give a trial folder (runs/NAME/trials/ID), a checkpoint "
                "in it, or a .safetensors or .pt file"
            )
    first = open_weights(a, first=True, key=key)
    if b is None and first.tensors is not None:
        raise CheckpointError(f"{a} is one checkpoint: give a second one to compare it with")
    second = open_weights(a if b is None else b, first=False, key=key)
    name, config = "", None
    owner = second.trial or first.trial
    if model is not None:
        name = able("plain_config", given=recipe)
        config = ability(name, "plain_config")(model)
    elif owner is not None:
        trial = TrialRecord(owner).trial()
        name = trial["recipe"]
        config = absolute(load(name).Config(**trial["config"]), root=Path(trial["root"]))
    if config is None:
        missing = "no model is known: give --model, or a checkpoint of a trial"
        return inspect(first, second, None, missing=(f"features: {missing}",))
    specimen = ability(name, "specimen")(config, data=data, device=torch.device(device))
    return inspect(first, second, specimen, images=images)


def inspect(
    a: Weights,
    b: Weights,
    specimen: Specimen | None,
    *,
    images: int = IMAGES,
    prompts: int | None = None,
    missing: Sequence[str] = (),
) -> Inspection:
    """What changed from A to B, what their features are worth, and the verdict.

    `images` bounds the images, `prompts` the texts of one that needs such. The specimen's
    model holds B afterwards, its BatchNorm statistics perhaps fitted to the images.
    """
    began = time.perf_counter()
    fresh = None
    if specimen is not None:
        fresh = {n: t.detach().cpu().clone() for n, t in specimen.model.state_dict().items()}
    old = a.tensors if a.tensors is not None else fresh
    assert old is not None and b.tensors is not None, "initial weights come with a specimen"
    _refuse_strangers(a.title, old, b.title, b.tensors)
    frozen = specimen.frozen if specimen is not None else ()
    compared = compare_weights(
        old, b.tensors, frozen=frozen, moments=b.moments, zero_gradients=b.zero_gradients
    )
    flags, not_judged = list(compared.flags), list(missing)
    if fresh is None:
        not_judged.append("random initialisation: it takes the model")
    elif a.tensors is not None or not b.known_seed:  # else what is there is static, and said
        trainable = {name: value for name, value in fresh.items() if name not in frozen}
        flags += _initial(b, trainable, old, compared)
    looked = None
    if specimen is not None:
        looked = _look(specimen, old, b.tensors, images, prompts, not_judged)
    pair, labels, names = looked if looked is not None else (None, None, ())
    gains = _gains(pair) if pair is not None else {}
    classes = len(torch.unique(labels)) if labels is not None else 0
    verdict, reasons = _judge(compared, pair, gains, not_judged)
    return Inspection(
        a=a.title,
        b=b.title,
        verdict=verdict,
        reasons=tuple(reasons),
        flags=tuple(flags),
        not_judged=tuple(not_judged),
        modules=tuple(compared.modules()),
        parameters=len(compared.parameters),
        moved=sum(change.moved for change in compared.parameters),
        frozen=len(frozen),
        features=pair,
        gains=gains,
        cka=scores.linear_cka(pair[0].values, pair[1].values) if pair is not None else None,
        images=0 if labels is None else len(labels),
        classes=classes,
        chance=1 / classes if classes else None,
        labels=labels,
        class_names=names,
        seconds=time.perf_counter() - began,
    )


def _refuse_strangers(
    title: str, old: Mapping[str, Any], other_title: str, new: Mapping[str, Any]
) -> None:
    if not old.keys() & new.keys():
        raise CheckpointError(
            f"{title} and {other_title} have no tensor in common, so nothing can be compared: the "
            f"names of the first are like {min(old, default='none')}, those of the second like "
            f"{min(new, default='none')}"
        )


def _initial(
    b: Weights,
    fresh: Mapping[str, torch.Tensor],
    old: Mapping[str, torch.Tensor],
    compared: Comparison,
) -> list[str]:
    """Whether B is at its random initialisation, in whole or in part.

    Of another seed it can be told by the distribution alone, which a short training hardly
    changes; so only what was replaced since A counts, or was trained in A.
    """
    assert b.tensors is not None
    if b.known_seed:
        total = len(at_initialisation(fresh, fresh))
        same, what = at_initialisation(b.tensors, fresh), "at"
    else:
        same, total = like_initialisation(b.tensors, fresh)
        before, _ = like_initialisation(old, fresh)
        replaced = {change.name for change in compared.changes if is_unrelated(change)}
        same = tuple(name for name in same if name in replaced or name not in before)
        what = "distributed as at"
        if len(same) < 0.1 * total:
            return []  # one test in a hundred says so by chance, and small tensors move little
    if not same:
        return []
    if len(same) > 0.9 * total:
        return [f"B is {what} random initialisation: {len(same)} of {total} tensors"]
    return [f"{what} random initialisation: {name_some(same)}; loaded, or trained, in part"]


def _look(
    specimen: Specimen,
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    images: int,
    prompts: int | None,
    not_judged: list[str],
) -> tuple[tuple[Features, Features], torch.Tensor, Sequence[str]] | None:
    """Features of both sides on the same images; None, with the reason noted, without any."""
    if not len(specimen.labels):
        not_judged.append(
            "features: no labelled images (--data, or a trial that evaluates on some)"
        )
        return None
    rows = choose(specimen.labels, images)
    labels = torch.from_numpy(specimen.labels[rows])
    if len(rows) < 2 or len(torch.unique(labels)) < 2:
        not_judged.append("features: fewer than two classes of images")
        return None
    not_judged += specimen.lacks
    fit = _is_untouched(old) != _is_untouched(new)
    if fit:
        not_judged.append(
            "BatchNorm statistics: one side's have seen no batch, so both sides' were fitted to "
            "these images for the scores"
        )
    sides = []
    for tensors in (old, new):
        try:
            specimen.model.load_state_dict(dict(tensors))
        except RuntimeError as error:
            not_judged.append(f"features: the weights do not fit the model ({_first(error)})")
            return None
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            not_judged.append("features: the weights are not finite")
            return None
        sides.append(_measure(specimen, labels, rows, prompts, fit=fit))
    return (sides[0], sides[1]), labels, specimen.class_names


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200]


def _measure(
    specimen: Specimen,
    labels: torch.Tensor,
    rows: npt.NDArray[np.int64],
    prompts: int | None,
    *,
    fit: bool,
) -> Features:
    values = specimen.features(specimen.model, rows)
    rank, spread = scores.rank_of(values), scores.spread_of(values)
    if fit:
        fit_statistics(specimen, rows)
        values = specimen.features(specimen.model, rows)
    answers: dict[str, torch.Tensor] = {}
    if int(torch.bincount(labels).max()) > 1:
        answers["knn"] = scores.knn_correct(values, labels)
        answers["linear"] = scores.linear_correct(values, labels, iterations=PROBE_ITERATIONS)
    for name, ask in specimen.own.items():
        answers[name] = ask(specimen.model, values, rows, prompts)
    measured = {name: scores.bootstrap(correct) for name, correct in answers.items()}
    return Features(
        knn=measured.get("knn"),
        linear=measured.get("linear"),
        own={name: measured[name] for name in specimen.own},
        rank=rank,
        spread=spread,
        values=values,
        answers=answers,
    )


def _is_untouched(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether BatchNorm statistics are still the means of 0 and variances of 1 they begin with."""
    means = [t for name, t in tensors.items() if name.endswith("running_mean")]
    variances = [t for name, t in tensors.items() if name.endswith("running_var")]
    return (
        bool(means)
        and not any(bool(t.any()) for t in means)
        and all(bool((t == 1).all()) for t in variances)
    )


def fit_statistics(specimen: Specimen, rows: npt.NDArray[np.int64]) -> None:
    """Set the model's BatchNorm statistics to those of the images that are looked at."""
    few = rows[np.linspace(0, len(rows) - 1, min(len(rows), FITTING_IMAGES)).round().astype(int)]
    with averaging(batch_norms(specimen.model)):
        # Whole batches: a last one of a single image may have a variance of nothing.
        specimen.features(specimen.model, np.resize(few, -(-len(few) // 16) * 16))


def choose(
    labels: npt.NDArray[np.int64], limit: int, *, per_class: int = 16
) -> npt.NDArray[np.int64]:
    """Rows of at most `limit` images: all, or the first of each of evenly spaced classes.

    Neighbours need classes with several images, so classes are left out rather than thinned to
    fewer than `per_class` images.
    """
    if len(labels) <= limit:
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")
    names, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    each = min(max(per_class, limit // len(names)), int(np.median(counts)))
    wanted = max(2, min(len(names), limit // each))
    picked = np.unique(np.linspace(0, len(names) - 1, wanted).round().astype(int))
    rows = [order[starts[i] : starts[i] + min(each, counts[i])] for i in picked]
    return np.sort(np.concatenate(rows))


def _gains(pair: tuple[Features, Features]) -> dict[str, Score]:
    before, after = (side.answers for side in pair)
    level = 1 - 0.05 / max(1, len(before))  # Bonferroni: any one of them may say "learning"
    return {name: scores.gain(before[name], after[name], confidence=level) for name in before}


_WORDS = {"knn": "nearest neighbours", "linear": "linear probe"}


def _judge(
    compared: Comparison,
    pair: tuple[Features, Features] | None,
    gains: Mapping[str, Score],
    not_judged: Sequence[str],
) -> tuple[Verdict, list[str]]:
    """The verdict and its reasons. The loss is not asked: it may be flat while these rise."""
    if any(math.isnan(change.largest) for change in compared.changes):
        return "collapsed", ["weights are not finite"]
    alone = len(compared.only_in_a) + len(compared.only_in_b)
    if alone > len(compared.changes):
        few = f"{len(compared.changes)} tensors are in both, {alone} in one of them alone"
        return "undecided", [few]
    if not any(change.moved for change in compared.parameters):
        return "not learning", ["no parameter moved"]
    if pair is None:
        return "undecided", [f"only the weights were compared; {'; '.join(not_judged)}"]
    before, after = pair
    told = [
        f"{_WORDS.get(name) or name.replace('_', '-')} "
        f"{float(before.answers[name].double().mean()):.3f} -> "
        f"{float(after.answers[name].double().mean()):.3f} "
        f"({gain.value:+.3f}, {gain.low:+.3f} to {gain.high:+.3f})"
        for name, gain in sorted(gains.items(), key=lambda item: -item[1].low)
    ]
    if not math.isfinite(after.rank) or after.rank < LEAST_RANK:
        return "collapsed", [f"the features span {after.rank:.1f} dimensions", *told]
    better = any(gain.low > 0 for gain in gains.values())
    if better:
        return "learning", told
    # Features begin in a narrow cone, so a narrow one alone is no collapse: it fell, or costs.
    if after.spread < min(LEAST_SPREAD, before.spread / 2):
        share = f"the features fill {after.spread:.3f} of an even spread (A's: {before.spread:.3f})"
        return "collapsed", [share, *told]
    worse = any(gains[name].high < 0 for name in ("knn", "linear") if name in gains)
    if after.rank < LEAST_KEPT * before.rank and worse:
        kept = f"the features span {after.rank:.1f} dimensions (A's: {before.rank:.1f})"
        return "collapsed", [kept, *told]
    unseen = max((gain.high for gain in gains.values()), default=0.0)
    if unseen > LEAST_GAIN:
        few = f"nothing rose by more than its noise, which may hide a gain of {unseen:+.3f}"
        return "undecided", [few, *told]
    return "not learning", ["nothing rose by more than its noise", *told]


def trial_record(
    specimen: Callable[[], Specimen], learner: Learner, *, step: int
) -> dict[str, Any]:
    """The summary of a trial that ended with what `learner` has, against its initial weights,
    which `specimen` makes anew.

    The last step's gradients are still there. The cost is bounded: at most 1024 images and 2048
    texts, twice; of a model with BatchNorm, the images four times, and a quarter of them twice.
    """
    model = learner.model
    moments, _ = named_state(model, learner.optimizer)
    without = {
        name: int(p.grad is None or not bool(p.grad.any())) for name, p in model.named_parameters()
    }
    last = Weights(
        title=f"step {step}",
        tensors=checkpoint.copy_to_host(learner.judged.state_dict()),
        moments=moments,
        zero_gradients=without,
        known_seed=True,
    )
    try:
        found = inspect(
            Weights(title="initial weights", tensors=None),
            last,
            specimen(),
            images=RECORD_IMAGES,
            prompts=RECORD_PROMPTS,
        )
    except (AblateError, OSError, torch.OutOfMemoryError) as error:
        return {"verdict": "undecided", "reasons": [f"not inspected: {error}"]}
    return found.to_dict()
