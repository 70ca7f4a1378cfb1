"""Programs against their tests, the solution in one sandbox and the tests in another.

The tests call the solution's function across a pipe: arguments go over as text, results come back as plain data
(`inside/wire.py`). A solution never sees a test, an expected value, or the nonce that a pass is told by.
"""

import json
import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rpsa.evaluation.sandbox.process import Heard, Limits, Process, exchange, job_text
from rpsa.evaluation.sandbox.tiers import Sandbox

ProgramOutcome = Literal["passed", "failed", "timeout", "error"]


@dataclass(frozen=True)
class Program:
    """A solution and what it is to pass."""

    id: str
    code: str
    test: str
    """Python that calls `entry_point`, or `candidate`, and raises if the answers are wrong."""
    entry_point: str
    preamble: str = ""
    """Runs before `code` and before `test`, in the module of each: imports and helpers that the prompt gave."""
    seconds: float = 10.0
    packages: tuple[str, ...] = ()
    """Distributions that the solution and the tests may import."""
    together: bool = False
    """Run both in one interpreter: for tests that pass callables, or need instances of the solution's classes.
    The machine stays safe, but such a solution can cheat."""


@dataclass(frozen=True)
class Verdict:
    """`failed`: a test did; `error`: the solution does not load, or its process died. `reason` is one line."""

    id: str
    outcome: ProgramOutcome
    reason: str
    seconds: float
    sandbox: str
    """Name and version of the sandbox."""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def grade_programs(
    programs: Sequence[Program],
    sandbox: Sandbox,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    limits: Limits | None = None,
) -> list[Verdict]:
    """Verdicts in the order of `programs`, graded `workers` at a time (None: one for each core).

    `progress` gets the number that are done and the number of all. `limits` bounds each process; its seconds are
    those of each program.
    """
    verdicts: dict[int, Verdict] = {}
    name, stop = str(sandbox), threading.Event()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = {
            pool.submit(_grade, program, sandbox, name, limits or Limits(), stop): i
            for i, program in enumerate(programs)
        }
        try:
            for future in as_completed(futures):
                verdicts[futures[future]] = future.result()
                if progress is not None:
                    progress(len(verdicts), len(programs))
        except BaseException:  # an interrupt is not to wait for what runs
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [verdicts[i] for i in range(len(programs))]


def _grade(program: Program, sandbox: Sandbox, name: str, limits: Limits, stop: threading.Event) -> Verdict:
    limits = replace(limits, seconds=program.seconds)
    nonce = secrets.token_hex(16)
    run = _together if program.together else _apart
    heard = run(program, sandbox, limits, nonce, stop)
    outcome, reason = _verdict(heard, nonce, limits.seconds)
    return Verdict(program.id, outcome, reason, round(heard.seconds, 3), name)


def _apart(program: Program, sandbox: Sandbox, limits: Limits, nonce: str, stop: threading.Event) -> Heard:
    given = {"preamble": program.preamble, "entry_point": program.entry_point}
    tests = {**given, "test": program.test, "nonce": nonce}
    code = {**given, "code": program.code}
    with ExitStack() as stack:
        answers, answer = os.pipe()  # what the solution writes, the tests read
        questions, question = os.pipe()
        descriptors = [answers, answer, questions, question]
        try:
            suite_launch = sandbox.launch(limits, program.packages)
            suite = stack.enter_context(Process(suite_launch, answers, question, subprocess.PIPE))
            launch = sandbox.launch(limits, program.packages)
            stack.enter_context(Process(launch, questions, answer, subprocess.DEVNULL))
            for descriptor in (answers, questions):
                descriptors.remove(descriptor)
                os.close(descriptor)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        # Each job goes in by the same pipe as the talk that follows. The solution's comes last: until it has
        # arrived none of its code runs, so nothing can mix with the tests' job.
        jobs = [
            (answer, job_text(suite_launch, limits, "suite", tests)),
            (question, job_text(launch, limits, "candidate", code)),
        ]
        return exchange(jobs, suite.output.fileno(), limits, stop)


def _together(program: Program, sandbox: Sandbox, limits: Limits, nonce: str, stop: threading.Event) -> Heard:
    data = {
        "preamble": program.preamble,
        "code": program.code,
        "test": program.test,
        "entry_point": program.entry_point,
        "nonce": nonce,
    }
    launch = sandbox.launch(limits, program.packages)
    with Process(launch, subprocess.PIPE, subprocess.DEVNULL, subprocess.PIPE) as process:
        stdin = os.dup(process.stdin.fileno())
        process.stdin.close()
        job = job_text(launch, limits, "together", data)
        return exchange([(stdin, job)], process.output.fileno(), limits, stop)


def _verdict(heard: Heard, nonce: str, seconds: float) -> tuple[ProgramOutcome, str]:
    lines = heard.output.decode(errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith(f"{nonce} "):
            with suppress(ValueError, TypeError):  # run together, a solution can write anything here
                outcome, reason = json.loads(line[len(nonce) :])
                if outcome in get_args(ProgramOutcome):
                    return outcome, str(reason)
    if heard.ending == "timeout":
        return "timeout", f"not done after {seconds:g} s"
    return (
        "error",
        f"the tests' process ended without a verdict: {lines[-1][:200] if lines else 'no message'}",
    )
