"""Files of weights as they go wrong, made of those of a run; for studies/retrieval_loading.yaml.

python studies/retrieval_files.py runs/retrieval_weights
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

FOLDER = Path("data/retrieval")


def main(run: Path) -> None:
    """Write whole, prefixed, vision_only and no_statistics of the run's last checkpoint."""
    last = max(run.glob("checkpoints/step-*/model.safetensors"))
    whole = load_file(last)
    files = {
        "whole": whole,
        "prefixed": {f"module.{name}": value for name, value in whole.items()},
        "vision_only": {n: v for n, v in whole.items() if n.startswith("visual.")},
        "no_statistics": {n: v for n, v in whole.items() if "running_" not in n},
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, FOLDER / f"{name}.safetensors")
    print(f"{FOLDER}: {', '.join(files)}, of {last}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
