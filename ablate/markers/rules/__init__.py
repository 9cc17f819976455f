"""The markers, one file per subject. A new one: a dataclass here, its name in ``RULES``."""

from __future__ import annotations

from ablate.markers.rule import Rule
from ablate.markers.rules.evaluation import AccuracyCollapse, BatchNorm, DataFaults
from ablate.markers.rules.gradient import DeadGradient, GradNormSpike, RmsSpike, UpdateRatio
from ablate.markers.rules.loss import Divergence, LossSpike, SpikeScore
from ablate.markers.rules.numeric import NonFinite, ScalerSkips
from ablate.markers.rules.output import (
    AttentionLogits,
    FeatureCollapse,
    LogitDrift,
    LogitScale,
)

RULES: tuple[type[Rule], ...] = (
    NonFinite,
    LossSpike,
    SpikeScore,
    RmsSpike,
    GradNormSpike,
    Divergence,
    UpdateRatio,
    AttentionLogits,
    LogitDrift,
    LogitScale,
    ScalerSkips,
    BatchNorm,
    FeatureCollapse,
    DeadGradient,
    AccuracyCollapse,
    DataFaults,
)
