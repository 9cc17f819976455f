"""Shared settings of all tests."""

from __future__ import annotations

import os

# Before anything imports torch, ray or mlflow: no hub, no telemetry, one thread a process.
os.environ.update(
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    OMP_NUM_THREADS="1",
    MPLBACKEND="agg",
)
