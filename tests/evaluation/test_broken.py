"""Broken responses: every kind of loop is found, and none in ordinary long texts; one class a response."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.examples import examples
from helpers.paths import ROOT
from rpsa.evaluation import broken
from rpsa.evaluation.broken import (
    LEAST_COVERED,
    LONGEST_UNIT,
    REPETITIONS,
    _repeats,
    broken_class,
    is_no_text,
    loop_at_the_end,
    loop_in,
)
from rpsa.thought import NO_THOUGHT, THINK

PARAGRAPH = (
    "Wait, let me check this once more. If x is even then x + 2 is even too, so the sum cannot be odd. "
    "Hence both of the terms have to be divisible by four, and we are back at the first equation.\n\n"
)
CIRCLES = [
    "But wait, I should consider whether this is right.",
    "Let me look at the second equation once again.",
    "No, that does not give us the value of x.",
    "So we go back to where we came from before.",
]


def prose(sentences: int, seed: int = 0) -> str:
    """Maths as a model thinks it: the same turns of phrase again and again, with other numbers."""
    rng = random.Random(seed)
    forms = [
        "Let me try n = {}.",
        "Then n^2 + 1 = {}, which is not divisible by {}.",
        "So that does not work.",
        "Wait, let me double-check that.",
        "Hmm, for n = {} we get {} and that is odd.",
        "Okay, so the next case is {}.",
    ]
    return " ".join(
        rng.choice(forms).format(rng.randrange(10**5), rng.randrange(10**5)) for _ in range(sentences)
    )


TAIL = {
    "a character": "so it is " + "!" * 1200,
    "a word": prose(30) + " sorry" * 300,
    "two words": prose(30) + " the answer" * 120,
    "a sentence": prose(30) + " Let me check this again." * 60,
    "a paragraph": prose(30) + "\n" + PARAGRAPH * 6,
    "a long paragraph": prose(30) + "\n" + (PARAGRAPH + prose(25)) * 4,
    "cut within its unit": prose(30) + ("\n" + PARAGRAPH * 9)[:-55],
    "digits": "0." + "142857" * 300,
    "Chinese": "答案是四" * 300,
}
ORDINARY = {
    "maths": prose(2000),
    "a list": "\n".join(f"- item {i}: take it" for i in range(300)),
    "a table": "| a | b |\n|---|---|\n" + "".join(f"| {i} | {i % 2} |\n" for i in range(300)),
    "a wide table's rule": "Here:\n" + "| column " * 40 + "|\n" + "|---" * 40 + "|",
    "code with a repeated line": "```python\ndef f():\n" + "    print('hello')\n" * 12 + "    return 0\n```",
    "a long sum": "We add: " + " + ".join(str(7 * i % 101) for i in range(600)) + " = 30165",
    "a sum of ones": "We add: " + "1 + " * 400 + "1 = 401.",
    "a list of zeros": "```python\ngrid = [" + "0, " * 400 + "0]\n```",
    "a period": "1/7 = 0." + "142857" * 20 + "...",
    "a rule": prose(5) + "\n" + "-" * 120,
    "cases that fail": " ".join(f"Take {i}. That does not work, so we go on with it." for i in range(200)),
    "a chorus": "\n".join(
        ["We sing our song for you again tonight.", "La la la la la, la la la la la."] * 10
    ),
    "lines of code": "\n".join(f"assert solve({i}) == {i * i}" for i in range(100)),
}


@pytest.mark.parametrize("name", TAIL)
def test_a_repeated_tail_is_found(name: str) -> None:
    assert loop_at_the_end(TAIL[name]) == "repeated tail"
    assert loop_in(f"<think>\n{TAIL[name]}", "length") == "repeated tail"  # the thought's
    assert loop_in(f"<think>\nso\n</think>\n{TAIL[name]}", "length") == "repeated tail"  # the answer's
    assert broken_class(f"<think>\n{TAIL[name]}\n</think>\nIt is 4.", "stop") == "looping"


@pytest.mark.parametrize("seed", range(5))
def test_a_thought_in_circles_is_found(seed: int) -> None:
    rng = random.Random(seed)
    circles = " ".join(rng.choice(CIRCLES) for _ in range(60))
    assert loop_at_the_end(f"{prose(50)} {circles}") == "recurring sentences"
    assert broken_class(f"<think>\n{prose(50)} {circles}", "length") == "looping"
    assert loop_at_the_end(f"{prose(50)} {circles} {prose(30)}") is None  # it found its way out


@pytest.mark.parametrize("name", ORDINARY)
def test_none_is_found_in_ordinary_text(name: str) -> None:
    assert loop_at_the_end(ORDINARY[name]) is None
    assert broken_class(f"<think>\n{ORDINARY[name]}\n</think>\n\n{ORDINARY[name]}", "stop") is None


@pytest.mark.parametrize(("different", "found"), [(6, "recurring sentences"), (7, None)])
def test_circles_are_of_few_sentences_that_have_words(different: int, found: str | None) -> None:
    rng = random.Random(0)
    names = ["one", "two", "three", "four", "five", "six", "seven"][:different]
    order = [rng.choice(names) for _ in range(60)] + names

    def walk(form: str) -> str:
        return "\n".join(form.format(name) for name in order)

    assert loop_at_the_end(walk("So we look at case number {} again.")) == found
    assert loop_at_the_end(walk("| 0 | {} | 0 | 1 | 0 | 1 |")) is None


def test_a_thought_in_circles_is_found_in_chinese() -> None:
    rng = random.Random(0)
    forms = [
        "等一下，让我再检查一遍这个方程。",
        "所以这个结果是不正确的，需要重新计算。",
        "我们回到最开始的地方再看一次吧。",
    ]
    assert loop_at_the_end("".join(rng.choice(forms) for _ in range(60))) == "recurring sentences"


def test_a_shorter_tail_is_enough_where_the_token_limit_ended_the_text() -> None:
    text = f"{prose(5)} {'t3 ' * 40}"
    assert loop_at_the_end(text) is None
    assert loop_at_the_end(text, is_cut=True) == "repeated tail"
    assert broken_class(f"{text}</think> So it is 4", "length") == "truncated"  # that thought was not cut


@given(st.text("ab", max_size=60), st.integers(1, 40))
@examples(300)
def test_the_tail_against_a_slow_oracle(text: str, least: int) -> None:
    def covered(period: int) -> int:
        length = period
        while length < len(text) and text[-length - 1] == text[-length - 1 + period]:
            length += 1
        return length

    slow = any(
        covered(p) >= REPETITIONS * p and covered(p) >= least for p in range(1, len(text) // REPETITIONS + 1)
    )
    assert _repeats(text, least) == slow


def test_the_thresholds_are_what_they_say() -> None:
    line = "a line of text that is forty letters !!\n"  # 40 characters
    enough = LEAST_COVERED // 40
    assert loop_at_the_end("x" + line * (enough + 1)) == "repeated tail"
    assert loop_at_the_end("x" + line * (enough - 1)) is None
    rng = random.Random(0)
    unit = "".join(rng.choice("abcdefgh ") for _ in range(LONGEST_UNIT - 1)) + "z"
    assert loop_at_the_end("xy" + unit * REPETITIONS) == "repeated tail"
    assert loop_at_the_end("xy" + unit * (REPETITIONS - 1)) is None
    assert loop_at_the_end("xy" + (unit + "yy") * (REPETITIONS + 2)) is None


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("<think>so</think>It is 4.", "stop", None),
        ("<think>so it is 4", "stop", "truncated"),
        ("<think>so</think>It is", "length", "truncated"),
        ("<think>so</think>", "stop", "empty"),
        ("<think>so</think>", "length", "truncated"),
        ("<think>so</think>" + "#&%(!;~" * 5 + "?!$§(/&%$§" * 3 + "*+~#'_:;" * 4, "stop", "incoherent"),
        ("<think>" + "so " * 400, "stop", "looping"),
        ("<think>" + "so " * 400 + "</think>", "stop", "looping"),
    ],
)
def test_one_class_a_response(text: str, reason: str, expected: str | None) -> None:
    assert broken_class(text, reason, THINK) == expected


def test_a_model_without_thoughts_is_read_whole() -> None:
    assert broken_class("It is 4.", "stop", NO_THOUGHT) is None
    assert broken_class("", "stop", NO_THOUGHT) == "empty"
    assert broken_class(TAIL["a sentence"], "stop", NO_THOUGHT) == "looping"


def test_what_somebody_knows_better_counts() -> None:
    assert broken_class("<think>so</think>t3 m7 bread", "stop", THINK, True) == "incoherent"
    assert broken_class("<think>so</think>" + "#&%(!;~" * 20, "stop", THINK, False) != "incoherent"


SALAD = "the kommt это идет काम है και το good mais это काम και wie nicht это है το und काम это και "
NO_TEXT = {
    "symbols": "#&%(!;~ ?!$§(/&%$§ *+~#'_:; <>|{}[]= ^°~+*#-_.:,; @€µ?ß\\}][{ «»¿¡ …—– ‹›†‡ ¶§",
    "unreadable": "It is \ufffd\ufffd\ufffd 4 and \ufffd\ufffd so on",
    "control": "It is \x01\x02\x03 four",
    "scripts": SALAD * 3,
}
TEXT = {
    "LaTeX": r"\[ \boxed{\frac{1}{2}} \] \[ \left( \frac{(a+b)^{2}}{c_{1}} \right) = \sum_{i=0}^{n} x_i^{2} \]",
    "a bare box": r"\boxed{-\frac{1}{2}}",
    "a rule": "| a | b |\n|---|---|\n| 1 | 2 |",
    "code": "```\n" + "{}[]();" * 40 + "\n```",
    "an emoji": "Sure! 😀",
    "Japanese": "この問題では Python を使って答えを計算します。 " * 12,
    "Russian and English": "Функция print в Python выводит текст. " * 15,
    "Greek letters": r"Let α and β be angles, so that sin α = cos β and α + β = π / 2. " * 8,
    "Hindi": "यह एक सरल प्रश्न है और इसका उत्तर चार है। " * 12,
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_found(name: str) -> None:
    assert is_no_text(NO_TEXT[name])


@pytest.mark.parametrize("name", TEXT)
def test_text_is_text(name: str) -> None:
    assert not is_no_text(TEXT[name])


@pytest.mark.parametrize("text", [*TAIL.values(), *ORDINARY.values()])
def test_only_the_end_is_looked_at(text: str) -> None:
    whole = f"{prose(3000)}\n{text}"
    assert loop_at_the_end(whole) == loop_at_the_end(whole[-20_000:])


def test_the_documented_thresholds_are_those_of_the_code() -> None:
    page = " ".join((ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split())
    of = broken
    assert (
        f"at least {of.REPETITIONS} repetitions of a unit of at most {of.LONGEST_UNIT:,} characters, to the very end, "
        f"that cover at least {of.LEAST_COVERED:,} characters; at least {of.LEAST_COVERED_AT_THE_LIMIT} where"
    ) in page
    assert f"among the last {of.SENTENCES} sentences or lines at most {of.DISTINCT} different ones" in page
    assert f"at least {of.PROSE} of the {of.SENTENCES} have five words" in page
    assert f"at least {of.LEAST_SYMBOLS} characters outside of code blocks, more than two thirds" in page
    assert f"at least {of.LEAST_WORDS} words, and the script changes" in page
    assert f"among at least {of.SCRIPTS} scripts" in page
    assert re.findall(r"\| `(looping|truncated|empty|incoherent)` \|", page) == list(of.BROKEN)
