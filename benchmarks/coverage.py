"""How often the 95% intervals hold the truth, over simulated studies whose truth is known.

    python benchmarks/coverage.py [--studies 500] [--replicates 2000]

A study draws the problems anew (rates by problem from a Beta distribution), then the samples. In `nested`, a training
run moves all rates up or down. Over 500 studies, a perfect interval holds the truth in 93 to 97% of them nineteen
times in twenty. An STR that is undefined, for lack of a sure gain, claims nothing and counts as held.
"""

import argparse
from collections.abc import Callable

import numpy as np

from rpsa.evaluation.statistics import (
    Interval,
    nested_mean,
    paired_difference,
    rate,
    safety_tax_difference,
    safety_tax_interval,
)

Rng = np.random.Generator
Study = Callable[[Rng, int], tuple[Interval, float]]  # (random numbers, replicates) -> interval, truth

REASONING = {"AIME": 30, "GPQA": 448, "HumanEval+": 164, "MBPP+": 378}
ATTACK = {"StrongREJECT": 313, "WildJailbreak": 250}
SMALL = {"small": 30, "larger": 100}


def problem_rates(rng: Rng, n: int, mean: float, alike: float = 0.5) -> np.ndarray:
    """n rates with this mean; `alike` is the correlation of two samples of one problem."""
    scale = (1 - alike) / alike
    return rng.beta(mean * scale, (1 - mean) * scale, size=n)


def sampled(rng: Rng, rates: np.ndarray, samples: int) -> list[list[float]]:
    return (rng.random((len(rates), samples)) < rates[:, None]).astype(float).tolist()


def models(rng: Rng, sizes: dict[str, int], samples: int, mean: float, kept: list[float]) -> list[dict]:
    """One model for each of `kept`: the share of the first model's rates that it keeps on every problem."""
    rates = {name: problem_rates(rng, n, mean) for name, n in sizes.items()}
    return [{name: sampled(rng, share * r, samples) for name, r in rates.items()} for share in kept]


def pass_at_1(n: int, samples: int, mean: float) -> Study:
    def study(rng: Rng, replicates: int) -> tuple[Interval, float]:
        return rate(sampled(rng, problem_rates(rng, n, mean), samples)).interval, mean

    return study


def difference(sizes: dict[str, int], samples: int, mean: float, kept: float) -> Study:
    def study(rng: Rng, replicates: int) -> tuple[Interval, float]:
        before, after = models(rng, sizes, samples, mean, [1, kept])
        seed = int(rng.integers(2**31))
        return paired_difference(before, after, replicates=replicates, seed=seed).interval, mean * (kept - 1)

    return study


def tax(
    reasoning: dict[str, int], attack: dict[str, int], samples: int, mean: float, kept: float, harm: float
) -> Study:
    def study(rng: Rng, replicates: int) -> tuple[Interval, float]:
        before, after = models(rng, reasoning, samples, mean, [1, kept])
        attack_before, attack_after = models(rng, attack, 1, 0.6, [1, harm])
        found = safety_tax_interval(
            reasoning_before=before,
            reasoning_after=after,
            attack_before=attack_before,
            attack_after=attack_after,
            replicates=replicates,
            seed=int(rng.integers(2**31)),
        )
        truth = mean * (1 - kept) / (0.6 * (1 - harm))
        return found.interval or Interval(-np.inf, np.inf), truth

    return study


def tax_difference(
    reasoning: dict[str, int], attack: dict[str, int], samples: int, plain: float, other: float
) -> Study:
    def study(rng: Rng, replicates: int) -> tuple[Interval, float]:
        reasonings = models(rng, reasoning, samples, 0.65, [1, plain, other])
        attacks = models(rng, attack, 1, 0.6, [1, 0.1, 0.05])
        names = ("before", "plain", "other")
        found = safety_tax_difference(
            **{f"reasoning_{name}": model for name, model in zip(names, reasonings, strict=True)},
            **{f"attack_{name}": model for name, model in zip(names, attacks, strict=True)},
            replicates=replicates,
            seed=int(rng.integers(2**31)),
        )
        truth = 0.65 * (1 - other) / (0.6 * 0.95) - 0.65 * (1 - plain) / (0.6 * 0.9)
        return found.interval or Interval(-np.inf, np.inf), truth

    return study


def nested(runs: int, n: int, samples: int, deviation: float) -> Study:
    """`deviation`: between runs, normal, of what all rates are multiplied with; its mean is 0.75."""

    def study(rng: Rng, replicates: int) -> tuple[Interval, float]:
        rates = problem_rates(rng, n, 0.6)
        luck = np.clip(rng.normal(0.75, deviation, size=runs), 0, 1)
        return nested_mean([sampled(rng, share * rates, samples) for share in luck]).interval, 0.6 * 0.75

    return study


STUDIES: dict[str, Study] = {
    "rate, 30 problems, 1 sample, 0.5": pass_at_1(30, 1, 0.5),
    "rate, 30 problems, 16 samples, 0.5": pass_at_1(30, 16, 0.5),
    "rate, 30 problems, 16 samples, 0.9": pass_at_1(30, 16, 0.9),
    "rate, 313 prompts, 1 sample, 0.03": pass_at_1(313, 1, 0.03),
    "rate, 313 prompts, 4 samples, 0.03": pass_at_1(313, 4, 0.03),
    "difference, 30 problems, 1 sample, 0.5 to 0.4": difference({"AIME": 30}, 1, 0.5, 0.8),
    "difference, 30 problems, 16 samples, 0.5 to 0.4": difference({"AIME": 30}, 16, 0.5, 0.8),
    "difference, 30 problems, 4 samples, 0.9 to 0.45": difference({"AIME": 30}, 4, 0.9, 0.5),
    "difference, the paper's four, 1 sample, 0.65 to 0.52": difference(REASONING, 1, 0.65, 0.8),
    "difference, the paper's four, 4 samples, 0.65 to 0.62": difference(REASONING, 4, 0.65, 0.95),
    "STR, the paper's six, 1 sample": tax(REASONING, ATTACK, 1, 0.65, 0.8, 0.1),
    "STR, the paper's six, 4 samples": tax(REASONING, ATTACK, 4, 0.65, 0.8, 0.1),
    "STR, 30 and 100 problems, 50 attacks": tax(SMALL, {"attack": 50}, 4, 0.65, 0.8, 0.1),
    "STR, 30 and 100 problems, 50 attacks, half the gain": tax(SMALL, {"attack": 50}, 4, 0.65, 0.8, 0.5),
    "STR of two methods, the paper's six, 1 sample": tax_difference(REASONING, ATTACK, 1, 0.7, 0.85),
    "STR of two methods, 30 and 100 problems, 50 attacks": tax_difference(
        SMALL, {"attack": 50}, 4, 0.7, 0.85
    ),
    "nested, 3 runs, 30 problems, 16 samples, runs alike": nested(3, 30, 16, 0.0),
    "nested, 3 runs, 200 problems, 1 sample, runs differ": nested(3, 200, 1, 0.05),
    "nested, 3 runs, 448 problems, 4 samples, runs differ": nested(3, 448, 4, 0.08),
    "nested, 5 runs, 100 problems, 4 samples, runs differ": nested(5, 100, 4, 0.08),
}


def coverage(name: str, studies: int, replicates: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(studies):
        (low, high), truth = STUDIES[name](rng, replicates)
        held += low <= truth <= high
    return held / studies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--replicates", type=int, default=2000)
    args = parser.parse_args()
    print("| Studies | covered |\n|---|---:|")
    for name in STUDIES:
        print(f"| {name} | {100 * coverage(name, args.studies, args.replicates):.1f}% |", flush=True)


if __name__ == "__main__":
    main()
