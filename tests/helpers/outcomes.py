"""A pytest plugin (`-p helpers.outcomes`): how each test ended, a line of JSON in the file RPSA_TEST_OUTCOMES.

A line as a test begins and one as it ends: of a process that dies it is known in which test.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(os.environ["RPSA_TEST_OUTCOMES"])


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _write(nodeid, "died", 0.0, "the process ended in it")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, report.duration, _reason(report))


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.strip().partition("\n")[0][:300] if crash else ""


def _write(test: str, outcome: str, seconds: float, reason: str) -> None:
    entry = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "reason": reason}
    with _FILE.open("a") as file:
        file.write(json.dumps(entry) + "\n")
