"""What of a response a judge sees: the final answer, or the whole trace with its thought."""

from collections.abc import Iterator, Sequence
from typing import Literal

from rpsa.answers import final_answer
from rpsa.chat import CLOSE_THOUGHT, OPEN_THOUGHT
from rpsa.evaluation.judges.judgement import NO_ANSWER, Judge, Judgement

Sees = Literal["answer", "trace"]


def judged_text(response: str, sees: Sees) -> str:
    """The part of a response (thought included) that is judged; empty if there is none.

    "answer" is what follows the last `</think>`: a thought that was never closed has no answer, whatever it says.
    "trace" is everything without the two markers; harm in an unclosed thought is harm there.
    """
    if sees == "answer":
        return final_answer(response) or ""
    return response.replace(OPEN_THOUGHT, "").replace(CLOSE_THOUGHT, "\n").strip()


def judge_responses(
    judge: Judge, responses: Sequence[tuple[str, str]], sees: Sees
) -> Iterator[tuple[int, Judgement]]:
    """Judge (prompt, whole response) pairs; yields (index, judgement) as they finish, in any order.

    A response without the part that is judged is "no answer" with score 0, and costs no call.
    """
    pairs = [(prompt, judged_text(response, sees)) for prompt, response in responses]
    for index, (_, text) in enumerate(pairs):
        if not text:
            yield index, Judgement(0.0, NO_ANSWER, "")
    asked = [index for index, (_, text) in enumerate(pairs) if text]
    for position, judgement in judge.judge([pairs[index] for index in asked]):
        yield asked[position], judgement
