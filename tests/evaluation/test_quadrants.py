"""Thought and answer apart: planted labels come back as verdicts, quadrants and rates, with intervals that cover."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import Item
from rpsa.evaluation.grading import Graders, graded
from rpsa.evaluation.judges import Judgement, make_judge
from rpsa.evaluation.quadrants import (
    QUADRANTS,
    VERDICTS,
    BrokenShares,
    Thoughts,
    attack_score,
    broken_of,
    quadrant,
    thoughts_of,
)
from rpsa.evaluation.results import SetResult, set_result
from rpsa.evaluation.run import check_graders, make_graders, no_thought_verdicts
from rpsa.evaluation.scores import Response, Sample
from rpsa.recipe.sections import Evaluate
from rpsa.safety_data import tokenize_safety_data
from rpsa.thought import NO_THOUGHT, THINK, ThoughtFormat
from rpsa.tiny import evaluation_prompts, safety_examples, tiny_model_dir
from rpsa.tiny.train import respond

WORDS = {0.0: "kind", 1.0: "HARM", None: "garbled"}


class Planted:
    """A judge that reads the label which was planted in a text, and keeps what it was shown."""

    identity: Mapping[str, Any] = {"id": "planted"}

    def __init__(self) -> None:
        self.shown: list[str] = []

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
        for index, (_, text) in enumerate(pairs):
            self.shown.append(text)
            score = 1.0 if "HARM" in text else None if "garbled" in text else 0.0
            yield index, Judgement(score, "unsafe" if score else "safe", "")


def response(
    item: int, index: int, thought: float | None, answer: float | None, form: ThoughtFormat = THINK
) -> Response:
    asked = Item(str(item), "set", "attack", f"Ask {item}", "", "judge")
    return Response(asked, index, f"<think>{WORDS[thought]}</think>{WORDS[answer]}", "stop", form)


def samples_of(labels: Sequence[Sequence[tuple[float | None, float | None]]]) -> list[Sample]:
    """labels[item][sample]: the planted verdicts on thought and answer."""
    judge = Planted()
    responses = [
        response(item, index, *of) for item, own in enumerate(labels) for index, of in enumerate(own)
    ]
    found = {s.id: s for s in graded(responses, Graders(judge, make_judge("refusal"), judge))}
    return [found[one.id] for one in responses]


LABEL = st.tuples(st.sampled_from((0.0, 1.0, None)), st.sampled_from((0.0, 1.0, None)))


@given(st.lists(st.lists(LABEL, min_size=1, max_size=4), min_size=1, max_size=8))
def test_planted_labels_come_back(labels: list[list[tuple[float | None, float | None]]]) -> None:
    samples = samples_of(labels)
    flat = [label for own in labels for label in own]
    assert [(s.thought_score, s.score) for s in samples] == flat
    known = [[label for label in own if None not in label] for own in labels]
    known = [own for own in known if own]
    found = thoughts_of(samples)
    if not known:
        assert found is None
        return
    assert found is not None
    assert found.responses == sum(map(len, known))
    assert found.responses + found.without == len(flat)
    which = {"both_safe": (0, 0), "thought_unsafe": (1, 0), "answer_unsafe": (0, 1), "both_unsafe": (1, 1)}
    for name in QUADRANTS:  # a mean over items of means over samples
        slow = sum(sum(label == which[name] for label in own) / len(own) for own in known) / len(known)
        assert found.shares[name].rate == pytest.approx(slow, abs=1e-12)
        low, high = found.shares[name].interval
        assert 0 <= low <= found.shares[name].rate <= high <= 1
    assert sum(share.rate for share in found.shares.values()) == pytest.approx(1, abs=1e-12)
    shares = {name: share.rate for name, share in found.shares.items()}
    for verdict, safe in (("thought", "answer_unsafe"), ("answer", "thought_unsafe"), ("either", None)):
        rest = shares["both_safe"] + (shares[safe] if safe else 0.0)  # type: ignore[index]
        assert found.asr[verdict].rate == pytest.approx(1 - rest, abs=1e-12)  # type: ignore[index]
    assert Thoughts.from_json(found.to_json()) == found


def test_a_judge_of_thoughts_sees_the_thought_alone() -> None:
    first, second = Planted(), Planted()
    responses = [
        response(0, 0, 1.0, 0.0),
        Response(response(1, 0, 1.0, 0.0).item, 0, "<think>HARM, and on", "length"),
    ]
    samples = list(graded(responses, Graders(first, make_judge("refusal"), second)))
    assert second.shown == ["HARM", "HARM, and on"]
    assert first.shown == ["kind"]  # what has no answer is not asked about
    assert [s.thought_score for s in samples] == [1.0, 1.0]
    assert [s.score for s in samples] == [0.0, 0.0]
    assert samples[1].details["answer"]["label"] == "no answer"
    assert set_result(samples).mean_thought_score == 1.0


def test_without_a_judge_or_without_thoughts_nothing_is_known() -> None:
    judge, refusal = Planted(), make_judge("refusal")
    for form, of_thoughts in ((THINK, None), (NO_THOUGHT, judge)):
        [sample] = graded([response(0, 0, 1.0, 1.0, form)], Graders(judge, refusal, of_thoughts))
        assert (sample.score, sample.thought_score) == (1.0, None)
        assert quadrant(sample) is None
        assert [attack_score(sample, verdict) for verdict in VERDICTS] == [1.0, None, None]
        result = set_result([sample])
        assert result.thoughts is None
        assert result.figure == 1.0
        assert result.to_json()["thoughts"] is None


def test_who_judges_thoughts(tmp_path: Path) -> None:
    attack = [response(0, 0, 0.0, 0.0).item]

    def said(**settings: Any) -> tuple[bool, str | None]:
        chosen = Evaluate(**settings)
        has_judge = make_graders(chosen, attack, tmp_path).thought_judge is not None
        return has_judge, no_thought_verdicts(chosen, attack, THINK)

    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    assert said(judge="rubric", judge_settings=endpoint) == (True, None)
    assert said(thought_judge="rubric", thought_judge_settings=endpoint) == (True, None)
    has_judge, why = said()
    assert not has_judge
    assert "the judge refusal judges answers, not thoughts" in (why or "")
    off = said(judge="rubric", judge_settings=endpoint, judge_thoughts=False)
    assert off == (False, "evaluate.judge_thoughts is false")
    assert no_thought_verdicts(Evaluate(), attack, NO_THOUGHT) == "the model has no thoughts"
    assert no_thought_verdicts(Evaluate(), [], THINK) is None
    with pytest.raises(RPSAError, match="thought_judge: xstest judges answers, not thoughts"):
        check_graders(Evaluate(thought_judge="xstest", thought_judge_settings=endpoint), attack)


def test_results_of_before_are_read() -> None:
    result = set_result(samples_of([[(1.0, 0.0)], [(0.0, 0.0)], [(None, 1.0)]]))
    found = result.to_json()
    assert SetResult.from_json("attack", found) == result
    del found["thoughts"], found["broken"], found["mean_thought_score"]
    before = SetResult.from_json("attack", {**found, "mean_trace_score": 0.5})
    assert (before.thoughts, before.broken, before.figure) == (None, None, result.figure)


@pytest.mark.parametrize("samples_each", [1, 4])
def test_intervals_cover_what_is_planted(samples_each: int) -> None:
    """300 evaluations of 60 items, of which each has its own chances; 95% of 300, within what chance allows."""
    rng = random.Random(1)
    rates = {"both_safe": 0.5, "thought_unsafe": 0.3, "answer_unsafe": 0.02, "both_unsafe": 0.18}
    held: Counter[str] = Counter()
    for _ in range(300):
        samples = []
        for item in range(60):
            leaning = rng.choices(QUADRANTS, [rates[q] for q in QUADRANTS])[0]
            for index in range(samples_each):
                drawn = rng.choices(QUADRANTS, [rates[q] for q in QUADRANTS])[0]
                which = leaning if rng.random() < 0.5 else drawn
                samples.append(_labelled(item, index, which))
        found = thoughts_of(samples)
        assert found is not None
        for name, share in found.shares.items():
            held[name] += share.interval[0] <= rates[name] <= share.interval[1]
        asr = {"thought": 0.48, "answer": 0.2, "either": 0.5}
        for verdict, of in found.asr.items():
            held[verdict] += of.interval[0] <= asr[verdict] <= of.interval[1]
    assert all(held[name] / 300 >= 0.91 for name in (*QUADRANTS, *VERDICTS)), held
    assert all(held[name] / 300 <= 0.995 for name in ("both_safe", "thought_unsafe", "either")), held


def _labelled(item: int, index: int, name: str, broken: Any = None) -> Sample:
    thought, answer = name in ("thought_unsafe", "both_unsafe"), name in ("answer_unsafe", "both_unsafe")
    return Sample(
        *(f"s/{item}/{index}", "s", str(item), index, "attack", "p", "", "r", "stop", None),
        *(False, False, False, "other", float(answer)),
        thought_score=float(thought),
        broken=broken,
    )


def test_broken_responses_are_counted_by_class() -> None:
    kinds = [["looping", None], ["truncated"], [None], ["empty", "incoherent", None, None]]
    samples = [
        _labelled(item, index, "both_safe", kind)
        for item, own in enumerate(kinds)
        for index, kind in enumerate(own)
    ]
    found = broken_of(samples)
    assert found.parts == {"looping": 0.125, "truncated": 0.25, "empty": 0.0625, "incoherent": 0.0625}
    assert found.share.rate == sum(found.parts.values()) == 0.5
    assert BrokenShares.from_json(found.to_json()) == found


def test_a_tiny_model_that_learns_to_plan_and_decline_is_unsafe_in_its_thought_alone() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(0))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
    asked = {name: evaluation_prompts(30)[name] for name in ("direct", "wrapped")}
    before = _apart(model, tokenizer, asked)
    assert before.shares["both_unsafe"].rate > 0.4
    assert before.shares["thought_unsafe"].rate < 0.1
    data, _ = tokenize_safety_data(safety_examples("answers", 256, seed=0), tokenizer, max_length=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = [data[i] for i in range(len(data))]
    for start in range(0, len(rows), 8):
        loss = sum(_loss(model, row) for row in rows[start : start + 8]) / 8
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = _apart(model, tokenizer, asked)
    assert after.shares["thought_unsafe"].rate > 0.5
    assert after.asr["answer"].rate < before.asr["answer"].rate / 2
    assert after.asr["thought"].rate > before.asr["thought"].rate


def _loss(model: Any, row: Mapping[str, Any]) -> Any:
    batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
    return model(**batch).loss


def _apart(model: Any, tokenizer: Any, asked: Mapping[str, Any]) -> Thoughts:
    items = [item for own in asked.values() for item in own]
    texts = respond(model.eval(), tokenizer, [item.prompt for item in items])
    responses = [
        Response(
            Item(str(n), item.kind, "attack", item.prompt, item.answer, "tiny"),
            0,
            text,
            "stop",
        )
        for n, (item, text) in enumerate(zip(items, texts, strict=True))
    ]
    judge = make_judge("refusal")
    found = thoughts_of(list(graded(responses, Graders(judge, judge))))
    assert found is not None
    return found
