"""The interface of judges: what they see, what is counted, how two agree, what is kept."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpsa.errors import RPSAError
from rpsa.evaluation.judges import (
    CachedJudge,
    Judgement,
    can_see,
    cohens_kappa,
    judge_responses,
    judged_text,
    judges_agree,
    make_judge,
    tally,
)


class Spy:
    """A judge that says "unsafe" of texts with an even number of words, and remembers what it was asked."""

    def __init__(self, revision: str = "1") -> None:
        self.identity: Mapping[str, Any] = {
            "id": "spy",
            "revision": revision,
            "prompt_sha256": None,
            "backend": "test",
        }
        self.asked: list[tuple[str, str]] = []

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
        for index in reversed(range(len(pairs))):
            self.asked.append(pairs[index])
            yield index, self.of(pairs[index][1])

    @staticmethod
    def of(text: str) -> Judgement:
        return (
            Judgement(1.0, "unsafe", text)
            if len(text.split()) % 2 == 0
            else Judgement(None, "unparseable", text)
        )


@pytest.mark.parametrize(
    ("response", "answer", "trace"),
    [
        ("<think>plan</think>\n\nanswer", "answer", "plan\n\n\nanswer"),
        ("plan</think> answer", "answer", "plan\n answer"),
        ("<think>plan, cut off", "", "plan, cut off"),
        ("<think>plan</think>", "", "plan"),
        ("a</think>b</think>c", "c", "a\nb\nc"),
        ("<think></think>", "", ""),
    ],
)
def test_what_a_judge_sees(response: str, answer: str, trace: str) -> None:
    assert judged_text(response, "answer") == answer
    assert judged_text(response, "trace") == trace


def test_no_answer_costs_no_call_and_is_no_harm() -> None:
    responses = [
        ("p0", "t</think>two words"),
        ("p1", "<think>two words"),
        ("p2", "t</think>one"),
        ("p3", "x</think>"),
    ]
    spy = Spy()
    judgements = dict(judge_responses(spy, responses, "answer"))
    assert [judgements[i].label for i in range(4)] == ["unsafe", "no answer", "unparseable", "no answer"]
    assert judgements[1].score == 0.0
    assert sorted(spy.asked) == [("p0", "two words"), ("p2", "one")]
    assert dict(judge_responses(spy, responses, "trace"))[1].label == "unsafe"


def test_the_unparseable_are_counted_and_not_averaged() -> None:
    counted = tally(
        [Judgement(1.0, "unsafe", ""), Judgement(0.5, "partial", ""), Judgement(None, "unparseable", "")]
    )
    assert (counted.n, counted.unparseable, counted.mean_score) == (3, 1, 0.75)
    assert counted.labels == {"partial": 1, "unparseable": 1, "unsafe": 1}
    assert tally([]).mean_score is None


def test_the_refusal_judge() -> None:
    texts = ["I can't help with that.", "Sure: four.", "I can't do that, but here's how: so.", " "]
    judgements = dict(make_judge("refusal").judge([("", text) for text in texts]))
    assert [(judgements[i].score, judgements[i].label) for i in range(4)] == [
        (0.0, "refused"),
        (1.0, "complied"),
        (0.5, "partial"),
        (0.0, "no answer"),
    ]


def test_what_make_judge_does_not_know_is_one_line() -> None:
    with pytest.raises(RPSAError, match=r"judge 'llama' is unknown: choose from refusal, llama-guard-3, "):
        make_judge("llama")
    with pytest.raises(
        RPSAError, match=r"judge rubric: missing a required argument: 'base_url'; it takes base_url, "
    ):
        make_judge("rubric", model="m")
    with pytest.raises(
        RPSAError, match=r"judge refusal: got an unexpected keyword argument 'x'; it takes no settings"
    ):
        make_judge("refusal", x=1)


def test_what_a_judge_can_see() -> None:
    assert can_see("qwen3guard") == ("answer", "thought", "trace")
    assert can_see("reasoningshield") == ("thought", "trace")
    refusals = ("refusal", "wildguard-refusal", "qwen3guard-refusal", "xstest")
    assert {can_see(name) for name in refusals} == {("answer",)}


# cache


def test_a_cached_judge_asks_once(tmp_path: Path) -> None:
    pairs = [("p", "two words"), ("p", "one"), ("p", "two words"), ("q", "two words")]
    spy = Spy()
    first = dict(CachedJudge(spy, tmp_path).judge(pairs))
    assert first == {i: Spy.of(text) for i, (_, text) in enumerate(pairs)}
    assert len(spy.asked) == 3
    assert dict(CachedJudge(spy, tmp_path).judge(pairs)) == first
    assert len(spy.asked) == 3
    assert dict(CachedJudge(spy, tmp_path).judge([("p", "new")])) == {0: Spy.of("new")}
    assert len(spy.asked) == 4


def test_another_judge_is_another_content(tmp_path: Path) -> None:
    for revision in ("1", "2"):
        spy = Spy(revision)
        list(CachedJudge(spy, tmp_path).judge([("p", "t")]))
        assert len(spy.asked) == 1
    identities = [json.loads(path.read_text()) for path in tmp_path.glob("*/identity.json")]
    assert sorted(identity["revision"] for identity in identities) == ["1", "2"]


def test_neither_prompts_nor_texts_are_stored(tmp_path: Path) -> None:
    list(CachedJudge(make_judge("refusal"), tmp_path).judge([("a certain prompt", "a certain text")]))
    assert "certain" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_a_run_that_stops_keeps_what_it_got(tmp_path: Path) -> None:
    spy = Spy()
    pairs = [("p", f"text {i}") for i in range(10)]
    running = CachedJudge(spy, tmp_path).judge(pairs)
    for got in range(1, 5):
        next(running)
        assert sum(path.read_bytes().count(b"\n") for path in tmp_path.rglob("*.jsonl")) == got
    running.close()
    list(CachedJudge(spy, tmp_path).judge(pairs))
    assert len(spy.asked) == 10


# agreement


def by_hand(first: Sequence[str], second: Sequence[str]) -> float:
    """Kappa from the table of counts."""
    n, labels = len(first), sorted({*first, *second})
    table = [
        [sum((x, y) == (a, b) for x, y in zip(first, second, strict=True)) for b in labels] for a in labels
    ]
    observed = sum(table[i][i] for i in range(len(labels))) / n
    expected = sum(sum(table[i]) * sum(row[i] for row in table) for i in range(len(labels))) / n**2
    return (observed - expected) / (1 - expected)


LABELS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=3, max_size=60)


@given(LABELS)
def test_kappa_against_the_table_and_sklearn(pairs: list[tuple[str, str]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = cohens_kappa(first, second)
    if len({*first, *second}) == 1:
        assert (found.kappa, found.interval, found.observed) == (None, None, 1.0)
        return
    assert found.kappa == pytest.approx(by_hand(first, second))
    assert found.interval is not None
    assert found.interval[0] <= found.kappa <= found.interval[1]
    metrics = pytest.importorskip("sklearn.metrics")
    assert found.kappa == pytest.approx(metrics.cohen_kappa_score(first, second))


def delta_method_half_width(counts: dict[tuple[str, str], int]) -> float:
    """1.96 standard errors of kappa: its gradient in the cell shares, by finite differences, through the multinomial
    covariance."""
    n = sum(counts.values())
    cells = list(counts)
    shares = [counts[cell] / n for cell in cells]
    labels = sorted({label for cell in cells for label in cell})

    def kappa(p: Sequence[float]) -> float:
        total = sum(p)
        share = {cell: x / total for cell, x in zip(cells, p, strict=True)}
        rows = {a: sum(share.get((a, b), 0) for b in labels) for a in labels}
        columns = {b: sum(share.get((a, b), 0) for a in labels) for b in labels}
        observed = sum(share.get((a, a), 0) for a in labels)
        expected = sum(rows[a] * columns[a] for a in labels)
        return (observed - expected) / (1 - expected)

    step = 1e-6
    gradient = []
    for i in range(len(cells)):
        up, down = list(shares), list(shares)
        up[i] += step
        down[i] -= step
        gradient.append((kappa(up) - kappa(down)) / (2 * step))
    mean = sum(g * p for g, p in zip(gradient, shares, strict=True))
    variance = sum(p * (g - mean) ** 2 for g, p in zip(gradient, shares, strict=True))
    return 1.959963984540054 * math.sqrt(variance / n)


@pytest.mark.parametrize(
    "counts",
    [
        {("a", "a"): 40, ("a", "b"): 9, ("b", "a"): 6, ("b", "b"): 45},
        {("a", "a"): 88, ("a", "b"): 10, ("a", "c"): 2, ("b", "a"): 14, ("b", "b"): 40, ("b", "c"): 6,
         ("c", "a"): 18, ("c", "b"): 10, ("c", "c"): 12},
        {("a", "b"): 30, ("b", "a"): 20, ("a", "a"): 5, ("b", "b"): 5},
    ],
)  # fmt: skip
def test_the_interval_is_that_of_the_delta_method(counts: dict[tuple[str, str], int]) -> None:
    pairs = [cell for cell, count in counts.items() for _ in range(count)]
    found = cohens_kappa(*zip(*pairs, strict=True))
    assert found.kappa is not None
    assert found.interval is not None
    half = delta_method_half_width(counts)
    assert found.interval == pytest.approx((found.kappa - half, found.kappa + half), abs=1e-6)


def test_fleiss_cohen_and_everitts_own_example() -> None:
    """The 200 diagnoses of their paper (Table 1): kappa .429, standard error .0536."""
    table = {"a": (106, 10, 4), "b": (22, 28, 10), "c": (2, 12, 6)}
    pairs = [
        (a, b) for a, row in table.items() for b, count in zip("abc", row, strict=True) for _ in range(count)
    ]
    found = cohens_kappa(*zip(*pairs, strict=True))
    assert found.kappa == pytest.approx(0.429, abs=5e-4)
    assert found.interval is not None
    assert (found.interval[1] - found.interval[0]) / 2 / 1.96 == pytest.approx(0.0536, abs=2e-4)


def test_two_judges_agree_on_harm_and_the_unparseable_are_left_out() -> None:
    harmful, harmless, nothing = (
        Judgement(0.5, "x", ""),
        Judgement(0.49, "y", ""),
        Judgement(None, "unparseable", ""),
    )
    first = [harmful, harmless, nothing, harmful, harmless]
    second = [harmful, harmless, harmful, harmless, nothing]
    found = judges_agree(first, second)
    assert (found.n, found.left_out) == (3, 2)
    assert found.observed == pytest.approx(2 / 3)
    assert judges_agree(first, second, threshold=0.4).kappa is None
    with pytest.raises(RPSAError, match="no item was labelled by both"):
        judges_agree([nothing], [harmful])
    with pytest.raises(RPSAError, match="1 labels against 2"):
        cohens_kappa(["a"], ["a", "b"])
