#!/usr/bin/env bash
# run_gang.sh [FOLDER] [OPTIONS OF gang.py]: what needs two or more accelerators of this machine.
SCRIPT=gang.py exec bash "$(dirname "$0")/run.sh" "$@"
