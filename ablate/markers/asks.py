"""The questions that clues ask: each answers with a sentence of evidence, or with nothing."""

from __future__ import annotations

import math

from ablate.markers.clue import LEARNT, Ask, Facts
from ablate.markers.event import number


def said(marker: str, kind: str = "") -> Ask:
    """A marker has an event."""
    return lambda facts: facts.says(marker, kind)


def both(first: Ask, second: Ask) -> Ask:
    """The second's evidence, where the first has some, too."""
    return lambda facts: second(facts) if first(facts) else ""


def either(first: Ask, second: Ask) -> Ask:
    return lambda facts: first(facts) or second(facts)


def precision(*names: str) -> Ask:
    """The run was configured with one of these."""

    def ask(facts: Facts) -> str:
        given = str(facts.config.get("precision", ""))
        return f"precision is {given}" if given in names else ""

    return ask


def nothing_else(facts: Facts) -> str:
    others = {item.marker for item in facts.events} - {"logit_scale"}
    return "" if others else "nothing else is unusual"


def announced(facts: Facts) -> str:
    """A loss spike was linked to a stale second moment."""
    for item in facts.events:
        if link := item.evidence.get("predicted_by"):
            return (
                f"the loss spike at step {item.first_step} came {link['steps_before']} steps "
                f"after the gradient of {link['tensor']} outgrew its second moment"
            )
    return ""


def long_memory(facts: Facts) -> str:
    """Spikes with a second moment that remembers 1000 steps."""
    beta2 = facts.value("beta2")
    if not (beta2 >= 0.999 and facts.find("loss_spike")):
        return ""
    return f"beta2 is {beta2:g}: the second moment averages over {1.0 / (1.0 - beta2):.0f} steps"


def unwatched_long_memory(facts: Facts) -> str:
    """The same where nobody measured whether the second moment was stale."""
    return long_memory(facts) if "rms_spike" in facts.silent else ""


def sudden(facts: Facts) -> str:
    """Loss and gradient jump in the same step, and no stale moment came before."""
    loss, norm = facts.find("loss_spike"), facts.find("grad_norm_spike")
    if loss is None or norm is None or abs(loss.first_step - norm.first_step) > 2:
        return ""
    return f"loss and gradient norm jumped together at step {loss.first_step}"


def abrupt(facts: Facts) -> str:
    """A high spike within two steps, where a stale moment would have been measured before."""
    spike = facts.find("loss_spike")
    if spike is None or "rms_spike" in facts.silent or spike.evidence["sigmas"] < 10.0:
        return ""
    if spike.evidence["peak_step"] - spike.first_step > 2:
        return ""
    return (
        f"the loss went from {spike.evidence['mean']:.3g} to {spike.evidence['peak']:.3g} at once"
    )


def short(facts: Facts) -> str:
    spike = facts.find("loss_spike")
    if spike is None or spike.evidence.get("recovered") is not True:
        return ""
    return f"the loss was back soon after step {spike.last_step}"


def unlearnt(facts: Facts) -> str:
    """The loss spiked before it had left chance level: there was nothing yet to be thrown off."""
    spike = facts.find("loss_spike")
    chance = None if spike is None else number(spike.evidence.get("chance"))
    if spike is None or chance is None or spike.evidence["mean"] < chance - 0.05:
        return ""
    return f"the loss spiked at step {spike.first_step}, still at chance level ({chance:.3g} nat)"


def tiny_eps(facts: Facts) -> str:
    eps = facts.value("eps")
    return f"eps {eps:g} is 0 in fp16" if eps < 6e-8 else ""  # fp16's least number


def never_learnt(facts: Facts) -> str:
    if not facts.learnt < LEARNT:
        return ""
    return f"the smoothed loss was never more than {max(facts.learnt, 0.0):.2g} nat below chance"


def forgot(facts: Facts) -> str:
    if not facts.learnt >= LEARNT:
        return ""
    return f"the loss had been {facts.learnt:.2g} nat below chance level before it came back"


def norm_left(facts: Facts) -> float:
    """Gradient norm at chance level over that of the first step."""
    found = facts.find("divergence", "chance")
    if found is None:
        return math.nan
    now, first = (number(found.evidence.get(name)) for name in ("grad_norm", "grad_norm_first"))
    return now / first if now is not None and first else math.nan


def vanished(facts: Facts) -> str:
    left = norm_left(facts)
    return f"the gradient is {left:.1g} of its first: no way back" if left < 1e-3 else ""


def pulls(facts: Facts) -> str:
    left = norm_left(facts)
    return (
        f"the gradient is still {left:.2g} of its first, and leads nowhere" if left > 0.01 else ""
    )


def fault(where: str) -> Ask:
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


def at_once(facts: Facts) -> str:
    """The first bad step lies where a warm-up should have been."""
    first = facts.first_step("divergence", "loss_spike", "feature_collapse")
    warmup = facts.value("warmup")
    if not (first <= 30 and warmup < 20):
        return ""
    return f"trouble begins at step {first:g}, with a warm-up of {warmup:g} steps"


def ran_away(facts: Facts) -> str:
    first = facts.first_step("loss_spike", "divergence", "grad_norm_spike")
    if not first < facts.first_step("non_finite") < math.inf:
        return ""
    return f"the loss or its gradient had run away from step {first:g} on"


def thrown(facts: Facts) -> str:
    """The temperature was thrown to its floor just before numbers broke."""
    fell, broke = facts.find("logit_scale", "fallen"), facts.first_step("non_finite")
    if fell is None or not 0 <= broke - fell.first_step <= 50:
        return ""
    return f"{fell.message}, at step {fell.first_step}; step {broke:g} was no longer finite"


def never_finite(facts: Facts) -> str:
    """No step had a finite loss."""
    found = facts.find("non_finite", "row")
    if found is None or found.verdict != "NUMERIC_FAIL" or found.first_step > 1:
        return ""
    return "the loss was not finite from the first step on"


def one_point(tower: str) -> Ask:
    """The features of a tower were all the same from the first step on."""

    def ask(facts: Facts) -> str:
        for item in facts.events:
            evidence = item.evidence
            if evidence["quantity"] == f"{tower}_feature_std" and item.first_step <= 1:
                if evidence.get("one_point"):
                    return f"the features of all {tower}s are the same from the first step on"
        return ""

    return ask


LOW_PRECISION = precision("pure_fp16", "pure_bf16", "fp16", "bf16")
DIVERGED = either(said("divergence", "rise"), said("divergence", "chance"))
BN_DRIFT = said("batch_norm", "drift")
ALL_ALIKE = either(one_point("image"), one_point("text"))
