"""Rates of one model, two models on the same problems, several runs: against slow loops, formulas and scipy."""

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rpsa.errors import RPSAError
from rpsa.evaluation.statistics import (
    mcnemar,
    mean_interval,
    mean_of_rates,
    minimum_detectable_effect,
    nested_mean,
    pass_at_k,
    rate,
    ratio_interval,
    safety_tax,
    safety_tax_rate,
)

# Table 1 of the paper: AIME, GPQA, HE+, MBPP+ | StrongReject, WildJailbreak | STR
ORIGINAL = {
    "llama": ([53.33, 53.79, 78.05, 82.28], [64.22, 49.60]),
    "qwen": ([60.00, 50.22, 84.15, 79.37], [64.22, 53.60]),
}
TABLE_1 = [
    ("llama", [10.00, 26.56, 26.83, 12.43], [6.71, 3.20], 0.9221),
    ("llama", [26.67, 36.38, 40.24, 36.51], [2.87, 1.60], 0.5837),
    ("llama", [33.33, 49.33, 65.85, 67.46], [1.28, 3.20], 0.2354),
    ("llama", [36.67, 52.68, 79.88, 79.63], [0.00, 2.40], 0.0834),
    ("qwen", [43.33, 49.11, 66.46, 60.05], [1.28, 8.40], 0.2533),
    ("qwen", [46.67, 51.78, 73.78, 64.29], [0.63, 8.00], 0.1704),
    ("qwen", [43.33, 48.44, 75.61, 57.14], [0.64, 9.20], 0.2279),
    ("qwen", [53.33, 50.00, 73.17, 66.93], [0.96, 11.20], 0.1434),
]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(sorted), min_size=1, max_size=5)
)
def test_the_mean_of_rates_adds_distances_as_squares(found: list[list[float]]) -> None:
    mean, (low, high) = mean_of_rates([(value, (lower, upper)) for lower, value, upper in found])
    n = len(found)
    assert mean == pytest.approx(sum(value for _, value, _ in found) / n)
    below = sum((value - lower) ** 2 for lower, value, _ in found) ** 0.5 / n
    above = sum((upper - value) ** 2 for _, value, upper in found) ** 0.5 / n
    assert low == pytest.approx(max(0.0, mean - below), abs=1e-12)
    assert high == pytest.approx(min(1.0, mean + above), abs=1e-12)


@pytest.mark.parametrize(("model", "reasoning", "attack", "expected"), TABLE_1)
def test_table_1_of_the_paper(
    model: str, reasoning: list[float], attack: list[float], expected: float
) -> None:
    before = ORIGINAL[model]
    value = safety_tax_rate(
        reasoning_before=before[0], reasoning_after=reasoning, attack_before=before[1], attack_after=attack
    )
    assert value == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("after", [[0.5], [0.7]])
def test_no_safety_gain_has_no_price(after: list[float]) -> None:
    sides = {
        "reasoning_before": [0.9],
        "reasoning_after": [0.4],
        "attack_before": [0.5],
        "attack_after": after,
    }
    assert math.isnan(safety_tax_rate(**sides))
    value, reason = safety_tax(**sides)
    assert value is None
    assert reason is not None
    assert "did not fall" in reason


def test_reasoning_that_rose_has_a_negative_tax() -> None:
    value, reason = safety_tax(
        reasoning_before=[0.5], reasoning_after=[0.6], attack_before=[0.5], attack_after=[0.1]
    )
    assert value == pytest.approx(-0.25)
    assert reason is None


@pytest.mark.parametrize(("before", "after"), [([], []), ([0.5], [0.5, 0.4])])
def test_unmatched_benchmarks_are_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(RPSAError, match="reasoning_before"):
        safety_tax_rate(
            reasoning_before=before, reasoning_after=after, attack_before=[0.5], attack_after=[0.1]
        )


def test_mean_interval_is_students() -> None:
    # By hand: mean 2, s 1, t(2) = 4.302653.
    low, high = mean_interval([1.0, 2.0, 3.0]) or (0, 0)
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3))
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3))
    assert mean_interval([1.0, 2.0]) is None


def test_ratio_interval_is_the_mean_interval_when_all_gains_are_one() -> None:
    drops = [0.1, 0.4, 0.2, 0.25]
    assert ratio_interval(drops, [1.0] * 4) == pytest.approx(mean_interval(drops))


@pytest.mark.parametrize("runs", [3, 9])
def test_ratio_interval_holds_the_truth_as_often_as_it_says(runs: int) -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        gains = [draw.gauss(0.6, 0.05) for _ in range(runs)]
        drops = [0.3 * gain + draw.gauss(0, 0.1) for gain in gains]
        low, high = ratio_interval(drops, gains) or (0, 0)
        held += low <= 0.3 <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_ratio_interval_needs_runs_and_a_gain() -> None:
    assert ratio_interval([0.1, 0.2], [0.5, 0.5]) is None
    assert ratio_interval([0.1, 0.2, 0.3], [0.1, -0.1, 0.0]) is None


def test_nested_mean_of_problems_that_are_all_alike_is_that_of_its_runs() -> None:
    runs = [0.1, 0.4, 0.2, 0.25]
    found = nested_mean([[[score]] * 5 for score in runs])
    assert found.value == pytest.approx(np.mean(runs))
    assert found.interval == pytest.approx(mean_interval(runs))


def test_nested_mean_of_runs_that_are_all_alike_is_that_of_its_problems() -> None:
    problems = [0.1, 0.4, 0.2, 0.25]
    found = nested_mean([[[score] for score in problems]] * 3)
    assert found.standard_error == pytest.approx(np.std(problems, ddof=1) / 2)
    assert found.interval == pytest.approx(mean_interval(problems))


@given(st.integers(3, 5), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_nested_mean_has_the_variance_components_of_a_two_way_table(
    runs: int, problems: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).normal(size=(runs, problems, 2))
    table = scores.mean(axis=2)
    grand = table.mean()
    interaction = between_runs = between_problems = 0.0
    for r in range(runs):
        between_runs += problems * (table[r].mean() - grand) ** 2 / (runs - 1)
        for p in range(problems):
            residual = table[r, p] - table[r].mean() - table[:, p].mean() + grand
            interaction += residual**2 / ((runs - 1) * (problems - 1))
    for p in range(problems):
        between_problems += runs * (table[:, p].mean() - grand) ** 2 / (problems - 1)
    of_runs = max(0.0, between_runs - interaction) / (runs * problems)
    found = nested_mean(scores.tolist())
    assert found.value == pytest.approx(grand)
    assert found.standard_error**2 == pytest.approx(of_runs + between_problems / (runs * problems))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "0 runs"),
        ([[[1], [0]]] * 2, "2 runs"),
        ([[[1]]] * 3, "1 problems"),
        ([[[1], [0]], [[1], [0]], [[1], [0], [1]]], r"\[2, 3\] problems"),
        ([[[1], [0]], [[1], []], [[1], [0]]], "run 1: problem 1 has no samples"),
    ],
)
def test_nested_mean_refuses(scores: list, message: str) -> None:
    with pytest.raises(RPSAError, match=message):
        nested_mean(scores)


samples = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5)
problems = st.lists(samples, min_size=1, max_size=12)


@given(problems)
def test_rate_is_clustered_by_problem(problems: list[list[float]]) -> None:
    found = rate(problems)
    n = len(problems)
    assert found.value == pytest.approx(sum(sum(s) / len(s) for s in problems) / n)
    if n == 1:
        assert math.isnan(found.standard_error)
        return
    # The sandwich estimator, in full: products of all pairs of samples of the same problem.
    total = 0.0
    for own in problems:
        for a, b in itertools.product(own, own):
            total += (a - found.value) * (b - found.value) / len(own) ** 2
    assert found.standard_error**2 == pytest.approx(total / (n * (n - 1)), abs=1e-15)


@given(problems, st.randoms())
def test_rate_has_bounds_and_no_order(problems: list[list[float]], draw: random.Random) -> None:
    found = rate(problems)
    low, high = found.interval
    assert 0 <= low <= found.value <= high <= 1
    assert high - low > 0.01  # even where all is right or all is wrong
    shuffled = [draw.sample(own, len(own)) for own in draw.sample(problems, len(problems))]
    again = rate(shuffled)
    assert again.value == pytest.approx(found.value)
    assert again.interval == pytest.approx(found.interval)
    mirrored = rate([[1 - score for score in own] for own in problems])
    assert mirrored.interval == pytest.approx((1 - high, 1 - low))


def wilson(right: int, n: int) -> tuple[float, float]:
    found = binomtest(right, n).proportion_ci(method="wilson")
    return found.low, found.high


@given(st.integers(1, 400), st.data())
def test_one_sample_a_problem_is_wilsons(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    found = rate([[1.0]] * right + [[0.0]] * (n - right)).interval
    # The ends are where (p_hat - p)^2 = z^2 p (1 - p) / n.
    for p in found:
        assert (right / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-4, abs=1e-12)
    assert found == pytest.approx(wilson(right, n), abs=1e-12)


def test_several_samples_narrow_the_interval_as_far_as_they_differ() -> None:
    single = rate([[1.0], [0.0]] * 20)
    copies = rate([[1.0] * 4, [0.0] * 4] * 20)  # tell no more than one sample each
    mixed = rate(
        [[1.0, 0.0, 1.0, 0.0]] * 39 + [[1.0, 0.0, 0.0, 0.0]]
    )  # 160 independent samples, as far as seen

    def width(p: float, n: float) -> float:
        low, high = wilson(round(p * n), round(n))
        return high - low

    assert copies.interval.high - copies.interval.low == pytest.approx(
        single.interval.high - single.interval.low, rel=0.04
    )  # Student's t in place of the normal curve
    assert mixed.interval.high - mixed.interval.low == pytest.approx(width(0.5, 160), rel=0.04)


def test_all_wrong_tells_of_problems_not_of_samples() -> None:
    assert rate([[0.0] * 16] * 30).interval == pytest.approx(wilson(0, 30), abs=1e-12)
    assert rate([[1.0] * 16] * 30).interval == pytest.approx(wilson(30, 30), abs=1e-12)
    # one problem, one effective sample: 1/2 -+ (1.96 sqrt(1 + 1.96^2) / 2) / (1 + 1.96^2)
    assert rate([[1.0, 0.0]]).interval == pytest.approx((0.0546, 0.9454), abs=1e-4)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=5), min_size=2, max_size=4))
def test_pass_at_k_is_the_mean_over_all_choices_of_k(problems: list[list[float]]) -> None:
    for k in (1, 2, 3):
        chances = [np.mean([max(choice) for choice in itertools.combinations(own, k)]) for own in problems]
        assert pass_at_k(problems, k).value == pytest.approx(np.mean(chances))
    assert pass_at_k(problems, 1).standard_error == pytest.approx(rate(problems).standard_error)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_the_binomial_test_of_the_discordant(pairs: list[tuple[bool, bool]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = mcnemar(first, second)
    discordant = found.only_first + found.only_second
    assert discordant == sum(a != b for a, b in pairs)
    expected = binomtest(found.only_first, discordant).pvalue if discordant else 1.0
    assert found.p_value == pytest.approx(expected)
    assert mcnemar(second, first).p_value == found.p_value


def test_mcnemar_is_the_share_of_swaps_that_are_as_lopsided() -> None:
    first, second = [1, 1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 0]
    lopsided = [
        abs(sum(signs)) >= 4 for signs in itertools.product([-1, 1], repeat=6)
    ]  # 5 only the first, 1 only the second
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (5, 1)
    assert found.p_value == pytest.approx(np.mean(lopsided))


@pytest.mark.parametrize(
    ("problems", "samples", "shared"),
    [(400, 1, 0.0), (400, 1, 1.0), (300, 4, 0.0), (300, 4, 1.0)],
)
def test_minimum_detectable_effect_is_found_four_times_in_five(
    problems: int, samples: int, shared: float
) -> None:
    effect = minimum_detectable_effect(problems, samples, rate=0.5, between=0.4, shared=shared)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        ease = rng.beta(0.75, 0.75, size=problems)  # correlation of two samples: 1 / (1 + .75 + .75) = .4
        other = ease if shared else rng.beta(0.75, 0.75, size=problems)
        # move both rates towards an effect of this size, centred on one half
        first = rng.binomial(samples, ease * (1 - effect)) / samples
        second = rng.binomial(samples, effect + other * (1 - effect)) / samples
        differences = second - first
        found += abs(differences.mean()) > 1.96 * differences.std(ddof=1) / math.sqrt(problems)
    assert 0.75 <= found / 1000 <= 0.87


def test_minimum_detectable_effect_by_hand() -> None:
    # AIME, one sample: 2.8016 sqrt(2 x .25 / 30); a model that always answers alike gains nothing from more samples.
    assert minimum_detectable_effect(30) == pytest.approx(0.3617, abs=1e-4)
    assert minimum_detectable_effect(30, 16, between=1.0) == minimum_detectable_effect(30, between=1.0)
    assert minimum_detectable_effect(30, 16, between=0.0) == pytest.approx(minimum_detectable_effect(30) / 4)
    assert minimum_detectable_effect(30, 16, shared=0.8) < minimum_detectable_effect(30, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate([]), "no problems"),
        (lambda: rate([[1], []]), "problem 1 has no samples"),
        (lambda: rate([[50.0]]), "not percent"),
        (lambda: rate([[math.nan]]), "between 0 and 1"),
        (lambda: pass_at_k([[1, 0], [1]], 2), "k <= 1"),
        (lambda: pass_at_k([[1, 0]], 0), "k = 0"),
        (lambda: pass_at_k([[0.5]], 1), "neither 0 nor 1"),
        (lambda: mcnemar([], []), "0 and 0 problems"),
        (lambda: mcnemar([1], [1, 0]), "1 and 2 problems"),
        (lambda: mcnemar([0.5], [1]), "paired_difference"),
        (lambda: minimum_detectable_effect(0), "0 problems"),
        (lambda: minimum_detectable_effect(9, rate=50), "fractions"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RPSAError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
