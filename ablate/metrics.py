"""Every measurement: its name, unit, direction and meaning, declared once.

The same names stand in the trace, in MLflow, in reports and in CSV files. Measurements with a
part after a slash (``rms/visual.conv1.weight``) belong to the entry of their first part.
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
    objective: bool = False
    """A study may be judged by it: it is measured at evaluations."""


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
    Metric("alignment", "", "mean squared distance between paired features"),
    Metric("logits_lse", "nat", "mean logsumexp of the rows of the logits"),
    Metric("data_faults", "sample", "bad samples replaced by a substitute so far"),
    Metric("rms", "", "root mean square of gradient over Adam's second moment, of a tensor"),
    Metric("update_ratio", "", "norm of the update over norm of the weights, of a group"),
    Metric("eps_share", "fraction", "tensors whose second moment is dominated by epsilon"),
    Metric("zero_grad_steps", "step", "steps in a row without any gradient, of a parameter"),
    Metric("attention_logits", "", "largest absolute attention logit, of a layer"),
    Metric("params_non_finite", "", "non-finite values in parameters"),
    Metric("bn_non_finite", "", "non-finite values in BatchNorm statistics"),
    Metric("bn_drift_median", "", "median |ln(running variance / fresh variance)| over layers"),
    Metric("bn_drift_max", "", "largest |ln(running variance / fresh variance)| over layers"),
    Metric("bn_gap", "", "relative loss difference of eval mode against train mode on a probe"),
    Metric("recalibrated_top1", "fraction", "top-1 with fresh BatchNorm statistics", "maximize"),
    Metric("imagenet_top1", "fraction", "zero-shot top-1 accuracy", "maximize", objective=True),
    Metric("imagenet_top5", "fraction", "zero-shot top-5 accuracy", "maximize", objective=True),
    Metric("eval_images", "image", "images that the evaluation saw"),
    Metric("eval_time_s", "s", "wall time of the evaluation"),
    Metric("zero_shot_top1", "fraction", "zero-shot top-1 of a set", "maximize", objective=True),
    Metric("zero_shot_top5", "fraction", "zero-shot top-5 of a set", "maximize", objective=True),
    Metric("knn_top1", "fraction", "weighted kNN accuracy", "maximize", objective=True),
    Metric("linear_top1", "fraction", "linear-probe accuracy", "maximize", objective=True),
    *(
        Metric(
            f"retrieval_{way}_r{k}", "fraction", f"{what} recall at {k}", "maximize", objective=True
        )
        for way, what in (("i2t", "image-to-text"), ("t2i", "text-to-image"))
        for k in (1, 5, 10)
    ),
    Metric("gpu_hours", "h", "accelerator-hours (worker-hours on CPU) of all attempts", "minimize"),
    Metric("mean_step_time_s", "s", "training time over optimizer steps of a trial", "minimize"),
    Metric("peak_memory_gib", "GiB", "most memory allocated on one accelerator", "minimize"),
    Metric("num_parameters", "", "trainable and frozen parameters of the model", "minimize"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}


def describe(name: str) -> Metric | None:
    """The table's entry for a measurement, also for a grouped one; None for an unknown name."""
    return METRICS.get(name.split("/", 1)[0])


def objectives() -> tuple[str, ...]:
    """Names by which a study may be judged."""
    return tuple(metric.name for metric in _TABLE if metric.objective)


COSTS = ("gpu_hours", "mean_step_time_s", "peak_memory_gib", "num_parameters")
"""What every trial is measured to cost."""


def costs() -> tuple[str, ...]:
    """Names that an objective may be weighed against: costs, and other objectives."""
    return (*COSTS, *objectives())
