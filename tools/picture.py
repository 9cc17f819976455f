"""Takes docs/report.png: the first screens of a report, as Chromium draws it.

python tools/picture.py runs/quickstart/report.html docs/report.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1180, 1620
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def take(page: Path, target: Path) -> None:
    """Write `target`, a palette PNG of the page's upper part."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser is installed; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        raw = Path(profile) / "page.png"
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-dev-shm-usage", f"--user-data-dir={profile}",
                f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={raw}",
                f"file://{page.resolve()}",
            ],
            check=True,
            capture_output=True,
            timeout=200,
        )  # fmt: skip
        Image.open(raw).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(
            target, optimize=True
        )


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
