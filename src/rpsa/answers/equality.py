"""Equality of answers: lists, points and numbers are compared here, everything else by computer algebra.

Expressions are read by math-verify and compared exactly by SymPy. math-verify alone takes 1/2^99 for 1/2^98, 40_9
for 40, and -2, 1 for the point (-2, 1).

Computer algebra runs in a process of its own, which is ended when a comparison takes too long: there are
expressions that no computer finishes. No limit within a process would hold: no signal interrupts a power tower that
Python raises in one step, and outside of the main thread there are no signals.
"""

import atexit
import json
import logging
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from sympy.core.relational import Relational

from rpsa.answers.reading import canonical, named, number, rounding
from rpsa.errors import RPSAError


def equal(stated: str, gold: str) -> bool:
    """Whether two canonical answers are equal; False for what cannot be read."""
    a, b = _read(stated), _read(gold)
    if isinstance(a, sympy.Set) or isinstance(b, sympy.Set):
        return _same_sets(a, b)
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(_same_expressions, a, b))
    if isinstance(a, Relational) and isinstance(b, Relational):
        return _same_relations(a, b) or _same_sets(a, b)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _same_expressions(a, b) or _rounded(stated, b) or _rounded(gold, a)
    return False


@lru_cache(maxsize=1000)  # an answer key is compared with many answers
def _read(text: str) -> Any:
    """A SymPy expression, matrix, relation or set, with exact numbers; None if the text is none."""
    joined = re.split(r"(\\lor|\\land) ", text, maxsplit=1)
    if len(joined) == 3:
        left, right = _solutions(_read(joined[0])), _solutions(_read(joined[2]))
        if left is None or right is None:
            return None
        return left | right if joined[1] == r"\lor" else left & right
    latex = [math_verify.LatexExtractionConfig()]
    parsed = math_verify.parse(f"\\boxed{{{text}}}", latex, "no_fallback", parsing_timeout=None)
    if not parsed or isinstance(parsed[0], str):
        return None
    if isinstance(parsed[0], sympy.And):  # of a chain, 1 < x < 3
        return _solutions(sympy.And(*map(_exact, parsed[0].args)))
    return _exact(parsed[0])


def _exact(value: Any) -> Any:
    """Evaluated, with rationals for decimals, one kind of symbol, and `i` the imaginary unit."""
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(_exact)
    floats = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    symbols = {
        s: sympy.I if s.name == "i" else sympy.Symbol(s.name, real=True) for s in value.atoms(sympy.Symbol)
    }
    return value.xreplace(floats | symbols).doit()


def _same_expressions(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a == b:
        return True
    difference = a - b
    return _is_zero(difference) if difference.is_number else bool(difference.equals(0))


def _is_zero(value: sympy.Expr) -> bool:
    """Whether a number is zero: by as many digits as that takes, and where 100 do not tell, by algebra."""
    approximate = value.evalf(5)
    if all(part._prec > 1 for part in approximate.atoms(sympy.Float)) and approximate.is_comparable:
        return False
    return bool(approximate == 0 or value.equals(0))


def _rounded(text: str, value: sympy.Expr) -> bool:
    """Whether `text` is a decimal that stands for `value`."""
    half = rounding(text)
    return half is not None and value.is_real is True and bool(abs(value - sympy.Rational(text)) <= half)


def _same_relations(a: Relational, b: Relational) -> bool:
    """Whether one is the other times a number."""
    if isinstance(a, sympy.Eq | sympy.Ne):
        return type(a) is type(b) and _ratio(a.lhs - a.rhs, b.lhs - b.rhs) is not None
    if isinstance(b, sympy.Eq | sympy.Ne) or ("=" in a.rel_op) != ("=" in b.rel_op):
        return False
    ratio = _ratio(a.gts - a.lts, b.gts - b.lts)
    return ratio is not None and bool(ratio.is_positive)


def _ratio(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    ratio = sympy.simplify(a / b) if b != 0 else sympy.S.Zero
    return ratio if ratio.is_number and ratio.is_finite and ratio != 0 else None


def _same_sets(a: Any, b: Any) -> bool:
    a, b = _solutions(a), _solutions(b)
    return a is not None and b is not None and bool(a == b or sympy.SymmetricDifference(a, b).is_empty)


def _solutions(value: Any) -> Any:
    """The set that a relation in one unknown describes; a set itself; None for anything else."""
    if isinstance(value, sympy.Set):
        return value
    if isinstance(value, sympy.Rel | sympy.And) and len(value.free_symbols) == 1:
        return value.as_set()
    return None


logger = logging.getLogger(__name__)

CPU_SECONDS = 5
"""For one comparison. The kernel counts them, so that a busy machine changes no verdict."""
_WALL_SECONDS = 300.0  # where the kernel does not count
_MEMORY = 4 << 30  # bytes of address space

_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None
_owner = 0  # who started it: what is forked off starts its own


def algebra_says_equal(stated: str, gold: str) -> bool:
    """Whether two canonical answers are equal; a comparison that does not end is warned of, and says no.

    Raises:
        RPSAError: the process does not start.
    """
    with _lock:
        process = _process if _process is not None and _owner == os.getpid() else _start()
        reply = _ask(process, json.dumps([stated, gold]))
    if reply is None:
        logger.warning("%.80r and %.80r could not be compared: counted as different", stated, gold)
    return reply == "true"


def serve() -> None:
    """Compare the pairs that come in, one a line; what the process of `_start` does."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints is a reply

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # not everywhere can it be set
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_SECONDS, resource.RLIM_INFINITY)
        )
        try:
            same = equal(*json.loads(line))
        except Exception:  # of any kind, from three libraries: it could not be read or compared
            same = False
        print(json.dumps(same), file=replies, flush=True)


def _start() -> subprocess.Popen[str]:
    global _process, _owner
    program = f"import sys; sys.path[:] = {sys.path!r}; from rpsa.answers.equality import serve; serve()"
    _process, _owner = (
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        ),
        os.getpid(),
    )
    if _ask(_process) != "ready":
        raise RPSAError(
            "mathematics cannot be compared: math-verify does not load; `import math_verify` says why"
        )
    return _process


def _ask(process: subprocess.Popen[str], question: str | None = None) -> str | None:
    """The next line that the process writes; None if it ended, or did not answer in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Timer(_WALL_SECONDS, process.kill)
    late.start()
    reply = ""
    try:
        if question is not None:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        pass
    finally:  # an interrupt too: an answer that nobody read would be taken for the next one's
        late.cancel()
        if not reply:
            _stop()
    return reply.rstrip("\n") or None


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None and _owner == os.getpid():
        _process.kill()
        _process.wait()
    _process = None


_BRACKETS = re.compile(r"([(\[]|\\langle)(.*)([)\]]|\\rangle)", re.DOTALL)
_OPENS, _CLOSES = re.compile(r"\\?[(\[{]|\\langle"), re.compile(r"\\?[)\]}]|\\rangle")
_BASED = re.compile(r"\(?([0-9A-Z]+)\)?(?:_\{?|\(?base)\(?(\d+|[a-z]+)\)?\}?")
_BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# Words are the same or not: algebra would take their letters for factors, and two numbers side by side for a sum.
_NO_ALGEBRA = re.compile(r"(?<![\\A-Za-z])(?!sqrt|pmatrix|bmatrix|vmatrix|matrix)[A-Za-z]{4,}|\d \d")
_SETS = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt|cup|cap|setminus|infty|in|mathbb|emptyset)(?![A-Za-z])")


def same_value(stated: str, gold: str) -> bool:
    """Whether two stated answers (LaTeX, or plain) are equal as mathematics.

    A unit, a percent sign and the name of the value count for nothing; a number with a base equals none without it.
    """
    if _same(canonical(stated), canonical(gold)):
        return True
    if ("%" in stated) != ("%" in gold):  # 50% is 1/2, too
        percent, other = (stated, gold) if "%" in stated else (gold, stated)
        share, value = number(named(canonical(percent))), number(named(canonical(other)))
        return share is not None and value is not None and share / 100 == value
    return False


def _same(stated: str, gold: str) -> bool:
    if not stated or not gold:
        return False
    if stated == gold or (stated.isalpha() and len(stated) > 1 and stated.casefold() == gold.casefold()):
        return True
    stated_value, gold_value = named(stated), named(gold)
    if (stated_value, gold_value) != (stated, gold) and _same(stated_value, gold_value):
        return True
    stated_list, gold_list = _listed(stated), _listed(gold)
    if len(stated_list) > 1 or len(gold_list) > 1:
        return _same_lists(stated_list, gold_list)
    stated_point, gold_point = _point(stated), _point(gold)
    if stated_point and gold_point:
        return _same_points(stated_point, gold_point)
    if bool(stated_point) != bool(gold_point) and not _SETS.search(stated + gold):
        return False
    stated_base, gold_base = _based(stated), _based(gold)
    if stated_base or gold_base:
        return stated_base == gold_base
    x, y = number(stated), number(gold)
    if x is not None and y is not None:
        return any(abs(x - y) <= half for half in (0, rounding(stated), rounding(gold)) if half is not None)
    if _NO_ALGEBRA.search(f"{stated} ; {gold}"):
        return False
    return algebra_says_equal(stated, gold)


def _same_lists(stated: Sequence[str], gold: Sequence[str]) -> bool:
    """In any order; a value that is stated twice, in two ways, counts once."""
    if len(gold) < len(stated) <= 2 * len(gold):
        stated = [
            part for i, part in enumerate(stated) if not any(_same(part, other) for other in stated[:i])
        ]
    if len(stated) != len(gold):
        return False
    left = list(gold)
    for part in stated:
        match = next((other for other in left if _same(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_points(stated: tuple[str, str, list[str]], gold: tuple[str, str, list[str]]) -> bool:
    return (
        stated[:2] == gold[:2]
        and len(stated[2]) == len(gold[2])
        and all(_same(a, b) for a, b in zip(stated[2], gold[2], strict=True))
    )


def _listed(text: str) -> list[str]:
    """The members of a list, with or without the braces of a set; `a \\pm b` is two."""
    set_braces = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    members = (set_braces and _split(set_braces[1])) or _split(text)
    return [one for member in members for one in dict.fromkeys(_signed(member, sign) for sign in "+-")]


def _signed(text: str, sign: str) -> str:
    other = {"+": "-", "-": "+"}[sign]
    return re.sub(r"\\([pm])[pm](?![A-Za-z])", lambda m: sign if m[1] == "p" else other, text)


def _point(text: str) -> tuple[str, str, list[str]] | None:
    """The brackets and coordinates of a point, vector or interval."""
    match = _BRACKETS.fullmatch(text)
    coordinates = _split(match[2]) if match else []
    return (match[1], match[3], coordinates) if match and len(coordinates) > 1 else None


def _split(text: str) -> list[str]:
    """The parts between the commas and semicolons that stand in no brackets; none if the brackets do not match."""
    parts, depth = [""], 0
    for piece in re.findall(r"\\[a-zA-Z]+|\\.|.", text, re.DOTALL):
        depth += bool(_OPENS.fullmatch(piece)) - bool(_CLOSES.fullmatch(piece))
        if depth < 0:
            return []
        if piece in (",", ";") and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts if part.strip()]


def _based(text: str) -> tuple[str, int] | None:
    """Digits and base of a numeral that says its base."""
    match = _BASED.fullmatch(text)
    if match is None or not (match[2] in _BASES or match[2].isdigit()):
        return None
    base = _BASES.index(match[2]) + 2 if match[2] in _BASES else int(match[2][:3])
    return (match[1].lstrip("0"), base) if base > 1 else None
