"""Serves a solution's function: arguments come in as text, results go out as text.

This process runs the untrusted code and knows nothing else: no test, no expected value, no nonce. Whatever the
code does to this interpreter it can only change what its own answers are.
"""

import os
import sys
import types
from typing import Any

from rpsa.evaluation.sandbox.inside.wire import dumps, loads


def main(data: dict[str, Any], receive: int, send: int) -> None:
    requests = os.fdopen(receive, "rb")
    try:
        function = load(data)
    except BaseException as error:
        _reply(send, {"failed": _description(error)})
        return
    _reply(send, {"ready": True})
    for line in requests:
        positional, named = loads(line)
        try:
            _reply(send, {"value": function(*positional, **named)})
        except BaseException as error:
            _reply(send, {"raised": type(error).__name__, "message": _description(error)})


def load(data: dict[str, Any]) -> Any:
    """The function `entry_point` of the program `preamble` and `code`; raises whatever the program raises.

    The program is imported, not run: its `__name__` is not `__main__`, so that what stands under a main guard (reading
    stdin, parsing arguments, running tests of its own) does not happen, as in the benchmarks' own harnesses.
    """
    program = types.ModuleType("solution")
    sys.modules["solution"] = sys.modules["__main__"] = program
    exec(compile(data["preamble"], "<prompt>", "exec"), program.__dict__)
    exec(compile(data["code"], "<solution>", "exec"), program.__dict__)
    if data["entry_point"] not in program.__dict__:
        raise NameError(f"the solution does not define {data['entry_point']}")
    return program.__dict__[data["entry_point"]]


def _reply(send: int, reply: dict[str, Any]) -> None:
    text = memoryview(dumps(reply))
    while text:
        text = text[os.write(send, text) :]


def _description(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
