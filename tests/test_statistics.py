import math
import random

import pytest

from rpsa.errors import RPSAError
from rpsa.evaluation.statistics import mean_interval, ratio_interval, safety_tax, safety_tax_rate

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
