"""Answers: what the answer of a response is, and whether it is right.

Only what follows the thought counts, in the model's own format (`rpsa.thought`): a `\boxed{}` inside a thought is
no answer, and a thought that was never closed has none.
"""

from typing import Literal

from rpsa.answers.equality import same_value
from rpsa.answers.programs import code_block, defined_names
from rpsa.answers.reading import integer, last_number, letter
from rpsa.answers.stated import boxed, extracted, stated
from rpsa.thought import THINK, ThoughtFormat

AnswerKind = Literal["math", "integer", "number", "letter", "exact"]

__all__ = [
    "AnswerKind",
    "boxed",
    "code_block",
    "defined_names",
    "extracted",
    "final_answer",
    "grade",
    "integer",
    "letter",
    "same_value",
    "stated_answer",
]


def final_answer(text: str, thought: ThoughtFormat = THINK) -> str | None:
    """What follows the end of the last thought, stripped; None if the thought was never closed.

    A model without thoughts is answered whole: give `thought` as `rpsa.chat.read_thought` finds it.
    """
    return thought.answer_of(text)


def stated_answer(answer: str, kind: AnswerKind) -> str | None:
    """The stated answer in an answer text, in the form that is compared; None if there is none of this kind.

    A box comes first. Where it holds no integer, or no choice, the final answer in words is read.
    """
    if kind in ("math", "exact"):
        return extracted(answer)
    read = letter if kind == "letter" else integer
    values = (read(text) for text in stated(answer))
    found = next((str(value) for value in values if value is not None), None)
    return last_number(answer) if found is None and kind == "number" else found


def grade(response_text: str, gold: str, kind: AnswerKind, thought: ThoughtFormat = THINK) -> bool:
    """Whether a whole response (thought included) answers `gold`.

    `math` compares by value, `integer` and `letter` as such, `number` as an integer that, where nothing is stated, is
    the last number of the answer (for models that keep to no format), `exact` as words: the box or the stated answer,
    or else the whole answer, up to whitespace.
    """
    answer = final_answer(response_text, thought)
    if answer is None:
        return False
    found = stated_answer(answer, kind)
    if kind == "exact":
        return _words(answer if found is None else found) == _words(gold)
    if found is None:
        return False
    if kind == "math":
        return same_value(found, gold)
    return found == str(letter(gold) if kind == "letter" else integer(gold))


def _words(text: str) -> str:
    return " ".join(text.split())
