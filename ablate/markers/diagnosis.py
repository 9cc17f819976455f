"""From what the markers saw to what probably caused it, and which factor to vary next.

``CAUSES`` is the whole knowledge: each cause has clues with weights, and a run's score for it
is the chance that not all of its clues are coincidence, 1 - product(1 - weight). Clues
``against`` take from it. Causes are ranked by score; evidence is quoted for each. This is a
list of suspects for a person, not a proof: the proof is an ablation of the factor it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ablate.markers.event import Event, number

_LEAST = 0.3  # a cause with a lower score is not worth a line


@dataclass(frozen=True, slots=True)
class Facts:
    """What clues may ask about a run: its events and its resolved configuration."""

    events: Sequence[Event]
    config: Mapping[str, Any] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    """Markers that had no input."""

    def find(self, marker: str, kind: str = "") -> Event | None:
        """The first event of a marker."""
        for item in self.events:
            if item.marker == marker and kind in ("", item.evidence["kind"]):
                return item
        return None

    def says(self, marker: str, kind: str = "") -> str:
        """Its message, or nothing."""
        found = self.find(marker, kind)
        return found.message if found else ""

    def value(self, name: str) -> float:
        """A number of the configuration; NaN compares false with everything."""
        found = number(self.config.get(name))
        return math.nan if found is None else found

    def first_step(self, *markers: str) -> float:
        """Where the first event of any of these markers begins; infinity without one."""
        return min(
            (item.first_step for item in self.events if item.marker in markers), default=math.inf
        )

    @property
    def learnt(self) -> float:
        """Nat by which the loss had fallen below chance before it came back to it."""
        found = self.find("divergence", "chance")
        if found is None or not isinstance(lowest := found.evidence.get("lowest"), float):
            return math.nan
        return float(found.evidence["chance"]) - lowest


Ask = Callable[[Facts], str]
"""Answers with a sentence of evidence, or with nothing."""


@dataclass(frozen=True, slots=True)
class Clue:
    """Something that speaks for a cause when ``ask`` answers."""

    weight: float
    ask: Ask


@dataclass(frozen=True, slots=True)
class Cause:
    """A suspect."""

    name: str
    factors: Mapping[str, str]
    """Field of the recipe -> what to try."""
    source: str
    clues: tuple[Clue, ...]
    against: tuple[Clue, ...] = ()


@dataclass(frozen=True, slots=True)
class Suspect:
    """A cause with what speaks for it in one run."""

    cause: str
    score: float
    evidence: tuple[str, ...]
    factors: Mapping[str, str]
    source: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def diagnose(
    events: Iterable[Event | Mapping[str, Any]],
    *,
    config: Mapping[str, Any] | None = None,
    silent: Iterable[str] = (),
) -> list[Suspect]:
    """Likely causes of a run's events, most likely first; empty when nothing points anywhere.

    ``config`` is the resolved configuration (trial.json): without it, clues about precision,
    beta2 and the like are mute. ``silent`` names markers that had no input, whose silence is
    then no argument.
    """
    read = [item if isinstance(item, Event) else Event.from_dict(item) for item in events]
    ordered = sorted(read, key=lambda item: item.first_step)
    facts = Facts(ordered, config or {}, frozenset(silent))
    suspects = []
    for cause in CAUSES:
        heard = [(clue.weight, text) for clue in cause.clues if (text := clue.ask(facts))]
        if not heard:
            continue
        score = 1.0 - math.prod(1.0 - weight for weight, _ in heard)
        score *= math.prod(1.0 - clue.weight for clue in cause.against if clue.ask(facts))
        if score >= _LEAST:
            evidence = tuple(text for _, text in sorted(heard, key=lambda pair: -pair[0]))
            suspects.append(
                Suspect(cause.name, round(score, 3), evidence, cause.factors, cause.source)
            )
    return sorted(suspects, key=lambda suspect: -suspect.score)


def _said(marker: str, kind: str = "") -> Ask:
    """A marker has an event."""
    return lambda facts: facts.says(marker, kind)


def _both(first: Ask, second: Ask) -> Ask:
    """The second's evidence, where the first has some, too."""
    return lambda facts: second(facts) if first(facts) else ""


def _either(first: Ask, second: Ask) -> Ask:
    return lambda facts: first(facts) or second(facts)


def _precision(*names: str) -> Ask:
    """The run was configured with one of these."""

    def ask(facts: Facts) -> str:
        given = str(facts.config.get("precision", ""))
        return f"precision is {given}" if given in names else ""

    return ask


def _announced(facts: Facts) -> str:
    """A loss spike was linked to a stale second moment."""
    for item in facts.events:
        if link := item.evidence.get("predicted_by"):
            return (
                f"the loss spike at step {item.first_step} came {link['steps_before']} steps "
                f"after the gradient of {link['tensor']} outgrew its second moment"
            )
    return ""


def _long_memory(facts: Facts) -> str:
    """Spikes with a second moment that remembers 1000 steps."""
    beta2 = facts.value("beta2")
    if not (beta2 >= 0.999 and facts.find("loss_spike")):
        return ""
    return f"beta2 is {beta2:g}: the second moment averages over {1.0 / (1.0 - beta2):.0f} steps"


def _unwatched_long_memory(facts: Facts) -> str:
    """The same where nobody measured whether the second moment was stale."""
    return _long_memory(facts) if "rms_spike" in facts.silent else ""


def _sudden(facts: Facts) -> str:
    """Loss and gradient jump in the same step, and no stale moment came before."""
    loss, norm = facts.find("loss_spike"), facts.find("grad_norm_spike")
    if loss is None or norm is None or abs(loss.first_step - norm.first_step) > 2:
        return ""
    return f"loss and gradient norm jumped together at step {loss.first_step}"


def _abrupt(facts: Facts) -> str:
    """A high spike within two steps, where a stale moment would have been measured before."""
    spike = facts.find("loss_spike")
    if spike is None or "rms_spike" in facts.silent or spike.evidence["sigmas"] < 10.0:
        return ""
    if spike.evidence["peak_step"] - spike.first_step > 2:
        return ""
    return (
        f"the loss went from {spike.evidence['mean']:.3g} to {spike.evidence['peak']:.3g} at once"
    )


def _short(facts: Facts) -> str:
    spike = facts.find("loss_spike")
    if spike is None or spike.evidence.get("recovered") is not True:
        return ""
    return f"the loss was back soon after step {spike.last_step}"


def _tiny_eps(facts: Facts) -> str:
    eps = facts.value("eps")
    return f"eps {eps:g} is 0 in fp16" if eps < 6e-8 else ""  # fp16's least number


def _never_learnt(facts: Facts) -> str:
    if not facts.learnt < _LEARNT:
        return ""
    return f"the smoothed loss was never more than {max(facts.learnt, 0.0):.2g} nat below chance"


def _forgot(facts: Facts) -> str:
    if not facts.learnt >= _LEARNT:
        return ""
    return f"the loss had been {facts.learnt:.2g} nat below chance level before it came back"


def _norm_left(facts: Facts) -> float:
    """Gradient norm at chance level over that of the first step."""
    found = facts.find("divergence", "chance")
    if found is None:
        return math.nan
    now, first = (number(found.evidence.get(name)) for name in ("grad_norm", "grad_norm_first"))
    return now / first if now is not None and first else math.nan


def _vanished(facts: Facts) -> str:
    left = _norm_left(facts)
    return f"the gradient is {left:.1g} of its first: no way back" if left < 1e-3 else ""


def _pulls(facts: Facts) -> str:
    left = _norm_left(facts)
    return (
        f"the gradient is still {left:.2g} of its first, and leads nowhere" if left > 0.01 else ""
    )


def _fault(where: str) -> Ask:
    """Recalibrated BatchNorm statistics told whether they or the weights are wrong."""

    def ask(facts: Facts) -> str:
        faults = {
            item.evidence.get("fault")
            for item in facts.events
            if item.marker == "batch_norm" and item.evidence["kind"] == "drift"
        }
        # Once they were the statistics' fault, an earlier drift that was not acquits nobody.
        if where not in faults or (where == "weights" and "statistics" in faults):
            return ""
        back = "bring the accuracy back" if where == "statistics" else "do not help"
        return f"BatchNorm statistics that are averaged anew {back}"

    return ask


def _at_once(facts: Facts) -> str:
    """The first bad step lies where a warm-up should have been."""
    first = facts.first_step("divergence", "loss_spike", "feature_collapse")
    warmup = facts.value("warmup")
    if not (first <= 30 and warmup < 20):
        return ""
    return f"trouble begins at step {first:g}, with a warm-up of {warmup:g} steps"


def _ran_away(facts: Facts) -> str:
    first = facts.first_step("loss_spike", "divergence", "grad_norm_spike")
    if not first < facts.first_step("non_finite") < math.inf:
        return ""
    return f"the loss or its gradient had run away from step {first:g} on"


def _thrown(facts: Facts) -> str:
    """The temperature was thrown to its floor just before numbers broke."""
    fell, broke = facts.find("logit_scale", "fallen"), facts.first_step("non_finite")
    if fell is None or not 0 <= broke - fell.first_step <= 50:
        return ""
    return f"{fell.message}, at step {fell.first_step}; step {broke:g} was no longer finite"


def _never_finite(facts: Facts) -> str:
    """No step had a finite loss."""
    found = facts.find("non_finite", "row")
    if found is None or found.verdict != "NUMERIC_FAIL" or found.first_step > 1:
        return ""
    return "the loss was not finite from the first step on"


def _one_point(tower: str) -> Ask:
    """The features of a tower were all the same from the first step on."""

    def ask(facts: Facts) -> str:
        for item in facts.events:
            evidence = item.evidence
            if evidence["quantity"] == f"{tower}_feature_std" and item.first_step <= 1:
                if evidence["value"] < 0.01 * evidence["limit"]:
                    return f"the features of all {tower}s are the same from the first step on"
        return ""

    return ask


def _nothing_else(facts: Facts) -> str:
    others = {item.marker for item in facts.events} - {"logit_scale"}
    return "" if others else "nothing else is unusual"


_LEARNT = 0.3  # nat below chance from which on a model has learnt something
_LOW = _precision("pure_fp16", "pure_bf16", "fp16", "bf16")
_DIVERGED = _either(_said("divergence", "rise"), _said("divergence", "chance"))
_BN = _said("batch_norm", "drift")
_ALIKE = _either(_one_point("image"), _one_point("text"))


CAUSES: tuple[Cause, ...] = (
    Cause(
        "learning rate too high",
        {"lr": "a third, a tenth", "warmup": "longer", "grad_clip_norm": "1.0"},
        "Wortsman et al. 2023 (small-scale proxies): instabilities appear at high learning rates",
        clues=(
            Clue(0.6, _said("divergence", "rise")),
            Clue(0.5, _said("divergence", "overshoot")),
            Clue(0.5, _said("update_ratio", "high")),
            Clue(0.5, _forgot),
            Clue(0.5, _vanished),
            Clue(0.8, _thrown),
            Clue(0.3, _said("divergence", "chance")),
            Clue(0.3, _said("logit_scale", "jump")),
            Clue(0.3, _said("feature_collapse")),
            Clue(0.2, _said("loss_spike")),
        ),
        against=(
            Clue(0.5, _announced),
            Clue(0.5, _said("scaler_skips")),
            Clue(0.5, _said("attention_logits")),
            Clue(0.5, _said("dead_gradient")),
            Clue(0.5, _LOW),
            Clue(0.8, _ALIKE),
        ),
    ),
    Cause(
        "warm-up too short",
        {"warmup": "a tenth of the run", "lr": "a third"},
        "Wortsman et al. 2023 (small-scale proxies): a longer warm-up allows a higher rate",
        clues=(
            Clue(0.7, _at_once),
            Clue(0.3, _said("divergence", "overshoot")),
        ),
        against=(
            Clue(0.4, _said("update_ratio", "high")),
            Clue(0.4, _said("feature_collapse")),
            Clue(0.8, _said("dead_gradient")),
            Clue(0.6, _LOW),
        ),
    ),
    Cause(
        "Adam's second moment is out of date",
        {
            "beta2": "0.98, 0.95",
            "warmup": "longer",
            "grad_clip_norm": "1.0, or updates clipped as StableAdamW does",
        },
        "Wortsman et al. 2023 (stable and low-precision training): loss spikes follow an RMS "
        "spike by 1 to 8 steps; a lower beta2 or clipped updates remove them",
        clues=(
            Clue(0.8, _announced),
            Clue(0.7, _unwatched_long_memory),
            Clue(0.2, _long_memory),
            Clue(0.2, _said("rms_spike")),
        ),
    ),
    Cause(
        "a stretch of bad data",
        {"train_data": "look at the samples of these steps", "grad_clip_norm": "1.0"},
        "Molybog et al. 2023 (arXiv 2304.09871) on PaLM: spikes vanished when the batches "
        "around them were skipped",
        clues=(
            Clue(0.6, _sudden),
            Clue(0.5, _abrupt),
            Clue(0.3, _short),
        ),
        against=(Clue(0.7, _announced),),
    ),
    Cause(
        "unreadable samples",
        {"train_data": "repair or remove the shards that the log names"},
        "open_clip_train skips what it cannot decode and logs each thousandth time only",
        clues=(Clue(0.9, _said("data_faults")),),
    ),
    Cause(
        "images and captions do not belong together",
        {"train_data": "check the pairing of a few samples", "dataset_type": "that of the shards"},
        "uniform logits have a loss of ln(batch); random pairs teach nothing below it",
        clues=(
            Clue(0.5, _both(_said("divergence", "chance"), _never_learnt)),
            Clue(0.4, _said("divergence", "chance")),
            Clue(0.3, _pulls),
        ),
        against=(
            Clue(0.6, _vanished),
            Clue(0.6, _said("divergence", "overshoot")),
            Clue(0.6, _said("logit_scale", "jump")),
            Clue(0.6, _said("update_ratio", "high")),
            Clue(0.8, _said("update_ratio", "low")),
            Clue(0.8, _said("dead_gradient")),
            Clue(0.8, _forgot),
            Clue(0.8, _ALIKE),
        ),
    ),
    Cause(
        "images or captions that are all alike",
        {"train_data": "look at a few samples", "aug_cfg": "without what may blank an image"},
        "a tower that sees one input has one output; no network at initialisation does that to "
        "inputs that differ",
        clues=(Clue(0.9, _ALIKE),),
    ),
    Cause(
        "learning rate too low",
        {"lr": "ten times"},
        "updates of less than a millionth of the weights change nothing within a run",
        clues=(Clue(0.8, _said("update_ratio", "low")),),
        against=(Clue(0.6, _said("dead_gradient")), Clue(0.5, _said("update_ratio", "eps"))),
    ),
    Cause(
        "epsilon rules the update",
        {"eps": "1e-6, 1e-8"},
        "Wortsman et al. 2023 (small-scale proxies): gradients near epsilon shrink updates",
        clues=(Clue(0.8, _said("update_ratio", "eps")),),
        against=(Clue(0.5, _DIVERGED),),
    ),
    Cause(
        "fp16 runs out of range",
        {"precision": "amp_bf16, fp32"},
        "PyTorch's GradScaler halves its scale on every infinite gradient",
        clues=(
            Clue(0.8, _said("scaler_skips", "streak")),
            Clue(0.8, _said("scaler_skips", "scale")),
            Clue(0.7, _said("scaler_skips", "rate")),
            Clue(0.2, _both(_said("scaler_skips"), _precision("amp"))),
            Clue(0.7, _both(_precision("amp"), _never_finite)),
        ),
    ),
    Cause(
        "weights in too low a precision",
        {"precision": "amp_bf16, fp32", "eps": "1e-6"},
        "open_clip casts weights and Adam's moments, too, with fp16, bf16 and pure_*; an eps "
        "below 6e-8 is 0 in fp16, and Adam then divides 0 by 0",
        clues=(
            Clue(0.7, _both(_LOW, _said("non_finite"))),
            Clue(0.5, _both(_precision("pure_fp16", "fp16"), _tiny_eps)),
        ),
    ),
    Cause(
        "an infinite or NaN input",
        {"train_data": "look for the sample", "aug_cfg": "without what may divide by zero"},
        "a non-finite forward pass poisons BatchNorm's running statistics even when the "
        "optimizer step is skipped",
        clues=(
            Clue(0.6, _said("batch_norm", "non_finite")),
            Clue(0.4, _said("non_finite")),
        ),
        against=(
            Clue(0.7, _LOW),
            Clue(0.7, _ran_away),
            Clue(0.7, _thrown),
            Clue(0.5, _said("scaler_skips")),
        ),
    ),
    Cause(
        "overflow after the loss ran away",
        {"lr": "a third, a tenth", "grad_clip_norm": "1.0", "warmup": "longer"},
        "a non-finite loss that a spike or a rise announced is their consequence",
        clues=(
            Clue(0.8, _ran_away),
            Clue(0.3, _both(_ran_away, _said("non_finite"))),
        ),
        against=(Clue(0.5, _LOW),),
    ),
    Cause(
        "BatchNorm's running statistics",
        {
            "precision": "amp_bf16, fp32 (pure_bf16 and pure_fp16 cast the buffers)",
            "use_bn_sync": "true",
            "batch_size": "larger per worker",
        },
        "bf16 has 8 bits: a running variance near 1 stalls 2 to 3 % off with momentum 0.1 and "
        "up to 40 % off with 0.01",
        clues=(
            Clue(0.6, _BN),
            Clue(0.6, _fault("statistics")),
            Clue(0.4, _both(_BN, _said("accuracy_collapse"))),
            Clue(0.4, _both(_BN, _precision("pure_bf16", "pure_fp16"))),
        ),
        against=(
            Clue(0.7, _fault("weights")),
            Clue(0.5, _DIVERGED),
            Clue(0.4, _said("loss_spike")),
        ),
    ),
    Cause(
        "a part of the model gets no gradient",
        {"lock_image": "false", "lock_text": "false"},
        "a trained parameter whose gradient is zero for 50 steps is cut off from the loss",
        clues=(Clue(0.95, _said("dead_gradient")),),
    ),
    Cause(
        "attention logits grow",
        {"lr": "a third", "wd": "higher", "grad_clip_norm": "1.0"},
        "Wortsman et al. 2023 (small-scale proxies): they grow before divergence; "
        "normalising queries and keys prevents it",
        clues=(Clue(0.75, _said("attention_logits")),),
    ),
    Cause(
        "output logits drift",
        {"wd": "higher", "lr": "a third"},
        "Chowdhery et al. 2022 (PaLM) add a z-loss against it",
        clues=(Clue(0.7, _said("logit_drift")),),
    ),
    Cause(
        "the temperature is out of its useful range",
        {"batch_size": "larger", "lr": "lower"},
        "open_clip clamps the temperature to 100 after every step, which hides its gradient",
        clues=(
            Clue(0.7, _said("logit_scale", "saturated")),
            Clue(0.6, _said("logit_scale", "fallen")),
            Clue(0.3, _both(_said("logit_scale"), _nothing_else)),
        ),
        against=(Clue(0.3, _DIVERGED), Clue(0.6, _thrown)),
    ),
    Cause(
        "the features collapse",
        {"lr": "a third", "wd": "lower", "batch_size": "larger"},
        "Jing et al. 2022 (dimensional collapse in contrastive learning)",
        clues=(Clue(0.6, _said("feature_collapse")),),
        against=(Clue(0.5, _DIVERGED), Clue(0.5, _said("dead_gradient"))),
    ),
)
