"""Algebra of stated answers: two expressions read by math-verify and compared exactly by SymPy.

Imported by the process of `rpsa.answers.equality` alone, which ends when a comparison takes too long: nobody else
waits for SymPy to load, and there are expressions that no computer finishes.
"""

import re
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from sympy.core.relational import Relational

from rpsa.answers.reading import rounding


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
