"""The only user of mlflow: mirrors a study folder into MLflow, and never reads it back.

One experiment per study; in it, side by side, a run for the study, one per cell and one per trial.
The folder is the truth, so a mirror can be deleted and built again, and an outage of MLflow costs
nothing but time: a thread of its own does all the talking, tries again after a failure, and catches
up. What stands in MLflow is the same whether it was mirrored live, after an outage, or from the
folder at the end. Which rows are mirrored is said in ``rows``, and as what in ``measures``.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported
# Standard output is for --json.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
