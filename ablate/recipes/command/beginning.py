"""What a first study of anybody's program asks."""

from __future__ import annotations

from ablate.trial.recipe import Beginning, Question


def beginning(*, workers: int, gpus: int) -> Beginning:
    """A program that takes a learning rate and a seed, and prints its accuracy."""
    return Beginning(
        baseline={
            "command": "python train.py --lr {lr} --seed {seed}",
            "metrics": {"accuracy": "maximize"},
            "lr": 0.1,
        },
        asks=("command",),
        questions={
            "lr": Question(
                text="Which learning rate does the program want?",
                factors={"lr": [0.1, 0.01, 1.0]},
            )
        },
        metric="accuracy",
        margin=0.005,
    )
