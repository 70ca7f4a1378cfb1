"""HTTP client: JSON to a server that may be busy, away or confused, asked until it answers or says no for good.

What is tried again, how long is waited, what errors say and where the key goes stand here once, whatever is asked:
completions (`rpsa.generation.server`), many at a time on one event loop, and judgements (`rpsa.evaluation.judges`),
one in a thread. Nothing here knows what a question or an answer is: `read` turns JSON into the caller's answer.
"""

import asyncio
import email.utils
import json
import logging
import math
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rpsa.errors import RPSAError
from rpsa.text import hide_credentials

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_WAIT = 600.0
"""Seconds that a server may ask to be left alone (`Retry-After`); who asks for more is asked again after these."""

_TEMPORARY = {408, 409, 425, 429}  # and every 5xx
_FOR_GOOD = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_SHOWN = 300
_CONNECT_TIMEOUT = 10.0
_ADVICE = {
    401: "set {keys} to a valid key",
    403: "check the rights of the key in {keys}",
    404: "check the URL (it ends in /v1) and the model's name (see GET /v1/models)",
    429: "see to the account",
}


@dataclass(frozen=True)
class Retry:
    """How long to go on trying.

    `tries` in all, the waits between them about `first_wait`, twice that, four times ... seconds, about `longest_wait`
    at most, or longer where the server asks for it (`Retry-After`, up to ten minutes). `timeout`: seconds until an
    answer begins, the server's queue included. `tries_unreached`: as long as no server was ever there; None: `tries`.
    """

    tries: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0
    timeout: float = 300.0
    tries_unreached: int | None = None

    def wait(self, attempt: int, asked: float) -> float:
        """Seconds after try number `attempt`, the first being 0; `asked`: what the server asks for."""
        backoff = min(self.first_wait * 2.0**attempt, self.longest_wait)
        return max(asked, backoff * random.uniform(0.5, 1.5))  # apart from each other: no herd


class TryAgain(Exception):
    """This try failed, another may not. `wait`: seconds that the server asks for. What `read` raises, too."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(RPSAError):
    """The server understood and declined: another try would end alike.

    `status` is HTTP's, `code` the error's own, if it gave one; `problem` is the message less the advice at its end.
    """

    def __init__(self, problem: str, status: int, code: str, advice: str) -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem
        self.status = status
        self.code = code


class GaveUp(RPSAError):
    """The server was there, and all tries are used up."""


class Stopped(Exception):
    """The caller wants no answer any more."""


class Client:
    """Asks one address, with the first key that `key_variables` hold. `called`: how errors name what is asked.

    Raises RPSAError if the key cannot be one.
    """

    def __init__(self, url: str, key_variables: Sequence[str], retry: Retry, called: str = "") -> None:
        self.url = url
        self.retry = retry
        self.called = called or url
        self._keys = " or ".join(key_variables)
        self._key = read_key(key_variables)
        self._is_reached = False

    def post(self, body: Any, read: Callable[[Any], T], pause: Callable[[float], bool]) -> T:
        """`Connection.post` on a connection of its own, for a thread without an event loop."""

        async def asked() -> T:
            async with self.connect(1) as connection:
                return await connection.post(body, read, lambda seconds: asyncio.to_thread(pause, seconds))

        return asyncio.run(asked())

    @asynccontextmanager
    async def connect(self, most: int) -> AsyncIterator["Connection"]:
        """Up to `most` connections, kept open between requests. Redirects are not followed: the key is for one host."""
        import httpx2

        timeout = httpx2.Timeout(self.retry.timeout, connect=min(_CONNECT_TIMEOUT, self.retry.timeout))
        is_here = urlsplit(self.url).hostname in ("127.0.0.1", "::1", "localhost")
        async with httpx2.AsyncClient(
            headers={"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "rpsa"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            limits=httpx2.Limits(max_connections=most),
            timeout=timeout,
            trust_env=not is_here,  # no proxy leads here
            verify=_trusted(),
        ) as client:
            yield Connection(self, client)

    async def _try(self, client: "httpx2.AsyncClient", content: bytes) -> Any:
        """The JSON of one answer."""
        import httpx2

        try:
            response = await client.post(self.url, content=content)
        except httpx2.RequestError as error:
            self._is_reached |= not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            cause = _cause(error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise RPSAError(
                    f"{self.called}: its certificate is not trusted ({cause.verify_message})"
                ) from None
            raise TryAgain(f"no answer ({type(cause).__name__}: {cause})".replace(": )", ")")) from error
        self._is_reached = True
        if response.status_code != 200:
            after = response.headers.get("Retry-After")
            raise self._said_no(read_refusal(response.status_code, response.content, after, self._key))
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError) as error:
            said = short(_without(self._key, response.text)) or "empty"
            raise TryAgain(f"an answer that is no JSON: {said}") from error

    def _said_no(self, refusal: "Refusal") -> TryAgain | Refused:
        problem = f"HTTP {refusal.status} {refusal.said}".strip()
        if refusal.may_pass:
            return TryAgain(problem, refusal.wait or 0.0)
        advice = _ADVICE.get(refusal.status, "correct the request").format(keys=self._keys)
        return Refused(f"{self.called}: {problem}", refusal.status, refusal.code, advice)

    def _gave_up(self, tries: int, reason: TryAgain) -> RPSAError:
        if not self._is_reached:
            return RPSAError(f"{self.called}: no server is there, {reason}; start it or correct the URL")
        return GaveUp(f"{self.called}: gave up after {tries} tries; the last: {reason}")


class Connection:
    """An open `Client`."""

    def __init__(self, client: Client, http: "httpx2.AsyncClient") -> None:
        self._client = client
        self._http = http

    async def post(self, body: Any, read: Callable[[Any], T], pause: Callable[[float], Awaitable[bool]]) -> T:
        """POST `body` as JSON and return what `read` makes of the JSON that comes back.

        Tried again: no connection, a dropped or silent one, 408, 409, 425, 429, 5xx, an answer that is no JSON, and
        one with which `read` raises `TryAgain`. `pause` waits between two tries, and says whether to stop there.

        Raises:
            Refused: the server refused the request (any other status, or a quota that is used up).
            GaveUp: the tries are used up.
            RPSAError: no server was ever there, or its certificate is not trusted.
            Stopped: `pause` said so.
        """
        client, retry = self._client, self._client.retry
        content = json.dumps(body).encode()  # escaped: half a surrogate pair of a model's is no UTF-8
        attempt = 0
        while True:
            try:
                return read(await client._try(self._http, content))
            except TryAgain as failure:
                reason = failure
            most = retry.tries
            if not client._is_reached and retry.tries_unreached is not None:
                most = retry.tries_unreached
            if attempt + 1 >= most:
                raise client._gave_up(attempt + 1, reason)
            if await pause(retry.wait(attempt, reason.wait)):
                raise Stopped
            logger.info("%s: %s; trying again", client.called, reason)
            attempt += 1


@dataclass(frozen=True)
class Refusal:
    """An answer that is an error.

    Attributes:
        status: HTTP's.
        code: the error's code or type, where the body has OpenAI's form; else empty.
        said: the server's own words on one line, without the key.
        wait: seconds that it asks for, at most `LONGEST_WAIT`; None if it does not ask, or cannot be understood.
    """

    status: int
    code: str
    said: str
    wait: float | None

    @property
    def may_pass(self) -> bool:
        """Whether another try may end otherwise."""
        return (self.status in _TEMPORARY or self.status >= 500) and self.code not in _FOR_GOOD


def read_refusal(status: int, body: bytes, retry_after: str | None, key: str | None) -> Refusal:
    """What an error answer says; `key` is taken out of it wherever the server repeats it."""
    message, code = body.decode(errors="replace"), ""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        details = json.loads(message)["error"]
        message, code = str(details["message"]), str(details.get("code") or details.get("type") or "")
    return Refusal(status, code, short(_without(key, message)), _wait(retry_after))


def read_key(variables: Sequence[str]) -> str | None:
    """The key in the first of the environment variables that holds one. Raises RPSAError for what cannot be a key."""
    for name in variables:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise RPSAError(f"{name} holds characters that no key has: set it again")
            return key
    return None


def checked_url(what: str, url: str, key_variable: str) -> str:
    """An address without the slashes at its end. Raises RPSAError, without its secrets, for what is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        is_one = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and url.isprintable()
            and " " not in url
        )
    except ValueError:  # a port that is not a number
        is_one = False
    if not is_one:
        raise RPSAError(f"{what} is {hide_credentials(url)!r}: give one like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise RPSAError(f"{what} holds more than an address: put the key into {key_variable}")
    return url.rstrip("/")


def short(text: str) -> str:
    """On one line, and not too much of it."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "…"


def _without(key: str | None, text: str) -> str:
    return text.replace(key, "***") if key else text


def _wait(retry_after: str | None) -> float | None:
    """Either form of the header: seconds, or a date (RFC 9110, 10.2.3)."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    if math.isnan(seconds) or seconds <= 0:
        return None
    return min(seconds, LONGEST_WAIT)


def _cause(error: BaseException) -> BaseException:
    """What the system said, below the names that the layers of a client give it; the error itself where that is all."""
    found = error
    below: BaseException | None = error
    while below is not None:
        found = below if isinstance(below, OSError) else found
        below = below.__cause__ or below.__context__
    return found


@cache
def _trusted() -> "ssl.SSLContext":
    """Made once: it takes longer than many a request."""
    import httpx2

    return httpx2.create_ssl_context()
