"""Answers as models write them."""

import itertools
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.real_format import MATH500, missing_real_data
from rpsa.answers import (
    boxed,
    code_block,
    defined_names,
    equality,
    extracted,
    final_answer,
    grade,
    integer,
    letter,
    same_value,
)
from rpsa.answers.reading import canonical


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 4</think>\n\n4.", "4."),
        ("a</think>b</think> c ", "c"),
        ("I think \\boxed{4}", None),
        ("", None),
        ("done</think>", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{42}", "42"),
        (r"boxed{204}", "204"),
        (r"\boxed {42}", "42"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{\frac{1}{2}} or \boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x + \boxed{2}}", r"x + \boxed{2}"),
        (r"\boxed{3} then cut: \boxed{\frac{1}{2", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("unboxed{3}", None),
        (r"\boxed 3", None),
        (r"\boxed{", None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("Final Answer: 42", "42"),
        ("**Final Answer:** 42.", "42"),
        ("**Final Answer**\n\n$\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("The final answer is: left", "left"),
        ("Final Answer: 1\nFinal Answer: 2", "2"),
        ("Final Answer: 1, that is \\boxed{3}", "3"),
        ("my final answer of all", None),
        ("42", None),
        ("Final Answer:\n$$\n\\frac12\n$$", "\\frac12"),
        ("Final Answer:\r\n\r\n$$\r\n42\r\n$$\r\n", "42"),
        ("**Final Answer**\n\n\\[\nx = 5\n\\]\n\nDone.", "x = 5"),
        ("Final Answer: $$42$$ dollars", "42 dollars"),
        ("Final Answer:\n\\begin{align*}\nx &= 5\n\\end{align*}", "\\begin{align*} x &= 5 \\end{align*}"),
        ("Final Answer: The roots are\n\\[ 1, 2 \\]", "1, 2"),
        ("Final Answer:\n```\n42\n```", "42"),
        ("Final Answer:\n- 42", "42"),
        ("Final Answer:\n\n* **42**", "42"),
        ("Final Answer:\n-42", "-42"),
        ("Final Answer: - 42", "- 42"),
        ("> Final Answer: 42", "42"),
        ("- **Final Answer:** 42", "42"),
        ("Final Answer: `42`", "42"),
        ("Final Answer: “42”.", "42"),
        ("Final Answer (in dollars): 42", "42"),
        ("**Final Answer** (in dollars): 42", "42"),
        ("The final answer in dollars is 42.", "42"),
        ("\\textbf{Final Answer:} 42", "42"),
        ("\\[\\text{Final Answer: } 42\\]", "42"),
        ("<b>Final Answer:</b> 42", "42"),
        ("(Final Answer: 42)", "42"),
        ("Final Answer = 42", "42"),
        ("Final Answer => 42", "42"),
        ("| Final Answer | 42 |", "42"),
        ("Final Answer: |x|", "|x|"),
        ("Final Answer\n------------\n42", "42"),
        ("Final Answer, in dollars: 42", "42"),
        ("Final Answer [in dollars]: 42", "42"),
        ("The final answer to this problem is 42.", "42"),
        ("The final answer comes out to 42.", "42"),
        ("Final Answer: The number of ways is **42**.", "The number of ways is 42"),
        ("final_answer = 12\nFinal Answer: 42", "42"),
        ("final_answer = 12", None),
        ("Final Answer – 42", "42"),
        ("FINAL ANSWER: 42", "42"),
        ("Final Answer: (2, 3]", "(2, 3]"),
        ("Final Answer: \\{1, 2\\}", "\\{1, 2\\}"),
        ("Final Answer: .5.", ".5"),
        ("Final Answer: The answer is 42.", "42"),
        ("Final Answer: The final answer is $42$. I hope it is correct.", "$42$"),
        ("Final Answer: The value we look for is $42$ dollars.", "$42$ dollars"),
        ("Final Answer: 42, which is even.", "42"),
        ("Final Answer: 42\n\nI hope this final answer is clear.", "42"),
        ("Final Answer: 42\n\nThe final answer is consistent with our estimate.", "42"),
        ("The final answer is 42. I am sure that the final answer is right.", "42"),
        ("The final answer is 12. No, the final answer is 42.", "42"),
        (
            "Final Answer: is is is is is is is is is is is is is is is is is is is is is is is is is is is is is",
            "is",
        ),
        ("the roots \\boxed{3}, \\boxed{5} and $\\boxed{7}$.", "3, 5, 7"),
        ("- \\boxed{3}\n- \\boxed{5}", "3, 5"),
        ("$x_1 = \\boxed{3}$ or $x_2 = \\boxed{5}$", "3, 5"),
        ("\\boxed{3}, that is, \\boxed{3}", "3"),
        ("\\boxed{3} or \\boxed{3}", "3"),
        ("First \\boxed{3}, so in all \\boxed{5}", "5"),
        ("\\boxed{3}\n\n\\boxed{5}", "5"),
        ("\\fbox{3}", "3"),
    ],
)
def test_extracted(text, stated):
    found = extracted(text)
    assert (found.split()[0] if stated == "is" else found) == stated


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("025", 25), ("204", 204), ("-3", -3), ("42.0", 42), ("1,024", 1024), ("1{,}024", 1024),
        (r"1,\!024", 1024),
        (r"m+n = \mathbf{204}", 204), (r"204 \text{ minutes}", 204), (r"$033$", 33), (r"90^\circ", 90),
        ("The answer is 7.", 7), (r"\(8\)", 8),
        (r"5 \text{ m/s}^2", 5), ("5 m/s", 5), ("5 cm^2", 5), ("5 m²", 5),
        (r"5\,\mathrm{m}\,\mathrm{s}^{-1}", 5), ("5km", 5),
        (r"5 \frac{\text{m}}{\text{s}^2}", 5), (r"\displaystyle 5", 5), ("{5}", 5), ("{{5}}", 5),
        (r"\left(5\right)", 5),
        ("- 5", -5), ("−5", -5), ("1 024", 1024), ("1\u202f024", 1024), ("1\u00a0024 euros", 1024),
        ("1'024", 1024),
        (r"11,\! 111,\! 111,\! 100", 11111111100), (r"\$1,234.00", 1234), ("US$ 18", 18), ("Rs. 18", 18),
        ("18 €", 18),
        ("Janet makes $18 every day at the farmers' market", 18), ("18 more apples", 18),
        ("18 (dollars)", 18), ("=18", 18),
        ("≈ 18", 18), ("5 million dollars", 5_000_000), (r"\text{Area} = 12\text{ cm}^2", 12),
        ("f(2) = 5", 5),
        (r"\angle ABC = 90^\circ", 90), ("18%", 18), ("42 (forty-two)", 42), ("9" * 5000, None),
        ("at least 5", None),
        ("5 or more", None), ("2xy", None), ("2 xy", None), ("5 apples and 6 pears", None),
        ("x^2 + 1 = 10", None),
        ("five", None), ("12 or 13", None), (r"\sqrt{16}", None), (r"\frac{408}{2}", None), ("5x", None),
        ("", None), ("2.5", None),
        ("1,2", None),
    ],
)  # fmt: skip
def test_integer(text, number):
    assert integer(text) == number


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"), ("(C)", "C"), (r"\text{B}", "B"), (r"\textbf{(D)}", "D"), ("b", "B"), ("A. The muon",
        "A"),
        ("**C**", "C"), ("The correct answer is (A) since", "A"), ("$D$", "D"), ("C)", "C"),
        ("[D]", "D"), ("Option (B)", "B"), ("D is correct", "D"), ("D - 3.4 eV", "D"), ("(B), not (A)", "B"),
        ("B: a particle", "B"), ("(B) because A is wrong", "B"), ("(A) or (B)", None), ("(A)/(B)", None),
        ("A, B", None),
        ("B or C", None), ("either A or B", None), ("(A) or possibly (B)", None), ("B) and C)", None),
        ("(a) or (b)", None),
        ("AB", None), ("A particle", None), ("E", None), ("A and B", None), ("Because", None), ("", None),
    ],
)  # fmt: skip
def test_letter(text, choice):
    assert letter(text) == choice


@pytest.mark.parametrize(
    ("response", "gold", "kind", "right"),
    [
        ("so \\boxed{204}</think>Final Answer: boxed{204}", "204", "integer", True),
        ("</think>Final Answer: \\boxed{025}", "25", "integer", True),
        ("so \\boxed{204}, wait", "204", "integer", False),
        ("so \\boxed{204}</think>I cannot help with that.", "204", "integer", False),
        ("</think>First \\boxed{1}, so \\boxed{2}", "1", "integer", False),
        ("</think>The answer is \\boxed{\\text{(B)}}", "B", "letter", True),
        ("</think>\\boxed{A}", "B", "letter", False),
        ("</think>It is \\boxed{3.4 \\text{ eV}}.\n\nFinal Answer: D", "D", "letter", True),
        ("</think>Final Answer: (D)\n\nIts energy is \\boxed{3.4}.", "D", "letter", True),
        ("</think>\\boxed{A}, \\boxed{B}", "B", "letter", False),
        ("</think>\\boxed{\\text{(A) or (B)}}", "A", "letter", False),
        ("</think>\\boxed{\\frac{408}{2}}\n\n**Final Answer:** 204", "204", "integer", True),
        ("</think>\\boxed{12} or \\boxed{13}", "13", "integer", False),
        ("</think>\\boxed{3}, \\boxed{5} and \\boxed{7}", "7, 5, 3", "math", True),
        ("</think>\\boxed{3}, \\boxed{5} and \\boxed{7}", "7", "math", False),
        ("</think>\\boxed{15\\frac{1}{2}}, or \\boxed{\\frac{31}{2}}", "15.5", "math", True),
        ("</think>Final Answer:\n$$\nx = \\frac{1}{2}\n$$", "0.5", "math", True),
        ("</think>\\boxed{\\dfrac{1}{2}}", "\\frac12", "math", True),
        ("</think>\\boxed{0.5}", "\\frac{1}{2}", "math", True),
        ("</think>\\boxed{x=5}", "5", "math", True),
        ("</think>\\boxed{(3, \\pi/2)}", "\\left( 3, \\frac{\\pi}{2} \\right)", "math", True),
        ("</think>\\boxed{p-q}", "p - q", "math", True),
        ("</think>\\boxed{q-p}", "p - q", "math", False),
        ("</think>\\boxed{Evelyn}", "\\text{Evelyn}", "math", True),
        ("</think>\\boxed{Carla}", "\\text{Evelyn}", "math", False),
        ("</think>\\boxed{10\\%}", "10", "math", True),
        ("</think>\\boxed{\\{2, 1\\}}", "\\{1,2\\}", "math", True),
        ("</think>\\boxed{}", "5", "math", False),
        ("</think>\\boxed{\\frac{}{", "5", "math", False),
        ("</think>5", "5", "math", False),
        ("plan </think> \\boxed{ 7 }", "7", "exact", True),
        ("plan </think> left  right", "left right", "exact", True),
        ("plan </think> left", "right", "exact", False),
        ("left", "left", "exact", False),
        ("</think>Ben has 2 + 3 = 5 apples.", "5", "number", True),
        ("</think>Ben has 2 + 3 = 5 of 8.", "5", "number", False),
        ("</think>1,204 of them", "1204", "number", True),
        ("</think>about 5.0 or 7.5", "7", "number", False),
        ("</think>It is -4", "-4", "number", True),
        ("</think>10-4=6, so a4 and 6", "6", "number", True),
        ("</think>\\boxed{5}, not 6", "5", "number", True),
        ("</think>The final answer is 5. There are 6 others.", "5", "number", True),
        ("</think>none", "5", "number", False),
        ("5 without an end of the thought", "5", "number", False),
    ],
)
def test_grade(response, gold, kind, right):
    assert grade(response, gold, kind) is right


EQUAL = [
    ("90°", r"90^\circ"), ("2 5/6", r"2\frac{5}{6}"), ("2½", r"\frac52"), ("137.5", r"137 \frac{1}{2}"),
    ("1e-3", "0.001"),
    ("x<3", r"(-\infty,3)"), (r"(-\infty, 3)", "x < 3"), (r"-2 \leq x \le 7", "[-2,7]"), ("-2 ≤ x ≤ 7",
    r"x \in [-2,7]"),
    (r"x<2 \text{ or } x>3", r"(-\infty, 2) \cup (3, \infty)"), (r"x>2 \text{ and } x<4", "(2,4)"),
    (r"x \ne 3", r"(-\infty,3) \cup (3,\infty)"), (r"(0,36) \setminus \{9\}", r"(0,9) \cup (9,36)"),
    ("3,5,7", "7, 5, 3"),
    ("7 and 5", "5, 7"), ("x=1 or x=-2", "1,-2"), (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"), ("1, 2",
    r"\{2, 1\}"),
    (r"1-\sqrt5, -2, 1+\sqrt5", r"\{1\pm\sqrt{5},-2\}"), ("0.333333", r"\frac13"), ("3.141593", r"\pi"),
    (r"\frac{1}{2^{99}}", "2^{-99}"), (r"6.72 \times 10^{-5}", ".0000672"), ("50%", r"\frac12"), (r"50\%",
    "50"),
    ("2516_{8}", "2516_8"), ("2516 (base 8)", "2516_8"), (r"2516_{\text{eight}}", "2516_8"), ("3√13",
    r"3\sqrt{13}"),
    (r"\begin{bmatrix}-\frac13\\ \frac23\end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"),
    ("(3,π/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("-5i+6", "6 - 5i"), (r"e^{i\pi}", "-1"), ("y - 2x = 3", "y = 2x + 3"), ("2x + 3", "y = 2x + 3"), ("5",
    "x=5"),
    ("10x - 14y + 8 = 0", "5x - 7y + 4 = 0"), ("2x + 2y < 6", "x + y < 3"), ("East", r"\text{east}"), ("C",
    r"\text{(C)}"),
    (r"\frac{\cos x}{\sin x}", r"\cot x"), ("ab+2a+5b+10", "(a+5)(b+2)"), (r"\sqrt2\sqrt3", r"\sqrt{6}"),
    ("10!", "3628800"),
    (r"\{x : x > 3\}", r"(3, \infty)"), (r"\{x \mid x > 3\}", r"(3, \infty)"), (r"\color{red}{-{5}}", "-5"),
    (r"12\;345", "12345"), ("2^10", "1024"), (r"\log_2 8", "3"), (r"864\text{ in}^2", r"864 \mbox{ inches}^2"),
    ("32348 dollars",
    r"\$32,\!348"),
    (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"), ("8π square units", r"8 \pi"), ("about 5 miles",
    "5"),
    (r"\boldsymbol{\frac{1}{2}}", "0.5"), (r"x = \frac{\mathbf{1}}{\mathbf{2}}", "0.5"),
    (r"\left. \frac12 \right.", "0.5"), (r"\text{Answer: } x - 1",
    "x-1"),
]  # fmt: skip
DIFFERENT = [
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2004!}", "0"),
    (r"\frac{x}{2^{99}}", r"\frac{x}{2^{98}}"), (r"e^{\pi\sqrt{163}}", "262537412640768744"), ("10^{100}+1",
    "10^{100}"),
    ("2516_8", "2516_9"), ("40", "40_9"), ("40_9", "40"), ("-2,1", "(-2,1)"), ("(1,-2)", "1,-2"), ("1,2,3",
    "(1,2,3)"),
    ("[2,4]", "(2,4)"), ("x<3", r"(-\infty,3]"), ("x>3", r"(-\infty,3)"), ("(6,31)", "(6,31,-1)"),
    ("5 and 7", "5"),
    ("5,5,6", "5"), ("3.14159", r"\pi"), ("0.33", r"\frac13"), ("0.0000003", "0.0000004"), ("1000000.5",
    "1000000"),
    ("6+5i", "6-5i"), ("0", "5x - 7y + 11z + 4 = 0"), ("5 3", "8"), ("seat", "east"), ("x is odd",
    "x is even"),
    ("even function", "odd function"), ("2 million", "2"), ("more than 5", "5"), ("not 5", "5"), ("2k", "2"),
    ("2 k", "2"),
    ("3R^2", "3"), ("x^2=9", "3"), (r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\begin{pmatrix}2\\1\end{pmatrix}"), ("", "5"),
    (r"\frac{}{", "5"), ("garbage 5 x", "5"), ("five", "5"), ("1/2004", "0"), (r"\frac{5}{0}", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("stated", "gold"), EQUAL)
def test_the_same_value_written_otherwise(stated, gold):
    assert same_value(stated, gold)


@pytest.mark.parametrize(("stated", "gold"), DIFFERENT)
def test_another_value(stated, gold):
    assert not same_value(stated, gold)


PIECES = [
    "\\text{",
    "\\frac",
    "\\left",
    "\\boxed{",
    "Final Answer: ",
    "is ",
    "m/s",
    *"\\{}()[]$^_&=,.;:*/'\"`<>-+\n%°½²√∪015axI ",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_can_be_read(text):
    extracted(text)
    letter(text)
    integer(text)
    canonical(text)


def test_math_is_graded_outside_of_the_main_thread_too():
    with ThreadPoolExecutor(4) as pool:
        graded = pool.map(
            grade, ["</think>\\boxed{\\sqrt{8}}"] * 8, ["2\\sqrt2", "\\sqrt7"] * 4, ["math"] * 8
        )
        assert list(graded) == [True, False] * 4


@pytest.mark.parametrize(
    "tower", ["9^{9^{9^{9}}}", pytest.param("10^{10^{10}}", marks=pytest.mark.integration)]
)
def test_an_endless_power_hangs_nobody_in_any_thread(tower, monkeypatch, caplog):
    monkeypatch.setattr(equality, "CPU_SECONDS", 1)
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        assert not pool.submit(grade, f"</think>\\boxed{{{tower}}}", "5", "math").result()
    assert "could not be compared" in caplog.text
    assert same_value(r"\sqrt{8}", r"2\sqrt{2}")


def test_a_comparison_that_is_interrupted_does_not_answer_the_next(monkeypatch):
    assert same_value(r"\sqrt{8}", r"2\sqrt{2}")

    class Interrupted:
        """The pipe to the process, with somebody who presses Ctrl-C while it computes."""

        def __init__(self, pipe):
            self.readline, self.write = self.interrupt, pipe.write

        def interrupt(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(equality._process, "stdout", Interrupted(equality._process.stdout))
    with pytest.raises(KeyboardInterrupt):
        same_value(r"\sqrt{12}", r"2\sqrt{3}")
    assert not same_value(r"\sqrt{8}", r"2\sqrt{3}")


def test_a_forked_process_compares_by_itself():
    assert same_value(r"\sqrt{8}", r"2\sqrt{2}")
    child = os.fork()
    if child == 0:
        os._exit(0 if same_value(r"\sqrt{12}", r"2\sqrt{3}") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not same_value(r"\sqrt{8}", r"2\sqrt{3}")


BOX = "\\boxed{"
STYLES = [
    BOX + "GOLD}", "$" + BOX + "GOLD}$", "\\[\n" + BOX + "GOLD}\n\\]",
    "**Final Answer:** $" + BOX + "GOLD}$.", BOX + "\\displaystyle GOLD}",
    BOX + "{GOLD}}", BOX + "\\mathbf{GOLD}}", BOX + "x = GOLD}", BOX + "GOLD \\text{ units}}",
    BOX + "GOLD\\text{ cm}^2}",
    BOX + "GOLD \\text{ m/s}}", BOX + "GOLD.}", BOX + "\\$GOLD}", BOX + "\\text{Answer: } GOLD}",
    "Final Answer: GOLD",
    "Final Answer: $GOLD$.", "Final Answer: \\(GOLD\\)", "Final Answer: \\[GOLD\\]", "Final Answer: $$GOLD$$",
    "Final Answer:\n$$\nGOLD\n$$", "Final Answer:\n\\[\nGOLD\n\\]",
    "**Final Answer**\r\n\r\n$$\r\nGOLD\r\n$$\r\n",
    "### Final Answer\n\nGOLD", "**Final Answer:**\n\n**GOLD**", "**Final Answer: $GOLD$**",
    "Final Answer: `GOLD`",
    'Final Answer: "GOLD"', "Final Answer:\n- $GOLD$", "Final Answer:\n\n* GOLD",
    "> **Final Answer:** $GOLD$",
    "Final Answer (in dollars): GOLD", "The final answer is $GOLD$.", "Final Answer: GOLD units",
    "Final Answer: $GOLD$ square feet",
    "Final Answer: $x = GOLD$", "Final Answer:\n$$\nx = GOLD\n$$",
    "Final Answer:\n\\begin{align*}\nx &= GOLD\n\\end{align*}",
    "Final Answer: The value we look for is $GOLD$.",
    "Final Answer: $GOLD$\n\nI am sure that the final answer is right.",
]  # fmt: skip


@pytest.fixture(scope="module")
def math500() -> list[dict[str, str]]:
    if reason := missing_real_data():
        pytest.skip(reason)
    return [json.loads(line) for line in MATH500.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("style", STYLES)
def test_the_real_answers_in_every_style(style, math500):
    golds = [row["answer"] for row in math500]
    missed = [gold for gold in golds if not grade("</think>" + style.replace("GOLD", gold), gold, "math")]
    assert len(missed) <= 1, missed


def test_math_on_the_real_solutions(math500):
    assert all(grade("...</think>" + row["solution"], row["answer"], "math") for row in math500)


def alike(a: str, b: str) -> bool:
    """Whether two real answers are the same, spelled out for those that are: a reading of one's own."""
    plain = [
        re.sub(
            r"\\!|\\,|\\\$|[\s,$]|\^\\circ|\\mbox\{.*?\}(?:\^2)?|\\text\{ ?(?:cents|degrees)\}|^[xy]=",
            "",
            side,
        )
        for side in (a, b)
    ]
    same = [re.sub(r"\\d?frac(\d)(\d)", r"\\frac{\1}{\2}", side) for side in plain]
    return same[0] == same[1] or sorted(a.split(",")) == sorted(b.split(","))


@pytest.mark.slow
def test_no_real_answer_is_taken_for_another(math500):
    golds = dict.fromkeys(row["answer"] for row in math500)
    confused = [(a, b) for a, b in itertools.permutations(golds, 2) if same_value(a, b) and not alike(a, b)]
    assert confused == []


def test_few_real_answers_are_taken_for_the_next(math500):
    golds = list(dict.fromkeys(row["answer"] for row in math500))
    assert not [(a, b) for a, b in itertools.pairwise(golds) if same_value(a, b) and not alike(a, b)]


UNITS = (
    "dollars", "dollars per day", "miles per hour", "km/h", "m/s", "m/s^2", "cm^2", "m³", "square feet",
    "sq ft", "cubic inches",
    "apples", "more apples", "pieces of fruit", "students in total", "years old", "minutes", "min", "hours",
    "hrs", "kg", "lbs.",
    "%", "percent", "degrees", "°C", "cups of flour", "times as many", "toys per child", "toys/child",
    "euros (EUR)",
)  # fmt: skip


def test_numbers_with_units_in_both_scorers():
    numbers = ["18", "3", "70,000", "1 450", "-4"]
    missed = [
        (number, unit)
        for number, unit in itertools.product(numbers, UNITS)
        for text in [f"</think>Final Answer: {number} {unit}"]
        for gold in [number.replace(",", "").replace(" ", "")]
        if not (grade(text, gold, "integer") and grade(text, gold, "math"))
    ]
    assert missed == []


CODE = "Try:\n```python\ndef f(x):\n    return x\n```\nBetter:\n```python\ndef f(x):\n    return x + 1\n```\n"


@pytest.mark.parametrize(
    ("text", "entry_point", "code"),
    [
        (CODE, "f", "def f(x):\n    return x + 1\n"),
        (CODE + "Usage:\n```python\nprint(f(1))\n```\n", "f", "def f(x):\n    return x + 1\n"),
        (CODE + "```python\ndef f(x:\n```\n", "f", "def f(x):\n    return x + 1\n"),
        (CODE, "g", None),
        (CODE, None, "def f(x):\n    return x + 1\n"),
        ("```\ng = lambda x: x\n```", "g", "g = lambda x: x\n"),
        ("1. So:\n   ```py\n   def f():\n       pass\n   ```\n", "f", "def f():\n    pass\n"),
        ("```python\nclass S:\n    pass", "S", "class S:\n    pass"),
        ("```bash\nls\n```", None, None),
        ("def f(): pass", "f", None),
        ("> ```python\n> def f():\n>     pass\n> ```", "f", "def f():\n    pass\n"),
        ("- So:\n      ```python\n      def f():\n          pass\n      ```", "f", "def f():\n    pass\n"),
        ("<details>\n```python\ndef f():\n    pass\n```\n</details>", "f", "def f():\n    pass\n"),
        ("```python\ndef f():\n    pass\n\nUse it:\n\n```python\nprint(f())\n```\n", "f", None),
        (
            "```python\ndef f(x):\n    return x\n```\n```python\nif __name__ == '__main__':\n    f = f(1)\n```",
            "f",
            "def f(x):\n    return x\n",
        ),
    ],
)
def test_code_block(text, entry_point, code):
    assert code_block(text, entry_point) == code


BODY = "def f(x):\n    return x + 1"
DOCUMENTED = 'def f(x):\n    """Adds.\n\n    ```python\n    f(1)\n    ```\n    """\n    return x + 1'
FLUSH = '"""Adds.\n\n```python\nf(1)\n```\n"""\ndef f(x):\n    return x + 1'


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *[(f"So:\n\n```{info}\n{BODY}\n```\nDone.", BODY) for info in (
            "Python", "PYTHON", "py3", "python3.11", "ipython", '{.python .numberLines startFrom="1"}',
            'python title="f.py"',
            "python:f.py", " python ", "text", "py linenums=1",
        )],
        (f"So:\r\n\r\n```python\r\n{BODY}\r\n```\r\nDone.".replace("x):\n", "x):\r\n"), BODY),
        (f"So:\n````python\n{BODY}\n````\nDone.", BODY),
        (f"So:\n~~~python\n{BODY}\n~~~\nDone.", BODY),
        (f"So:\n```python\n{DOCUMENTED}\n```\nDone.", DOCUMENTED),
        (f"So:\n```python\n{FLUSH}\n```\nDone.", FLUSH),
        (f"So:\n```python\n{BODY}```\nDone.", BODY),
        (f"So:\n```python\n{BODY}``` That is all.", BODY),
        (f"So: ```python\n{BODY}\n```\nDone.", BODY),
        ("So: ```python f = lambda x: x + 1```.", "f = lambda x: x + 1"),
        ("So: ```f = lambda x: x + 1```.", "f = lambda x: x + 1"),
    ],
)  # fmt: skip
def test_the_fences_that_models_write(text, code):
    found = code_block(text, "f")
    assert found is not None
    assert found.strip() == code


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("if x:\n    def f(): pass\nelse:\n    g = 1", {"f", "g"}), ("from math import gcd as f", {"f"}),
        ("import a.b", {"a"}),
        ("f: int = 3", {"f"}), ("f: int", set()),
        ("try:\n    import f\nexcept ImportError:\n    f = None", {"f"}),
        ("f, (g, *h) = 1, (2, 3)", {"f", "g", "h"}), ("with a as f: pass", {"f"}),
        ("for f in x: pass", {"f"}),
        ("(f := 3)", {"f"}), ("def g():\n    f = 1", {"g"}), ("[f for f in x]", set()),
        ("class f:\n    g = 1", {"f"}),
        ("if __name__ == '__main__':\n    f = 1", set()),
        ("if '__main__' == __name__:\n    f = 1\nelse:\n    g = 2", {"g"}),
        ("return 3", set()), ("def f(:", set()), ("f = '\\d'", {"f"}), ("-" * 100_000 + "1", set()),
        ("(" * 500, set()),
    ],
)  # fmt: skip
def test_names_that_a_program_binds(code, names):
    assert defined_names(code) == names
