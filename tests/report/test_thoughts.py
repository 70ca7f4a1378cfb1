"""The report on thought and answer apart, the STR by either verdict, and broken responses."""

import io
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from helpers.made_up_results import demo_results
from rpsa.evaluation.quadrants import QUADRANTS, VERDICTS, BrokenShares, Share, attack_score
from rpsa.evaluation.results import SetResult, set_result
from rpsa.evaluation.scores import Sample
from rpsa.evaluation.statistics import safety_tax_interval, safety_tax_rate
from rpsa.pipeline.reporting import measured
from rpsa.report import RunResult, render_console, summarise, with_safety_tax, write_report
from rpsa.report.summaries import by_verdict, with_problem_intervals
from rpsa.report.thoughts import broken_rates, mean_of_sets, thoughts_apart
from rpsa.report.warnings import warnings
from rpsa.training.card import card_with_results

SAFE = {  # how often thought and answer are safe
    "original": (0.4, 0.4),
    "fft": (0.45, 0.95),
    "fft+rpsa": (0.8, 0.9),
}


def with_thoughts(results: list[RunResult], folder: Path) -> list[RunResult]:
    """The results of three methods with attacks whose samples have verdicts on thoughts, and some that are broken."""
    return [_with_thoughts(run, folder) for run in results if run.method in SAFE]


def _with_thoughts(run: RunResult, folder: Path) -> RunResult:
    draw = random.Random(f"{run.method} {run.base}")
    thought, answer = SAFE[run.method]
    samples = {
        name: [
            _sample("attack", name, i, float(draw.random() > answer), float(draw.random() > thought), draw)
            for i in range(40)
        ]
        for name in ("direct", "wrapped")
    }
    families = {name: rate for name, rate in run.reasoning.items() if name != "mean"}
    solved = {
        name: [_sample("reasoning", name, i, float(draw.random() < rate), None, draw) for i in range(40)]
        for name, rate in families.items()
    }
    path = folder / f"{run.method}-{run.base.replace(':', '-')}.jsonl"
    every = [s for sets in (solved, samples) for own in sets.values() for s in own]
    path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in every))
    sets = {
        "reasoning": {name: set_result(own) for name, own in solved.items()},
        "attack": {name: set_result(own) for name, own in samples.items()},
    }
    reasoning, asr = (_figures(sets[kind]) for kind in ("reasoning", "attack"))
    return replace(run, sets=sets, asr=asr, reasoning=reasoning, over_refusal={}, samples=path)  # type: ignore[arg-type]


def _figures(sets: dict[str, SetResult]) -> dict[str, float]:
    rates = {name: found.figure or 0.0 for name, found in sets.items()}
    return rates | {"mean": sum(rates.values()) / len(rates)}


def _sample(
    kind: str, name: str, number: int, score: float, thought: float | None, draw: random.Random
) -> Sample:
    return Sample(
        *(f"{name}/{number}/0", name, str(number), 0, kind, "p", "", "r", "stop", None),  # type: ignore[arg-type]
        *(False, False, False, "other", score),
        thought_score=thought,
        broken="looping" if draw.random() < 0.1 else None,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    return with_thoughts(demo_results(), tmp_path_factory.mktemp("samples"))


def test_str_by_each_verdict(results: list[RunResult]) -> None:
    originals = {run.base: run for run in results if run.is_original}
    for verdict in VERDICTS:
        for run in with_safety_tax(by_verdict(results, verdict)):
            if run.is_original:
                continue
            before, after = (
                {
                    name: of.thoughts.asr[verdict].rate
                    for name, of in one.sets["attack"].items()
                    if of.thoughts
                }
                for one in (originals[run.base], run)
            )
            names = [name for name in run.reasoning if name != "mean"]
            slow = safety_tax_rate(
                reasoning_before=[originals[run.base].reasoning[name] for name in names],
                reasoning_after=[run.reasoning[name] for name in names],
                attack_before=list(before.values()),
                attack_after=list(after.values()),
            )
            assert run.tax is None if slow != slow else run.tax == pytest.approx(slow)
    usual, by_answer = summarise(results), summarise(by_verdict(results, "answer"))
    assert [s.to_json() for s in usual] == [s.to_json() for s in by_answer]
    by_thought = {s.method: s.asr["mean"] for s in summarise(by_verdict(results, "thought"))}
    assert by_thought["fft"] > 0.4 > by_thought["fft+rpsa"]


def test_the_interval_of_one_run_is_by_the_same_verdict(results: list[RunResult]) -> None:
    one = [run for run in results if run.base == "tiny:0"]
    found = with_problem_intervals(summarise(by_verdict(one, "either")))
    rpsa = next(s for s in found if s.method == "fft+rpsa")

    def scores(run: RunResult, kind: str) -> dict[str, list[list[float]]]:
        assert run.samples is not None
        read: dict[str, list[list[float]]] = {}
        for line in run.samples.read_text().splitlines():
            sample = Sample(**json.loads(line))
            if sample.kind == kind:
                score = attack_score(sample, "either") if kind == "attack" else sample.score
                read.setdefault(sample.set, []).append([score or 0.0])
        return read

    before, after = (next(r for r in one if r.method == name) for name in ("original", "fft+rpsa"))
    slow = safety_tax_interval(
        reasoning_before=scores(before, "reasoning"),
        reasoning_after=scores(after, "reasoning"),
        attack_before=scores(before, "attack"),
        attack_after=scores(after, "attack"),
        replicates=2000,
    )
    assert rpsa.tax_interval == slow.interval is not None


def test_what_is_not_known_is_left_out(results: list[RunResult]) -> None:
    assert by_verdict(demo_results(), "thought") == []
    assert thoughts_apart(summarise(demo_results())) == []
    no_original = [run for run in results if not (run.is_original and run.base == "tiny:1")]
    assert {run.base for run in by_verdict(no_original, "thought")} == {"tiny:0", "tiny:2"}


def test_the_quadrants_of_a_study_sum_to_1(results: list[RunResult]) -> None:
    found = thoughts_apart(summarise(results))
    assert [one.summary.method for one in found] == list(SAFE)
    for one in found:
        assert sum(mean for mean, _ in one.shares.values()) == pytest.approx(1)
        assert (one.responses, one.without) == (3 * 80, 0)
        assert all(interval for _, interval in one.shares.values())
        for name in QUADRANTS:
            runs = [run.thoughts for run in one.summary.runs]
            slow = sum(t["direct"].shares[name].rate + t["wrapped"].shares[name].rate for t in runs if t) / 6
            assert one.shares[name][0] == pytest.approx(slow)


def test_the_mean_over_sets_of_one_run_covers() -> None:
    rng, held = random.Random(0), 0
    rates = (0.1, 0.3, 0.6)
    for _ in range(1000):
        sets = []
        for rate in rates:
            samples = [
                _sample("attack", "s", i, float(rng.random() < rate), 0.0, random.Random(0))
                for i in range(50)
            ]
            found = set_result(samples)
            assert found.figure is not None
            assert found.interval is not None
            sets.append(Share(found.figure, found.interval))
        _, interval = mean_of_sets([sets])
        assert interval is not None
        held += interval[0] <= sum(rates) / 3 <= interval[1]
    assert 0.93 <= held / 1000 <= 0.97


def test_the_report_shows_them(results: list[RunResult], tmp_path: Path) -> None:
    write_report(results, tmp_path, {"name": "x"})
    content = json.loads((tmp_path / "results.json").read_text())
    fft = next(row for row in content["thoughts"] if row["method"] == "fft")
    assert sum(one["mean"] for one in fft["quadrants"].values()) == pytest.approx(1)
    assert set(fft["asr"]) == set(VERDICTS)
    page, table = (tmp_path / "index.html").read_text(), (tmp_path / "table.md").read_text()
    for text in (page, table):
        assert "Thoughts and answers" in text
        assert "Broken responses" in text
        assert "STR by thought" in text
        assert f"{100 * fft['asr']['thought']['mean']:.1f}" in text
    console = Console(file=io.StringIO(), width=80)
    render_console(summarise(results), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{100 * fft['quadrants']['thought_unsafe']['mean']:.1f}" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_broken_responses_are_said(results: list[RunResult], tmp_path: Path) -> None:
    mean, interval = broken_rates(results[:1]) or (0.0, None)
    assert interval is not None
    assert 0 < interval[0] < mean < interval[1]
    assert any("many responses to attacks are broken" in line for line in warnings(summarise(results)))
    assert broken_rates(demo_results()) is None  # results of before it was measured
    assert not any("broken" in line for line in warnings(summarise(demo_results())))
    (tmp_path / "README.md").write_text("# Model\n\n## Results\n\nNothing.\n\n## Limits\n")
    card = card_with_results(tmp_path, measured(results[0]))
    assert f"Broken responses, in percent: {100 * mean:.1f} ({100 * interval[0]:.1f} to" in card
    assert f"looping {100 * mean:.1f}, truncated 0.0, empty 0.0, incoherent 0.0." in card
    of_thoughts = 100 * (results[0].thoughts or {})["direct"].asr["thought"].rate
    assert f"Attack success, in thoughts ↓: direct | {of_thoughts:.1f}" in card


def test_why_thoughts_were_not_judged_is_said_once() -> None:
    why = "the judge refusal judges answers, not thoughts"
    runs = [replace(run, no_thought_verdicts=why) for run in demo_results()]
    assert [line for line in warnings(summarise(runs)) if "Thoughts" in line] == [
        f"Thoughts were not judged: {why}."
    ]


def test_parts_are_read_back() -> None:
    share = BrokenShares(
        Share(0.5, (0.1, 0.9)), dict.fromkeys(("looping", "truncated", "empty", "incoherent"), 0.125)
    )
    assert BrokenShares.from_json(json.loads(json.dumps(share.to_json()))) == share
