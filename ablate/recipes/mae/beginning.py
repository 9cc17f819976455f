"""What a first study of masked autoencoding asks: the affordable setting, and what is argued of."""

from __future__ import annotations

from ablate.trial.recipe import Beginning, Question


def beginning(*, workers: int, gpus: int) -> Beginning:
    """ViT-B for 100 epochs with a global batch near 256, as in Lightly's benchmark; the levels are
    those of the paper's tables and of the peer's issues."""
    return Beginning(
        baseline={
            "model": "mae_vit_base_patch16",
            "data_path": "/data/images/train",
            "val_path": "/data/images/val",
            "norm_pix_loss": True,
            "precision": "amp" if gpus else "fp32",
            "batch_size": max(256 // workers, 1),
            "blr": 1.5e-4,
            "epochs": 100,
            "warmup_epochs": 10,
            "num_workers": 8 if gpus else 0,
            "evaluations": [
                {"kind": "knn", "train_path": "/data/images/train", "every": 10},
                {"kind": "reconstruction", "every": 5},
            ],
        },
        asks=("data_path", "val_path"),
        questions={
            "mask": Question(
                text="How much of an image should be hidden?",
                factors={"mask_ratio": [0.75, 0.5, 0.9]},
            ),
            "lr": Question(
                text="Is the base learning rate right?", factors={"blr": [1.5e-4, 7.5e-5, 3.0e-4]}
            ),
            "decay": Question(
                text="Does it matter which parameters are decayed?",
                factors={"param_groups": ["mae", "all"]},
                controls={"param_groups": ("all",)},
            ),
            "pixels": Question(
                text="Do normalised patches make a better target?",
                factors={"norm_pix_loss": [True, False]},
            ),
            "crop": Question(
                text="How much of an image should a crop show?",
                factors={"crop_scale": [[0.2, 1.0], [0.08, 1.0]]},
            ),
        },
        metric="knn_top1",
        margin=0.005,
    )
