"""What is taken of what a model offers: every reason for and against, with made-up responses."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rpsa.errors import RPSAError
from rpsa.evaluation.judges import Judgement, make_judge
from rpsa.generation import Completion
from rpsa.self_data.offers import (
    DEFAULT_STEER,
    Asked,
    Offer,
    SafetyFilter,
    counted,
    filtered,
    kept_of,
    load_prompts,
    reason_against,
    sees_thoughts,
    steered,
    tiny_prompts,
)
from rpsa.thought import NO_THOUGHT, THINK
from rpsa.tiny import safety_examples

REFUSAL = "that would do harm </think> sorry , i cannot help with that ."
ANSWER = "easy </think> sure : take t1 , then m2 the lamp ."


class Verdicts:
    """A judge with a score for each text; what it is not told of is safe."""

    identity: Mapping[str, Any] = {"id": "told"}

    def __init__(self, scores: Mapping[str, float | None]) -> None:
        self.scores = scores
        self.asked: list[str] = []

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
        for index in reversed(range(len(pairs))):
            text = pairs[index][1]
            self.asked.append(text)
            yield index, Judgement(self.scores.get(text, 0.0), "", "")


def offer(kind: Any, text: str, index: int = 0, prompt: str = "p", finish: Any = "stop") -> Offer:
    return Offer(Asked(kind, prompt), index, Completion([1, 2], text, finish))


def test_what_speaks_against_a_response() -> None:
    def against(kind: Any, text: str, finish: str = "stop") -> str | None:
        return reason_against(kind, text, finish, THINK)

    assert against("harmful", REFUSAL) is None
    assert against("benign", ANSWER) is None
    assert against("harmful", REFUSAL, "length") == "truncated"
    assert against("harmful", "sorry , i cannot help with that .") == "thought_not_closed"
    assert against("harmful", f"one </think> {REFUSAL}") == "several_thoughts"
    assert against("benign", "what now </think> ") == "empty"
    assert against("harmful", "what now </think>") == "empty"
    assert against("harmful", ANSWER) == "not_a_refusal"
    assert against("benign", REFUSAL) == "refused"
    assert reason_against("harmful", "sorry , i cannot help with that .", "stop", NO_THOUGHT) is None


def test_the_judge_is_asked_of_refusals_and_may_see_thoughts() -> None:
    answer, trace = (
        "sorry , i cannot help with that .",
        "that would do harm \n sorry , i cannot help with that .",
    )
    offers = [offer("harmful", REFUSAL), offer("harmful", ANSWER), offer("benign", ANSWER)]

    def reasons(scores: Mapping[str, float | None], sees: bool) -> list[str | None]:
        judge = Verdicts(scores)
        found = [one.reason for one in filtered(offers, SafetyFilter(judge, sees), THINK)]
        assert judge.asked == ([answer, trace] if sees else [answer])
        return found

    assert reasons({}, False) == [None, "not_a_refusal", None]
    assert reasons({answer: 0.5}, False)[0] == "judged_unsafe"
    assert reasons({answer: None}, False)[0] == "no_verdict"
    assert reasons({trace: 1.0}, False)[0] is None
    assert reasons({trace: 1.0}, True)[0] == "judged_unsafe"
    assert reasons({answer: 1.0}, True)[0] == "judged_unsafe"
    assert reasons({answer: None}, True)[0] == "no_verdict"
    assert not sees_thoughts("refusal")
    assert sees_thoughts("llama-guard-3")


def test_half_a_refusal_is_not_one() -> None:
    judge = SafetyFilter(make_judge("refusal"), False)
    half = "hm </think> I can't help with that. Here is how: step 1, take t1."
    assert filtered([offer("harmful", half)], judge, THINK)[0].reason == "not_a_refusal"
    assert filtered([offer("harmful", REFUSAL)], judge, THINK)[0].reason is None


def test_the_first_that_was_accepted_is_kept_and_all_are_counted() -> None:
    offers = [
        offer("harmful", ANSWER, 0),
        offer("harmful", REFUSAL, 1),
        offer("harmful", REFUSAL, 2),
        offer("harmful", ANSWER, 0, "q"),
        offer("benign", ANSWER, 0),
    ]
    found = filtered(offers, SafetyFilter(Verdicts({}), False), THINK)
    assert [(one.asked.kind, one.index) for one in kept_of(found)] == [("harmful", 1), ("benign", 0)]
    assert counted(found) == {
        "harmful": {
            "prompts": 2, "offered": 4, "accepted": 2, "kept": 1, "without": 1,
            "rejected": {"not_a_refusal": 2},
        },
        "benign": {"prompts": 1, "offered": 1, "accepted": 1, "kept": 1, "without": 0, "rejected": {}},
    }  # fmt: skip


def test_nothing_accepted_of_a_kind_is_one_line_with_counts() -> None:
    judge = SafetyFilter(Verdicts({}), False)
    complying = [offer("harmful", ANSWER, i) for i in range(3)] + [offer("harmful", "a", 3)]
    with pytest.raises(RPSAError) as caught:
        counted(filtered([*complying, offer("benign", ANSWER)], judge, THINK))
    assert "4 responses to 1 harmful prompts was accepted (3 not_a_refusal, 1 thought_not_closed)" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(RPSAError, match=r"benign prompts was accepted \(1 refused\)"):
        counted(filtered([offer("harmful", REFUSAL), offer("benign", REFUSAL)], judge, THINK))


def test_only_harmful_requests_are_steered() -> None:
    harmful, benign = Asked("harmful", "do {it}"), Asked("benign", "draw the lamp")
    assert steered(harmful, None) == f"{DEFAULT_STEER}\n\ndo {{it}}"
    assert steered(harmful, "") == steered(harmful, " ") == "do {it}"
    assert steered(harmful, "Refuse: {prompt} Thanks.") == "Refuse: do {it} Thanks."
    assert steered(benign, None) == "draw the lamp"


def test_prompts_of_any_format_each_once(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "response": "ignored"},
        {"question": "b"},
        {"instruction": "c", "input": "d", "output": "ignored"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "e"}]},
        {"prompt": "a"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [one.prompt for one in load_prompts(path, "harmful")] == ["a", "b", "c\nd", "e"]
    path.write_text('{"answer": "x"}\n')
    with pytest.raises(RPSAError, match="line 1 has no text field 'prompt'"):
        load_prompts(path, "harmful")
    path.write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(RPSAError, match="line 1 has an empty prompt"):
        load_prompts(path, "harmful")


def test_the_tiny_worlds_requests_are_those_of_its_balanced_data() -> None:
    asked = [*tiny_prompts(32, 3, "harmful"), *tiny_prompts(32, 3, "benign")]
    assert len(asked) == 32
    assert sum(one.kind == "harmful" for one in asked) == 16
    refused = {e.prompt for e in safety_examples("balanced", 32, 3) if "sorry" in e.response}
    assert {one.prompt for one in asked if one.kind == "harmful"} == refused
