"""How a server says no, and whether to ask it again: one set of rules for every client, whatever sends the requests."""

import email.utils
import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass

LONGEST_WAIT = 600.0
"""Seconds that a server may ask to be left alone (`Retry-After`); who asks for more is asked again after these."""

_TEMPORARY = {408, 409, 425, 429}  # and every 5xx
_FOR_GOOD = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_SHOWN = 300


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
    if key:
        message = message.replace(key, "***")
    return Refusal(status, code, short(message), _wait(retry_after))


def short(text: str) -> str:
    """On one line, and not too much of it."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "…"


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
