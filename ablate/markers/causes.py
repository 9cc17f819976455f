"""What probably causes what the markers see, in any model that is trained by gradient descent.

Each cause has clues with weights, and a run's score for it is the chance that not all of its
clues are coincidence, 1 - product(1 - weight). Clues ``against`` take from it. Causes that only
one kind of model has are its recipe's, and are handed in.
"""

from __future__ import annotations

from ablate.markers import asks
from ablate.markers.clue import Cause, Clue

CAUSES: tuple[Cause, ...] = (
    Cause(
        "learning rate too high",
        {"lr": "a third, a tenth", "warmup": "longer", "grad_clip_norm": "1.0"},
        "Wortsman et al. 2023 (small-scale proxies): instabilities appear at high learning rates",
        clues=(
            Clue(0.6, asks.said("divergence", "rise")),
            Clue(0.5, asks.said("divergence", "overshoot")),
            Clue(0.5, asks.said("update_ratio", "high")),
            Clue(0.5, asks.said("update_ratio", "grown")),
            Clue(0.5, asks.forgot),
            Clue(0.5, asks.unlearnt),
            Clue(0.5, asks.vanished),
            Clue(0.8, asks.thrown),
            Clue(0.3, asks.said("divergence", "chance")),
            Clue(0.3, asks.said("logit_scale", "jump")),
            Clue(0.3, asks.said("feature_collapse")),
            Clue(0.2, asks.said("loss_spike")),
        ),
        against=(
            Clue(0.5, asks.announced),
            Clue(0.5, asks.said("scaler_skips")),
            Clue(0.5, asks.said("attention_logits")),
            Clue(0.5, asks.said("dead_gradient")),
            Clue(0.5, asks.LOW_PRECISION),
            Clue(0.8, asks.ALL_ALIKE),
        ),
    ),
    Cause(
        "warm-up too short",
        {"warmup": "a tenth of the run", "lr": "a third"},
        "Wortsman et al. 2023 (small-scale proxies): a longer warm-up allows a higher rate",
        clues=(
            Clue(0.7, asks.at_once),
            Clue(0.3, asks.said("divergence", "overshoot")),
        ),
        against=(
            Clue(0.4, asks.said("update_ratio", "high")),
            Clue(0.4, asks.said("feature_collapse")),
            Clue(0.8, asks.said("dead_gradient")),
            Clue(0.6, asks.LOW_PRECISION),
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
            Clue(0.8, asks.announced),
            Clue(0.7, asks.unwatched_long_memory),
            Clue(0.2, asks.long_memory),
            Clue(0.2, asks.said("rms_spike")),
        ),
    ),
    Cause(
        "a stretch of bad data",
        {"train_data": "look at the samples of these steps", "grad_clip_norm": "1.0"},
        "Molybog et al. 2023 (arXiv 2304.09871) on PaLM: spikes vanished when the batches "
        "around them were skipped",
        clues=(
            Clue(0.6, asks.sudden),
            Clue(0.5, asks.abrupt),
            Clue(0.3, asks.short),
        ),
        against=(
            Clue(0.7, asks.announced),
            Clue(0.6, asks.DIVERGED),
            Clue(0.7, asks.unlearnt),
        ),
    ),
    Cause(
        "unreadable samples",
        {"train_data": "repair or remove the shards that the log names"},
        "most trainers skip what they cannot decode and log little of it",
        clues=(Clue(0.9, asks.said("data_faults")),),
    ),
    Cause(
        "learning rate too low",
        {"lr": "ten times"},
        "updates of less than a millionth of the weights change nothing within a run",
        clues=(Clue(0.8, asks.said("update_ratio", "low")),),
        against=(
            Clue(0.6, asks.said("dead_gradient")),
            Clue(0.5, asks.said("update_ratio", "eps")),
        ),
    ),
    Cause(
        "epsilon rules the update",
        {"eps": "1e-6, 1e-8"},
        "Wortsman et al. 2023 (small-scale proxies): gradients near epsilon shrink updates",
        clues=(Clue(0.8, asks.said("update_ratio", "eps")),),
        against=(Clue(0.5, asks.DIVERGED),),
    ),
    Cause(
        "fp16 runs out of range",
        {"precision": "amp_bf16, fp32"},
        "PyTorch's GradScaler halves its scale on every infinite gradient",
        clues=(
            Clue(0.8, asks.said("scaler_skips", "streak")),
            Clue(0.8, asks.said("scaler_skips", "scale")),
            Clue(0.7, asks.said("scaler_skips", "rate")),
            Clue(0.2, asks.both(asks.said("scaler_skips"), asks.precision("amp"))),
            Clue(0.7, asks.both(asks.precision("amp"), asks.never_finite)),
        ),
    ),
    Cause(
        "weights in too low a precision",
        {"precision": "amp_bf16, fp32", "eps": "1e-6"},
        "weights and Adam's moments are cast, too, with fp16, bf16 and pure_*; an eps "
        "below 6e-8 is 0 in fp16, and Adam then divides 0 by 0",
        clues=(
            Clue(0.7, asks.both(asks.LOW_PRECISION, asks.said("non_finite"))),
            Clue(0.5, asks.both(asks.precision("pure_fp16", "fp16"), asks.tiny_eps)),
        ),
    ),
    Cause(
        "an infinite or NaN input",
        {"train_data": "look for the sample", "aug_cfg": "without what may divide by zero"},
        "a non-finite forward pass poisons BatchNorm's running statistics even when the "
        "optimizer step is skipped",
        clues=(
            Clue(0.6, asks.said("batch_norm", "non_finite")),
            Clue(0.4, asks.said("non_finite")),
        ),
        against=(
            Clue(0.7, asks.LOW_PRECISION),
            Clue(0.7, asks.ran_away),
            Clue(0.7, asks.thrown),
            Clue(0.5, asks.said("scaler_skips")),
        ),
    ),
    Cause(
        "overflow after the loss ran away",
        {"lr": "a third, a tenth", "grad_clip_norm": "1.0", "warmup": "longer"},
        "a non-finite loss that a spike or a rise announced is their consequence",
        clues=(
            Clue(0.8, asks.ran_away),
            Clue(0.3, asks.both(asks.ran_away, asks.said("non_finite"))),
        ),
        against=(Clue(0.5, asks.LOW_PRECISION),),
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
            Clue(0.6, asks.BN_DRIFT),
            Clue(0.6, asks.fault("statistics")),
            Clue(0.4, asks.both(asks.BN_DRIFT, asks.said("accuracy_collapse"))),
            Clue(0.4, asks.both(asks.BN_DRIFT, asks.precision("pure_bf16", "pure_fp16"))),
        ),
        against=(
            Clue(0.7, asks.fault("weights")),
            Clue(0.5, asks.DIVERGED),
            Clue(0.4, asks.said("loss_spike")),
        ),
    ),
    Cause(
        "a part of the model gets no gradient",
        {"lock_image": "false", "lock_text": "false"},
        "a trained parameter whose gradient is zero for 50 steps is cut off from the loss",
        clues=(Clue(0.95, asks.said("dead_gradient")),),
    ),
    Cause(
        "attention logits grow",
        {"lr": "a third", "wd": "higher", "grad_clip_norm": "1.0"},
        "Wortsman et al. 2023 (small-scale proxies): they grow before divergence; "
        "normalising queries and keys prevents it",
        clues=(Clue(0.75, asks.said("attention_logits")),),
    ),
    Cause(
        "output logits drift",
        {"wd": "higher", "lr": "a third"},
        "Chowdhery et al. 2022 (PaLM) add a z-loss against it",
        clues=(Clue(0.7, asks.said("logit_drift")),),
        against=(Clue(0.6, asks.DIVERGED), Clue(0.6, asks.said("loss_spike"))),
    ),
    Cause(
        "the features collapse",
        {"lr": "a third", "wd": "lower", "batch_size": "larger"},
        "Jing et al. 2022 (dimensional collapse in contrastive learning)",
        clues=(Clue(0.6, asks.said("feature_collapse")),),
        against=(Clue(0.5, asks.DIVERGED), Clue(0.5, asks.said("dead_gradient"))),
    ),
)
