"""How those train a configuration who leave us: the upstream trainer's own command line.

What a recipe knows of it is an :class:`Upstream`; the script around it is the export's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Beside:
    """An argument that names a file of the bundle: `prefix`, then where `path` lies."""

    prefix: str
    path: str

    def __str__(self) -> str:
        return self.prefix + self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """One configuration in the words of the trainer that the recipe follows."""

    name: str
    """Trainer and version."""
    library: str = ""
    """What loads the exported model, by Hugging Face's name."""
    module: str
    """Python module that torchrun starts in each process."""
    arguments: tuple[str | Beside, ...]
    """Its flags, every value resolved."""
    parser: str
    """``module:function`` that makes a namespace of these arguments."""
    log_flags: tuple[str, str]
    """Flags that take the folder of all logs, and the name of the run within it."""
    checkpoint: str
    """The last checkpoint, within the run's folder."""
    results: str
    """File of JSON lines within the run's folder that its measurements go to."""
    measured: Mapping[str, str] = field(default_factory=dict)
    """Our name of each measurement that it makes itself, with its own name for it."""
    on_cpus: str = ""
    """Module among `files` that starts it in several processes on CPUs; empty: it needs none."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files of the bundle that the line needs: path within it -> text."""
    requirements: tuple[str, ...] = ()
    """Packages that it was seen to run with, as pip takes them."""
    notes: tuple[str, ...] = ()
    """What differs from the trial all the same, a sentence each."""

    def command(self, *, workers: int) -> list[str]:
        """The line for `workers` processes of one machine."""
        # Without "--" torchrun takes the peer's --logs for an abbreviation of its --logs-specs.
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(workers), "-m", "--"]
        return [*launcher, self.module, *(str(argument) for argument in self.arguments)]
