"""The reference of the documentation site is made from the code, and the site's links hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from write_reference import write

from ablate.markers.rules import RULES
from ablate.study import json_schema
from ablate.trial.recipe import load, usable

REPOSITORY = Path(__file__).parents[2]


def test_the_reference_names_everything_there_is(tmp_path: Path) -> None:
    """Each key of a study, each field of each recipe, each marker and exit code."""
    pages = {path.name: path.read_text() for path in write(tmp_path)}
    for key in json_schema()["properties"]:
        assert f"| `{key}` |" in pages["study.md"]
    for name in usable():
        page = pages[f"recipe_{name}.md"]
        for field in load(name).Config.model_fields:
            assert f"| `{field}` |" in page
    assert all(f"## {rule.name}\n" in pages["markers.md"] for rule in RULES)
    assert all(f"| {code} |" in pages["commands.md"] for code in (0, 1, 2, 3, 130))
    assert "`--warmup`" in pages["recipe_openclip.md"] and "Run.effects" in pages["python.md"]


def test_every_page_links_to_pages_of_the_site_alone(tmp_path: Path) -> None:
    """What mkdocs refuses, seen without it: a link of docs/ that leaves docs/, or leads nowhere."""
    docs = REPOSITORY / "docs"
    made = {docs / "reference" / path.name for path in write(tmp_path)}
    pages = list(docs.rglob("*.md"))
    broken = [
        f"{page.relative_to(docs)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", page.read_text(encoding="utf-8"))
        if (target := (page.parent / link).resolve()) not in made
        and not (target.is_file() and docs in target.parents)
    ]
    assert len(pages) > 15 and broken == []


@pytest.mark.exhaustive
def test_the_site_builds_and_every_link_holds(tmp_path: Path) -> None:
    """mkdocs, which takes any link that leads nowhere and any page out of the menu as an error."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "reference" / "study" / "index.html").is_file()
