"""Why a server refuses everything: MLflow's client tells no status where the answer is JSON."""

from __future__ import annotations

from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import get_default_host_creds
from mlflow.utils.rest_utils import http_request

_REFUSED = {
    401: "it asks who you are (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN",
    403: "it does not allow you that (403): ask for the right to write there",
    404: "there is no MLflow at this address (404): check the URL, with its path",
}
_LOOK_S = 5


def refusal_of(uri: str, error: BaseException) -> str | None:
    """What the server says to a plain question, where it refuses that, too; None if it does not."""
    if not uri.startswith("http") or not isinstance(error, MlflowException):
        return None
    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            params={"max_results": "1"},
            timeout=_LOOK_S,
            max_retries=0,
        )
    except MlflowException:
        return None
    return _REFUSED.get(answer.status_code)
