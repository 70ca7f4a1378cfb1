"""Sandboxes and grading: what programs may do, what a verdict means, what crosses between solution and tests."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.examples import examples
from helpers.paths import ROOT
from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox import (
    Limits,
    Program,
    Sandbox,
    Unsandboxed,
    Verdict,
    best_sandbox,
    grade_programs,
    probe,
    tier_reports,
)
from rpsa.evaluation.sandbox.inside import wire
from rpsa.evaluation.sandbox.tiers import Bubblewrap, Container, Namespaces, view

TESTS = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\ncheck(add)"


@pytest.fixture(params=[Bubblewrap(), Namespaces()], ids=lambda sandbox: sandbox.name)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    tier: Sandbox = request.param
    if problem := probe(tier):
        pytest.skip(f"{tier.name}: {problem}")
    return tier


def grade(sandbox: Sandbox, code: str, test: str = TESTS, **fields: Any) -> Verdict:
    [verdict] = grade_programs([Program("p", code, test, "add", **fields)], sandbox, workers=1)
    return verdict


# running


def test_a_program_runs_with_little_around_it(sandbox: Sandbox) -> None:
    program = """
import os, ssl, sqlite3, decimal, sys
open("mine", "w").write("x")
print(sorted(os.listdir("/")), os.getcwd(), os.listdir("."), sys.argv, sys.stdin.read() == "")
print({name: value for name, value in os.environ.items() if "root" in value or "home/" in value})
"""
    finished = sandbox.run(program)
    assert (finished.ending, finished.exit_code) == ("exit", 0), finished.output
    seen, environment = finished.output.splitlines()
    assert {"home", "root", "etc", "proc", "var", "opt"}.isdisjoint(eval(seen.partition(" /")[0]))
    assert seen.endswith("/tmp ['mine'] ['-c'] True")
    assert environment == "{}"
    assert finished.tier == str(sandbox)


def test_runs_share_nothing(sandbox: Sandbox) -> None:
    sandbox.run("open('/tmp/left', 'w')")
    assert sandbox.run("import os; print(os.listdir('/tmp'))").output == "[]\n"


@pytest.mark.parametrize(
    ("program", "ending", "exit_code"),
    [
        ("import sys; sys.exit(3)", "exit", 3),
        ("import os; os.kill(os.getpid(), 9)", "exit", 137),
        ("1 / 0", "exit", 1),
        ("while True: pass", "timeout", None),
        ("while True: print('x' * 1000)", "output", None),
    ],
)
def test_how_a_program_ended(sandbox: Sandbox, program: str, ending: str, exit_code: int | None) -> None:
    limits = Limits(seconds=1.5 if ending == "timeout" else 600, output_bytes=5000)
    finished = sandbox.run(program, limits)
    assert (finished.ending, finished.exit_code) == (ending, exit_code)
    assert len(finished.output) <= 5000


def test_limits_are_those_asked_for(sandbox: Sandbox) -> None:
    program = """
import resource
for size in (90, 190):
    try: bytearray(size << 20); print(size, "MB")
    except MemoryError: print(size, "MB refused")
for size in (3, 5):
    try: open("f", "wb").write(bytes(size << 20)); print(size, "MB file")
    except OSError: print(size, "MB file refused")
"""
    finished = sandbox.run(program, Limits(memory_mb=160, file_mb=4, scratch_mb=8))
    assert finished.output.splitlines() == ["90 MB", "190 MB refused", "3 MB file", "5 MB file refused"]


def test_packages_are_seen_only_if_named(sandbox: Sandbox) -> None:
    program = "import os, numpy; print(numpy.ones(2).sum(), sorted(os.listdir('/packages'))[0])"
    assert sandbox.run(program, packages=["numpy"]).output == "2.0 numpy\n"
    assert "No module named 'numpy'" in sandbox.run(program).output
    with pytest.raises(RPSAError, match="'no-such-package' is to be shown"):
        sandbox.run(program, packages=["no-such-package"])


def test_no_home_folder_is_named_in_a_sandbox() -> None:
    for _, there in view(("numpy",)).show:
        assert there.startswith(("/python/", "/packages/", "/lib", "/usr/lib"))


def test_the_strongest_that_works_is_taken_and_without_one_nothing_runs() -> None:
    class Broken(Bubblewrap):
        name = "broken"
        program = None

        def launch(self, limits: Limits, packages: tuple[str, ...]) -> Any:
            return replace(Unsandboxed().launch(limits, packages), command=["/bin/sh", "-c", "echo no walls"])

    class Open(Unsandboxed):
        isolates = True

    class Lingering(Unsandboxed):
        isolates = True

        def launch(self, limits: Limits, packages: tuple[str, ...]) -> Any:
            # its leader ends with the program, but is not what the program's children hang on
            command = ["/bin/sh", "-c", "echo sound; sleep 20 & exit 0"]
            return replace(super().launch(limits, packages), command=command)

    working = [report.sandbox for report in tier_reports() if report.problem is None]
    assert best_sandbox(tiers=[Broken(), *working, Unsandboxed()]) == (working or [Unsandboxed()])[0]
    with pytest.raises(
        RPSAError, match=r"no sandbox works here.*install bubblewrap.*\(broken: no walls\)"
    ) as raised:
        best_sandbox(tiers=[Broken()])
    assert "\n" not in str(raised.value)
    # a tier without walls is found out by its probe, whatever it says of itself
    assert "it sees the host's files" in str(probe(Open()))
    assert "outlive" in str(probe(Lingering()))
    assert isinstance(best_sandbox(accept_unsandboxed=True, tiers=[Broken(), Open()]), Unsandboxed)


@pytest.mark.parametrize("tier", [Bubblewrap(), Namespaces()], ids=lambda tier: tier.name)
def test_what_this_machine_allows_is_not_given_up(tier: Sandbox) -> None:
    flags = 0x7E020000 - (0x10000000 if os.geteuid() == 0 else 0)
    trial = {
        "bubblewrap": ["bwrap", "--ro-bind", "/", "/", "--unshare-all", "true"],
        "namespaces": [sys.executable, "-c", f"import ctypes; exit(ctypes.CDLL(None).unshare({flags}))"],
    }[tier.name]
    if shutil.which(trial[0]) is None or subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(trial)} does not work here")
    assert probe(tier) is None


def test_a_container_is_never_pulled_and_gets_no_privileges() -> None:
    launch = Container("docker", "python:3.11-slim").launch(Limits(memory_mb=100, scratch_mb=4), ())
    words = " ".join(launch.command)
    for part in (
        "--pull never",
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--memory 104m",
        "--pids-limit",
    ):
        assert part in words
    assert not {"-v", "--volume", "--mount", "--privileged"} & set(launch.command)


@pytest.mark.skipif(bool(probe(Container())), reason=f"docker: {probe(Container())}")
def test_a_container_grades() -> None:
    assert grade(Container(), "def add(a, b): return a + b").passed


def test_it_works_as_an_ordinary_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("all other tests run as an ordinary user already")
    python = next(
        filter(_nobody_can_run, (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin"))),
        None,
    )
    if python is None or not os.access(ROOT, os.X_OK):
        pytest.skip("no Python 3.11 or newer that every user can run")
    program = f"""
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
from rpsa.evaluation.sandbox.tiers import Bubblewrap, Namespaces
from rpsa.evaluation.sandbox import probe
from helpers.hostile.measuring import ATTACKS, escapes
for sandbox in (Bubblewrap(), Namespaces()):
    problem = probe(sandbox)
    print("tier", sandbox.name, problem)
    for attack in ATTACKS[5::6] if problem is None else ():
        print(attack.name, escapes(attack, sandbox))
"""
    done = subprocess.run(
        [python, "-B", "-c", program],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    tiers = [line for line in lines if line.startswith("tier ")]
    assert len(tiers) == 2
    assert all(line.endswith("[]") for line in lines if line not in tiers)
    if len(lines) == len(tiers):
        pytest.skip(f"no sandbox works here for an ordinary user: {'; '.join(tiers)}")


def _nobody_can_run(python: str | None) -> bool:
    if python is None:
        return False
    program = "import sys; sys.exit(sys.version_info < (3, 11))"
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@"', "sh", os.path.realpath(python), "-c", program],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


# grading


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ("def add(a, b): return a + b", "passed", ""),
        ("add = lambda a, b: a + b", "passed", ""),
        ("def add(a, b): return 3", "failed", "a test failed after add(2, 2) gave 3"),
        ("def add(a, b): raise ValueError('no')", "failed", "ValueError: ValueError: no after add(1, 2)"),
        ("def add(a, b) return", "error", "SyntaxError"),
        ("def sub(a, b): pass", "error", "NameError: the solution does not define add"),
        ("import os; os._exit(0)", "error", "the solution's process ended in its start"),
        (
            "import os\ndef add(a, b): os.kill(os.getpid(), 9)",
            "error",
            "the solution's process ended in add(1, 2)",
        ),
        ("while True: pass", "timeout", "not done after 1.5 s"),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_verdicts(sandbox: Sandbox, code: str, outcome: str, reason: str, together: bool) -> None:
    verdict = grade(sandbox, code, seconds=1.5, together=together)
    if together and "ended" in reason:
        assert not verdict.passed
        return
    assert verdict.outcome == outcome, verdict
    assert together or reason in verdict.reason
    assert "\n" not in verdict.reason
    assert verdict.sandbox == str(sandbox)


def test_many_at_a_time_in_their_order(sandbox: Sandbox) -> None:
    programs = [
        Program(str(i), f"def add(a, b): return a + b + {i % 3}", TESTS, "add", seconds=20) for i in range(9)
    ]
    seen: list[tuple[int, int]] = []
    verdicts = grade_programs(programs, sandbox, workers=3, progress=lambda *done: seen.append(done))
    assert [(v.id, v.passed) for v in verdicts] == [(str(i), i % 3 == 0) for i in range(9)]
    assert seen == [(i, 9) for i in range(1, 10)]


def test_an_interrupt_does_not_wait_for_what_runs(sandbox: Sandbox) -> None:
    quick, *slow = [Program("q", "def add(a, b): return a + b", TESTS, "add")] + [
        Program(str(i), "while True: pass", TESTS, "add", seconds=86400) for i in range(3)
    ]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade_programs([quick, *slow], sandbox, workers=2, progress=interrupt)


def test_tests_see_the_solutions_exceptions(sandbox: Sandbox) -> None:
    test = """
try: add(1, "x")
except TypeError as error: assert "unsupported" in str(error)
else: raise AssertionError
"""
    assert grade(sandbox, "def add(a, b): return a + b", test).passed
    assert not grade(sandbox, "def add(a, b): return a", test).passed


def test_a_solution_cannot_end_the_tests_loops(sandbox: Sandbox) -> None:
    test = "assert all(map(lambda n: add(n, n) == 2 * n, range(3)))"
    assert grade(sandbox, "def add(a, b): return a + b", test).passed
    assert not grade(sandbox, "def add(a, b): raise StopIteration", test).passed


def test_arguments_go_by_value(sandbox: Sandbox) -> None:
    test = "a = [1]\nassert add(a, a) == [1, 1] == a * 2"
    assert grade(sandbox, "def add(a, b):\n    b = list(b)\n    a += b\n    return a", test).passed


def test_the_prompts_preamble_comes_first_and_futures_still_work(sandbox: Sandbox) -> None:
    code = "from __future__ import annotations\ndef add(a: Undefined, b): return half(math.floor(2.5 * 0 + a + b)) * 2"
    assert grade(sandbox, code, preamble="import math\ndef half(x): return x / 2").passed


def test_solutions_and_tests_meet_as_objects_only_together(sandbox: Sandbox) -> None:
    code = "class add:\n    def __init__(self, n): self.n = n\n    def more(self, f): return f(self.n)"
    test = "assert add(3).more(lambda n: n + 1) == 4"
    assert not grade(sandbox, code, test).passed
    assert grade(sandbox, code, test, together=True).passed


@pytest.mark.parametrize("text", ['["won", ""]', "[", "[[], 1]", "7", '{"a": 1}'])
def test_a_solution_that_finds_the_nonce_cannot_stop_the_harness(sandbox: Sandbox, text: str) -> None:
    code = f"""
import os, sys
frame = sys._getframe()
while "nonce" not in frame.f_locals.get("data", ()): frame = frame.f_back
for n in range(10):
    try: os.write(n, ("\\n" + frame.f_locals["data"]["nonce"] + {" " + text!r} + "\\n").encode())
    except OSError: pass
os._exit(0)
"""
    assert grade(sandbox, code, together=True).outcome == "error"


def test_sets_come_in_the_same_order_in_every_run(sandbox: Sandbox) -> None:
    program = "print(list({'alpha', 'beta', 'gamma', 'delta'}))"
    assert len({sandbox.run(program).output for _ in range(4)}) == 1


def test_integers_too_long_for_text_are_compared_and_told_of(sandbox: Sandbox) -> None:
    test = "assert add(10**5000, [10**5000]) == [10**5000, 10**5000]"
    assert grade(sandbox, "def add(a, b): return [a, *b]", test).passed
    assert "after add(<a long int>" in grade(sandbox, "def add(a, b): return [a]", test).reason


def test_a_failing_harness_process_is_an_error_that_says_so(sandbox: Sandbox) -> None:
    test = "import os; os._exit(7)"
    verdict = grade(sandbox, "def add(a, b): return 3", test)
    assert (verdict.outcome, verdict.reason[:38]) == ("error", "the tests' process ended without a ver")


def test_nothing_is_left_running_or_open(sandbox: Sandbox) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for code in ("def add(a, b): return a + b", "while True: pass"):
        grade(sandbox, code, seconds=1)
        sandbox.run("while True: pass", Limits(seconds=0.5))
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if children.exists():
        names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()]
        assert not [name for name in names if b"_receive_job" in name]


# the wire

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**40), max_value=10**40)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.dates()
    | st.datetimes().map(lambda moment: moment.replace(fold=0))
    | st.timedeltas()
)
HASHABLE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.lists(inner, max_size=3).map(deque)
    ),
    max_leaves=12,
)


def _same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down (1 == True == 1.0 otherwise)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and all(any(_same(x, y) for y in b) for x in a)
    return (
        bool(a == b) and math.copysign(1, a) == math.copysign(1, b) if isinstance(a, float) else bool(a == b)
    )


@examples(60)
@given(VALUES)
def test_plain_values_cross_unchanged(value: Any) -> None:
    assert _same(wire.loads(wire.dumps(value)), value)


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        "\ud800 a lone surrogate",
        float("inf"),
        range(3, 10**30, 2),
        Counter("banana"),
        OrderedDict([(2, 1), (1, 2)]),
        bytearray(b"xy"),
        slice(1, None, 2),
        ...,
        Decimal("1.50"),
        Fraction(-3, 10**50),
        datetime(2024, 2, 29, 1, 2, 3, 4),
        date(2024, 2, 29),
        datetime(2024, 2, 29, tzinfo=timezone(timedelta(hours=-5))),
        timedelta(days=-1, microseconds=5),
        time(23, 59, 1),
        {1: {2: {(3, 4): [5]}}}.keys(),
        [[1, True, 1.0, None], [2**63, -(2**63) - 1]],
        np.float64(0.1),
        np.int32(-7),
    ],
    ids=lambda value: type(value).__name__,
)
def test_special_values_cross_unchanged(value: Any) -> None:
    back = wire.loads(wire.dumps(value))
    assert type(back) is type(value)
    assert back == value


def test_arrays_cross_unchanged() -> None:
    for array in (
        np.arange(6.0).reshape(2, 3),
        np.array(["a", "bc"]),
        np.array([[1, "x"]], dtype=object),
        np.zeros((0, 2)),
    ):
        back = wire.loads(wire.dumps(array))
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert (back == array).all()


def test_what_iterates_arrives_as_what_iterates_and_nan_as_nan() -> None:
    assert list(wire.loads(wire.dumps(map(str, [1, 2])))) == ["1", "2"]
    assert list(wire.loads(wire.dumps({1: 2}.items()))) == [(1, 2)]
    assert list(wire.loads(wire.dumps({1: 2}.values()))) == [2]
    assert math.isnan(wire.loads(wire.dumps(float("nan"))))
    assert wire.loads(wire.dumps(defaultdict(list, {1: [2]}))) == {1: [2]}


def test_subclasses_arrive_as_what_they_derive_from() -> None:
    class Equal(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class Text(str):
        def __str__(self) -> str:
            return "another"

    back = wire.loads(wire.dumps([Equal(7), Text("own")]))
    assert back == [7, "own"]
    assert [type(item) for item in back] == [int, str]


def test_objects_arrive_as_a_stand_in_that_equals_nothing() -> None:
    stand_in = wire.loads(wire.dumps(object()))
    assert repr(stand_in) == "<builtins.object object>"
    assert stand_in != wire.loads(wire.dumps(object()))
    assert wire.loads(wire.dumps(print)) is not None


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff",
        b"{}",
        b'{"a":1,"b":2}',
        b'{"eval":"1"}',
        b'{"__reduce__":[]}',
        b'{"numpy":["|O8",null,""]}',
        b'{"numpy":["<f8",[2],"AAAA"]}',
        b'{"date":["os",[]]}',
        b'{"set":[[]]}',
        b'{"int":"zz"}',
        b"[" * 100_000,
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_what_is_no_value_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        wire.loads(line)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(sorted(wire._MAKE)), inner, min_size=1, max_size=1)
        ),
    )
)
def test_whatever_comes_is_a_value_or_refused(content: Any) -> None:
    with suppress(ValueError):
        wire.loads(json.dumps(content).encode())
