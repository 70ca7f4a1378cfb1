"""Equality of answers: lists, points and numbers are compared here, everything else by computer algebra.

Expressions are read by math-verify and compared exactly by SymPy. math-verify alone takes 1/2^99 for 1/2^98, 40_9
for 40, and -2, 1 for the point (-2, 1).

Computer algebra (`rpsa.answers.algebra`) runs in a process of its own, which is ended when a comparison takes too
long: there are expressions that no computer finishes. No limit within a process would hold: no signal interrupts a
power tower that Python raises in one step, and outside of the main thread there are no signals.
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

from rpsa.answers.reading import canonical, named, number, rounding
from rpsa.errors import RPSAError

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

    from rpsa.answers.algebra import equal

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
