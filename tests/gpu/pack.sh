#!/usr/bin/env bash
# pack.sh [PYTHON_VERSION] [FOLDER]: the wheels that measure.py needs beside torch and torchvision, for a
# machine without a network: run it where there is one, take FOLDER (tests/gpu/wheels) along.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=${1:-3.11} folder=${2:-$here/wheels}
# As launch/constraints.txt has them; torch, torchvision, numpy and pillow are the machine's own.
packages=(open_clip_torch timm ftfy regex wcwidth huggingface_hub safetensors filelock fsspec pyyaml tqdm
  pydantic pydantic_core annotated-types typing-inspection typing_extensions scipy psutil packaging
  pytest pluggy iniconfig pygments httpx2 httpcore2 h11 anyio idna certifi truststore click shellingham
  pandas python-dateutil six webdataset braceexpand nvidia-ml-py)
mkdir -p "$folder"
constraints=$here/../../launch/constraints.txt
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
  --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --implementation cp \
  --constraint "$constraints" --dest "$folder" "${packages[@]}"
du -sh "$folder"
