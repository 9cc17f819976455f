"""Takes a picture of a report: its first screens, or the first element that a CSS selector finds.

python tools/picture.py runs/quickstart/report.html docs/report.png
python tools/picture.py runs/mae_weight_decay/report.html docs/recipes/mae.png "#effects figure"
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1180, 1620
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def take(page: Path, target: Path, *, selector: str | None = None) -> None:
    """Write `target`, a palette PNG."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser is installed; install one of {', '.join(BROWSERS)}")
    with sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        view.goto(page.resolve().as_uri())
        raw = (view.locator(selector).first if selector else view).screenshot()
        chromium.close()
    picture = Image.open(io.BytesIO(raw)).convert("RGB")
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(target, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]), selector=next(iter(sys.argv[3:]), None))
