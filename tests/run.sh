#!/usr/bin/env bash
# Makes the environment and runs all tests:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment '.[test]'
export HF_HUB_OFFLINE=1
exec python -m pytest "$@"
