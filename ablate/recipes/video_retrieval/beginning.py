"""What a first study of text-video retrieval asks: how much is trained, and of how many frames."""

from __future__ import annotations

from ablate.trial.recipe import Beginning, Question


def beginning(*, workers: int, gpus: int) -> Beginning:
    """InternVideo2's settings of its CLIP training, on an open_clip model and clips of the user's
    own; its global batch shared out."""
    return Beginning(
        baseline={
            "model": "ViT-B-16",
            "train_data": "/data/clips/train.json",
            "val_data": "/data/clips/val.json",
            "init_from": {"path": "/data/weights/vit_b_16.safetensors"},
            "max_txt_l": 77,
            "num_frames": 8,
            "lr": 1.0e-5,
            "epochs": 3,
            "batch_size": max(256 // workers, 2),
            "precision": "amp_bf16" if gpus else "fp32",
            "num_workers": 12 if gpus else 0,
        },
        asks=("train_data", "val_data"),
        questions={
            "frames": Question(
                text="How many frames of a clip are worth their time?",
                factors={"num_frames": [8, 4, 1]},
            ),
            "vision": Question(
                text="Should the image tower be trained?", factors={"freeze_vision": [True, False]}
            ),
            "text": Question(
                text="Should the text tower be trained?", factors={"freeze_text": [True, False]}
            ),
            "lr": Question(
                text="Is the learning rate right?", factors={"lr": [1.0e-5, 3.0e-6, 3.0e-5]}
            ),
            "temperature": Question(
                text="Where should the temperature start?", factors={"temp": [0.01, 0.07]}
            ),
        },
        metric="t2v_r1",
        margin=0.01,
    )
