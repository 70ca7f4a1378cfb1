"""What the answer of a response is, and whether it is right.

Only what follows the thought counts, in the model's own format (`rpsa.thought`): a `\\boxed{}` inside a thought is
no answer, and a thought that was never closed has none.
"""

import ast
import re
import textwrap
import threading
from typing import Literal

from rpsa.thought import THINK, ThoughtFormat

AnswerKind = Literal["math", "integer", "letter", "exact"]

_BOX = re.compile(r"(?<![A-Za-z])boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_FINAL = re.compile(r"final answer\b[*_ \t]*(?::|is\b:?|\n)[*_\s]*(?P<rest>[^\n]+)", re.IGNORECASE)
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad|~")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|,|\\[,! ])(?=\d{3}(?!\d))")
_INTEGER = re.compile(r"(?:[A-Za-z]+ )*([+-]?\d+)(?:\.0+)?(?: [A-Za-z%°]+)*")
_LETTER = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:? )?(?:\(([A-D])\).*|([A-D])(?:$|[).:].*))",
    re.IGNORECASE | re.DOTALL,
)


def final_answer(text: str, thought: ThoughtFormat = THINK) -> str | None:
    """What follows the end of the last thought, stripped; None if the thought was never closed.

    A model without thoughts is answered whole: give `thought` as `rpsa.chat.read_thought` finds it.
    """
    return thought.answer_of(text)


def boxed(text: str) -> str | None:
    """The inside of the last balanced `\\boxed{...}`, with or without its backslash; None if there is none.

    Of nested boxes the outer one counts; a box that holds nothing but a box is unwrapped.
    """
    found, start = None, 0
    while match := _BOX.search(text, start):
        end = _closing_brace(text, match.end())
        if end is None:
            start = match.end()
            continue
        found, start = text[match.end() : end].strip(), end
    if found is not None and re.fullmatch(r"\\?boxed\s*\{.*\}", found, re.DOTALL):
        return boxed(found)
    return found


def extracted(text: str) -> str | None:
    """The stated answer in an answer text: its last box, else what follows the last `Final Answer:`."""
    box = boxed(text)
    if box is not None:
        return box
    stated = [match["rest"].strip(" \t*_") for match in _FINAL.finditer(text)]
    return next((s.removesuffix(".") for s in reversed(stated) if s), None)


def integer(text: str) -> int | None:
    """The integer that an extracted answer states (`025`, `1{,}024`, `m+n = 204`, `42 \\text{ minutes}`)."""
    plain = _plain(_THOUSANDS.sub("", text)).rpartition("=")[2].strip()
    match = _INTEGER.fullmatch(plain)
    return int(match[1]) if match else None


def letter(text: str) -> str | None:
    """The choice A to D that an extracted answer states (`B`, `(B)`, `\\text{B}`, `B. because`)."""
    match = _LETTER.fullmatch(_plain(text))
    return (match[1] or match[2]).upper() if match else None


def code_block(text: str, entry_point: str | None = None) -> str | None:
    """The last fenced Python block of an answer that parses and defines `entry_point` (None: any function).

    A last fence that was never closed counts; a block indented in a list is dedented.
    """
    for block in reversed(_FENCE.findall(text)):
        code = textwrap.dedent(block)
        names = defined_names(code)
        if entry_point in names or (entry_point is None and names):
            return code
    return None


def grade(response_text: str, gold: str, kind: AnswerKind, thought: ThoughtFormat = THINK) -> bool:
    """Whether a whole response (thought included) answers `gold`.

    `math` compares by value with math-verify, `integer` and `letter` as such, `exact` as words: the box or
    the stated answer, or else the whole answer, up to whitespace.
    """
    answer = final_answer(response_text, thought)
    if answer is None:
        return False
    stated = extracted(answer)
    if kind == "exact":
        return _words(answer if stated is None else stated) == _words(gold)
    if stated is None:
        return False
    if kind == "integer":
        return integer(stated) is not None and integer(stated) == integer(gold)
    if kind == "letter":
        return letter(stated) is not None and letter(stated) == letter(gold)
    return _same_notation(stated) == _same_notation(gold) or _same_value(stated, gold)


def _closing_brace(text: str, start: int) -> int | None:
    """Where the group closes that was opened just before `start`; `\\{` and `\\}` open and close none."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _plain(text: str) -> str:
    """An extracted answer without LaTeX wrappers, delimiters and Markdown emphasis."""
    text = re.sub(r"\\[()\[\]]|\\?\$|\*\*|\\%|\^\s*\{?\\circ\}?", "", text)
    previous = None
    while text != previous:
        previous, text = text, _WRAPPER.sub(r" \1 ", text)
    return " ".join(_SPACING.sub(" ", text).split()).strip(" .")


def _words(text: str) -> str:
    return " ".join(text.split())


def _same_notation(text: str) -> str:
    """One spelling for what differs in looks only, so that words and plain matches need no algebra."""
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ]|\$|\\\(|\\\)", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", _WRAPPER.sub(r"\1", text))
    return re.sub(r"\s+", "", text).removesuffix(".")


def _same_value(stated: str, gold: str) -> bool:
    from math_verify import parse, verify

    # math-verify's time limits use SIGALRM, which only the main thread may set
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    parsed = [parse(f"\\boxed{{{side}}}", parsing_timeout=limit) for side in (gold, stated)]
    return bool(verify(*parsed, timeout_seconds=limit))


def defined_names(code: str) -> set[str]:
    """What `code` binds at its top level by `def`, `class` or assignment; empty if it does not parse."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return set()
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
