"""What is built for others works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def call(*words: str | Path, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """Of wheel and sdist, built from the files that git knows: help, the emoji and the plan of a
    study that came along, in a fresh environment outside the repository. Makers' tools stay out.

    The packages it depends on are those of this environment; ablate itself is the wheel's.
    """
    source = tmp_path / "source"
    source.mkdir()
    listed = call("git", "ls-files", "-z", folder=REPOSITORY).split("\0")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = "import setuptools.build_meta as b; print(b.build_sdist('out')); b.build_wheel('out')"
    call(sys.executable, "-c", build, folder=source)
    [wheel], [sdist] = (source / "out").glob("*.whl"), (source / "out").glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ablate/SKILL.md" in names and "ablate/recipes/openclip/tiny-rn-a.json" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/pyproject.toml") for name in archive.getnames())

    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    [packages] = fresh.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(ours) + "\n")
    install = ("-m", "pip", "--python", fresh / "bin" / "python", "install", "--no-deps")
    call(sys.executable, *install, "--no-index", "--force-reinstall", wheel, folder=tmp_path)
    python, verb = fresh / "bin" / "python", fresh / "bin" / "ablate"
    where = call(python, "-c", "import ablate; print(ablate.__file__)", folder=tmp_path)
    assert where.startswith(str(fresh))
    assert "Commands:" in call(verb, "--help", folder=tmp_path)
    call(verb, "data", "emoji", folder=tmp_path)
    study = fresh / "share" / "ablate" / "studies" / "quickstart.yaml"
    assert "12 to run" in call(verb, "plan", study, folder=tmp_path)
