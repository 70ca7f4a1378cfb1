"""HumanEval+, MBPP+ and suites of one's own: loading, repairs, time limits, and the reference solutions."""

import ast
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import DATA_DIR
from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox import (
    CodeProblem,
    Program,
    Sandbox,
    Verdict,
    best_sandbox,
    grade_programs,
    load_code_problems,
    tier_reports,
    with_time_limits,
)
from rpsa.evaluation.sandbox.evalplus import cache_path
from rpsa.rows import read_rows

HUMANEVAL = DATA_DIR / "humanevalplus" / "HumanEvalPlus-OriginFmt.jsonl.gz"
MBPP = DATA_DIR / "mbppplus" / "MbppPlus-OriginFmt.jsonl.gz"

needs_sandbox = pytest.mark.skipif(
    all(report.problem for report in tier_reports()), reason="; ".join(map(str, tier_reports()))
)
needs_data = pytest.mark.skipif(
    not (HUMANEVAL.is_file() and MBPP.is_file()), reason=f"{HUMANEVAL} or {MBPP} not found"
)

ADD: dict[str, Any] = {
    "prompt": "import math\n\ndef half(x):\n    return x / 2\n\ndef add(a, b):\n    '''Adds.'''\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "canonical_solution": "    return a + b\n",
}


def problems(folder: Path, *rows: dict[str, Any]) -> list[CodeProblem]:
    path = folder / "suite.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_code_problems(path)


def verdict_of(problem: CodeProblem, solution: str) -> Verdict:
    [verdict] = grade_programs([problem.program(solution)], best_sandbox())
    return verdict


@needs_sandbox
@pytest.mark.parametrize(
    ("solution", "passed"),
    [
        ("    return a + b\n", True),
        ("def add(a, b):\n    return a + b", True),
        ("def add(a, b):\n    return int(half(2 * math.floor(a + b)))", True),
        ("    return a - b\n", False),
        ("def sub(a, b):\n    return a + b", False),
        ("", False),
        ("not Python (", False),
    ],
)
def test_a_suite_of_ones_own(tmp_path: Path, solution: str, passed: bool) -> None:
    [problem] = problems(tmp_path, ADD)
    assert verdict_of(problem, solution).passed == passed


GUARDS = {
    "reads stdin": "n = int(input())\n    print(add(n, n))",
    "parses arguments": "import argparse\n    parser = argparse.ArgumentParser()\n"
    "    parser.add_argument('a')\n    parser.parse_args()",
    "runs tests of its own": "import unittest\n    unittest.main()",
    "exits": "import sys\n    sys.exit(1)",
    "raises": "raise SystemError",
}


@needs_sandbox
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_what_stands_under_a_main_guard_is_not_run(tmp_path: Path, together: bool) -> None:
    [problem] = problems(tmp_path, ADD)
    bodies = [f"def add(a, b):\n    return a {sign} b\n\n" for sign in "+-"]
    codes = [f"{body}if __name__ == '__main__':\n    {guard}" for body in bodies for guard in GUARDS.values()]
    programs = [replace(problem.program(code), together=together) for code in codes]
    verdicts = grade_programs(programs, best_sandbox())
    assert [verdict.outcome for verdict in verdicts] == ["passed"] * len(GUARDS) + ["failed"] * len(GUARDS)


A_MODULE = '''
import __main__, doctest, pickle
from dataclasses import dataclass

@dataclass
class Pair:
    a: int
    b: int

def add(a, b):
    """
    >>> add(1, 1)
    2
    """
    if a == b:
        return a + b
    assert doctest.testmod().attempted == 1
    pair = pickle.loads(pickle.dumps(Pair(a, b)))
    return __main__.Pair(pair.a, pair.b).a + b
'''


@needs_sandbox
def test_a_solution_is_a_module_that_can_be_found(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, ADD)
    assert verdict_of(problem, A_MODULE).passed


HELPERS: dict[str, Any] = {
    "prompt": "import math\nimport numpy as np\n\ndef encode(text):\n    return text[::-1]\n\ndef decode(text):\n",
    "entry_point": "decode",
    "test": "def check(candidate):\n    for text in ('', 'ab', 'abc'):\n"
    "        assert candidate(encode(text)) == text\n    assert math.pi > 3",
    "canonical_solution": "    return ''.join(np.array(list(text), dtype=object)[::-1])\n",
}


@needs_sandbox
@pytest.mark.parametrize("end", ["", "    '''Decodes.'''\n", "    # decodes\n"])
def test_tests_and_solutions_know_what_the_prompt_defines(tmp_path: Path, end: str) -> None:
    [problem] = problems(tmp_path, HELPERS | {"prompt": HELPERS["prompt"] + end})
    assert problem.packages == ("numpy",)
    solutions = {
        HELPERS["canonical_solution"]: True,
        "def decode(text):\n    return encode(text)": True,
        "def decode(text):\n    return text": False,
        "def encode(text):\n    return text\ndef decode(text):\n    return text": False,
    }
    verdicts = grade_programs([problem.program(code) for code in solutions], best_sandbox())
    assert [verdict.passed for verdict in verdicts] == list(solutions.values())


CLOSE = """
import numpy as np

def assertion(out, exp, atol):
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp

assertion(add(1, 2), EXPECTED, 1e-6)
"""


@needs_sandbox
@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        (
            "[1.1]",
            ["[1.1]", "[1.1000001]"],
            ["[]", "1.1", "(1.1,)", "[1.1, 1.1]", "[[1.1]]", "[1.2]", "None", "{}"],
        ),
        (
            "[[1.1], [2.2]]",
            ["[[1.1], [2.20000001]]"],
            ["[[], []]", "[[1.1, 1.1], [2.2, 2.2]]", "[1.1, 2.2]", "[[]]"],
        ),
        ("1.0", ["1.0", "1", "1.0000001"], ["[]", "[1.0]", "'1.0'"]),
        ("(1.1, 2.2)", ["(1.1, 2.2)"], ["()", "(1.1,)", "1.1"]),
        ("[]", ["[]"], ["0", "0.0", "[[]]", "()", "None"]),
    ],
)
def test_what_is_nearly_equal_is_of_the_same_type_and_length(
    tmp_path: Path, expected: str, right: list[str], wrong: list[str]
) -> None:
    [problem] = problems(tmp_path, ADD | {"test": CLOSE.replace("EXPECTED", expected)})
    verdicts = grade_programs([constant(problem, value) for value in right + wrong], best_sandbox())
    assert [verdict.passed for verdict in verdicts] == [True] * len(right) + [False] * len(wrong)


def constant(problem: CodeProblem, value: str) -> Program:
    return problem.program(f"def {problem.entry_point}(*_, **__):\n    return {value}")


@needs_sandbox
@pytest.mark.parametrize(
    "test",
    [
        "assert add(1, 2) == 3",
        "def test_it():\n    assert add(1, 2) == 3\ndef test_more():\n    assert add(2, 2) == 4",
        "if add(1, 2) != 3:\n    raise ValueError",
    ],
)
def test_the_ways_to_write_a_test(tmp_path: Path, test: str) -> None:
    [problem] = problems(tmp_path, ADD | {"test": test})
    assert verdict_of(problem, "    return a + b").passed
    assert not verdict_of(problem, "    return a * b").passed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"test": "def check(candidate):\n    candidate(1, 2)"},
            "line 1: its test has no assert and raises nothing",
        ),
        ({"test": "assert ("}, "line 1: its test is no Python"),
        ({"entry_point": None}, "line 1 has no text field 'entry_point'"),
        (
            {"test_list": ["assert sub(1) == 2"], "code": "def add(): pass", "task_id": 1},
            "calls no function of its code",
        ),
    ],
)
def test_a_suite_that_cannot_judge_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RPSAError, match=message):
        problems(tmp_path, ADD | changed)


@needs_sandbox
def test_time_limits_follow_the_reference_and_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    slow = "    import time\n    time.sleep(2.6)\n    return a + b\n"
    suite = problems(
        tmp_path,
        ADD,
        ADD | {"canonical_solution": slow},
        ADD | {"canonical_solution": None},
        ADD | {"canonical_solution": "    return 0\n"},
    )
    sandbox = best_sandbox()
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        first = with_time_limits(suite, sandbox, progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]
    assert [problem.seconds for problem in first[::2]] == [10.0, 10.0]
    assert 10.4 <= first[1].seconds < 40
    assert "the reference solution of 3 does not pass" in caplog.text
    assert set(json.loads(cache_path(sandbox).read_text()).values()) == {
        p.seconds / 4 for p in first[1:2]
    } | {time for time in json.loads(cache_path(sandbox).read_text()).values() if time < 2.5}
    seen.clear()
    assert with_time_limits(suite[:3], sandbox, progress=lambda done, _: seen.append(done)) == first[:3]
    assert seen == []
    [other] = with_time_limits(
        [replace(suite[0], test=suite[0].test + "\n")], sandbox, progress=lambda d, _: seen.append(d)
    )
    assert (other.seconds, seen) == (10.0, [1])


@needs_sandbox
def test_where_no_reference_passes_nothing_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    suite = problems(
        tmp_path, *[ADD | {"test": f"import nosuch{n}\nassert add(1, 2) == 3"} for n in range(2)]
    )
    suite = [replace(problem, packages=()) for problem in suite]
    with pytest.raises(RPSAError, match=r"none of 2 reference solutions .*No module named 'nosuch0'"):
        with_time_limits(suite, best_sandbox())


@needs_data
def test_both_benchmarks_load_whole() -> None:
    humaneval, mbpp = load_code_problems(HUMANEVAL), load_code_problems(MBPP)
    assert (len(humaneval), len(mbpp)) == (164, 378)
    assert {problem.packages for problem in humaneval + mbpp} == {("numpy",), ()}
    for problem in humaneval + mbpp:
        assert problem.reference is not None
        assert problem.entry_point in problem.program(problem.reference).code
    by_id = {problem.id: problem for problem in humaneval + mbpp}
    assert by_id["Mbpp/126"].entry_point == "sum"
    assert "from typing import List" in by_id["HumanEval/0"].preamble


def constant_cheats(problems: list[CodeProblem]) -> dict[str, str]:
    """For each MBPP+ problem a solution that returns the value of the assert that its prompt shows."""
    shown = {f"Mbpp/{row.fields['task_id']}": row.fields["test_list"][0] for row in read_rows(MBPP)}
    cheats = {}
    for problem in problems:
        [statement] = ast.parse(shown[problem.id]).body
        assert isinstance(statement, ast.Assert)
        test = statement.test
        value = ast.unparse(test.comparators[0]) if isinstance(test, ast.Compare) else "True"
        cheats[problem.id] = f"from math import *\ndef {problem.entry_point}(*_):\n    return {value}"
    return cheats


def grade_all(problems: list[CodeProblem], solutions: dict[str, str], sandbox: Sandbox) -> dict[str, str]:
    programs = [problem.program(solutions[problem.id]) for problem in problems]
    verdicts = grade_programs(programs, sandbox, workers=2)
    return {verdict.id: verdict.outcome + verdict.reason for verdict in verdicts}


# The three whose tests call a helper of the prompt.
OWN_TESTS = {
    "HumanEval/32": "def check(candidate):\n    for xs in ([2, 3], [-6, 11, -6, 1], [5, 5]):\n"
    "        assert abs(poly(xs, candidate(list(xs)))) < 1e-4",
    "HumanEval/38": "def check(candidate):\n    for text in ('', 'ab', 'abcdefgh'):\n"
    "        assert candidate(encode_cyclic(text)) == text",
    "HumanEval/50": "def check(candidate):\n    for text in ('', 'abc', 'xyz'):\n"
    "        assert candidate(encode_shift(text)) == text",
}


def original_humaneval(folder: Path) -> list[CodeProblem]:
    """HumanEval as a file of one's own: its prompts and solutions, with as few inputs as its own tests have."""
    rows = []
    for row in read_rows(HUMANEVAL):
        test = re.sub(r"(?m)^(\s*(?:inputs|results) = )(.*)$", shortened, row.fields["test"])
        rows.append({**row.fields, "test": OWN_TESTS.get(row.fields["task_id"], test)})
    return problems(folder, *rows)


def shortened(line: re.Match[str]) -> str:
    value = ast.parse(line[2], mode="eval").body
    assert isinstance(value, ast.List)
    value.elts = value.elts[:8]
    return line[1] + ast.unparse(value)


def as_written(problem: CodeProblem, number: int) -> str:
    return str(problem.reference)


def guarded(problem: CodeProblem, number: int) -> str:
    guard = list(GUARDS.values())[number % len(GUARDS)]
    return f"{problem.prompt}{problem.reference}\n\nif __name__ == '__main__':\n    {guard}"


def mutated(problem: CodeProblem, number: int) -> str:
    name = problem.entry_point
    wrong = f"def {name}(*arguments):\n    return [_right(*arguments)]"
    return f"{problem.prompt}{problem.reference}\n\n_right = {name}\n\n{wrong}"


def passed(suite: list[CodeProblem], write: Callable[[CodeProblem, int], str]) -> set[str]:
    programs = [problem.program(write(problem, number)) for number, problem in enumerate(suite)]
    return {verdict.id for verdict in grade_programs(programs, best_sandbox()) if verdict.passed}


@pytest.mark.integration
@needs_data
@needs_sandbox
def test_a_sample_of_the_original_humaneval(tmp_path: Path) -> None:
    suite = [p for n, p in enumerate(original_humaneval(tmp_path)) if p.id in OWN_TESTS or n % 50 == 0]
    everything = {problem.id for problem in suite}
    assert [passed(suite, write) for write in (as_written, guarded, mutated)] == [
        everything,
        everything,
        set(),
    ]


@pytest.mark.slow
@needs_data
@needs_sandbox
def test_the_whole_original_humaneval(tmp_path: Path) -> None:
    suite = original_humaneval(tmp_path)
    assert [len(passed(suite, write)) for write in (as_written, guarded, mutated)] == [164, 164, 0]


STRETCHED = (
    {f"HumanEval/{n}" for n in (2, 4, 45)}
    | {
        f"Mbpp/{n}"
        for n in (
            14,
            80,
            82,
            85,
            98,
            120,
            124,
            137,
            139,
            233,
            267,
            276,
            287,
            293,
            300,
            312,
            422,
            432,
            606,
            622,
            721,
        )
    }
    | {"Mbpp/731", "Mbpp/742", "Mbpp/767"}
)


@pytest.mark.integration
@needs_data
@needs_sandbox
def test_an_empty_list_passes_none_of_those_that_numpy_let_pass() -> None:
    suite = [p for p in load_code_problems(HUMANEVAL) + load_code_problems(MBPP) if p.id in STRETCHED]
    assert len(suite) == len(STRETCHED)
    assert passed(suite, lambda problem, _: constant(problem, "[]").code) == set()


@pytest.mark.slow
@needs_data
@needs_sandbox
@pytest.mark.parametrize("path", [HUMANEVAL, MBPP], ids=["HumanEval+", "MBPP+"])
@pytest.mark.parametrize("value", ["[]", "0", "None", '""', "True", "{}", "()"])
def test_no_constant_passes(path: Path, value: str) -> None:
    assert passed(load_code_problems(path), lambda problem, _: constant(problem, value).code) == set()


SLOW_REFERENCES = {"Mbpp/255", "Mbpp/599", "Mbpp/392", "HumanEval/15", "HumanEval/130", "HumanEval/139"}


@needs_data
@needs_sandbox
def test_a_sample_of_the_reference_solutions_passes_and_of_cheats_does_not() -> None:
    mbpp, humaneval = load_code_problems(MBPP), load_code_problems(HUMANEVAL)
    repaired = [
        p
        for p in mbpp + humaneval
        if p.id in ("HumanEval/32", "Mbpp/737", "Mbpp/787", "Mbpp/794", "Mbpp/126")
    ]
    sample = [p for p in mbpp[::40] + humaneval[::25] + repaired if p.id not in SLOW_REFERENCES]
    sample = [replace(problem, seconds=60.0) for problem in sample]
    results = grade_all(sample, {p.id: str(p.reference) for p in sample}, best_sandbox())
    assert {name: how for name, how in results.items() if how != "passed"} == {}
    ours = [p for p in sample if p.id.startswith("Mbpp")]
    results = grade_all(ours, constant_cheats(ours), best_sandbox())
    assert [name for name, how in results.items() if how == "passed"] == []


@pytest.mark.slow
@needs_data
@needs_sandbox
@pytest.mark.parametrize(("path", "count"), [(HUMANEVAL, 164), (MBPP, 378)], ids=["HumanEval+", "MBPP+"])
def test_every_reference_solution_passes(path: Path, count: int) -> None:
    suite = [replace(problem, seconds=200.0) for problem in load_code_problems(path)]
    results = grade_all(suite, {p.id: str(p.reference) for p in suite}, best_sandbox())
    assert {name: how for name, how in results.items() if how != "passed"} == {}
    assert len(results) == count


@pytest.mark.slow
@needs_data
@needs_sandbox
def test_no_solution_that_returns_the_shown_value_passes() -> None:
    suite = load_code_problems(MBPP)
    results = grade_all(suite, constant_cheats(suite), best_sandbox())
    assert [name for name, how in results.items() if how == "passed"] == []
    assert not [name for name, how in results.items() if how.startswith("error")]
