"""Whether the reasoning loss predicts accuracy, and how a report shows it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.made_up_results import demo_results
from rpsa.pipeline.reporting import measured
from rpsa.reasoning_loss import ReasoningLoss, TraceLoss
from rpsa.report import RunResult, write_report
from rpsa.report.prediction import predict
from rpsa.training.card import Measured, _with_results


def loss(nll: float, kl: float | None) -> ReasoningLoss:
    traces = ((10, 0.5), (30, 1.0), (20, 1.5), (40, 1.0))
    scale = sum(tokens * factor for tokens, factor in traces) / 100
    return ReasoningLoss(
        tuple(
            TraceLoss(str(i), tokens, nll * factor / scale, None if kl is None else kl * factor / scale)
            for i, (tokens, factor) in enumerate(traces)
        )
    )


def with_losses(results: Sequence[RunResult], sign: float) -> list[RunResult]:
    """A loss that rises (or falls) as accuracy falls."""
    return [
        replace(run, loss=loss(0.4, 0.0) if run.is_original else loss(0.4 + kl, kl))
        for run in results
        for kl in [1 + sign * (1 - run.reasoning["mean"]) / 2]
    ]


def drops(results: Sequence[RunResult]) -> list[float]:
    before = {run.base: run.reasoning["mean"] for run in results if run.is_original}
    return [before[run.base] - run.reasoning["mean"] for run in results if not run.is_original]


def ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < value for v in values) + sum(v == value for v in values) / 2 for value in values]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    a, b = ranks(first), ranks(second)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    products = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    squares = (sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)) ** 0.5
    return products / squares


@pytest.mark.parametrize(("sign", "says"), [(1, "both predict"), (-1, "it does not predict the drop")])
def test_it_is_the_rank_correlation_with_the_drop_in_accuracy(sign: float, says: str) -> None:
    results = with_losses(demo_results(), sign)
    found = predict(results)
    assert found is not None
    kls = [run.loss.kl or 0.0 for run in results if run.loss and not run.is_original]
    expected = rank_correlation(kls, drops(results))
    assert found.runs == 18
    assert (found.kl, found.nll) == (pytest.approx(expected), pytest.approx(expected))
    assert abs(expected) > 0.7
    assert says in found.sentence


def test_nothing_is_said_of_few_runs_and_none_of_ranks_that_are_all_the_same() -> None:
    results = with_losses(demo_results()[:7], 1)
    assert predict(results[:5]) is None
    assert predict(results[:6]) is not None
    assert predict(results[1:]) is None  # no original
    assert predict(demo_results()) is None
    alike = predict([run if run.is_original else replace(run, loss=loss(0.5, 0.1)) for run in results])
    assert alike is not None
    assert (alike.kl, alike.nll) == (None, None)
    assert "none for the KL" in alike.sentence
    assert "does not predict" in alike.sentence
    only_kl = [
        run if run.is_original else replace(run, loss=loss(1 - (run.loss.kl or 0), run.loss.kl))
        for run in results
        if run.loss
    ]
    found = predict(only_kl)
    assert found is not None
    assert "the KL predicts the order of the runs, the other does not" in found.sentence


def test_a_report_shows_the_loss_where_there_is_one(tmp_path: Path) -> None:
    results = with_losses(demo_results(), 1)
    write_report(results, tmp_path / "with", {"name": "x"})
    write_report(demo_results(), tmp_path / "without", {"name": "x"})
    content = json.loads((tmp_path / "with" / "results.json").read_text())
    first = content["runs"][0]["reasoning_loss"]
    assert (first["nll"], first["kl"], first["traces"], first["tokens"]) == (pytest.approx(0.4), 0, 4, 100)
    assert first["nll_ci95"][0] < 0.4 < first["nll_ci95"][1]
    assert content["summary"][0]["reasoning_loss"]["nll"]["mean"] == pytest.approx(0.4)
    low, high = content["summary"][1]["reasoning_loss"]["kl"]["ci95"]
    assert low < content["summary"][1]["reasoning_loss"]["kl"]["mean"] < high
    assert content["prediction"]["runs"] == 18
    for name in ("table.md", "index.html"):
        shown, plain = ((tmp_path / which / name).read_text() for which in ("with", "without"))
        assert "Reasoning loss, NLL" in shown
        assert content["prediction"]["says"].split(";")[0] in shown
        assert "Reasoning loss" not in plain
    nothing = json.loads((tmp_path / "without" / "results.json").read_text())
    assert nothing["prediction"] is None
    assert nothing["runs"][0]["reasoning_loss"] is None


def test_a_card_says_it_in_one_sentence() -> None:
    original, run = (measured(one) for one in with_losses(demo_results()[:2], 1))
    card = _with_results("# x\n", run, original)
    assert (run.reasoning_nll, run.reasoning_kl) == (
        pytest.approx(1.745, abs=0.1),
        pytest.approx(1.345, abs=0.1),
    )
    assert f"negative log-likelihood {run.reasoning_nll:.3g} (untouched: 0.4), divergence" in card
    assert Measured.from_json(run.to_json()) == run
    assert "log-likelihood" not in _with_results("# x\n", Measured(), None)
