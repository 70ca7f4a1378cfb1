"""Extraction on responses as reasoning models write them: what is read as the answer, and how the rest is flagged."""

import pytest

from rpsa.evaluation.benchmarks import Item, Scorer
from rpsa.evaluation.sandbox import CodeProblem
from rpsa.evaluation.scores import Response

THOUGHT = (
    "Okay, so I need to find the total time. Let me set up equations. If s is the speed then 9/s + t/60 = 4, and "
    "9/(s+2) + t/60 = 2.4. Wait, maybe \\boxed{99}? No, let me double-check that.\n\nHmm, yes."
)
LONG = "Let me think about this again. " * 200
FENCE = "```"


def item(scorer: Scorer, answer: str = "", entry_point: str = "solve") -> Item:
    problem = CodeProblem("1", "a prompt", entry_point, test="", preamble="", reference=None)
    return Item("1", "set", "reasoning", "a prompt", answer, scorer, problem)


def read(asked: Item, text: str) -> Response:
    return Response(asked, 0, text, "stop")


def closed(answer: str, thought: str = THOUGHT) -> str:
    return f"{thought}\n</think>\n\n{answer}"


# (response, what is extracted, the gold answer, whether it counts as correct)
INTEGERS = {
    "box": (closed("The total is \\[\\boxed{204}\\]"), "204", "204", True),
    "final answer and box": (closed("**Final Answer:** \\boxed{204}."), "204", "204", True),
    "box without backslash": (closed("Final Answer: boxed{204}"), "204", "204", True),
    "box with a space": (closed("Final Answer: \\boxed { 204 }"), "204", "204", True),
    "zero-padded": (closed("Final Answer: \\boxed{025}"), "25", "25", True),
    "gold zero-padded": (closed("Final Answer: \\boxed{25}"), "25", "025", True),
    "zero itself": (closed("\\boxed{000}"), "0", "0", True),
    "negative": (closed("\\boxed{-7}"), "-7", "-7", True),
    "thousands with comma": (closed("\\boxed{1,024}"), "1024", "1024", True),
    "thousands in LaTeX": (closed("\\boxed{1{,}024}"), "1024", "1024", True),
    "thousands with thin space": (closed("\\boxed{1\\,024}"), "1024", "1024", True),
    "equation in the box": (closed("\\boxed{m+n=204}"), "204", "204", True),
    "words around it": (closed("\\boxed{204 \\text{ minutes}}"), "204", "204", True),
    "text in the box": (closed("\\boxed{\\text{204}}"), "204", "204", True),
    "bold in the box": (closed("\\boxed{\\mathbf{204}}"), "204", "204", True),
    "degrees": (closed("\\boxed{60^\\circ}"), "60", "60", True),
    "decimal zero": (closed("\\boxed{204.0}"), "204", "204", True),
    "dollar signs": (closed("Final Answer: $\\boxed{204}$"), "204", "204", True),
    "two boxes, the last counts": (closed("First \\boxed{113}, so in all \\boxed{371}."), "371", "371", True),
    "a box in a box": (closed("\\boxed{\\boxed{5}}"), "5", "5", True),
    "last box is cut off": (closed("\\boxed{104} and then \\boxed{20"), "104", "104", True),
    "no box, final answer": (closed("**Final Answer:** 204"), "204", "204", True),
    "no box, final answer on the next line": (closed("### Final Answer\n\n204"), "204", "204", True),
    "final answer is": (closed("The final answer is: 204."), "204", "204", True),
    "two final answers": (closed("Final Answer: 12\n\nCorrection. Final Answer: 204"), "204", "204", True),
    "final answer after a box": (closed("Final Answer: 7, that is \\boxed{204}"), "204", "204", True),
    "wrong number": (closed("\\boxed{205}"), "205", "204", False),
    "a fraction is no integer": (closed("\\boxed{\\frac{204}{2}}"), None, "102", False),
    "several numbers": (closed("\\boxed{204 or 205}"), None, "204", False),
    "answer in words only": (closed("So the walk takes two hundred and four minutes."), None, "204", False),
    "number in prose only": (closed("So the walk takes 204 minutes."), None, "204", False),
    "box in the thought only": (closed("I am not sure.", "It is \\boxed{204}."), None, "204", False),
    "unclosed thought with the right box": (f"{THOUGHT} So \\boxed{{204}}", None, "204", False),
    "unclosed and long": (LONG, None, "204", False),
    "nothing after the thought": (closed(""), None, "204", False),
    "two thoughts closed": ("a</think>\\boxed{1} wait</think>\n\\boxed{204}", "204", "204", True),
    "leading think tag": ("<think>\n" + closed("\\boxed{204}"), "204", "204", True),
    "no thought at all": ("\\boxed{204}", None, "204", False),
}
LETTERS = {
    "letter": (closed("Final Answer: \\boxed{B}"), "B", "B", True),
    "without backslash": (closed("Final Answer: boxed{B}"), "B", "B", True),
    "in parentheses": (closed("\\boxed{(C)}"), "C", "C", True),
    "as text": (closed("\\boxed{\\text{D}}"), "D", "D", True),
    "lower case": (closed("\\boxed{a}"), "A", "A", True),
    "with its reason": (closed("Final Answer: B. The rate doubles."), "B", "B", True),
    "with its content": (closed("Final Answer: (B) 3.4 eV"), "B", "B", True),
    "the answer is": (closed("Final Answer: The correct answer is (D)."), "D", "D", True),
    "bold": (closed("**Final Answer: B**"), "B", "B", True),
    "several letters": (closed("\\boxed{B, C}"), None, "B", False),
    "a letter that is no choice": (closed("\\boxed{E}"), None, "B", False),
    "a value in place of a letter": (closed("\\boxed{3.4}"), None, "B", False),
    "wrong letter": (closed("\\boxed{A}"), "A", "B", False),
}
MATHS = {
    "fraction": (closed("\\boxed{\\frac{3}{4}}"), "\\frac{3}{4}", "\\frac34", True),
    "decimal for a fraction": (closed("\\boxed{0.75}"), "0.75", "\\frac{3}{4}", True),
    "display fraction": (closed("\\boxed{\\dfrac{14}{3}}"), "\\dfrac{14}{3}", "\\frac{14}{3}", True),
    "nested roots": (
        closed("\\boxed{\\frac{1+\\sqrt{\\frac{5}{2}}}{2}}"),
        "\\frac{1+\\sqrt{\\frac{5}{2}}}{2}",
        "\\frac{1+\\sqrt{5/2}}{2}",
        True,
    ),
    "tuple": (
        closed("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}"),
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        True,
    ),
    "set in another order": (closed("\\boxed{\\{2, 1\\}}"), "\\{2, 1\\}", "\\{1, 2\\}", True),
    "interval": (closed("\\boxed{[-2,7]}"), "[-2,7]", "[-2,7]", True),
    "matrix": (
        closed("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}"),
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        True,
    ),
    "word": (closed("\\boxed{\\text{Evelyn}}"), "\\text{Evelyn}", "\\text{Evelyn}", True),
    "wrong value": (closed("\\boxed{\\frac{3}{5}}"), "\\frac{3}{5}", "\\frac34", False),
    "no box": (closed("It is three quarters."), None, "\\frac34", False),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    check("integer", *INTEGERS[name])


@pytest.mark.parametrize("name", LETTERS)
def test_letters(name: str) -> None:
    check("letter", *LETTERS[name])


@pytest.mark.parametrize("name", MATHS)
def test_values(name: str) -> None:
    check("math", *MATHS[name])


def check(scorer: Scorer, response: str, extracted: str | None, gold: str, correct: bool) -> None:
    asked = item(scorer, gold)
    reading = read(asked, response)
    assert reading.extracted == extracted
    assert reading.truncated == ("</think>" not in response)
    assert reading.empty == response.endswith("</think>\n\n")
    assert reading.unparsed == (extracted is None and not reading.truncated and not reading.empty)
    assert (read(asked, response).outcome == "correct") == correct


def fenced(code: str, language: str = "python") -> str:
    return f"{FENCE}{language}\n{code}\n{FENCE}"


SOLVE = "def solve(x):\n    return x + 1"
FIRST_TRY = fenced("def solve(x):\n    return x")
HELPER = fenced("def other(x):\n    return x")
PROGRAMS = {
    "one block": (closed(f"Here it is:\n\n{fenced(SOLVE)}\n\nIt adds one."), SOLVE),
    "the last of two": (closed(f"{FIRST_TRY}\nBetter:\n{fenced(SOLVE)}"), SOLVE),
    "example use after it": (closed(f"{fenced(SOLVE)}\nUse:\n{fenced('print(solve(1))')}"), SOLVE),
    "helper after it": (closed(f"{fenced(SOLVE)}\n{HELPER}"), SOLVE),
    "shell block after it": (closed(f"{fenced(SOLVE)}\nRun:\n{fenced('pip install numpy', 'bash')}"), SOLVE),
    "output block after it": (closed(f"{fenced(SOLVE)}\nOutput:\n{fenced('2', '')}"), SOLVE),
    "no language": (closed(fenced(SOLVE, "")), SOLVE),
    "py": (closed(fenced(SOLVE, "py")), SOLVE),
    "never closed": (closed(f"{FENCE}python\n{SOLVE}\n"), SOLVE),
    "cut in the middle": (
        closed(f"{fenced(SOLVE)}\nOr:\n{FENCE}python\ndef solve(x):\n    return (x"),
        SOLVE,
    ),
    "in a list": (
        closed(f"1. Do:\n\n   {FENCE}python\n   def solve(x):\n       return x + 1\n   {FENCE}"),
        SOLVE,
    ),
    "in the thought only": (closed("Done.", f"{THOUGHT}\n{fenced(SOLVE)}"), None),
    "unclosed thought": (f"{THOUGHT}\n{fenced(SOLVE)}", None),
    "another function": (closed(fenced("def answer(x):\n    return x")), None),
    "prose only": (closed("Return x plus one."), None),
    "does not parse": (closed(fenced("def solve(x) return x")), None),
    "lambda": (closed(fenced("solve = lambda x: x + 1")), "solve = lambda x: x + 1"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    response, code = PROGRAMS[name]
    reading = read(item("code"), response)
    assert (reading.extracted.strip() if reading.extracted else None) == code
    assert reading.truncated == ("</think>" not in response)


def test_a_refusal_is_told_apart_from_a_wrong_answer() -> None:
    assert read(item("integer", "5"), closed("I'm sorry, but I can't help with that.")).outcome == "refused"
    assert read(item("integer", "5"), closed("I cannot see why, but \\boxed{5}")).outcome == "correct"
    assert read(item("integer", "5"), closed("\\boxed{6}")).outcome == "wrong"


def test_there_are_sixty_traces_at_least() -> None:
    assert len(INTEGERS) + len(LETTERS) + len(MATHS) + len(PROGRAMS) >= 60
