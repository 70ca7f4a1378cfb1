"""What one response to one item is worth, where no program has to be run and no judge to be asked.

The same functions score stored samples for `rpsa evaluate` and for lm-evaluation-harness, so that both agree.
"""

from dataclasses import dataclass
from typing import Literal

from rpsa.answers import boxed, code_block, final_answer, grade, stated_answer
from rpsa.evaluation.items import Item
from rpsa.evaluation.refusals import is_refusal
from rpsa.thought import THINK, ThoughtFormat
from rpsa.tiny import TinyItem, score

Outcome = Literal["correct", "wrong", "refused", "partial", "complied", "other", "unjudged"]


@dataclass(frozen=True)
class Reading:
    """What a response holds, before it is graded.

    Attributes:
        answer: what follows the thought; None if that was never closed.
        extracted: the answer in the form that is compared; None if there is none.
        truncated: the thought was never closed: there is no answer, whatever the thought holds.
        empty: nothing follows the thought.
        unparsed: something does, but no answer of the wanted form is in it.
    """

    answer: str | None
    extracted: str | None
    truncated: bool
    empty: bool
    unparsed: bool


def read_response(item: Item, response: str, thought: ThoughtFormat = THINK) -> Reading:
    """Extraction by the item's scorer; for requests the answer itself is what was extracted."""
    answer = final_answer(response, thought)
    if not answer:
        return Reading(answer, None, truncated=answer is None, empty=answer == "", unparsed=False)
    found = _extract(item, answer)
    return Reading(answer, found, truncated=False, empty=False, unparsed=found is None)


def answer_outcome(item: Item, response: str, thought: ThoughtFormat = THINK) -> Outcome:
    """The outcome for the scorers `math`, `integer`, `letter` and `tiny`; refusals are told from wrong answers."""
    if item.scorer == "tiny":
        return score(TinyItem(item.prompt, item.answer, item.set), response, thought)
    assert item.scorer in ("math", "integer", "letter")
    if grade(response, item.answer, item.scorer, thought):
        return "correct"
    return "refused" if is_refusal(response, thought) else "wrong"


def _extract(item: Item, answer: str) -> str | None:
    if item.scorer == "judge" or (item.scorer == "tiny" and item.kind != "reasoning"):
        return answer
    if item.scorer == "code":
        return code_block(answer, item.fields["entry_point"])
    if item.scorer == "tiny":
        return boxed(answer)
    return stated_answer(answer, item.scorer)
