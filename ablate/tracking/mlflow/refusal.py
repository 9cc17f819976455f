"""Why a server refuses everything, or is not reached: MLflow's client tells no status where the
answer is JSON, and a cause after more than a line of its own."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import requests
import urllib3
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from ablate.records.masking import masked_url

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


def not_reached(uri: str, error: BaseException) -> str | None:
    """What lies between here and the server; None where it, or another thing, has answered."""
    host = urlsplit(uri).hostname
    causes = list(_causes(error))

    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if has(requests.exceptions.ProxyError):
        proxy = requests.utils.select_proxy(uri, requests.utils.get_environ_proxies(uri))
        return (
            f"the proxy {masked_url(str(proxy))} of this environment lets nothing through; where "
            f"the server is reached without one, set no_proxy={host}"
        )
    if has(requests.exceptions.SSLError):
        said = _last_words(causes)
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return (
                f"its certificate is not trusted here ({said}); set REQUESTS_CA_BUNDLE to a file "
                "of those that are"
            )
        return f"no encrypted connection ({said}); is its address https?"
    if has(urllib3.exceptions.NameResolutionError):
        return f"this machine knows no host {host!r}"
    if has(requests.exceptions.Timeout):
        return "it does not answer in time"
    if has(requests.exceptions.ConnectionError):
        return f"no connection ({_last_words(causes)}); is the server up, and this its port?"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, the outermost first; requests keeps some in arguments."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        cause = waiting.pop(0)
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [cause.__cause__, cause.__context__, *cause.args]
            waiting.append(getattr(cause, "reason", None))


def _last_words(causes: list[BaseException]) -> str:
    """Those of the innermost cause, which the system or the other side said."""
    said = [cause.strerror or str(cause) for cause in causes if isinstance(cause, OSError)]
    return str(said[-1]).splitlines()[0][:120] if said else type(causes[-1]).__name__
