"""Files of weights as they go wrong, made of a whole one; for studies/retrieval_loading.yaml.

python studies/retrieval_files.py data/retrieval/whole.safetensors
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(path: Path) -> None:
    """Write prefixed, vision_only and no_statistics beside `path`."""
    whole = load_file(path)
    files = {
        "prefixed": {f"module.{name}": value for name, value in whole.items()},
        "vision_only": {n: v for n, v in whole.items() if n.startswith("visual.")},
        "no_statistics": {n: v for n, v in whole.items() if "running_" not in n},
    }
    for name, tensors in files.items():
        save_file(tensors, path.with_name(f"{name}.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
