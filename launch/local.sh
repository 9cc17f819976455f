#!/usr/bin/env bash
# One machine: a private Ray that listens on loopback alone and ends with the study.
#
#   bash launch/local.sh [--dry-run] STUDY [arguments of `ablate launch`]
#   bash launch/local.sh studies/quickstart.yaml --cpus 4
set -euo pipefail
source "$(dirname "$0")/common.sh"
run ablate launch "$STUDY" --yes "$@"
