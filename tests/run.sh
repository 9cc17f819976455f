#!/usr/bin/env bash
# Makes the environment and runs all tests:  bash tests/run.sh [pytest arguments]
# TEST_WORKERS (default 2) test files run side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment '.[test]'
export HF_HUB_OFFLINE=1
# Else every process compiles them anew where PYTHONDONTWRITEBYTECODE is set.
python -m compileall -q ablate tests
# Files in their own order: those with few, long tests would else all come last.
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
