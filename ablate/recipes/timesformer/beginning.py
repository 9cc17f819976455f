"""What a first study of TimeSformer asks: upstream's file, and what its users argue about."""

from __future__ import annotations

from ablate.trial.recipe import Beginning, Question


def beginning(*, workers: int, gpus: int) -> Beginning:
    """``TimeSformer_divST_8x32_224.yaml`` of upstream, on clips of the user's own."""
    return Beginning(
        baseline={
            "model_name": "vit_base_patch16_224",
            "train_data": "/data/clips/train.csv",
            "val_data": "/data/clips/val.csv",
            "num_frames": 8,
            "sampling_rate": 32,
            "base_lr": 0.005,
            "max_epoch": 15,
            "batch_size": 8 * workers,
            "precision": "amp_bf16" if gpus else "fp32",
            "num_workers": 8 if gpus else 0,
        },
        asks=("train_data", "val_data"),
        questions={
            "attention": Question(
                text="How should attention look at time?",
                factors={
                    "attention_type": ["divided_space_time", "joint_space_time", "space_only"]
                },
            ),
            "time": Question(
                text="Does the model use the order of frames, or only what they show?",
                factors={"frame_order": ["kept", "shuffled"]},
                controls={"frame_order": ("shuffled",)},
            ),
            "sampling": Question(
                text="How far apart should the frames be?",
                factors={"sampling_rate": [32, 16, 8]},
            ),
            "lr": Question(
                text="Is the learning rate right for this batch?",
                factors={"base_lr": [0.005, 0.0025, 0.01]},
            ),
            "resume": Question(
                text="Does a run that lost its optimizer's state end elsewhere?",
                factors={
                    "interruption": {
                        "none": {},
                        "optimizer_lost": {"interruption": {"at": 0.6, "optimizer": "lost"}},
                    }
                },
                controls={"interruption": ("optimizer_lost",)},
            ),
        },
        metric="clip_top1",
        margin=0.005,
    )
