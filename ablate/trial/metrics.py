"""Every measurement that recipes share: its name, unit, direction and meaning, declared once.

What a recipe's evaluations measure it declares itself. The same names stand in the trace, in
MLflow, in reports and in CSV files. Measurements with a part after a
slash (``rms/visual.conv1.weight``) belong to the entry of their first part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a name means."""

    name: str
    unit: str
    meaning: str
    direction: Direction | None = None
    """Which way is better; None where neither is."""
    chance: float | None = None
    """What a model that learnt nothing scores, where that is known without the data."""
    judged: bool = False
    """An accuracy, a fraction of images, whose collapse the markers call a fault."""


_TABLE = (
    Metric("step", "step", "optimizer steps completed; the first row is 1"),
    Metric("attempt", "", "the attempt that measured the row"),
    Metric("time", "s", "unix time at which the row was measured"),
    Metric("epoch", "epoch", "passes over the training data so far"),
    Metric("samples", "sample", "samples consumed by all ranks so far"),
    Metric("lr", "", "learning rate of the step"),
    Metric("loss", "nat", "training loss, mean over all ranks", "minimize"),
    Metric("grad_norm", "", "global gradient norm, unscaled and before clipping"),
    Metric("logit_scale", "", "inverse temperature, exp of the parameter, 1 to 100"),
    Metric("scaler_scale", "", "loss scale of the fp16 gradient scaler"),
    Metric("skipped_steps", "step", "optimizer steps that the scaler has skipped so far"),
    Metric("step_time_s", "s", "time from the end of the last step to the end of this one"),
    Metric("data_time_s", "s", "part of step_time_s that waited for data"),
    Metric("samples_per_s", "sample/s", "throughput of all ranks"),
    Metric("in_batch_accuracy", "fraction", "pairs matched within the batch", "maximize"),
    Metric("image_feature_std", "", "mean over dimensions of the normalised features' deviation"),
    Metric("text_feature_std", "", "mean over dimensions of the normalised features' deviation"),
    Metric("image_feature_rank", "", "effective rank of image features (exp of spectral entropy)"),
    Metric("text_feature_rank", "", "effective rank of text features (exp of spectral entropy)"),
    Metric("encoder_rank", "", "effective rank of an encoder's features, which may be low early"),
    Metric("projection_rank", "", "effective rank of projected features, low in sound runs too"),
    Metric("projection_spread", "", "root mean square distance of projections from their mean"),
    Metric(
        "prototype_perplexity", "", "prototypes that the mean prediction of a batch spreads over"
    ),
    Metric("prototypes_used", "", "prototypes that are the nearest of some sample of a batch"),
    Metric("loss_gap", "nat", "loss below that of a model that says nothing", "maximize"),
    Metric("ln_scale_min", "", "smallest root mean square of a LayerNorm's scale, 1 at the start"),
    Metric("alignment", "", "mean squared distance between paired features"),
    Metric("logits_lse", "nat", "mean logsumexp of the rows of the logits"),
    Metric("data_faults", "sample", "bad samples replaced by a substitute so far"),
    Metric("rms", "", "root mean square of gradient over Adam's second moment, of a tensor"),
    Metric("update_ratio", "", "norm of the update over norm of the weights, of a group"),
    Metric("update_norm", "", "norm of the whole update over the learning rate, near checkpoints"),
    Metric("interrupted", "", "1 on the first step after an interruption that was asked for"),
    Metric("update_turn", "", "cosine of an update and the one before it, about an interruption"),
    Metric("resume_lr_ratio", "", "learning rate over that of a schedule that goes on, there"),
    Metric("eps_share", "fraction", "tensors whose second moment is dominated by epsilon"),
    Metric("zero_grad_steps", "step", "steps in a row without any gradient, of a parameter"),
    Metric("attention_logits", "", "largest absolute attention logit, of a layer"),
    Metric("params_non_finite", "", "non-finite values in parameters"),
    Metric("bn_non_finite", "", "non-finite values in BatchNorm statistics"),
    Metric("bn_drift_median", "", "median |ln(running variance / fresh variance)| over layers"),
    Metric("bn_drift_max", "", "largest |ln(running variance / fresh variance)| over layers"),
    Metric(
        "bn_initial_share", "fraction", "share of their initial value in BatchNorm's statistics"
    ),
    Metric("bn_gap", "", "relative loss difference of eval mode against train mode on a probe"),
    Metric("recalibrated_top1", "fraction", "top-1 with fresh BatchNorm statistics", "maximize"),
    Metric("eval_images", "image", "images that the evaluation saw"),
    Metric("eval_time_s", "s", "wall time of the evaluation"),
    Metric("gpu_hours", "h", "accelerator-hours (worker-hours on CPU) of all attempts", "minimize"),
    Metric("mean_step_time_s", "s", "training time over optimizer steps of a trial", "minimize"),
    Metric("peak_memory_gib", "GiB", "most memory allocated on one accelerator", "minimize"),
    Metric("num_parameters", "", "trainable and frozen parameters of the model", "minimize"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}


def describe(name: str) -> Metric | None:
    """The table's entry for a measurement, also for a grouped one; None for an unknown name."""
    return METRICS.get(name.split("/", 1)[0])


COSTS = ("gpu_hours", "mean_step_time_s", "peak_memory_gib", "num_parameters")
"""What every trial is measured to cost."""
