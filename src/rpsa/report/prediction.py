"""Prediction: whether the reasoning loss, which costs seconds, orders a study's runs as their accuracy does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rpsa.report.summaries import RunResult

FEWEST = 5
"""Runs, below which a rank correlation says nothing."""

ENOUGH = 0.7
"""A correlation from here on counts as a prediction."""


@dataclass(frozen=True)
class Prediction:
    """Spearman's rank correlation with the drop in mean reasoning accuracy against the untouched model, over `runs`.

    `kl` is that of the reasoning KL, `nll` that of the rise of the NLL; None where all runs have the same rank.
    """

    runs: int
    kl: float | None
    nll: float | None

    @property
    def sentence(self) -> str:
        known = {"KL": self.kl, "rise of the NLL": self.nll}
        said = " and ".join(f"{_said(value)} for the {name}" for name, value in known.items())
        predicting = [name for name, value in known.items() if value is not None and value >= ENOUGH]
        verdicts = (
            f"below {ENOUGH} for both: here it does not predict the drop",
            f"the {(*predicting, '')[0]} predicts the order of the runs, the other does not",
            "both predict the order of the runs",
        )
        return (
            f"Reasoning loss against the drop in accuracy, rank correlation over {self.runs} runs: {said}; "
            f"{verdicts[len(predicting)]}."
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "spearman_kl": self.kl,
            "spearman_nll_rise": self.nll,
            "says": self.sentence,
        }


def predict(results: Sequence[RunResult]) -> Prediction | None:
    """Over all trained runs that have both figures, sweeps included; None for fewer than `FEWEST`.

    A run whose accuracy, or that of its untouched model, does not stand alone is left out.
    """
    originals = {result.base: result for result in results if result.is_original}
    drops, kls, rises = [], [], []
    for run in results:
        original = originals.get(run.base)
        if run.is_original or original is None or run.loss is None or original.loss is None:
            continue
        if run.loss.kl is None or run.unreliable("reasoning") or original.unreliable("reasoning"):
            continue
        drops.append(original.reasoning["mean"] - run.reasoning["mean"])
        kls.append(run.loss.kl)
        rises.append(run.loss.nll - original.loss.nll)
    if len(drops) < FEWEST:
        return None
    return Prediction(len(drops), _spearman(kls, drops), _spearman(rises, drops))


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if len({*first}) == 1 or len({*second}) == 1:
        return None
    return float(spearmanr(first, second).statistic)


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
