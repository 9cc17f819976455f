"""What a first study of CLIP asks: open_clip's README command, and the usual suspects."""

from __future__ import annotations

from ablate.trial.recipe import Beginning, Question


def beginning(*, workers: int, gpus: int) -> Beginning:
    """The README command of open_clip (RN50 on CC3M), with what it leaves open made explicit.

    Source of the values: README of mlfoundations/open_clip, "Sample single-process running code";
    the levels are what its maintainers and users suggest in its issues.
    """
    return Beginning(
        baseline={
            "model": "RN50",
            "train_data": "/data/cc3m/cc3m-train-{0000..0575}.tar",
            "imagenet_val": "/data/imagenet/val",
            "zeroshot_frequency": 1,
            "precision": "amp_bf16" if gpus else "fp32",
            "batch_size": 128,
            "lr": 1.0e-3,
            "wd": 0.1,
            "beta2": 0.999,
            "warmup": 10_000,
            "epochs": 30,
            "workers": 8 if gpus else 0,
        },
        asks=("model", "train_data", "imagenet_val"),
        questions=_questions(workers=workers, gpus=gpus),
        metric="imagenet_top1",
        margin=0.005,
        usual=True,
    )


def _questions(*, workers: int, gpus: int) -> dict[str, Question]:
    precisions = ["amp_bf16", "amp", "fp32"] if gpus else ["fp32", "amp_bf16"]
    questions = {
        "precision": Question(
            text="Does the number format cost accuracy?", factors={"precision": precisions}
        ),
        "lr": Question(
            text="How near is the learning rate to where training breaks?",
            factors={"lr": [1.0e-3, 5.0e-4, 2.0e-3, 5.0e-3]},
        ),
        "warmup": Question(
            text="Is the warmup too long, or too short?",
            factors={"warmup": [10_000, 2_000, 1_000]},
        ),
        "beta2": Question(
            text="Does Adam's second moment remember too long?",
            factors={"beta2": [0.999, 0.98, 0.95]},
        ),
        "augmentation": Question(
            text="Does a stronger augmentation help?",
            factors={
                "augmentation": {
                    "default": {},
                    "strong": {"aug_cfg": {"use_timm": True, "scale": [0.4, 1.0], "re_prob": 0.3}},
                }
            },
        ),
        "clipping": Question(
            text="Does clipping the gradient help?", factors={"grad_clip_norm": [None, 1.0]}
        ),
    }
    if workers > 1:
        questions["loss"] = Question(
            text="Are --local-loss and --gather-with-grad missing?",
            factors={
                "contrastive_loss": {
                    "default": {},
                    "local_gather": {"local_loss": True, "gather_with_grad": True},
                    "local_only": {"local_loss": True},
                }
            },
            controls={"contrastive_loss": ("local_gather", "local_only")},
        )
    return questions
