"""Stated answers: what a response puts in a box, or after "Final Answer"."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_BOX = re.compile(r"\\?(?<![A-Za-z])f?boxed\s*\{|\\fbox\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What may stand between the boxes of one list beside a comma: the ends of formulas, bullets, "and", "x =".
_BETWEEN_BOXES = re.compile(
    r"^[ \t]*(?:[-*•+]|\d+[.)])[ \t]|\\text\s*\{[\s,]*(?:and|or)?\s*\}|\b(?:and|or)\b|[\s$*,;]|\\[()\[\],;! ]|\\q?quad"
    r"|\b[A-Za-z](?:_\{?\w+\}?)?\s*=",
    re.MULTILINE,
)
_SEPARATES = re.compile(r"(?<!\\)[,;]|\b(?:and|or)\b|\n[ \t]*(?:[-*•+]|\d+[.)])[ \t]")

_MARKUP = r"(?:[ \t>#|*_`\"'“‘«$(\[{•-]|\\[(\[]|<\w{1,6}>|\\(?:text|math)\w{0,2}\s*\{)*"
_CLOSING = r"(?:[ \t*_`\"'”’»$)\]}]|\\[)\]]|</\w{1,6}>)*"
_SUBJECT = (
    r"(?:(?:so|thus|hence|therefore|finally|and)\b,?[ \t]*)?(?:(?:the|my|our)[ \t]+)?final[ \t-]*answer[*_]*"
    r"(?:[ \t]*[(\[][^()\[\]\n]{1,60}[)\]]|,?[ \t]+(?:in|for|to|of|as)(?:[ \t]+[\w$']+){1,4}?)?"
)
_IS = r"(?:is|are|equals|becomes|(?:would|will) be|comes out (?:to|as))"
# The best first: as a heading or with a colon, where a line or a sentence begins; "the final answer is", where a
# clause begins; and anywhere.
_FINAL_ANSWERS = [
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        rf"(?:^|(?<=[.!?:;])[ \t]){_MARKUP}{_SUBJECT}{_CLOSING}(?:(?:is[ \t]*)?[:：=→⇒|]>?|[—–-]+>?(?=[ \t])|$)",
        rf"(?:^|(?<=[.!?:;,])[ \t]){_MARKUP}{_SUBJECT}{_CLOSING}[ \t]{_IS}\b",
        r"\bfinal[ \t]+answer\b[*_ \t]*(?::|is\b:?)",
    )
]
# "The final answer is ..." what says something of an answer, and not what it is.
_REMARK = re.compile(
    r"\W*(?:correct|consistent|clear|reasonable|verified|confirmed|obtained|given|found|shown|written|expressed"
    r"|stated|supported|based|indeed|therefore|thus|not|also|what|as|in|of|at|below|above)\b",
    re.IGNORECASE,
)
_LONGEST = 2000  # characters: what is longer is not an answer
_EMPHASIS = " \t\n*_`\"'“”‘’«»"
_EMPHASISED = re.compile(r"(\*\*|__|`+)(?=\S)(.+?)(?<=\S)\1")
_TO_VALUE = re.compile(r"(?:[ \t*_}]|</\w{1,6}>)*(?:\n(?:[\s>*_#]|[-•+](?=[ \t])|-{3,}|={3,})*)?")
_DISPLAYS = [
    re.compile(pattern + r"(?P<rest>[^\n]*)", re.DOTALL)
    for pattern in (
        r"\$\$(?P<inside>.+?)\$\$",
        r"\$[ \t]*\n(?P<inside>[^$]+)\$",
        r"\\\[(?P<inside>.+?)\\\]",
        r"\\\([ \t]*\n(?P<inside>.+?)\\\)",
        r"(?P<inside>\\begin\{(?P<name>\w+\*?)\}.+?\\end\{(?P=name)\})",
        r"(?P<fence>`{3,}|~{3,})[^\n`]*\n(?P<inside>.+?)\n[ \t]*(?P=fence)",
    )
]
_GOES_ON = re.compile(r"(?::|\b(?:is|are|by)|=)[ \t]*$")
_PAIRS = [(r"\\\[", r"\\\]"), (r"\\\(", r"\\\)"), (r"(?<!\\)\{", r"(?<!\\)\}"), (r"[(\[]", r"[)\]]")]
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:correct\s+|final\s+)?(?:answer|result|value|solution)\s*"
    r"(?:is|are|:|=)\s*:?\s*",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"(?<!\\)\$[^$]+\$|\\\(.+?\\\)")
# Another sentence, or why it is so.
_MORE = re.compile(
    r"(?:(?<=[\d$})\]%*`\"'”])|(?<=\b[A-Za-z])|(?<=[a-z]{4}))(?:\.\s+(?=[A-Z])|,?\s+(?:which|because|since)\s).*",
    re.DOTALL,
)


class _Box(NamedTuple):
    start: int
    end: int
    inside: str


def boxed(text: str) -> str | None:
    """The inside of the last balanced `\\boxed{...}`, with or without its backslash; None if there is none.

    Of nested boxes the outer one counts; a box that holds nothing but a box is unwrapped.
    """
    found = _boxes(text)
    return found[-1].inside if found else None


def extracted(text: str) -> str | None:
    """The stated answer in an answer text: its last box or list of boxes, else what it calls its final answer."""
    return next(stated(text), None)


def stated(text: str) -> Iterator[str]:
    """The stated answers in an answer text, at most two: the last box or list of boxes, and the final answer.

    Of final answers the last counts of those in the best form.
    """
    text = text.replace("\r\n", "\n")
    if boxes := _boxes(text):
        yield _last_list(text, boxes)
    for pattern in _FINAL_ANSWERS:
        for match in reversed(list(pattern.finditer(text))):
            remark = pattern is not _FINAL_ANSWERS[0] and _REMARK.match(text, match.end())
            if not remark and (value := _value(text[match.end() :][:_LONGEST])):
                yield value
                return


def _boxes(text: str) -> list[_Box]:
    """The outermost balanced boxes."""
    closing: dict[int, int] = {}  # `\{` and `\}` open and close nothing
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    boxes, start = [], 0
    while match := _BOX.search(text, start):
        start = match.end()
        if start in closing:
            inside = text[match.end() : closing[start]].strip()
            start = closing[start] + 1
            boxes.append(_Box(match.start(), start, _unwrapped(inside)))
    return boxes


def _unwrapped(inside: str) -> str:
    if not _BOX.match(inside):
        return inside
    boxes = _boxes(inside)
    return boxes[0].inside if len(boxes) == 1 and boxes[0][:2] == (0, len(inside)) else inside


def _last_list(text: str, boxes: list[_Box]) -> str:
    """The last box, and those before it as far as only commas and the like stand between them."""
    parts = [boxes[-1].inside]
    for n in reversed(range(len(boxes) - 1)):
        between = text[boxes[n].end : boxes[n + 1].start]
        if _BETWEEN_BOXES.sub("", between) or not _SEPARATES.search(between):
            break
        parts.append(boxes[n].inside)
    return ", ".join(dict.fromkeys(reversed(parts)))


def _value(text: str) -> str:
    """The value at the beginning of `text`, without what wraps it."""
    value = _line_or_display(text)
    if lead := _LEAD.match(value):
        value = value[lead.end() :]
    value = _MORE.sub("", _EMPHASISED.sub(r"\2", value)).strip(_EMPHASIS)
    formulas = list(_FORMULA.finditer(value))
    if len(formulas) == 1:  # "the value is $5$ dollars"
        value = value[formulas[0].start() :]
    value = re.sub(r"^<\w{1,6}>|</\w{1,6}>$|\s\|$", "", value)  # of HTML, of a table
    for opening, closing in _PAIRS:
        ends = re.search(rf"(?:{closing})\.?$", value)
        if ends and len(re.findall(closing, value)) > len(re.findall(opening, value)):
            value = value[: ends.start()]
    return value.removesuffix(".").strip(_EMPHASIS)


def _line_or_display(text: str) -> str:
    text = text[_match_end(_TO_VALUE, text) :]
    for display in _DISPLAYS:
        if match := display.match(text):
            return " ".join(match["inside"].split()) + " " + match["rest"].lstrip("*_ ")
    line, _, after = text.partition("\n")
    return _line_or_display(after) if _GOES_ON.search(line) and after.strip() else line


def _match_end(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.match(text)
    return match.end() if match else 0
