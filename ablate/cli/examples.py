"""What each verb looks like when it is used; stands at the end of its --help."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import typer

EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": (
        "ablate init study.yaml --gpus 8 --about precision --about warmup",
        "ablate init study.yaml --gpus 8 --set train_data='/data/cc3m/{0000..0575}.tar'",
        "ablate init mine.yaml --recipe command --set command='python train.py --lr {lr}'",
    ),
    "check": ("ablate check study.yaml",),
    "plan": (
        "ablate plan study.yaml --probe",
        "ablate plan study.yaml --samples-per-s 3600 --concurrency 4",
        "ablate plan study.yaml --commands > trials.sh",
        "ablate plan study.yaml --json",
    ),
    "schema": ("ablate schema > ablate.schema.json", "ablate schema status"),
    "launch": (
        "ablate launch study.yaml",
        "ablate launch study.yaml --yes --address auto",
        "ablate launch study.yaml --dry-run",
    ),
    "confirm": ("ablate confirm runs/study",),
    "status": ("ablate status runs/study", "ablate status runs/study --json"),
    "watch": (
        "ablate watch",
        "ablate watch runs/study 'beta2=0.98 · seed 0'",
        "ablate watch runs/study --once",
    ),
    "stop": ("ablate stop runs/study",),
    "train": ("ablate train runs/study/best/config.yaml --seed 3",),
    "report": ("ablate report runs/study", "ablate report runs/study --json"),
    "export": (
        "ablate export runs/study --verify",
        "ablate export runs/study --cell lr=0.002 --seed 0 --out mine",
    ),
    "evaluate": (
        "ablate evaluate runs/study/best/model --images data/emoji/val",
        "ablate evaluate epoch_30.pt --model RN50 --images /data/val",
    ),
    "ui": ("ablate ui", "ablate ui --live", "ablate ui /shared/runs --port 5001"),
    "rebuild": ("ablate rebuild runs/study",),
    "verify": ("ablate verify runs/study", "ablate verify runs/study --same-as runs/again"),
    "analyze": ("ablate analyze results.csv --margin 0.005",),
    "import": (
        "ablate import wandb_export.csv --metric val_acc --factor lr --factor wd",
        "ablate import mlruns --metric val_acc --experiment resnet",
        "ablate import optuna.db --metric value --minimize",
        "ablate import logs --metric eval_top1",
    ),
    "ladder": ("ablate ladder study.yaml", "ablate ladder runs/study"),
    "compare": ("ablate compare runs/study runs/again",),
    "markers replay": (
        "ablate markers runs/study",
        "ablate markers runs/study --set loss_spike.sigma=4",
    ),
    "markers import": ("ablate markers import logs/run/out.log --batch-size 1024",),
    "diagnose": ("ablate diagnose runs/study", "ablate diagnose out.log"),
    "inspect": (
        "ablate inspect runs/study/trials/9f2c41d0a7b3",
        "ablate inspect step-000100 step-000500",
    ),
    "doctor": ("ablate doctor", "ablate doctor --cluster study.yaml --address auto"),
    "data emoji": ("ablate data emoji",),
    "data cc3m": (
        "ablate data cc3m /data/cc3m --links Train_GCC-training.tsv",
        "ablate data cc3m /data/cc3m",
    ),
    "data pack": (
        "ablate data pack train.csv /data/shards",
        "ablate data pack train.tsv /data/shards --image path --caption text",
    ),
    "data check": ("ablate data check '/data/cc3m/{0000..0575}.tar'",),
}
"""By verb; those of a group have its name before theirs. A verb that needs nothing needs none."""


def show_examples(app: typer.Typer) -> None:
    """Let the --help of every verb end with its examples."""
    for name, command in verbs_of(app):
        lines = EXAMPLES.get(name) or ((f"ablate {name}",) if _stands_alone(command) else ())
        if lines:
            # The first line keeps the terminal from filling the others up into a paragraph.
            command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _stands_alone(command: typer.models.CommandInfo) -> bool:
    """Whether the verb's name is a whole command: nothing must be given."""
    assert command.callback is not None
    parameters = inspect.signature(command.callback).parameters.values()
    return all(parameter.default is not parameter.empty for parameter in parameters)


def verbs_of(app: typer.Typer, within: str = "") -> Iterator[tuple[str, typer.models.CommandInfo]]:
    """(name, command) of every verb, those of groups with the group's name before."""
    for command in app.registered_commands:
        assert command.callback is not None
        yield within + (command.name or command.callback.__name__), command
    for group in app.registered_groups:
        assert group.typer_instance is not None
        name = f"{group.name} " if isinstance(group.name, str) else ""
        yield from verbs_of(group.typer_instance, within + name)
