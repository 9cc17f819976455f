"""Fill a manifest in: ``render.py TEMPLATE NAME=VALUE... -- COMMAND...`` prints it.

``${NAME}`` becomes the value, ``${COMMAND}`` the command after ``--`` as one quoted YAML string.
A name without a value, and a value without a place, are errors.
"""

from __future__ import annotations

import json
import shlex
import string
import sys
from collections.abc import Sequence
from pathlib import Path


def render(template: str, values: dict[str, str], command: Sequence[str]) -> str:
    # JSON strings are YAML strings.
    known = dict(values)
    if command:
        known["COMMAND"] = json.dumps(shlex.join(command))
    if unused := known.keys() - set(string.Template(template).get_identifiers()):
        raise SystemExit(f"no place for {', '.join(sorted(unused))} in the template")
    try:
        return string.Template(template).substitute(known)
    except KeyError as error:
        raise SystemExit(f"no value for ${{{error.args[0]}}}") from None


if __name__ == "__main__":
    end = sys.argv.index("--")
    pairs = dict(pair.split("=", 1) for pair in sys.argv[2:end])
    sys.stdout.write(render(Path(sys.argv[1]).read_text(), pairs, sys.argv[end + 1 :]))
