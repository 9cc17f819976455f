"""Knowing an unstable run when one sees it: rules over plain numbers, live and afterwards.

``Monitor`` takes rows as they are measured, ``judge`` takes a finished trace, and both run the
same rules. This package needs numpy and nothing that trains.

What the rules read
-------------------
A row may lack any of these; the markers that live on it are then silent and ``judge`` says so.
Names ending in a slash are groups: ``rms/visual.conv1.weight``.

Rows of optimizer steps (``Monitor.observe``), cheap ones on every step:

=========================  ===================================================================
``step``                   optimizer steps completed; the only one that must be there
``loss``                   nat, mean over ranks
``grad_norm``              global, unscaled, before clipping
``grad_norm/<group>``      the same of a group, to say where a spike comes from
``lr``                     of this step
``logit_scale``            exp of the parameter, 1 to 100, after the step
``logits_lse``             mean logsumexp over the rows of the logits (temperature applied)
``scaler_scale``           loss scale after the step; absent without an fp16 scaler
``skipped_steps``          steps the scaler skipped so far; absent without one
``rms/<tensor>``           sqrt(mean(g^2 / max(u, eps^2))), g the unscaled gradient that was
                           applied, u = exp_avg_sq / (1 - beta2^t) after the update; watched:
                           the input convolution, the attention pool, positional embeddings
``update_ratio/<group>``   |update| / |weights| of a group (every 50 steps)
``update_norm``            norm of the whole update over the learning rate (last five steps before
                           a checkpoint or an interruption, and the first after)
``update_turn``            cosine of an update and the one before it (about an interruption)
``interrupted``            1 on the first step after an interruption; ``resume_lr_ratio`` there
``eps_share``              share of tensors with sqrt(mean u) < 10 eps (every 50 steps)
``attention_logits/<layer>``  largest |q k / sqrt(d)| of 8 samples (every 200 steps)
``image_feature_std``      mean over dimensions of the deviation over the batch of normalised
                           image features; ``text_feature_std`` likewise
``image_feature_rank``     exp of the entropy of the normalised singular values of at least
                           1024 centred, normalised features (every 500 steps or at
                           evaluations); ``text_feature_rank`` likewise
``prototypes_used``        prototypes that are the nearest of some sample of the batch
``projection_spread``      root mean square distance of projections of norm 1 from their mean
``zero_grad_steps/<param>``  steps in a row whose gradient was exactly zero or None (every 50
                           steps; parameters with 0 may be left out)
``data_faults``            samples replaced so far, with ``samples`` consumed so far
``params_non_finite``      non-finite parameter values (at checkpoints and evaluations)
=========================  ===================================================================

Rows of evaluations (``Monitor.evaluate``):

=========================  ===================================================================
``step``                   the step it was made after
``accuracy``               what ``Context.accuracy`` names: a fraction, with ``eval_images``
                           (else ``Context.eval_images``)
``params_non_finite``, ``bn_non_finite``  counts over parameters, and over running statistics
``bn_drift_median``, ``bn_drift_max``  over layers (median over its channels) of
                           |ln(running variance / variance over fresh batches)|
``bn_initial_share``       part of the running statistics that is still their initial value;
                           it has been taken out of the drifts
``bn_gap``                 (loss in eval mode - loss in train mode) / max(loss in train mode,
                           0.5 nat), on a fixed probe
``recalibrated_top1``      top-1 after BatchNorm statistics were reset and averaged anew; needed
                           only where drift is found
``*_feature_rank``         as above
=========================  ===================================================================
"""

from __future__ import annotations

from ablate.markers.event import PRECEDENCE, Context, Event, VerdictName, event_key, latest
from ablate.markers.judge import Judgement, judge, settle
from ablate.markers.marker import Marker
from ablate.markers.monitor import VERSION, Monitor, Stop, Verdict
from ablate.markers.rules import RULES
from ablate.markers.thresholds import (
    ThresholdError,
    Thresholds,
    check_thresholds,
    describe_thresholds,
    thresholds_schema,
)

__all__ = [
    "PRECEDENCE",
    "RULES",
    "VERSION",
    "Context",
    "Event",
    "Judgement",
    "Marker",
    "Monitor",
    "Stop",
    "ThresholdError",
    "Thresholds",
    "Verdict",
    "VerdictName",
    "check_thresholds",
    "describe_thresholds",
    "event_key",
    "judge",
    "latest",
    "settle",
    "thresholds_schema",
]
