"""Tables and curves of runs under attack, from results that are made up."""

from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from helpers.made_up_results import demo_results
from rpsa.evaluation.results import EvaluationResult, SetResult
from rpsa.evaluation.statistics import mean_interval
from rpsa.report import write_report
from rpsa.report.attacked import (
    UNATTACKED,
    Attacked,
    robustness_tables,
    summarised,
    tampering_curves,
)
from rpsa.thought import THINK


def under(method: str, base: int, attack: str, *asr: float, steps: int | None = None) -> Attacked:
    sets = {
        f"set{n}": SetResult("attack", 50, 50, rate, 0.05, (max(0.0, rate - 0.1), min(1.0, rate + 0.2)))
        for n, rate in enumerate(asr)
    }
    result = EvaluationResult(
        {"reasoning": {}, "attack": sets, "over_refusal": {}}, 50, THINK, {}, "exact", "refusal"
    )
    return Attacked(method, f"tiny:{base}", 0, attack, result, "harmful rows, LoRA" if steps else None, steps)


RUNS = [
    under(method, base, attack, rate + 0.01 * base, steps=steps)
    for attack, steps, level in ((UNATTACKED, None, 0.1), ("finetune-5", 5, 0.5), ("finetune-10", 10, 0.9))
    for method, more in (("fft", 0.0), ("lora+rpsa", 0.05))
    for base in range(3)
    for rate in [level + more]
]


def test_means_and_intervals_are_over_runs() -> None:
    found = summarised(RUNS)["attack_success_rate"]
    assert list(found) == [UNATTACKED, "finetune-5", "finetune-10"]
    one = found["finetune-5"]["lora+rpsa"]
    assert one.mean == pytest.approx(0.56)
    assert one.interval == pytest.approx(tuple(mean_interval([0.55, 0.56, 0.57]) or ()))
    assert one.runs == 3
    assert "over_refusal" not in summarised(RUNS)


def test_a_single_runs_interval_is_that_of_its_sets_together() -> None:
    [found] = [
        by["fft"] for by in summarised([under("fft", 0, "x", 0.0, 0.4)])["attack_success_rate"].values()
    ]
    assert found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - sqrt(0.0**2 + 0.1**2) / 2, 0.2 + sqrt(0.2**2 + 0.2**2) / 2))
    # nothing succeeded, and yet it is not known that nothing can
    zero = summarised([under("fft", 0, "x", 0.0)])["attack_success_rate"]["x"]["fft"]
    assert zero.interval == pytest.approx((0.0, 0.2))


def test_a_row_for_each_attack_and_a_column_for_each_method() -> None:
    [table] = robustness_tables([*RUNS, under("lora+rpsa", 0, "merge-0.5", 0.3)]).values()
    assert table.header == ["Attack", "fft", "lora+rpsa"]
    assert [row[0].text for row in table.rows] == [UNATTACKED, "finetune-5", "finetune-10", "merge-0.5"]
    assert [cell.text for cell in table.rows[1]] == ["finetune-5", "51.0", "56.0"]
    assert table.rows[1][1].note == "48.5 to 53.5"
    assert table.rows[3][1].text == "–"


def test_the_curves_begin_with_the_models_as_they_are() -> None:
    figure = tampering_curves(RUNS)
    assert figure is not None
    [axes] = figure.axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [[round(x) for x, _ in line] for line in lines] == [[0, 5, 10]] * 2
    assert [round(y) for _, y in lines[0]] == [11, 51, 91]
    assert tampering_curves([replace(run, curve=None, steps=None) for run in RUNS]) is None


def test_a_report_shows_them_where_there_are_any(tmp_path: Path) -> None:
    write_report(demo_results(), tmp_path / "with", {"name": "x"}, attacked=RUNS)
    write_report(demo_results(), tmp_path / "without", {"name": "x"})
    assert "<h2>Robustness</h2>" in (tmp_path / "with" / "index.html").read_text()
    assert "Robustness" not in (tmp_path / "without" / "index.html").read_text()
    assert not (tmp_path / "without" / "robustness.md").exists()
    assert "| finetune-5 | 51.0 (48.5 to 53.5) |" in (tmp_path / "with" / "robustness.md").read_text()
