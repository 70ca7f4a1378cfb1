"""Runs a solution and its tests in one interpreter: for tests that need objects rather than plain data.

The machine is as safe as elsewhere, but the verdict is only as honest as the solution: code that shares an
interpreter with its tests can replace what they compare with, or find the nonce.
"""

import os
from typing import Any

from rpsa.evaluation.sandbox.inside.candidate import load
from rpsa.evaluation.sandbox.inside.suite import run_tests, say


def main(data: dict[str, Any], receive: int, send: int) -> None:
    report = os.dup(2)
    os.dup2(0, 2)
    try:
        function = load(data)
    except BaseException as error:
        say(report, data["nonce"], "error", f"{type(error).__name__}: {error}")
    say(report, data["nonce"], *run_tests(data, function))
