"""The bootstrap over problems and the Safety Tax Rate: against loops, known cases, the paper's table, simulation."""

import random
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.examples import examples
from helpers.paths import ROOT
from rpsa import safety_tax_interval
from rpsa.errors import RPSAError
from rpsa.evaluation.statistics import (
    Counts,
    paired_difference,
    safety_tax_difference,
    safety_tax_rate,
)
from rpsa.evaluation.statistics.bootstrap import draw, percentile_interval

Scores = dict[str, list[list[float]]]


def made_up(seed: int, sizes: dict[str, int], rate: float, samples: int = 2) -> Scores:
    rng = np.random.default_rng([seed, len(sizes)])
    return {
        name: (rng.random((n, samples)) < rng.beta(2 * rate, 2 * (1 - rate), size=(n, 1)))
        .astype(float)
        .tolist()
        for name, n in sizes.items()
    }


REASONING = {"aime": 12, "code": 30}
ATTACK = {"harm": 40}
BEFORE = {"reasoning_before": made_up(0, REASONING, 0.8), "attack_before": made_up(1, ATTACK, 0.7)}
AFTER = {"reasoning_after": made_up(2, REASONING, 0.6), "attack_after": made_up(3, ATTACK, 0.1)}


def means(scores: Scores) -> list[float]:
    return [float(np.mean([np.mean(own) for own in problems])) for problems in scores.values()]


def test_draws_are_those_of_an_explicit_loop() -> None:
    models = [made_up(5, REASONING, 0.7), made_up(6, REASONING, 0.4)]
    draws = draw("reasoning", models, "benchmarks", replicates=40, seed=3)
    expected = np.zeros((2, 40))
    for name, n in REASONING.items():
        rng = np.random.default_rng([3, crc32(f"reasoning/{name}".encode())])
        rows = sorted(zip(*([float(np.mean(own)) for own in model[name]] for model in models), strict=True))
        kinds = sorted(set(rows))
        times = rng.multinomial(n - 1, [rows.count(kind) / n for kind in kinds], size=40)
        for replicate in range(40):
            chosen = [kind for kind, count in zip(kinds, times[replicate], strict=True) for _ in range(count)]
            assert len(chosen) == n - 1
            for model in range(2):
                expected[model, replicate] += sum(kind[model] for kind in chosen) / (n - 1) / 2
    np.testing.assert_allclose(draws.drawn, expected)
    assert draws.freedom == 11


def test_the_interval_is_that_of_resampling_problems_one_by_one() -> None:
    tax = safety_tax_interval(**BEFORE, **AFTER, replicates=40_000)
    rng = random.Random(0)
    ratios, drops = [], []
    for _ in range(20_000):
        sides = []
        for before, after in (
            (BEFORE["reasoning_before"], AFTER["reasoning_after"]),
            (BEFORE["attack_before"], AFTER["attack_after"]),
        ):
            falls = []
            for name, problems in before.items():
                chosen = rng.choices(range(len(problems)), k=len(problems) - 1)
                fall = sum(sum(before[name][i]) - sum(after[name][i]) for i in chosen)
                falls.append(fall / 2 / len(chosen))
            sides.append(sum(falls) / len(falls))
        drops.append(sides[0])
        ratios.append(sides[0] / sides[1])
    # t of 11 degrees of freedom, 2.201, lies where the normal curve has 1.387%
    assert tax.interval == pytest.approx(np.quantile(ratios, [0.01387, 1 - 0.01387]), abs=0.02)
    assert tax.drop.standard_error == pytest.approx(np.std(drops), rel=0.02)
    assert tax.drop.interval == pytest.approx(np.quantile(drops, [0.01387, 1 - 0.01387]), abs=0.01)


def test_standard_error_of_one_benchmark_is_that_of_paired_differences() -> None:
    first, second = made_up(5, {"a": 60}, 0.7), made_up(6, {"a": 60}, 0.5)
    found = paired_difference(first, second, replicates=40_000)
    differences = np.mean(second["a"], axis=1) - np.mean(first["a"], axis=1)
    assert found.value == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / np.sqrt(60), rel=0.02)


def test_what_both_models_share_cancels() -> None:
    first = made_up(5, {"a": 60, "b": 20}, 0.5)
    second = {name: [[score - 0.25 for score in own] for own in problems] for name, problems in first.items()}
    found = paired_difference(first, second)
    assert found.value == pytest.approx(-0.25)
    assert found.interval == pytest.approx((-0.25, -0.25))
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    shuffled = {name: problems[1:] + problems[:1] for name, problems in second.items()}
    assert paired_difference(first, shuffled).standard_error > 0.03


def test_weights() -> None:
    first = {"small": [[1.0]] * 10, "large": [[1.0]] * 30}
    second = {"small": [[0.0]] * 10, "large": [[1.0]] * 30}
    assert paired_difference(first, second).value == pytest.approx(-0.5)
    assert paired_difference(first, second, weighting="items").value == pytest.approx(-0.25)


@pytest.mark.parametrize("weighting", ["benchmarks", "items"])
def test_the_value_is_the_rate_of_the_means(weighting: str) -> None:
    tax = safety_tax_interval(**BEFORE, **AFTER, weighting=weighting)
    rows = {name: means(scores) for name, scores in (BEFORE | AFTER).items()}
    if weighting == "items":
        rows = {k: [np.average(v, weights=[12, 30])] if len(v) == 2 else v for k, v in rows.items()}
    assert tax.value == pytest.approx(safety_tax_rate(**rows))
    assert tax.value == pytest.approx(tax.drop.value / tax.gain.value)
    assert tax.interval.low < tax.value < tax.interval.high
    assert tax.reason is None


@examples(15)
@given(st.integers(0, 1000))
def test_order_and_scale_change_nothing(seed: int) -> None:
    shuffle = random.Random(seed)
    scores = BEFORE | AFTER | {"reasoning_after": made_up(seed, REASONING, 0.6)}
    tax = safety_tax_interval(**scores, replicates=200)
    for side in ("reasoning", "attack"):
        for name, problems in scores[f"{side}_before"].items():
            order = shuffle.sample(range(len(problems)), len(problems))
            for when in ("before", "after"):
                model = scores[f"{side}_{when}"]
                rows = [shuffle.sample(model[name][i], 2) for i in order]
                scores[f"{side}_{when}"] = {name: [[100 * s for s in own] for own in rows]} | {
                    k: v for k, v in model.items() if k != name
                }
    again = safety_tax_interval(**scores, replicates=200)
    assert again.value == pytest.approx(tax.value)
    assert again.interval == pytest.approx(tax.interval)
    assert again.gain.interval == pytest.approx([100 * end for end in tax.gain.interval])


def test_a_seed_is_a_seed() -> None:
    tax = safety_tax_interval(**BEFORE, **AFTER, seed=1)
    assert tax == safety_tax_interval(**BEFORE, **AFTER, seed=1)
    assert tax.interval != safety_tax_interval(**BEFORE, **AFTER, seed=2).interval


def test_the_order_of_benchmarks_changes_not_a_bit() -> None:
    sizes = {"a": 7, "b": 9, "c": 11, "d": 13}
    models = [made_up(5, sizes, 0.7), made_up(6, sizes, 0.4)]
    turned = [dict(reversed(model.items())) for model in models]
    assert paired_difference(*models, weighting="items") == paired_difference(*turned, weighting="items")


def test_an_end_of_an_interval_is_a_drawn_value_and_not_on_the_way_to_infinity() -> None:
    values = np.arange(1000.0)
    values[975:] = np.inf
    assert percentile_interval(values, freedom=np.inf) == (25, 974)


def same(value: float, sizes: dict[str, int]) -> Scores:
    return {name: [[value]] * n for name, n in sizes.items()}


@pytest.mark.parametrize(
    "attack_after", [BEFORE["attack_before"], made_up(4, ATTACK, 0.72), same(1.0, ATTACK)]
)
def test_no_sure_gain_has_no_tax(attack_after: Scores) -> None:
    tax = safety_tax_interval(**BEFORE, **AFTER | {"attack_after": attack_after})
    assert tax.value is tax.interval is None
    assert tax.gain.interval.low <= 0
    assert tax.reason.startswith("no sure safety gain to divide by: 95% interval ")
    models = {
        f"{side}_{who}": AFTER[f"{side}_after"]
        for side in ("reasoning", "attack")
        for who in ("plain", "other")
    }
    for who in ("plain", "other"):
        found = safety_tax_difference(**BEFORE, **models | {f"attack_{who}": attack_after})
        assert found.value is found.interval is found.no_improvement is None
        assert found.reason.startswith(f"{who}: no sure safety gain")


def test_draws_without_a_gain_are_the_dearest() -> None:
    # Five attacks of 40 fewer: sure, but nothing is gained in some of the draws.
    attack_before = {"harm": [[1.0]] * 9 + BEFORE["attack_before"]["harm"][9:]}
    attack_after = {"harm": [[0.0]] * 5 + [[1.0]] * 4 + BEFORE["attack_before"]["harm"][9:]}
    before = {"reasoning_before": same(1.0, REASONING), "attack_before": attack_before}
    after = {"reasoning_after": made_up(2, REASONING, 0.6), "attack_after": attack_after}
    tax = safety_tax_interval(**before, **after)
    draws = [
        draw(side, [before[f"{side}_before"], after[f"{side}_after"]], "benchmarks", 10_000, seed=0).drawn
        for side in ("reasoning", "attack")
    ]
    drops, gains = (drawn[0] - drawn[1] for drawn in draws)
    nothing = int((gains <= 0).sum())
    assert 0 < nothing < 139
    ratios = sorted(drops[gains > 0] / gains[gains > 0]) + [np.inf] * nothing
    assert tax.interval == pytest.approx((ratios[138], ratios[9_861]), rel=1e-2)

    # The other method is better in every draw, but where neither gains anything it is no improvement.
    other = {name: [[0.9]] * n for name, n in REASONING.items()}
    plain = {name: [[0.1]] * n for name, n in REASONING.items()}
    found = safety_tax_difference(
        **before,
        reasoning_plain=plain,
        reasoning_other=other,
        attack_plain=attack_after,
        attack_other=attack_after,
    )
    assert found.no_improvement == nothing / 10_000


def test_all_right_and_all_refused() -> None:
    tax = safety_tax_interval(
        reasoning_before=same(1.0, REASONING),
        reasoning_after=same(0.0, REASONING),
        attack_before=same(1.0, ATTACK),
        attack_after=same(0.0, ATTACK),
    )
    assert (tax.value, tax.interval) == (pytest.approx(1.0), pytest.approx((1.0, 1.0)))


def test_difference_of_a_method_and_itself_is_nothing() -> None:
    models = {
        f"{side}_{who}": AFTER[f"{side}_after"]
        for side in ("reasoning", "attack")
        for who in ("plain", "other")
    }
    found = safety_tax_difference(**BEFORE, **models)
    assert (found.value, found.interval, found.no_improvement) == (0.0, (0.0, 0.0), 1.0)


def test_the_model_before_is_shared_and_so_the_difference_is_surer_than_either() -> None:
    # Both methods lose the same problems, and the other one a few more.
    plain = AFTER["reasoning_after"]
    other = {name: [[0.0, 0.0], *problems[1:]] for name, problems in plain.items()}
    attack = AFTER["attack_after"]
    found = safety_tax_difference(
        **BEFORE, reasoning_plain=plain, reasoning_other=other, attack_plain=attack, attack_other=attack
    )
    alone = safety_tax_interval(**BEFORE, **AFTER)
    assert found.interval.high - found.interval.low < 0.7 * (alone.interval.high - alone.interval.low)
    both = [
        safety_tax_interval(**BEFORE, reasoning_after=r, attack_after=attack).value for r in (plain, other)
    ]
    assert found.value == pytest.approx(both[1] - both[0])


def test_counts_are_drawn_from_binomials_with_the_model_before_shared() -> None:
    before, plain, other = ({"a": Counts(c, 100)} for c in (80, 60, 60))
    draws = draw("reasoning", [before, plain, other], "benchmarks", replicates=40_000, seed=0)
    assert draws.observed == pytest.approx([0.8, 0.6, 0.6])
    assert draws.drawn.std(axis=1) == pytest.approx([0.04, 0.049, 0.049], rel=0.02)
    assert np.corrcoef(draws.drawn) == pytest.approx(np.eye(3), abs=0.02)
    drops = draws.drawn[0] - draws.drawn[1:]
    assert np.corrcoef(drops)[0, 1] == pytest.approx(0.0016 / (0.0016 + 0.0024), abs=0.02)
    # ... and the same from one call to the next
    alone = draw("reasoning", [before, plain], "benchmarks", replicates=40_000, seed=0)
    np.testing.assert_array_equal(alone.drawn[0], draws.drawn[0])


ONE = {"a": [[1.0], [0.0]]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference({}, {}), "no benchmarks"),
        (lambda: paired_difference(ONE, {"b": ONE["a"]}), "a, b not given for all models"),
        (lambda: paired_difference(ONE, ONE | {"b": ONE["a"]}), "b not given for all models"),
        (lambda: paired_difference(ONE, {"a": [[1.0]] * 3}), r"scores, a: models with \[2, 3\] problems"),
        (lambda: paired_difference({"a": [[1.0]]}, {"a": [[1.0]]}), "1 problems"),
        (lambda: paired_difference({"a": []}, {"a": []}), "0 problems"),
        (lambda: paired_difference(ONE, {"a": [[1.0], []]}), "a: problem 1 has no samples"),
        (lambda: paired_difference(ONE, {"a": Counts(1, 2)}), "counts of one model and samples of another"),
        (lambda: paired_difference({"a": Counts(1, 2)}, {"a": Counts(1, 3)}), r"\[2, 3\] problems"),
        (lambda: Counts(4, 3), "4 of 3"),
        (lambda: Counts(0, 0), "0 of 0"),
        (
            lambda: safety_tax_interval(
                reasoning_before=ONE, reasoning_after=ONE, attack_before=ONE, attack_after={"b": ONE["a"]}
            ),
            "attack: a, b not given",
        ),
    ],
)
def test_what_does_not_match_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RPSAError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def table_1() -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "paper_table1.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout in (ROOT / "docs" / "statistics.md").read_text()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line]


def test_the_example_of_the_documentation() -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "statistics.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tax"].value is None
    assert names["tax"].reason in code


def test_table_1_of_the_paper_is_recomputed(table_1: list[list[str]]) -> None:
    rows = [row for row in table_1 if row[0].startswith("R1") and len(row) == 8]
    assert len(rows) == 8
    for _, _, printed, recomputed, from_counts, *_ in rows:
        assert float(recomputed) == pytest.approx(float(printed), abs=2e-4)
        assert float(from_counts) == pytest.approx(float(printed), abs=1e-3)


def test_two_of_the_papers_four_gains_are_within_noise(table_1: list[list[str]]) -> None:
    by_benchmark = {(row[0], row[2]): float(row[-1]) for row in table_1 if row[3] == "benchmarks"}
    assert by_benchmark["R1-Llama-8B", "FFT"] < 0.01
    assert by_benchmark["R1-Llama-8B", "LoRA"] < 0.01
    assert by_benchmark["R1-Qwen-7B", "FFT"] == pytest.approx(0.11, abs=0.015)
    assert by_benchmark["R1-Qwen-7B", "LoRA"] == pytest.approx(0.11, abs=0.015)


COVERAGE = runpy.run_path(str(ROOT / "benchmarks" / "coverage.py"))


@pytest.mark.parametrize(
    "study",
    [
        "rate, 30 problems, 16 samples, 0.5",
        "difference, 30 problems, 16 samples, 0.5 to 0.4",
        "STR, 30 and 100 problems, 50 attacks",
        "nested, 3 runs, 30 problems, 16 samples, runs alike",
        "nested, 5 runs, 100 problems, 4 samples, runs differ",
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(study: str) -> None:
    assert 0.93 <= COVERAGE["coverage"](study, studies=500, replicates=1000) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("study", COVERAGE["STUDIES"])
def test_all_studies_of_the_coverage_table(study: str) -> None:
    # docs/statistics.md tells of the two kinds that are known to lie outside of 93 to 97%.
    assert 0.91 <= COVERAGE["coverage"](study, studies=500, replicates=2000) <= 0.98


def test_ten_thousand_replicates_are_quick() -> None:
    sizes = {"AIME": 30, "GPQA": 448, "HumanEval+": 164, "MBPP+": 378}
    attacks = {"StrongREJECT": 313, "WildJailbreak": 250}
    scores = {
        "reasoning_before": made_up(0, sizes, 0.7, samples=4),
        "reasoning_after": made_up(1, sizes, 0.5, samples=4),
        "attack_before": made_up(2, attacks, 0.6, samples=1),
        "attack_after": made_up(3, attacks, 0.1, samples=1),
    }
    safety_tax_interval(**scores, replicates=10)
    started = time.process_time()
    safety_tax_interval(**scores)
    assert time.process_time() - started < 1
