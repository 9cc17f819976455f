"""The doctor tells an accelerator that cannot be used from one that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ablate.runner import doctor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def accelerators(folder: Path) -> doctor.Finding:
    (found,) = (f for f in doctor.examine(folder) if f.subject == "accelerators")
    return found


def test_gpus_that_torch_cannot_use_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi tells of two, torch of none: both versions are named, with torch's reason."""
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\necho 'NVIDIA H100, 470.82.01'\necho 'NVIDIA H100, 470.82.01'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = accelerators(tmp_path)
    assert found.level == "error"
    assert "2 x NVIDIA H100 with driver 470.82.01" in found.message
    assert torch.__version__ in found.message and "driver" in found.message.partition(": ")[2]


def test_a_machine_without_any_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials then train on the CPU; without a compiler, they are not compiled."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert accelerators(tmp_path).level == "ok"
    (compiler,) = (f for f in doctor.examine(tmp_path) if f.subject == "compiler")
    assert compiler.level == "warning" and "torchcompile" in compiler.message
