"""How long a problem's own solution takes on this machine: the measure of a fair time limit.

HumanEval+ and MBPP+ hold problems whose reference takes half a minute. The limit is four times the reference's
time and never less than ten seconds; the times are measured once, and kept in the user's cache.
"""

import json
import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rpsa.artifacts import atomic_write, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox.benchmarks import DEFAULT_SECONDS, CodeProblem
from rpsa.evaluation.sandbox.grading import grade_programs
from rpsa.evaluation.sandbox.tiers import Sandbox

logger = logging.getLogger(__name__)

FACTOR = 4.0
LONGEST_REFERENCE = 300.0


def with_time_limits(
    problems: Sequence[CodeProblem],
    sandbox: Sandbox,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[CodeProblem]:
    """The problems with `seconds` = max(10, 4 x the reference's own time); without a reference they keep theirs.

    A reference that does not pass is warned of, and leaves its problem's limit as it is.

    Raises:
        RPSAError: none of several references passes, so the tests cannot run here at all.
    """
    path = cache_path(sandbox)
    known = _read(path)
    keys = [_key(problem) for problem in problems]
    missing = {
        key: replace(problem.program(problem.reference), seconds=LONGEST_REFERENCE)
        for key, problem in zip(keys, problems, strict=True)
        if problem.reference is not None and key not in known
    }
    if missing:
        verdicts = grade_programs(list(missing.values()), sandbox, workers, progress)
        if len(verdicts) > 1 and not any(verdict.passed for verdict in verdicts):
            raise RPSAError(
                f"none of {len(verdicts)} reference solutions passes its own tests in {sandbox} "
                f"({verdicts[0].id}: {verdicts[0].reason}): nothing can be graded"
            )
        for key, verdict in zip(missing, verdicts, strict=True):
            if verdict.passed:
                known[key] = verdict.seconds
            else:
                logger.warning("the reference solution of %s does not pass: %s", verdict.id, verdict.reason)
        _keep(path, known)
    return [
        replace(problem, seconds=max(DEFAULT_SECONDS, FACTOR * known[key])) if key in known else problem
        for key, problem in zip(keys, problems, strict=True)
    ]


def cache_path(sandbox: Sandbox) -> Path:
    """Where the times of this machine, this Python and this kind of sandbox are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    machine = f"{platform.node()}-{platform.machine()}-{os.cpu_count()}-python{platform.python_version()}"
    return folder / "rpsa" / "reference-times" / f"{machine}-{sandbox.name}.json"


def _key(problem: CodeProblem) -> str:
    return sha256_of([problem.preamble, problem.prompt, problem.reference, problem.test])


def _read(path: Path) -> dict[str, float]:
    try:
        times = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return times if isinstance(times, dict) else {}


def _keep(path: Path, times: dict[str, float]) -> None:
    try:
        atomic_write(path, stable_json(times))
    except OSError as error:
        logger.warning("reference times are not kept, and will be measured again: %s", error)
