"""The leaderboard: shortfalls, intervals, the worst base, the Pareto front, and what is written."""

import re
from pathlib import Path
from typing import Any

import pytest

from rpsa.artifacts import read_json
from rpsa.report.leaderboard import (
    Contender,
    Leaderboard,
    compare_data,
    entry_of,
    measures,
    misses,
    ranked,
    shortfall,
    write_leaderboard,
)
from rpsa.report.summaries import RunResult

TARGETS = {"reasoning": 0.01, "direct": 0.02, "benign": 0.05}


def run(
    method: str,
    base: str = "a",
    seed: int = 0,
    reasoning: float = 0.9,
    direct: float = 0.1,
    benign: float = 0.1,
) -> RunResult:
    return RunResult(
        method=method,
        base=base,
        seed=seed,
        lr=1e-3,
        reasoning={"sums": reasoning, "mean": reasoning},
        refused=0.0,
        asr={"direct": direct, "mean": direct},
        over_refusal={"benign": benign},
        is_original=method == "original",
    )


ORIGINALS = {base: run("original", base, reasoning=1.0, direct=0.6, benign=0.0) for base in ("a", "b")}


def contender(method: str, data: str = "mixed", **rates: Any) -> Contender:
    runs = [run(method, base, seed, **rates) for base in ("a", "b") for seed in (1, 2)]
    return Contender(data, method, {"train.learning_rate": 1e-3}, runs, [2.0, 1.0, 3.0])


def test_a_shortfall_adds_up_what_is_missed_and_nothing_else() -> None:
    one = run("fft", reasoning=0.95, direct=0.01, benign=0.15)
    original = ORIGINALS["a"]
    assert measures(one, original) == pytest.approx({"reasoning": 0.05, "direct": 0.01, "benign": 0.15})
    assert misses(one, original, TARGETS) == pytest.approx({"reasoning": 0.04, "direct": 0.0, "benign": 0.1})
    assert shortfall(one, original, TARGETS) == pytest.approx(0.14)
    assert shortfall(original, original, {"reasoning": 0.0}) == 0


def test_a_standing_has_means_intervals_and_the_worst_base() -> None:
    rates = {("a", 1): 0.1, ("a", 2): 0.2, ("b", 1): 0.4, ("b", 2): 0.5}
    runs = [run("fft", base, seed, direct=rate) for (base, seed), rate in rates.items()]
    found = entry_of(Contender("mixed", "fft", {}, runs, [1.0, 9.0, 2.0]), ORIGINALS, TARGETS)
    assert found is not None
    assert found.means["direct"] == pytest.approx(0.3)
    assert found.worst["direct"] == pytest.approx(0.45)
    assert found.accuracy == pytest.approx(0.9)
    interval = found.intervals["direct"]
    assert interval is not None
    assert interval[0] < 0.3 < interval[1]
    assert found.shortfall == pytest.approx(0.09 + 0.28 + 0.05)
    assert found.shortfall_worst == pytest.approx(0.09 + 0.43 + 0.05)
    assert found.cost == 2.0
    assert not found.reaches


def test_targets_are_reached_where_every_base_meets_them() -> None:
    good = {"reasoning": 1.0, "direct": 0.0, "benign": 0.0}
    best = entry_of(contender("fft", **good), ORIGINALS, TARGETS)
    assert best is not None
    assert best.reaches
    one_bad = Contender(
        "mixed", "fft", {}, [run("fft", "a", **good), run("fft", "b", **(good | {"benign": 0.06}))]
    )
    found = entry_of(one_bad, ORIGINALS, TARGETS)
    assert found is not None
    assert not found.reaches
    failed = Contender("mixed", "fft", {}, [run("fft", "a", **good)], failed=["b seed 1: diverged"])
    found = entry_of(failed, ORIGINALS, TARGETS)
    assert found is not None
    assert not found.reaches
    assert entry_of(Contender("mixed", "fft", {}, [], failed=["all"]), ORIGINALS, TARGETS) is None


def test_the_front_holds_what_nothing_beats_in_everything() -> None:
    rates: dict[str, dict[str, Any]] = {
        "careful": {"reasoning": 0.99, "direct": 0.3},
        "safe": {"reasoning": 0.7, "direct": 0.0},
        "beaten": {"reasoning": 0.7, "direct": 0.3},
        "as_safe": {"reasoning": 0.7, "direct": 0.0},
    }
    entries = [entry_of(contender(name, **found), ORIGINALS, TARGETS) for name, found in rates.items()]
    order = ranked(entry for entry in entries if entry is not None)
    assert {one.method for one in order if one.is_best} == {"careful", "safe", "as_safe"}
    worst = [one.shortfall_worst for one in order]
    assert worst == sorted(worst)


def test_kinds_of_data_are_compared_run_by_run() -> None:
    refusals, mixed = contender("fft", "refusals", benign=0.5), contender("fft", "mixed", benign=0.1)
    [found] = compare_data([refusals, mixed, contender("fft+ewc", "mixed")], ORIGINALS, TARGETS)
    assert (found.beside, found.data, found.pairs) == ("refusals", "mixed", 4)
    assert found.means["benign"] == pytest.approx(-0.4)


def test_what_is_written_is_whole_and_shows_names_as_text(tmp_path: Path) -> None:
    entries = [
        entry_of(contender("fft", direct=0.0), ORIGINALS, TARGETS),
        entry_of(contender("<b>mine</b>", direct=0.2), ORIGINALS, TARGETS),
    ]
    board = Leaderboard(
        name="mine",
        rule="the best.",
        chosen_on="c (seeds 0)",
        tested_on="a, b (seeds 1, 2)",
        targets=TARGETS,
        entries=ranked(entry for entry in entries if entry is not None),
        original_accuracy=1.0,
        without_result={"fft+kl on refusals": "no row complies"},
        comparisons=compare_data([contender("fft", "refusals"), contender("fft")], ORIGINALS, TARGETS),
    )
    write_leaderboard(board, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("bench.html", "bench.json", "bench.md", "bench.png", "bench.svg")
    ]
    page = (tmp_path / "bench.html").read_text()
    assert "<b>mine</b>" not in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "no row complies" in page
    assert not re.search(r"(src|href)=\"https?:", page)
    parts = (tmp_path / "bench.md").read_text().split("\n\n")
    assert len(parts) == 4
    for table, rows in zip(parts[:2], (2, 1), strict=True):
        lines = table.splitlines()
        assert len(lines) == 2 + rows
        assert len({line.count("|") for line in lines}) == 1
    assert "no row complies" in parts[3]
    assert read_json(tmp_path / "bench.json")["entries"][0]["method"] == "fft"
