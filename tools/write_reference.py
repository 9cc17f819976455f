"""Writes docs/reference from the code: study keys, fields of every recipe, metrics, markers, exit
codes, the Python API; also a hook of mkdocs, which calls it before a build.

    python tools/write_reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablate
from ablate import api
from ablate.cli import app
from ablate.cli.examples import verbs_of
from ablate.cli.schemas import schema_of, verbs
from ablate.markers.rules import RULES
from ablate.study import json_schema
from ablate.trial.metrics import METRICS
from ablate.trial.recipe import load, usable

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "docs" / "reference"


def on_pre_build(config: Any) -> None:
    """mkdocs' hook."""
    write(FOLDER)


def write(folder: Path) -> list[Path]:
    """One page for each subject; files that say the same are left untouched."""
    pages = {
        "study.md": study_keys(),
        **{f"recipe_{name}.md": recipe(name) for name in usable()},
        "recipes.md": recipes(),
        "metrics.md": metrics(),
        "markers.md": markers(),
        "commands.md": commands(),
        "json.md": json_of_verbs(),
        "python.md": python(),
        "places.md": (REPOSITORY / "launch" / "README.md").read_text(encoding="utf-8"),
        "skill.md": skill(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def study_keys() -> str:
    """Every key of a study file, with its type, default and meaning."""
    schema = json_schema()
    parts = ["# Keys of a study file\n", _keys(schema["properties"], schema.get("required", []))]
    for title, entry in schema["$defs"].items():
        if title.startswith("baseline-") or title not in _own(schema):
            continue
        parts.append(f"## {title}\n\n{inspect.cleandoc(entry.get('description', ''))}\n")
        parts.append(_keys(entry.get("properties", {}), entry.get("required", [])))
    return "\n".join(parts)


def _own(schema: dict[str, Any]) -> set[str]:
    """Definitions that the keys of a study lead to, not those of a recipe's fields."""
    found: set[str] = set()
    waiting = [schema["properties"]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rsplit("/", 1)[-1]
            if name and name not in found:
                found.add(name)
                waiting.append(schema["$defs"][name])
            waiting += list(node.values())
        elif isinstance(node, list):
            waiting += node
    return found


def _keys(properties: dict[str, Any], required: list[str]) -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for name, entry in properties.items():
            default = "required" if name in required else f"`{entry.get('default')}`"
            yield f"`{name}`", _type(entry), default, entry.get("description", "")

    return table(("key", "type", "default", "meaning"), rows())


def _type(entry: dict[str, Any]) -> str:
    if "$ref" in entry:
        return str(entry["$ref"]).rsplit("/", 1)[-1]
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in entry:
            return " or ".join(dict.fromkeys(_type(item) for item in entry[key]))
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry.get("type") == "array" and "items" in entry:
        return f"list of {_type(entry['items'])}"
    return str(entry.get("type", "any"))


def recipe(name: str) -> str:
    """The fields of a recipe's baseline."""
    module = load(name)
    schema = module.Config.model_json_schema()
    ask = getattr(module, "own_fields", None)
    ours = ask() if ask is not None else None
    doc = inspect.cleandoc(inspect.getdoc(module) or "")

    def rows() -> Iterator[tuple[str, ...]]:
        for field, entry in schema["properties"].items():
            flag = "" if ours is None or field in ours else f"`--{field.replace('_', '-')}`"
            default = "required" if field in schema.get("required", []) else entry.get("default")
            row = (f"`{field}`", _type(entry), f"`{default}`", entry.get("description", ""))
            yield row if ours is None else (*row[:3], flag, row[3])

    header = ("field", "type", "default", "meaning")
    if ours is not None:
        header = ("field", "type", "default", "upstream flag", "meaning")
    return f"# Recipe `{name}`\n\n{_plain(doc)}\n\n## Fields of the baseline\n\n" + table(
        header, rows()
    )


def recipes() -> str:
    """The recipes that can be loaded here, each with its first line."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name in usable():
            doc = inspect.getdoc(load(name)) or ""
            yield f"[{name}](recipe_{name}.md)", doc.partition("\n\n")[0]

    return "# Recipes\n\n" + table(("recipe", "what it trains"), rows())


def _plain(doc: str) -> str:
    """A docstring without the roles of another markup; indented blocks stay code."""
    for role in (":func:", ":mod:", ":class:", ":data:"):
        doc = doc.replace(role, "")
    return doc.replace("\n::\n", "\n").replace("``", "`")


def metrics() -> str:
    """What is measured, with unit and direction."""
    parts = ["# Metrics\n", "Of every recipe, step by step and at the end:\n"]
    parts.append(table(("name", "unit", "meaning", "better"), map(_metric, METRICS.values())))
    for name in usable():
        module = load(name)
        try:
            declared = module.metrics(module.Config())
        except ValueError:
            continue  # a recipe whose user says what it measures
        parts.append(f"## Evaluations of `{name}`\n")
        parts.append(table(("name", "unit", "meaning", "better"), map(_metric, declared)))
    return "\n".join(parts)


def _metric(metric: Any) -> tuple[str, ...]:
    return f"`{metric.name}`", metric.unit, metric.meaning, metric.direction or ""


def markers() -> str:
    """Every rule with what it reads, its formula and its thresholds."""
    parts = ["# Markers of instability\n", "A study changes thresholds under `markers:`.\n"]
    for rule in RULES:
        parts.append(f"## {rule.name}\n")
        parts.append(f"Reads {', '.join(f'`{name}`' for name in rule.reads) or 'events'}.\n")
        parts.append(_plain(inspect.cleandoc(rule.__doc__ or "")) + "\n")
        fields = [field for field in dataclasses.fields(rule) if field.init]
        rows = ((f"`{field.name}`", f"`{field.default}`") for field in fields)
        parts.append(table(("threshold", "default"), iter(rows)))
    return "\n".join(parts)


def commands() -> str:
    """Every verb with its examples, and the exit codes."""
    doc = inspect.cleandoc(app.__doc__ or "").split("Exit codes:", 1)[1]
    codes = [text.strip() for text in " ".join(doc.split()).removesuffix(".").split(";")]
    rows = ((code.partition(" ")[0], code.partition(" ")[2]) for code in codes)
    parts = ["# Commands\n", "## Exit codes\n", table(("code", "meaning"), iter(rows))]
    for name, command in verbs_of(app.app):
        assert command.callback is not None
        parts.append(f"## ablate {name}\n")
        parts.append(inspect.cleandoc(inspect.getdoc(command.callback) or "") + "\n")
        examples = (command.epilog or "").partition("Examples:\n")[2]
        if examples:
            parts.append(f"```bash\n{textwrap.dedent(examples)}\n```\n")
    return "\n".join(parts)


def json_of_verbs() -> str:
    """What each verb prints with --json: its keys, and the whole schema below."""
    parts = ["# JSON of every verb\n", "`ablate schema VERB` prints the same.\n"]
    for verb in verbs():
        found = schema_of(verb)
        body = json.dumps({k: v for k, v in found.items() if k[0] != "$"}, indent=1)
        parts += [f"## {found['title']}\n", f"{found['description']}\n", f"```json\n{body}\n```\n"]
    return "\n".join(parts)


def python() -> str:
    """The functions of the package and of a run."""
    parts = ["# Python\n", _plain(inspect.cleandoc(api.__doc__ or "")).replace(">>> ", "    >>> ")]
    for name in ablate.__all__:
        found = getattr(ablate, name)
        if not inspect.isfunction(found):
            continue
        parts += _function(f"ablate.{name}", found)
    for name, found in inspect.getmembers(api.Run, inspect.isfunction):
        if not name.startswith("_"):
            parts += _function(f"Run.{name}", found)
    return "\n".join(parts) + "\n"


def _function(name: str, found: Any) -> list[str]:
    doc = _plain(inspect.cleandoc(inspect.getdoc(found) or ""))
    return [f"\n## {name}\n", f"```python\n{name}{inspect.signature(found)}\n```\n", doc]


def skill() -> str:
    """The file for agents, without its header."""
    text = (REPOSITORY / "ablate" / "SKILL.md").read_text(encoding="utf-8")
    return text.split("---\n", 2)[2]


if __name__ == "__main__":
    for path in write(FOLDER):
        print(path)
