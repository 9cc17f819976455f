"""The files of an exported setting that are text: configuration, scripts, what they say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ablate import __version__
from ablate.report.best import Recommendation
from ablate.report.scale import scale_of
from ablate.report.script import one_line
from ablate.study import Study
from ablate.words import counted

RUN = """\
set -euo pipefail
here=$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)
# Relative data paths are relative to this folder; DATA_ROOT moves it.
root={root}
exec ablate train "$here/config.yaml" --seed {seed} --root "${{DATA_ROOT:-$root}}" "$@"
"""
SLURM = """\
#SBATCH --job-name={name}
#SBATCH --ntasks={workers}
#SBATCH --cpus-per-task={cpus}{gpus}
#SBATCH --time=24:00:00
# cd best && sbatch slurm.sh
# {upstream}; our own, on one machine:
# cd best && sbatch --ntasks=1 --cpus-per-task={all_cpus} slurm.sh run.sh
set -euo pipefail
cd -- "${{SLURM_SUBMIT_DIR:-.}}"
export MASTER_ADDR=${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NAME=${{NAME:-{name}-$SLURM_JOB_ID}}
exec srun bash "$PWD/${{1:-{script}}}" "${{@:2}}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is exported: one trial of one cell, and all that is known of it."""

    study: Study
    choice: Recommendation
    full: Mapping[str, Any]
    """The configuration with every value resolved, seed included."""
    minimal: Mapping[str, Any]
    """What of it differs from the recipe's defaults."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """The attempt's last word (result.json)."""
    losses: Sequence[float] = ()
    """Of the first steps."""

    @property
    def metric(self) -> str:
        return self.study.objective.metric

    def origin(self) -> list[str]:
        """Where a file comes from, a line each."""
        row = self.choice.run
        listed = ", ".join(f"{name} {value}" for name, value in flat(row.fingerprint or {}))
        return [
            self.choice.sentence,
            f"Study {self.study.name}, trial {row.id}: {self.choice.chosen.name}, seed {row.seed} "
            f"(the median seed unless asked otherwise), {self.metric} {row.value} at step "
            f"{row.step}.",
            f"Trained with {listed}." if listed else "What it was trained with is not known.",
            f"Written by ablate {__version__}.",
        ]

    def band(self) -> str:
        """What another run of the setting gives, as a sentence's end."""
        values = self.choice.chosen.values()
        if len(values) < 2:
            return "another number; how far it may be off takes more seeds to know."
        scale = scale_of(self.study, ())
        middle, spread = fmean(values), stdev(values)
        low, high = middle - 3 * spread, middle + 3 * spread
        if scale.percent:
            low, high = max(low, 0.0), min(high, 1.0)
        seeds = counted(len(values), "seed")
        return (
            f"{scale.value(low)} to {scale.value(high)} (mean of {seeds} and 3 standard "
            "deviations), not the same number."
        )


def leave_defaults_out(kind: type[BaseModel], full: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `full` that the recipe would not resolve to by itself."""
    kept = dict(full)
    for name in full:
        fewer = {key: value for key, value in kept.items() if key != name}
        try:
            if kind(**fewer).model_dump(mode="json") == full:
                kept = fewer
        except ValidationError:
            continue
    return kept


def config_yaml(setting: Setting, *, full: bool) -> str:
    """A study's beginning: add factors, and it is compared with."""
    study = setting.study
    fields = setting.full if full else setting.minimal
    objective = study.objective.model_dump(exclude_none=True)
    content = {
        "recipe": study.recipe,
        "baseline": json.loads(json.dumps({k: v for k, v in fields.items() if k != "seed"})),
        "seeds": list(study.seeds),
        "objective": objective,
        "gang": study.gang.model_dump(exclude_none=True),
        **({"markers": dict(study.markers)} if study.markers else {}),
    }
    what = "Every value is resolved." if full else "What differs from the recipe's defaults."
    comments = [*setting.origin(), f"{what} Add factors to ask what to change next."]
    head = "".join(f"# {one_line(line)}\n" for line in comments)
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def run_script(setting: Setting) -> str:
    """``run.sh``: the trial itself, once more."""
    row = setting.choice.run
    comments = [
        *setting.origin(),
        "",
        f"Repeats trial {row.id} without a study and without Ray: on the same kind of machine, "
        "with the versions above, every number is the same to the last bit.",
        "--out is the folder of the run; what was stopped goes on there.",
    ]
    text = RUN.format(root=shlex.quote(setting.study.root), seed=row.seed)
    return _commented(comments) + text


def slurm_script(setting: Setting, *, upstream: bool) -> str:
    """``slurm.sh``: a process for each worker, started by srun."""
    gang = setting.study.gang
    cpus = max(1, round(gang.cpus_per_worker))
    gpus = f"\n#SBATCH --gpus-per-task={gang.gpus_per_worker}" if gang.gpus_per_worker else ""
    text = SLURM.format(
        name=f"{setting.study.name}-{setting.choice.run.id}",
        workers=gang.workers if upstream else 1,
        cpus=cpus if upstream else cpus * gang.workers,
        all_cpus=cpus * gang.workers,
        gpus=gpus,
        upstream="The upstream trainer (train.sh)" if upstream else "Our own trainer (run.sh)",
        script="train.sh" if upstream else "run.sh",
    )
    return "#!/usr/bin/env bash\n" + text


def sky_yaml(setting: Setting, *, upstream: bool) -> str:
    """``sky.yaml``: one rented machine, by SkyPilot."""
    gang = setting.study.gang
    needs: dict[str, Any] = {"cpus": f"{max(2, round(gang.cpus_per_worker * gang.workers))}+"}
    if gang.gpus_per_worker:
        needs["accelerators"] = f"A100:{gang.gpus_per_worker * gang.workers}"
    content = {
        "name": f"{setting.study.name}-{setting.choice.run.id}",
        "resources": needs,
        "workdir": ".",
        "envs": {"DATA_ROOT": "/data"},
        "file_mounts": {"/data": "s3://your-bucket/data"},
        "setup": "pip install -r requirements.txt",
        "run": "bash train.sh" if upstream else "bash run.sh",
    }
    head = (
        "# cd best && sky launch sky.yaml    the kind of accelerator and the bucket are yours to "
        "name\n"
    )
    return head + yaml.safe_dump(content, sort_keys=False)


def requirements(names: Mapping[str, str | None], *, what: str) -> str:
    """``requirements.txt``: the versions with which the script was seen to run."""
    lines = [f"{name}=={version}" if version else name for name, version in names.items()]
    return f"# {what}\n" + "".join(f"{line}\n" for line in lines)


def readme(setting: Setting, files: Mapping[str, str]) -> str:
    """``README.md`` of the bundle: what came out, and what each file is for."""
    listed = "".join(f"- `{name}`: {what}\n" for name, what in files.items())
    return (
        f"# {one_line(setting.study.name)}: {one_line(setting.choice.chosen.name)}\n\n"
        f"{one_line(setting.choice.sentence)}\n\n{listed}\n"
        "`ablate export --verify` on the study's folder checks all of it here.\n"
    )


def model_card(
    setting: Setting, *, library: str, data: Sequence[str], limits: Sequence[str]
) -> str:
    """``model/README.md``, as Hugging Face shows it."""
    choice, scale = setting.choice, scale_of(setting.study, ())
    ran = [row for row in choice.chosen.trials if row.value is not None]
    runs = ", ".join(f"seed {row.seed}: {scale.value(row.value)}" for row in ran)
    mine = f"{scale.value(choice.run.value)} (seed {choice.run.seed}, the model here)"
    front: dict[str, Any] = {"library_name": library} if library else {}
    front["tags"] = [setting.study.recipe, "ablate"]
    changed = json.loads(json.dumps(setting.minimal))
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {one_line(setting.study.name)}: {one_line(choice.chosen.name)}",
        *map(one_line, setting.origin()),
        "## Result",
        f"{setting.metric} {mine}; all seeds of the setting: {runs}. Another run gives "
        f"{setting.band()}",
        "## Data",
        _bullets(data),
        "## Known limits",
        _bullets(limits) or "None is known.",
        "## Settings that differ from the defaults",
        f"```yaml\n{yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {one_line(line)}" for line in lines)


def find_licences(root: Path, paths: Sequence[str]) -> list[str]:
    """A line for each source of data: where it lies, and the licence files beside it."""
    lines = []
    for path in paths:
        folder = (root / path.split("::")[0]).parent
        near = [
            found.relative_to(root) if found.is_relative_to(root) else found
            for place in (root / path, folder, folder.parent)
            if place.is_dir()
            for found in sorted(place.glob("[Ll][Ii][Cc][Ee][Nn]*"))
        ]
        licence = ", ".join(map(str, dict.fromkeys(near)))
        lines.append(f"{path}: licence {licence or 'not known here, ask the source of the data'}")
    return lines


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of nested facts."""
    found = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", str(value)))
    return found


def _commented(comments: Sequence[str]) -> str:
    lines = ["#!/usr/bin/env bash", *(f"# {one_line(line)}".rstrip() for line in comments)]
    return "\n".join(lines) + "\n\n"
