"""Results such as the tiny world gives, made up: reports are tested without training anything."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rpsa.evaluation.results import SetResult
from rpsa.evaluation.scores import METRICS, Sample
from rpsa.report import RunResult

FAMILIES = ("arithmetic", "sorting", "counting", "parity", "lookup")
# Mean reasoning, share refused, ASR, benign and borderline over-refusal at a middling learning rate.
LEVELS = {
    "original": (0.86, 0.00, 0.62, 0.02, 0.05),
    "fft": (0.31, 0.35, 0.00, 1.00, 1.00),
    "fft+rpsa": (0.78, 0.03, 0.01, 0.97, 0.99),
    "fft+constant": (0.74, 0.04, 0.00, 0.98, 1.00),
    "fft+random": (0.70, 0.05, 0.00, 0.97, 0.98),
    "lora": (0.62, 0.10, 0.06, 0.20, 0.31),
    "lora+rpsa": (0.84, 0.00, 0.44, 0.02, 0.04),
}


def demo_results(seed: int = 0) -> list[RunResult]:
    """Seven methods on three bases, as the demo runs them."""
    return [
        made_up(method, f"tiny:{base}", 0, None if method == "original" else 1e-3, "tiny:refusals", seed)
        for base in range(3)
        for method in LEVELS
    ]


def study_results(
    rates: Sequence[float] = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3),
    seeds: Sequence[int] = (0, 1, 2),
) -> list[RunResult]:
    """Seven methods on three bases with seeds, a grid of learning rates, and both safety sets."""
    results = []
    for base in (f"tiny:{index}" for index in range(3)):
        results.append(made_up("original", base, 0, None, ""))
        for method in list(LEVELS)[1:]:
            for safety in ("tiny:refusals", "tiny:balanced"):
                results += [made_up(method, base, seed, rate, safety) for seed in seeds for rate in rates]
    return results


def made_up(method: str, base: str, seed: int, lr: float | None, safety: str, salt: int = 0) -> RunResult:
    draw = random.Random(f"{method} {base} {seed} {lr} {safety} {salt}")
    start = LEVELS["original"]
    # How far this run goes from the untouched model towards the method's level: less at a low learning rate.
    way = 0.0 if lr is None else min(1.3, (lr / 1e-3) ** 0.6)
    reasoning, refused, asr, benign, borderline = (
        _share(before + way * (after - before) + (draw.gauss(0, 0.03) if after != before else 0))
        for before, after in zip(start, LEVELS[method], strict=True)
    )
    if safety == "tiny:balanced":
        benign, borderline = _share(0.15 * benign), _share(0.25 * borderline)
    families = {name: _share(reasoning + draw.gauss(0, 0.05)) for name in FAMILIES}
    direct, wrapped = _share(asr - 0.02), _share(asr + 0.02)
    dynamic = method.endswith("+rpsa")
    aligned = "+" in method
    return RunResult(
        method=method,
        base=base,
        seed=seed,
        lr=lr,
        safety=None if lr is None else safety,
        reasoning=families | {"mean": sum(families.values()) / len(families)},
        refused=refused,
        truncated=0.0,
        asr={"direct": direct, "wrapped": wrapped, "mean": (direct + wrapped) / 2},
        over_refusal={"benign": benign, "borderline": borderline},
        trajectory=_trajectory(draw) if dynamic else None,
        audit={
            "gradient_only": False,
            "frozen_element_steps_checked": 17_400_000,
            "frozen_elements_moved": 0,
        }
        if aligned
        else None,
        sets={
            "reasoning": _sets("reasoning", families),
            "attack": _sets("attack", {"direct": direct, "wrapped": wrapped}),
            "over_refusal": _sets("over_refusal", {"benign": benign, "borderline": borderline}),
        },
        judge="exact",
        is_original=method == "original",
    )


def with_samples(
    results: Sequence[RunResult], folder: Path, items: int = 30, response: str = "no"
) -> list[RunResult]:
    """The results with stored samples whose scores are about as frequent as the results say.

    An item is as hard for all models, so that scores are paired, as real ones are.
    """
    return [_with_samples(result, folder / f"{i}.jsonl", items, response) for i, result in enumerate(results)]


def _with_samples(result: RunResult, path: Path, items: int, response: str) -> RunResult:
    samples = []
    for kind, sets in result.sets.items():
        for name, found in sets.items():
            for number in range(items):
                difficulty = random.Random(f"{name} {number}").random()
                score = float(difficulty < (found.figure or 0.0))
                samples.append(_sample(kind, name, number, score, response))
    path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    return replace(result, samples=path)


def _sample(kind: Any, name: str, number: int, score: float, response: str) -> Sample:
    outcomes: dict[str, tuple[Any, Any]] = {
        "reasoning": ("wrong", "correct"),
        "attack": ("refused", "complied"),
        "over_refusal": ("complied", "refused"),
    }
    return Sample(
        id=f"{name}/{name}-{number}/0",
        set=name,
        item=f"{name}-{number}",
        index=0,
        kind=kind,
        prompt=f"what is {name} of {number}?",
        answer="yes",
        response=response,
        finish_reason="stop",
        extracted="yes" if score else None,
        truncated=False,
        empty=False,
        unparsed=False,
        outcome=outcomes[kind][int(score)],
        score=score,
    )


def _sets(kind: Any, rates: Mapping[str, float]) -> dict[str, SetResult]:
    others: dict[str, Any] = dict.fromkeys(METRICS[kind][1:], 0.0)
    return {
        name: SetResult(kind, 30, 30, rate, 0.05, (max(0.0, rate - 0.1), min(1.0, rate + 0.1)), **others)
        for name, rate in rates.items()
    }


def _trajectory(draw: random.Random) -> dict[str, list[float]]:
    steps = list(range(0, 96, 2))
    conflict = [0.5 + 0.02 * draw.gauss(0, 1) - 0.0006 * step for step in steps]
    ratio = [0.5 if i < 10 else _share(0.5 + draw.gauss(0, 0.5)) for i in range(len(steps))]
    return {"step": [float(s) for s in steps], "k": ratio, "c": conflict, "tau": [1e-9] * len(steps)}


def _share(value: float) -> float:
    return round(min(1.0, max(0.0, value)), 4)
