"""One POST of JSON to a server that may be busy, away or confused: retried until it answers, or stopped in one line.

Nothing here knows what is asked. The key goes into one header, and into no message.
"""

import http.client
import json
import random
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

from rpsa.errors import RPSAError
from rpsa.http import Refusal, read_refusal

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How long to go on trying: `tries` in all, waits in seconds that double, each drawn between half and whole.

    A `Retry-After` of the server, up to ten minutes, takes the place of a wait. `timeout` is that of the socket.
    """

    tries: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0
    timeout: float = 300.0


class EndpointError(RPSAError):
    """The server refused for good. `code` is the error code in its answer, if it gave one."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Stopped(Exception):
    """The caller wants no answer any more."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would follow with the key, to whatever host, and with a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def post(
    url: str, body: Any, key: str | None, read: Callable[[Any], T], retry: Retry, stop: Event | None = None
) -> T:
    """POST `body` as JSON and return what `read` makes of the JSON that comes back.

    Tried again: no connection, a dropped or silent one, 408, 409, 425, 429, 5xx, and an answer that is not JSON or
    that `read` fails on (KeyError, IndexError, TypeError, ValueError).

    Raises:
        EndpointError: the server refused the request (any other status, or a quota that is used up).
        RPSAError: the tries are used up, or the address or the certificate is wrong.
        Stopped: `stop` was set while waiting.
    """
    stop = stop or Event()
    request = _request(url, body, key)
    problem = ""
    for attempt in range(retry.tries):
        wait = min(retry.first_wait * 2**attempt, retry.longest_wait) * random.uniform(0.5, 1)
        try:
            with _OPENER.open(request, timeout=retry.timeout) as response:
                answer = response.read()
            return read(json.loads(answer))
        except urllib.error.HTTPError as error:
            refusal = _refusal(error, key)
            problem = f"HTTP {refusal.status} {refusal.said}".strip()
            if not refusal.may_pass:
                raise EndpointError(f"{url}: {problem}", refusal.status, refusal.code) from None
            wait = refusal.wait or wait
        except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            problem = f"the answer is not what was asked for ({type(error).__name__})"
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise RPSAError(f"{url}: its certificate is not trusted ({reason.verify_message})") from None
            problem = f"no answer ({type(reason).__name__}: {reason})"
        if attempt + 1 < retry.tries and stop.wait(wait):
            raise Stopped
    raise RPSAError(f"{url}: gave up after {retry.tries} tries; the last: {problem}")


def _request(url: str, body: Any, key: str | None) -> urllib.request.Request:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "rpsa"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")


def _refusal(error: urllib.error.HTTPError, key: str | None) -> Refusal:
    try:
        body = error.read()
    except (OSError, http.client.HTTPException):
        body = b""
    return read_refusal(error.code, body, error.headers.get("Retry-After"), key)
