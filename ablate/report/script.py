"""``train.sh``: the upstream trainer's line as a script that runs to a number."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ablate.trial.upstream import Beside, Upstream

_HEAD = """
set -euo pipefail
here=$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)
logs=$(realpath -m -- "${{LOGS:-logs}}")
name=${{NAME:-{name}-$(date +%Y%m%d-%H%M%S)}}
# Shards are data: webdataset runs no pipe and unpickles nothing.
export WDS_SECURE=1
# Relative data paths are relative to this folder; DATA_ROOT moves it.
root={root}
cd -- "${{DATA_ROOT:-$root}}"

arguments=(
  {arguments}
  {logs} "$logs" {run} "$name"
)
module={module}
start=(torchrun --standalone --nproc_per_node {workers} -m --)
if [ -n "${{SLURM_PROCID:-}}" ] && [ "${{SLURM_NTASKS:-}}" = {workers} ]; then
  start=(python3 -m) # srun has started one process for each worker
else
  unset SLURM_PROCID # the trainer would take it for its rank
fi
"""
_CPUS = """\
if ! python3 -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then
  module={on_cpus} # of this folder; it says why
  export PYTHONPATH=$here${{PYTHONPATH:+:$PYTHONPATH}}
fi
"""
_START = """\
if [ "${{1:-}}" = --dry-run ]; then
  printf '%q ' "${{start[@]}}" "$module" "${{arguments[@]}}"
  exit
fi
"${{start[@]}}" "$module" "${{arguments[@]}}"
[ "${{SLURM_PROCID:-0}}" = 0 ] || exit 0

checkpoint=$logs/$name/{checkpoint}
if [ ! -s "$checkpoint" ]; then # its exit status does not say so
  echo "{trainer} left no checkpoint $checkpoint" >&2
  exit 1
fi
"""
_OWN_NUMBER = """\
python3 - "$logs/$name/{results}" {key} {metric} <<'END'
import json, sys
with open(sys.argv[1]) as file:
    row = json.loads(file.readlines()[-1])
print(sys.argv[3], row[sys.argv[2]])
END
"""
_MEASURE = """\
measure=(ablate evaluate "$checkpoint" --like "$here/config.yaml")
if ! command -v ablate > /dev/null; then
  echo "To measure it: pip install ablate-runner; ${{measure[*]}}" >&2
  exit
fi
"${{measure[@]}}"
"""

_COMMAND = """
set -euo pipefail
# Relative paths are relative to this folder; DATA_ROOT moves it.
root={root}
cd -- "${{DATA_ROOT:-$root}}"
if [ "${{1:-}}" = --dry-run ]; then
  printf '%q ' {words}
  exit
fi
exec {words}
"""


def train_script(
    upstream: Upstream,
    comments: Sequence[str],
    *,
    root: str,
    workers: int,
    name: str,
    metric: str,
) -> str:
    """A bash script that trains with `upstream` in `workers` processes and prints `metric`.

    Relative data paths lie under `root`; the run is called `name` and the time. Every word is
    quoted; comments are kept to their lines.
    """
    facts = {
        "name": shlex.quote(name),
        "root": shlex.quote(root),
        "arguments": "\n  ".join(_lines(upstream.arguments)),
        "logs": upstream.log_flags[0],
        "run": upstream.log_flags[1],
        "workers": workers,
        "module": upstream.module,
        "on_cpus": upstream.on_cpus,
        "checkpoint": upstream.checkpoint,
        "results": upstream.results,
        "trainer": upstream.name,
        "metric": shlex.quote(metric),
        "key": shlex.quote(upstream.measured.get(metric, "")),
    }
    parts = [
        _HEAD,
        _CPUS if upstream.on_cpus else "",
        _START,
        _OWN_NUMBER if metric in upstream.measured else _MEASURE,
    ]
    head = ["#!/usr/bin/env bash", *(f"# {one_line(comment)}".rstrip() for comment in comments)]
    return "\n".join(head) + "\n" + "".join(part.format(**facts) for part in parts)


def command_script(words: Sequence[str], comments: Sequence[str], *, root: str) -> str:
    """A bash script that runs `words` as they are, with relative data paths under `root`."""
    head = ["#!/usr/bin/env bash", *(f"# {one_line(comment)}".rstrip() for comment in comments)]
    text = _COMMAND.format(root=shlex.quote(root), words=shlex.join(words))
    return "\n".join(head) + "\n" + text


def write_script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    path.chmod(0o700)


def _lines(words: Sequence[str | Beside]) -> list[str]:
    """A line for each flag with its values."""
    groups: list[list[str]] = [[]]
    for word in words:
        if isinstance(word, str) and word.startswith("--") and groups[-1]:
            groups.append([])
        groups[-1].append(_quote(word))
    return [" ".join(group) for group in groups]


def _quote(word: str | Beside) -> str:
    if isinstance(word, Beside):
        return f'{shlex.quote(word.prefix)}"$here"/{shlex.quote(word.path)}'
    return shlex.quote(word)


def one_line(text: str) -> str:
    """`text` without what could end a comment."""
    return re.sub(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+", " ", text)
