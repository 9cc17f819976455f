"""The Dockerfile's own Python commands, run to their end in an environment of its own.

On demand: packages that the image has beyond the present environment are fetched from the index. No
image is built (there is no registry to pull its base from): what apt-get brings is not proven here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "launch" / "Dockerfile"
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1200)]


def instructions() -> list[tuple[str, str]]:
    """(instruction, what follows), lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, rest in re.findall(r"^([A-Z]+) (.+)$", text, re.MULTILINE)]


def test_the_images_commands_run_and_its_programs_answer(tmp_path: Path) -> None:
    """What COPY brings is enough to install from, every pinned version can be had, each import of
    the build's own check succeeds, and the health check passes as another user's home would see
    it: without the sources beside it."""
    image, home = tmp_path / "image", tmp_path / "home"
    image.mkdir()
    home.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    (inner,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    below = [path for path in sys.path if path.endswith("site-packages")]
    (inner / "below.pth").write_text("\n".join(below))
    env = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        # Programs of what is installed below come last.
        "PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin:{Path(sys.executable).parent}",
        "HOME": str(home),
    }
    ran = []
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = image / target / (source if target == "./" else "")
                copy = shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copyfile
                place.parent.mkdir(parents=True, exist_ok=True)
                copy(REPOSITORY / source, place)
        elif word == "RUN" and rest.startswith(("pip", "python")):
            ran.append(rest.split()[0])
            done = subprocess.run(
                ["sh", "-ec", rest], cwd=image, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert ran == ["pip", "python"]
    (check,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    (command,) = re.findall(r"CMD \[(.+)\]", check)
    words = [part.strip().strip('"') for part in command.split(",")]
    shutil.rmtree(image)
    done = subprocess.run(words, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "launch" in done.stdout, done.stderr
    where = "import ablate; print(ablate.__file__)"
    found = subprocess.run(
        ["python", "-c", where], cwd=home, env=env, capture_output=True, text=True, check=True
    )
    assert str(inner) in found.stdout, "it is the installed package"
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users and users[-1] != "root"
