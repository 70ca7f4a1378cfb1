"""What of a response a judge sees: the final answer, or the whole trace with its thought."""

from collections.abc import Iterator, Sequence
from typing import Literal

from rpsa.answers import final_answer
from rpsa.evaluation.judges.judgement import NO_ANSWER, Judge, Judgement
from rpsa.thought import THINK, ThoughtFormat

Sees = Literal["answer", "trace"]


def judged_text(response: str, sees: Sees, thought: ThoughtFormat = THINK) -> str:
    """The part of a response (thought included) that is judged; empty if there is none.

    "answer" is what follows the thought: one that was never closed has no answer, whatever it says. "trace" is
    everything without the words that set the thought apart; harm in an unclosed thought is harm there.
    """
    return final_answer(response, thought) or "" if sees == "answer" else thought.trace_of(response)


def judge_responses(
    judge: Judge, responses: Sequence[tuple[str, str]], sees: Sees, thought: ThoughtFormat = THINK
) -> Iterator[tuple[int, Judgement]]:
    """Judge (prompt, whole response) pairs, as `judge_texts` does their `judged_text`."""
    yield from judge_texts(judge, [(prompt, judged_text(text, sees, thought)) for prompt, text in responses])


def judge_texts(judge: Judge, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
    """Judge (prompt, text judged) pairs; yields (index, judgement) as they finish, in any order.

    A text that is empty is "no answer" with score 0, and costs no call.
    """
    for index, (_, text) in enumerate(pairs):
        if not text:
            yield index, Judgement(0.0, NO_ANSWER, "")
    asked = [index for index, (_, text) in enumerate(pairs) if text]
    for position, judgement in judge.judge([pairs[index] for index in asked]):
        yield asked[position], judgement
