"""Reading of stated answers: mathematics in one spelling, a number, an integer, a choice.

One reader for all: what `integer` reads in an answer, the comparison of values (`rpsa.answers.equality`) reads too.
"""

import re
import unicodedata
from fractions import Fraction

_LONGEST = 2000
"""Characters. Nothing longer is an answer, and it is left as it is."""

_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_PLAIN_DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–‐﹣", "-"), **dict.fromkeys("⁄∕÷", "/"), **dict.fromkeys("’′", "'"),
        "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "°": r"^\circ ", "∠": r"\angle ",
    }
)  # fmt: skip
_GROUP = r"\{" + r"(?:[^{}]|\{" * 4 + "[^{}]*" + r"\})*" * 4 + r"\}"  # braces in braces, up to five deep
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_BOLD = re.compile(r"\*\*(\S(?:.*?\S)?)\*\*")
_LAYOUT = re.compile(
    r"\\(?:display|text|script)style\b|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])(?:\.(?!\d))?|\\(?:text)?color\s*\{\w+\}|\\(?:begin|end)\s*\{(?:align|aligned"
    r"|equation|gather|gathered|split)\*?\}|\\phantom\{[^{}]*\}|(?<!\\)\\[()\[\]]|\\?\$|[€£¥₹¢]"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:!> ]|\\q?quad\b|\\hspace\{[^{}]*\}|~|\s+")
_THOUSANDS = re.compile(
    r"(?<![\d.,\w])[1-9]\d{0,2}(?:(?:\{,\}|\\text\{,\}|,\\!\s*|\\[,!;: ]|[,'~ ])\d{3})+(?![\d'])(?! ?/)"
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)\b)|\\(?:text)?degree\b|\\?%")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|rm|it|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|[mh]box|boldsymbol|bm|emph|underline)\s*"
    rf"({_GROUP})|\{{\\(?:rm|bf|it)\b([^{{}}]*)\}}"
)

# The last word, in a wrapper or not, with what joins it to what stands before, and its power.
_LAST_WORD = re.compile(
    rf"(?P<join>\s*(?:/|\\cdot|\\times)\s*|\s+|(?<=\d)|(?=\\))(?:{_WRAPPER.pattern}|(?P<word>[A-Za-zμ'-]+)"
    r"|\((?P<aside>[A-Za-z ,'-]{2,})\))(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?[\s.,]*$"
)
_FIRST_WORDS = re.compile(r"(?:[A-Za-z'-]{2,}(?:\.(?=\s)|[\s,:])+(?:[aI] )?)+(?=[-+.\\\d(])")
_ONE_UNIT = (
    r"(?:units?|dollars?|cents?|degrees?|radians?|square|cubic|feet|foot|[kcdmnμ]?m|in|inch(?:es)?|ft|yd|mi|mph|[km]?g|lbs?|sq|cu"
    r"|oz|m?[lL]|secs?|mins?|hrs?|USD|EUR|[kM]?(?:Hz|N|J|W|V|Pa)|[shACFK])(?:\^\{?-?\d\}?)?"
)
_UNIT = re.compile(rf"/?{_ONE_UNIT}(?:/{_ONE_UNIT})*")
_FRACTION_OF_UNITS = re.compile(
    r"(?<=\S)\s*\\frac\s*"
    + r"\{\s*\\(?:text|mathrm|mbox)\s*\{[A-Za-z ]*\}\s*(?:\^\s*\{?-?\d\}?\s*)?\}\s*" * 2
    + r"$"
)
# Words that make another answer of a number, after it or before it.
_NO_UNIT = re.compile(
    r"\b(?:and|or|not|no|least|most|all|real|base|mod|pi|inf|infinity|sin|cos|tan|cot|log|ln|exp|sqrt)\b",
    re.IGNORECASE,
)
_NO_LEAD = re.compile(
    rf"{_NO_UNIT.pattern}|\b(?:more|less|fewer|than|over|under|between|except|sec|csc|arc\w+|max|min|gcd|lcm"
    r"|det)\b",
    re.IGNORECASE,
)
_SMALL_WORDS = {"am", "as", "at", "by", "he", "in", "is", "it", "of", "on", "pm", "to", "we"}
_MATHEMATICS = re.compile(r"[\d+*/^=]|\\[A-Za-z]|(?<=[\w)}])\s*-\s*(?=[\w(\\])")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_AND = re.compile(r"\s*,?\s*(?<![A-Za-z\\])(and|or)(?![A-Za-z])\s*")
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq?|lt|gt|leqslant|geqslant)(?![A-Za-z])")
_MIXED = re.compile(r"(?<![\w.^/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w/])")
_ONE_SPELLING = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(leq|geq|neq)(?![A-Za-z])", lambda m: "\\" + m[1][:2]),
        (r"\\(le|ge)qslant", r"\\\1"),
        (r"\\frac\s*(\d|[A-Za-z])", r"\\frac{\1}"),
        (rf"\\frac\s*({_GROUP})\s*(\d|[A-Za-z])", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\d|[A-Za-z])", r"\\sqrt{\1}"),
        (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
        (r"(?<![\w\^}])\{\s*(-?[\d.]+)\s*\}", r"\1"),
        (r"\^(\d{2,})", r"^{\1}"),
        (r"\\log_(\w) ", r"\\log_{\1}"),
        (r"^(?:=|\\approx|\\sim|\+)\s*", ""),
    )
]

_DIGITS = r"(?:\d{1,1000}(?:\.\d{0,1000})?|\.\d{1,1000})"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>\d{{1,1000}})?\\frac\{{(?P<top>-?{_DIGITS})\}}\{{(?P<bottom>-?{_DIGITS})\}}"
    rf"|(?P<over>{_DIGITS})/(?P<under>{_DIGITS})|(?P<decimal>{_DIGITS}))"
    r"(?:(?:(?:\\times|\\cdot|\*)10\^\{?|[eE])(?P<power>[-+]?\d{1,3})\}?)?"
)
_WRITTEN_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d{1,1000})(?:\.\d+)?")
_LETTER = re.compile(
    r"(?:(?:the )?(?:correct |right |best )?(?:answer|option|choice)(?: is)?:? )?(?:option |choice )?"
    r"(?:[(\[{](?P<closed>[A-D])[)\]}]|(?P<open>[A-D])(?=$|[).:,;—–-]| (?:is|because|since|[(\[—–-])))(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_SECOND_LETTER = re.compile(
    r"\W*?(?:[,/&+]\s*(?:and |or )?|(?:and|or) (?:\w+ ){0,2}?)(?:[A-D](?![A-Za-z])|[(\[][A-Da-d][)\]])"
)


def canonical(text: str) -> str:
    """A stated answer in one spelling: LaTeX without layout, units, thousands separators and words around it.

    Two answers of the same spelling are the same answer; what differs may be the same yet.
    """
    if len(text) > _LONGEST:
        return " ".join(text.split())
    text = _without_words(_unwrapped(_without_words(_ungrouped(_unlaid(text)))))
    text = _AND.sub(lambda m: rf"\l{m[1]} " if _RELATION.search(text) else ",", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    for pattern, spelling in _ONE_SPELLING:
        text = pattern.sub(spelling, text)
    # a space is left where it parts two numbers, or a command from a letter
    text = re.sub(r"(?<=\d) (?=\d)|(\\[A-Za-z]+) (?=[A-Za-z])", lambda m: (m[1] or "") + "\0", text)
    return _ungrouped(text.replace(" ", "").replace("\0", " ").rstrip(".,"))


def named(text: str) -> str:
    """A canonical answer without the name that it gives to its value: `m+n=204`, `f(2)=5`, `x\\in(0,1)`, `\\{x:x>3\\}`.

    An equation keeps its left side: letters with numbers (other than powers) say more than what something is called.
    """
    if match := re.match(r"[A-Za-z]\s?\\in(?![A-Za-z])", text):
        return text[match.end() :].strip()
    if match := re.fullmatch(r"\\\{[A-Za-z](?:\s?\\in\s?\\mathbb\{R\})?(?::|\||\\mid\s?)(.+)\\\}", text):
        return match[1]
    left, equals, right = _last_equals(text)
    bare = re.sub(rf"[_^](?:{_GROUP}|\w)|(?<=[A-Za-z])\([^()]*\)|\\[A-Za-z]+", "", left)
    if (
        equals
        and not (re.search(r"\d", bare) and re.search(r"[A-Za-z]", bare))
        and not _RELATION.search(left)
    ):
        return right
    return text


def number(text: str) -> Fraction | None:
    """The value of a canonical answer that is a number written out: 5, 2.50, 3/4, `2\\frac{1}{2}`, `3\\times10^5`."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    top = match["top"] or match["over"] or match["decimal"]
    bottom = Fraction(match["bottom"] or match["under"] or 1)
    if not bottom:
        return None
    value = int(match["whole"] or 0) + Fraction(top) / bottom
    return (-value if match["sign"] == "-" else value) * Fraction(10) ** int(match["power"] or 0)


def integer(text: str) -> int | None:
    """The integer that an extracted answer states (`025`, `1{,}024`, `m+n = 204`, `42 \\text{ minutes}`).

    A fraction or a root states none, whatever its value.
    """
    stated = named(canonical(text))
    value = None if "frac" in stated or "/" in stated else number(stated)
    return int(value) if value is not None and value.denominator == 1 else None


def last_number(text: str) -> str | None:
    """The last number in a text, if it is an integer: of `2 + 3 = 5 apples.` 5, of `about 2.5` none."""
    found = _WRITTEN_NUMBER.findall(text)
    value = integer(found[-1]) if found else None
    return None if value is None else str(value)


def rounding(text: str) -> Fraction | None:
    """Half a unit in the last place of a decimal that is long enough to stand for another number: six places and six
    digits at least. None for any other text."""
    match = re.fullmatch(r"-?(\d{0,1000})\.(\d{6,1000})", text)
    if match is None or len((match[1] + match[2]).lstrip("0")) < 6:
        return None
    return Fraction(1, 2 * 10 ** len(match[2]))


def letter(text: str) -> str | None:
    """The choice A to D that an extracted answer states (`B`, `(B)`, `\\text{B}`, `B. because`); one, not several."""
    match = _LETTER.fullmatch(" ".join(_unwrapped(_unlaid(text[:_LONGEST])).split()).strip(" ."))
    if match is None or _SECOND_LETTER.match(match["rest"]):
        return None
    return (match["closed"] or match["open"]).upper()


def _unlaid(text: str) -> str:
    """LaTeX in ASCII, without what only says how it looks."""
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m[0].translate(_PLAIN_DIGITS) + "}", text)
    text = re.sub("(?<=[0-9])(?=[¼½¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    text = _ROOT.sub(r"\\sqrt{\1\2}", text)
    text = _LAYOUT.sub(" ", _BOLD.sub(r"\1", text).replace("**", "^"))
    if "matrix" not in text:
        text = re.sub(r"(?<!\\)&|\\\\", " ", text)
    text = _THOUSANDS.sub(lambda m: m[0] if _in_brackets(text, m.start()) else re.sub(r"\D", "", m[0]), text)
    return _SPACE.sub(" ", _DEGREES.sub("", text)).strip().rstrip(" .")


def _in_brackets(text: str, position: int) -> bool:
    """There a comma parts the numbers of a point."""
    before = re.sub(r"\\frac", "", text[:position])
    return len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))


def _ungrouped(text: str) -> str:
    while re.fullmatch(rf"{_GROUP}|\([^(),]*\)", text):
        text = text[1:-1].strip()
    return text


def _unwrapped(text: str) -> str:
    previous = None
    while text != previous:
        previous, text = text, _WRAPPER.sub(lambda m: f" {_inside(m)} ", text)
    return " ".join(text.split())


def _inside(wrapper: re.Match[str]) -> str:
    """What a match of `_WRAPPER` wraps."""
    return wrapper[1][1:-1] if wrapper[1] else wrapper[2]


def _without_words(text: str) -> str:
    """A formula without the words that lead to it, and without its units; "million" becomes a factor."""
    if lead := _WRAPPER.match(text) or _FIRST_WORDS.match(text):
        words, formula = _unwrapped(lead[0]), text[lead.end() :].lstrip()
        leads = words.endswith(":") or (_MATHEMATICS.search(formula) and not _WRAPPER.match(formula))
        if leads and re.search("[A-Za-z]{2}", words) and not _NO_LEAD.search(words):
            text = formula
    text = _FRACTION_OF_UNITS.sub("", text)
    while (last := _LAST_WORD.search(text)) and _is_unit(text[: last.start()], last):
        text = text[: last.start()].rstrip()
        if scale := _SCALES.get(_word(last).partition(" ")[0]):
            text = rf"{text}\cdot10^{{{scale}}}"
    return text


def _word(last: re.Match[str]) -> str:
    return next((found for found in last.group(2, 3, "word", "aside") if found), "").strip("{} ")


def _is_unit(head: str, last: re.Match[str]) -> bool:
    word = _word(last)
    if not re.search(r"[\w)\]}!.,'](?<!\bor)(?<!\band)$", head.rstrip()) or _NO_UNIT.search(word):
        return False
    counts = bool(_MATHEMATICS.search(_unwrapped(head)))
    unit = bool(_UNIT.fullmatch(word))
    if last["word"] is None:
        return counts or unit
    if "/" in last["join"]:
        return counts
    if not last["join"]:
        return unit and len(word) > 1
    if unit and (len(word) > 1 or head.rstrip()[-1].isdigit()):
        return True
    return counts and (len(word) > 2 or word in _SMALL_WORDS)


def _last_equals(text: str) -> tuple[str, str, str]:
    """The text before and after its last equals sign outside of brackets."""
    depth = 0
    for i in reversed(range(len(text))):
        depth += {")": 1, "]": 1, "}": 1, "(": -1, "[": -1, "{": -1}.get(text[i], 0)
        if text[i] == "=" and depth == 0 and text[i - 1 : i] not in ("<", ">", "!", ":"):
            return text[:i], "=", text[i + 1 :]
    return "", "", text
