"""What a first study of SwAV asks: the peer's script for small batches, and why it collapses."""

from __future__ import annotations

from ablate.trial.recipe import Beginning, Question


def beginning(*, workers: int, gpus: int) -> Beginning:
    """``swav_200ep_bs256_pretrain.sh`` of the peer, its global batch of 256 shared out."""
    return Beginning(
        baseline={
            "arch": "resnet50",
            "data_path": "/data/images/train",
            "val_path": "/data/images/val",
            "nmb_crops": [2, 6],
            "size_crops": [224, 96],
            "min_scale_crops": [0.14, 0.05],
            "max_scale_crops": [1.0, 0.14],
            "queue_length": 3840,
            "epochs": 200,
            "batch_size": max(256 // workers, 2),
            "base_lr": 0.6,
            "final_lr": 6.0e-4,
            "warmup_epochs": 0,
            "freeze_prototypes_niters": 5005,
            "use_fp16": gpus > 0,
            "sync_bn": "pytorch" if gpus else "none",
            "workers": 8 if gpus else 0,
            "evaluations": [{"kind": "knn", "train_path": "/data/images/train", "every": 20}],
        },
        asks=("data_path", "val_path"),
        questions={
            "queue": Question(
                text="Does a batch this small need the queue?",
                factors={"queue_length": [3840, 0]},
            ),
            "sharpness": Question(
                text="Are the assignments too soft? The peer advises 0.03 where it collapses.",
                factors={"epsilon": [0.05, 0.03]},
            ),
            "frozen": Question(
                text="How long should the prototypes stay frozen?",
                factors={"freeze_prototypes_niters": [5005, 313]},
            ),
            "lr": Question(
                text="Is the learning rate right for this batch?",
                factors={"base_lr": [0.6, 0.3, 1.2]},
            ),
        },
        metric="knn_top1",
        margin=0.005,
    )
