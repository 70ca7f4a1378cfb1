"""Verdicts on claims: on the side of the interval, or none."""

from dataclasses import replace

import pytest

from helpers.made_up_results import made_up
from rpsa.evaluation.results import SetResult
from rpsa.report.claims import CLAIMS, Claim, judge_claims
from rpsa.report.paper_figures import ablation
from rpsa.report.summaries import RunResult, summarise
from rpsa.report.sweeps import sweep_figures

LESS = Claim("less", "here", "fft+rpsa", "fft")


def run(method: str, base: int, reasoning: float, asr: float = 0.1, seed: int = 0) -> RunResult:
    made = made_up(method, f"tiny:{base}", seed, None if method == "original" else 1e-3, "tiny:refusals")
    return replace(made, reasoning={"a": reasoning, "mean": reasoning}, asr={"d": asr, "mean": asr})


def study(*drops: tuple[float, float]) -> list[RunResult]:
    """Untouched models of accuracy .9 and ASR .6, and by base the drops of fft and fft+rpsa."""
    return [
        one
        for base, (fft, rpsa) in enumerate(drops)
        for one in (
            run("original", base, 0.9, 0.6),
            run("fft", base, 0.9 - fft),
            run("fft+rpsa", base, 0.9 - rpsa),
        )
    ]


@pytest.mark.parametrize(
    ("drops", "verdict"),
    [
        ([(0.3, 0.1), (0.31, 0.1), (0.29, 0.1)], "supported"),
        ([(0.1, 0.3), (0.1, 0.31), (0.1, 0.29)], "contradicted"),
        ([(0.3, 0.1), (0.1, 0.3), (0.2, 0.2)], "undecided"),
        ([(0.3, 0.1), (0.3, 0.1)], "undecided"),  # two pairs have no interval
    ],
)
def test_a_verdict_needs_the_whole_interval(drops: list[tuple[float, float]], verdict: str) -> None:
    [judged] = judge_claims(study(*drops), [LESS])
    assert judged.verdict == verdict
    assert judged.runs == len(drops)
    assert judged.difference == pytest.approx(sum((b - a) / 0.5 for a, b in drops) / len(drops))


def test_reasoning_is_better_when_it_is_higher() -> None:
    claim = Claim("the tax is real", "here", "original", "fft", "reasoning")
    assert judge_claims(study((0.3, 0), (0.31, 0), (0.29, 0)), [claim])[0].verdict == "supported"
    assert judge_claims(study((-0.03, 0), (-0.04, 0), (-0.05, 0)), [claim])[0].verdict == "contradicted"


def test_only_runs_of_the_same_seed_are_compared_and_sweeps_do_not_count() -> None:
    results = study((0.3, 0.1), (0.31, 0.1), (0.29, 0.1))
    others = [replace(r, seed=1) for r in results if r.method == "fft"]
    swept = [
        replace(r, sweep="rank", reasoning={"a": 0.0, "mean": 0.0}) for r in results if not r.is_original
    ]
    [judged] = judge_claims([*results, *others, *swept], [LESS])
    assert judged.runs == 3
    assert judged.verdict == "supported"


def test_lora_is_paired_by_seed_whatever_its_learning_rate() -> None:
    claim = Claim("less", "here", "lora", "fft")
    originals = [run("original", 0, 0.9, 0.6)]
    plain = [run("fft", 0, 0.6, seed=seed) for seed in (0, 1, 2)]
    lora = [replace(run("lora", 0, 0.7 + 0.05 * seed, seed=seed), lr=1e-2) for seed in (0, 1, 2)]
    [judged] = judge_claims([*originals, *plain, *lora], [claim])
    assert judged.runs == 3
    assert judged.difference == pytest.approx(-(0.1 + 0.15 + 0.2) / 3 / 0.5)


def test_on_a_grid_of_learning_rates_runs_of_one_rate_are_paired() -> None:
    """LoRA is worse by .1 at both rates, and both methods are better at the second."""
    claim = Claim("less", "here", "lora", "fft")
    results = [run("original", base, 0.9, 0.6) for base in range(3)]
    for base in range(3):
        for rate, accuracy in ((1e-3, 0.5), (2e-3, 0.8)):
            results += [
                replace(run("lora", base, accuracy - 0.1 + 0.001 * base), lr=rate),
                replace(run("fft", base, accuracy), lr=rate),
            ]
    [judged] = judge_claims(results, [claim])
    assert judged.runs == 6
    assert judged.difference == pytest.approx((0.1 - 0.001) / 0.5)
    assert judged.verdict == "contradicted"
    own = [replace(one, lr=10 * one.lr) if one.method == "lora" and one.lr else one for one in results]
    assert judge_claims(own, [claim])[0].verdict == "not tested"  # two rates against two others


def test_what_was_not_run_is_not_tested() -> None:
    verdicts = {judged.claim: judged.verdict for judged in judge_claims(study((0.3, 0.1)))}
    assert set(verdicts) == set(CLAIMS)
    assert [v for c, v in verdicts.items() if "noise_k" in (c.better, c.worse)] == []
    assert verdicts[CLAIMS[1]] == "not tested"


def test_the_ablation_needs_three_methods() -> None:
    results = study((0.3, 0.1), (0.31, 0.1), (0.29, 0.1))
    assert ablation(summarise(results)) is None
    third = [replace(r, method="fft+random") for r in results if r.method == "fft"]
    figure = ablation(summarise([*results, *third]))
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "fft",
        "fft+rpsa",
        "fft+random",
    ]


def test_a_sweep_has_a_mark_for_each_method_at_each_point() -> None:
    results = study((0.3, 0.1), (0.31, 0.1), (0.29, 0.1))
    swept = [
        replace(one, sweep="rank", point={"lora.r": rank, "lora.target_modules": ["q_proj", "up_proj"]})
        for rank in (1, 8)
        for one in results
        if not one.is_original
    ]
    [figure] = sweep_figures([*results, *swept]).values()
    axes = figure.axes[0]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["1", "8"]
    assert axes.get_title() == "q_proj+up_proj"
    marks = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert len(marks) == 2
    heights = {round(float(y), 6) for line in marks for y in line.get_ydata()}
    taxes = {round(s.tax, 6) for s in summarise(results) if s.tax is not None}
    assert heights == taxes


@pytest.mark.parametrize("figure", ["STR", "reasoning", "ASR"])
def test_a_rate_that_does_not_stand_alone_tests_no_claim(figure: str) -> None:
    claim = replace(LESS, figure=figure)
    kind = "reasoning" if figure == "reasoning" else "attack"
    results = study((0.3, 0.1), (0.31, 0.1), (0.29, 0.1))
    assert judge_claims(results, [claim])[0].runs == 3
    sets = {kind: {"d": SetResult(kind, 9, 9, 0.1, truncated=0.9)}}
    unanswered = [replace(r, sets=sets) if (r.method, r.base) == ("fft", "tiny:1") else r for r in results]
    assert judge_claims(unanswered, [claim])[0].runs == 2


def test_a_sweeps_figure_has_no_str_where_a_rate_does_not_stand_alone() -> None:
    swept = [
        replace(
            run("lora", 0, 0.8, seed=seed),
            sweep="rank",
            point={"lora.r": seed},
            sets={"attack": {"d": SetResult("attack", 9, 9, 0.1, empty=0.9 * seed)}},
        )
        for seed in (0, 1)
    ]
    figure = sweep_figures([run("original", 0, 0.9, 0.6), *swept])["rank"]
    [line] = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert line.get_xdata()[0] == 0  # the second point has none
