"""Runs tests against a function that lives in another sandbox.

The tests call `Remote`, which sends the arguments over and takes plain data back; they see no object of the
solution's. After the last test one line goes to stderr: the nonce, and JSON with the verdict. The nonce never
leaves this process and the harness.
"""

import builtins
import json
import os
import reprlib
import sys
import types
from typing import Any, NoReturn

from rpsa.evaluation.sandbox.inside.wire import dumps, loads

_LONGEST_REPLY = 128 << 20
_LONGEST_REASON = 300


class SolutionError(Exception):
    """The solution raised something that is not a built-in exception."""


class Gone(BaseException):
    """The solution's process ended or no longer speaks; no test can catch this by `except Exception`."""


class Remote:
    """The solution's function as the tests call it."""

    def __init__(self, name: str, receive: int, send: int) -> None:
        self.__name__ = name
        self._last: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._replies = os.fdopen(receive, "rb")
        self._send = send

    def __call__(self, *positional: Any, **named: Any) -> Any:
        self._last = positional, {}
        text = memoryview(dumps([list(positional), named]))
        try:
            while text:
                text = text[os.write(self._send, text) :]
        except BrokenPipeError:
            raise Gone(f"the solution's process ended in or before {self.last_call}") from None
        reply = self.read()
        self._last = positional, reply
        if "value" in reply:
            return reply["value"]
        raise _exception(str(reply.get("raised")), str(reply.get("message"))[:_LONGEST_REASON])

    def read(self) -> dict[str, Any]:
        line = self._replies.readline(_LONGEST_REPLY)
        if not line:
            raise Gone(f"the solution's process ended in {self.last_call}")
        try:
            reply = loads(line)
        except ValueError:
            reply = None
        if type(reply) is not dict:
            raise Gone(f"what came back from {self.last_call} is not a reply")
        return reply

    @property
    def last_call(self) -> str:
        """The last call and what it gave, for messages."""
        if self._last is None:
            return "its start"
        positional, reply = self._last
        call = f"{self.__name__}({', '.join(map(_short, positional))})"
        if "value" in reply:
            return f"{call} gave {_short(reply['value'])}"
        return f"{call} raised {reply['message']}" if "message" in reply else call


def main(data: dict[str, Any], receive: int, send: int) -> None:
    report = os.dup(2)
    os.dup2(0, 2)
    remote = Remote(data["entry_point"], receive, send)
    try:
        first = remote.read()
        if "ready" in first:
            verdict, reason = run_tests(data, remote)
        else:
            verdict, reason = "error", str(first.get("failed"))
    except Gone as error:
        verdict, reason = "error", str(error)
    if verdict == "failed":
        reason += f" after {remote.last_call}"
    say(report, data["nonce"], verdict, reason)


def run_tests(data: dict[str, Any], function: Any) -> tuple[str, str]:
    """Run the source `test`, which knows what `preamble` defines, and `function` by both names that tests use.

    Gone passes through.
    """
    tests = types.ModuleType("__main__")
    sys.modules["__main__"] = tests
    try:
        exec(compile(data["preamble"], "<prompt>", "exec"), tests.__dict__)
        tests.__dict__.update({data["entry_point"]: function, "candidate": function})
        exec(compile(data["test"], "<tests>", "exec"), tests.__dict__)
    except Gone:
        raise
    except AssertionError as error:
        return "failed", f"a test failed: {error}".removesuffix(": ")
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""


def say(report: int, nonce: str, verdict: str, reason: str) -> NoReturn:
    """Write the verdict and end at once: it is the last word, and no exit handler may follow it."""
    line = f"\n{nonce} {json.dumps([verdict, ' '.join(reason.split())[:_LONGEST_REASON]])}\n"
    os.write(report, line.encode())
    os._exit(0)


def _exception(name: str, message: str) -> Exception:
    """A built-in exception of that name; StopIteration would end the tests' own loops early, and is not let in."""
    kind = getattr(builtins, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and name not in ("StopIteration", "StopAsyncIteration")
    ):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its like want more than a message
            pass
    return SolutionError(message)


def _short(value: Any) -> str:
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer too long for decimal text
        text = f"<a long {type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."
