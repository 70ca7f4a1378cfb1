"""Problems of HumanEval+, MBPP+ and other Python test suites, and fair time limits for their solutions.

Rows of HumanEval+: `task_id, prompt, canonical_solution, entry_point, test`; of MBPP+: `task_id, code, prompt,
test_imports, test_list, test`; of any other suite: `prompt, entry_point, test`, with `task_id` and
`canonical_solution` if there are any.

There are problems whose reference takes half a minute. The limit is four times the reference's time on this machine,
never less than ten seconds; the times are measured once, and kept in the user's cache.
"""

import ast
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from rpsa.answers import defined_names
from rpsa.artifacts import atomic_write, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox.running import Program, grade_programs
from rpsa.evaluation.sandbox.tiers import Sandbox
from rpsa.rows import Row, read_rows, text_field

DEFAULT_SECONDS = 10.0

# Faults of the released tests, by task: (what stands there, what is meant).
_REPAIRS = {
    # hands the coefficients over as if they were the root, and takes any value below zero for a root
    "HumanEval/32": (
        "assert _poly(*candidate(*inp), inp) <= 0.0001",
        "assert abs(_poly(*inp, candidate(*inp))) <= 0.0001",
    ),
    # the answer to this one input takes a gigabyte, and the tests hold it twice
    "Mbpp/255": ("[['Dog', 'Cat', 'CatBird', 'Bird', 'Fish'], 77], ", ""),
}
# Three tests of MBPP+ compute whether the answer matches and never look at it: any answer would pass.
_UNCHECKED = "        exact_match = exp == (out is not None)\n"
_CHECKED = _UNCHECKED + "    assert exact_match\n"
# Numpy stretches what it compares: `allclose([], [1.1])` holds. EvalPlus's own harness asks for one type and length
# first, and its released tests do not; here the lists in a list have to be as long as well.
_STRETCHED = "        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
_UNSTRETCHED = "        assert type(out) is type(exp) and _lengths(out) == _lengths(exp)\n" + _STRETCHED
_LENGTHS = """

def _lengths(value):
    return [_lengths(item) for item in value] if isinstance(value, (list, tuple)) else None

"""

_LINE_OF_DATA = re.compile(r"^([ \t]*)[^\n]{1000,}$", re.MULTILINE)


@dataclass(frozen=True)
class CodeProblem:
    """One problem, and how an answer to it is judged."""

    id: str
    prompt: str
    entry_point: str
    test: str
    preamble: str
    reference: str | None
    packages: tuple[str, ...] = ()
    seconds: float = DEFAULT_SECONDS

    def program(self, solution: str) -> Program:
        """A solution of this problem: code that defines the entry point, or else continues the prompt."""
        if self.entry_point not in defined_names(solution) and _parses(self.prompt + solution):
            solution = self.prompt + solution
        return Program(
            self.id, solution, self.test, self.entry_point, self.preamble, self.seconds, self.packages
        )


def load_code_problems(source: str | Path) -> list[CodeProblem]:
    """The problems of a file or dataset; its columns say which suite it is.

    Raises:
        RPSAError: a row lacks a column, its test checks nothing, or its entry point cannot be found.
    """
    return [code_problem(row, i) for i, row in enumerate(read_rows(source))]


def code_problem(row: Row, index: int) -> CodeProblem:
    """One row as a problem; `index` names it if the row has no `task_id`. Raises as `load_code_problems` does."""
    return _mbpp(row) if "test_list" in row.fields else _suite(row, index)


def shown_assertion(row: Row) -> str:
    """The assertion of a row of MBPP+ that its prompt shows."""
    return str(row.fields["test_list"][0])


def _suite(row: Row, index: int) -> CodeProblem:
    prompt, entry_point, test = (text_field(row, [name]) for name in ("prompt", "entry_point", "test"))
    name = str(row.fields.get("task_id", index))
    test = _repaired(test, name)
    tree = _checked_test(row, test)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    calls = [f"{node.name}()" for node in functions if node.name.startswith("test_") and not node.args.args]
    if any(node.name == "check" for node in functions):
        calls = [f"check({entry_point})"]
    solution = row.fields.get("canonical_solution")
    preamble = _imports_and_helpers(prompt, entry_point)
    return CodeProblem(
        id=name,
        prompt=prompt,
        entry_point=entry_point,
        test="\n".join([test, *calls]),
        preamble=preamble,
        reference=None if solution is None else str(solution),
        packages=_packages(tree, ast.parse(preamble)),
    )


def _mbpp(row: Row) -> CodeProblem:
    code, test = text_field(row, ["code"]), text_field(row, ["test"])
    shown = row.fields["test_list"]
    entry_point = _called(str(shown[0]), code) if isinstance(shown, list) and shown else None
    if entry_point is None:
        raise RPSAError(
            f"{row.where}: the first of test_list calls no function of its code, so there is no entry point"
        )
    name = f"Mbpp/{row.fields['task_id']}"
    test = _repaired(test, name)
    return CodeProblem(
        id=name,
        prompt=text_field(row, ["prompt"]),
        entry_point=entry_point,
        test=test,
        preamble="\n".join(map(str, row.fields.get("test_imports") or [])),
        reference=code,
        packages=_packages(_checked_test(row, test)),
    )


def _repaired(test: str, name: str) -> str:
    for wrong, right in (_REPAIRS.get(name, ("", "")), (_UNCHECKED, _CHECKED)):
        test = test.replace(wrong, right)
    return _LENGTHS + test.replace(_STRETCHED, _UNSTRETCHED) if _STRETCHED in test else test


def _called(assertion: str, code: str) -> str | None:
    """The function that an assert calls and `code` defines (MBPP+ has one that is named `sum`)."""
    names = defined_names(code)
    calls = (node for node in ast.walk(ast.parse(assertion)) if isinstance(node, ast.Call))
    return next((c.func.id for c in calls if isinstance(c.func, ast.Name) and c.func.id in names), None)


def _checked_test(row: Row, test: str) -> ast.Module:
    """The statements of a test, which must be able to fail.

    Lines of data are left out where that leaves Python: parsing the megabytes of expected values takes seconds.
    """
    skimmed = _LINE_OF_DATA.sub(r"\1pass", test)
    for source in (skimmed, test) if _parses(skimmed) else (test,):
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise RPSAError(f"{row.where}: its test is no Python ({error})") from error
        if any(isinstance(node, ast.Assert | ast.Raise) for node in _statements(tree)):
            return tree
    raise RPSAError(f"{row.where}: its test has no assert and raises nothing, so any answer would pass")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements; expressions, which hold megabytes of expected values, are not looked into."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from _statements(child)


def _packages(*sources: ast.Module) -> tuple[str, ...]:
    imported = {
        name.split(".")[0]
        for source in sources
        for node in _statements(source)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    return tuple(sorted({_distribution(name) for name in imported - sys.stdlib_module_names}))


def _distribution(module: str) -> str:
    return _installed().get(module, [module])[0]


@cache
def _installed() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _imports_and_helpers(prompt: str, entry_point: str) -> str:
    """What a prompt sets up beside the function that is asked for: its imports and other definitions."""
    whole = prompt + "\n    pass"  # a function that ends with its signature or a comment
    parsed = next((text for text in (prompt, whole) if _parses(text)), "")
    kept = [node for node in ast.parse(parsed).body if getattr(node, "name", None) != entry_point]
    return "\n".join(ast.unparse(node) for node in kept)


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


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
