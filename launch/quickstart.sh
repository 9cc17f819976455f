#!/usr/bin/env bash
# From a fresh clone to a finished study on this machine: virtual environment, installation, the
# small real data set, studies/quickstart.yaml on a local Ray, report, best configuration.
#
#   bash launch/quickstart.sh            # Python 3.11 and pip are all it needs
#   PYTHON=python3.11 VENV=.venv bash launch/quickstart.sh
#
# Run it again after an interruption: it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

step() { printf '\n\033[1m[%s] %s\033[0m\n' "$(date +%H:%M:%S)" "$*"; }

step "1/4 environment in $VENV (the first time: some minutes, about 7 GB)"
prepare_environment .

step "2/4 data: emoji drawn by four vendors, two unseen styles held out"
ablate data emoji

step "3/4 study: 4 cells x 3 seeds and what confirms, each trained by two processes"
ablate launch studies/quickstart.yaml --yes

step "4/4 what came out"
ablate report runs/quickstart
ablate diagnose runs/quickstart
ablate export runs/quickstart
ablate export runs/quickstart --verify
cat <<END

Look at it:
  report             $PWD/runs/quickstart/report.html
  setting to use     $PWD/runs/quickstart/best/README.md
  MLflow UI          source $VENV/bin/activate && ablate ui
END
