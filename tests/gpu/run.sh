#!/usr/bin/env bash
# run.sh [FOLDER] [OPTIONS OF measure.py]: six minutes on this machine's first accelerator.
# Uses what the machine has (torch, torchvision), and the wheels of pack.sh for the rest.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-found}
shift || true
python=${PYTHON:-python3}
if ! "$python" -c 'import open_clip, pydantic, safetensors, pytest, scipy' 2>/dev/null; then
  site=$PWD/.gpu-site
  [ -d "$site" ] || "$python" -m pip install --quiet --no-index --no-deps --target "$site" tests/gpu/wheels/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export HF_HUB_OFFLINE=1
exec "$python" "tests/gpu/${SCRIPT:-measure.py}" --out "$out" "$@"
