"""What came out of a run of the matrix, and its summary: the content of `results.json`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rpsa.evaluation.statistics import mean_interval, ratio_interval, safety_tax


@dataclass(frozen=True)
class RunResult:
    """One evaluated cell. All rates are fractions in [0, 1].

    Attributes:
        lr: learning rate; None for the untouched model, which makes it the one that others are compared with.
        reasoning: accuracy of each family, and their "mean".
        refused: share of the reasoning problems that were refused rather than got wrong.
        truncated: share of all responses that ran out of tokens.
        asr: attack success rate on each set of harmful requests, and their "mean".
        over_refusal: share refused of each set of requests that nobody should refuse, if there is one.
        safety: name of the safety data; None for the untouched model.
        trajectory: {"step", "k", "c", "tau"}, equally long lists with an entry for each measurement of the conflict;
            None where k is constant.
        audit: the content of rpsa_audit.json.
        sets: what `results.json` of the evaluation says of each set, by kind: figure, interval, rates.
        judge, sandbox: who judged, and where programs ran.
        samples: the evaluation's `samples.jsonl`, for a look at the responses themselves.
        sweep: the sweep of the recipe that this cell belongs to; None for a cell of the matrix.
        point: the settings that the sweep or the grid gave this cell.
        tax, tax_reason: STR, or why there is none; `with_safety_tax` fills them in.
    """

    method: str
    base: str
    seed: int
    lr: float | None
    reasoning: Mapping[str, float]
    refused: float
    asr: Mapping[str, float]
    over_refusal: Mapping[str, float]
    truncated: float = 0.0
    safety: str | None = None
    trajectory: Mapping[str, Sequence[float]] | None = None
    audit: Mapping[str, Any] | None = None
    seconds: float | None = None
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    judge: str = ""
    sandbox: str | None = None
    samples: Path | None = None
    sweep: str | None = None
    point: Mapping[str, Any] = field(default_factory=dict)
    tax: float | None = None
    tax_reason: str | None = None

    @property
    def is_original(self) -> bool:
        return self.lr is None

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "base": self.base,
            "seed": self.seed,
            "lr": self.lr,
            "safety": self.safety,
            "reasoning": dict(self.reasoning),
            "refused": self.refused,
            "truncated": self.truncated,
            "asr": dict(self.asr),
            "over_refusal": dict(self.over_refusal),
            "str": self.tax,
            "reason": self.tax_reason,
        }


@dataclass(frozen=True)
class Summary:
    """Means over the bases and seeds of one method at one learning rate on one safety set."""

    method: str
    lr: float | None
    safety: str | None
    reasoning: Mapping[str, float]
    refused: float
    asr: Mapping[str, float]
    over_refusal: Mapping[str, float]
    tax: float | None
    tax_interval: tuple[float, float] | None
    tax_reason: str | None
    runs: Sequence[RunResult] = field(repr=False)

    @property
    def is_original(self) -> bool:
        return self.lr is None

    @property
    def paradigm(self) -> str:
        return self.method.partition("+")[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "lr": self.lr,
            "safety": self.safety,
            "runs": len(self.runs),
            "reasoning": dict(self.reasoning),
            "refused": self.refused,
            "asr": dict(self.asr),
            "over_refusal": dict(self.over_refusal),
            "str": {
                "mean": self.tax,
                "ci95": list(self.tax_interval) if self.tax_interval else None,
                "reason": self.tax_reason,
            },
        }


def with_safety_tax(results: Iterable[RunResult]) -> list[RunResult]:
    """The results with each run's STR against the untouched model of the same base."""
    results = list(results)
    originals = {result.base: result for result in results if result.is_original}
    return [_taxed(result, originals.get(result.base)) for result in results]


def summarise(results: Iterable[RunResult]) -> list[Summary]:
    """One summary for each method, learning rate and safety set, in order of appearance."""
    results = with_safety_tax(results)
    originals = {result.base: result for result in results if result.is_original}
    groups: dict[tuple[str, float | None, str | None], list[RunResult]] = defaultdict(list)
    for result in results:
        groups[result.method, result.lr, result.safety].append(result)
    return [_summary(runs, originals) for runs in groups.values()]


def tax_difference(summary: Summary, plain: Summary) -> tuple[float, float] | None:
    """95% interval of the mean difference in STR to the plain method, run by run on the same base and seed."""
    taxes = {(run.base, run.seed): run.tax for run in plain.runs}
    pairs = [(run.tax, taxes.get((run.base, run.seed))) for run in summary.runs]
    return mean_interval([a - b for a, b in pairs if a is not None and b is not None])


def _taxed(result: RunResult, original: RunResult | None) -> RunResult:
    if result.is_original:
        return result
    if original is None:
        return replace(result, tax=None, tax_reason="the untouched model of this base was not evaluated")
    families = [name for name in original.reasoning if name != "mean"]
    attacks = [name for name in original.asr if name != "mean"]
    value, reason = safety_tax(
        reasoning_before=[original.reasoning[name] for name in families],
        reasoning_after=[result.reasoning[name] for name in families],
        attack_before=[original.asr[name] for name in attacks],
        attack_after=[result.asr[name] for name in attacks],
    )
    return replace(result, tax=value, tax_reason=reason)


def _summary(runs: list[RunResult], originals: Mapping[str, RunResult]) -> Summary:
    first = runs[0]
    compared = [(run, originals[run.base]) for run in runs if run.base in originals and not run.is_original]
    drops = [original.reasoning["mean"] - run.reasoning["mean"] for run, original in compared]
    gains = [original.asr["mean"] - run.asr["mean"] for run, original in compared]
    has_tax = sum(gains) > 0
    return Summary(
        method=first.method,
        lr=first.lr,
        safety=first.safety,
        reasoning=_means([run.reasoning for run in runs]),
        refused=sum(run.refused for run in runs) / len(runs),
        asr=_means([run.asr for run in runs]),
        over_refusal=_means([run.over_refusal for run in runs]),
        tax=sum(drops) / sum(gains) if has_tax else None,
        tax_interval=ratio_interval(drops, gains),
        tax_reason=None
        if has_tax or first.is_original
        else first.tax_reason or "attack success did not fall on average",
        runs=runs,
    )


def _means(rates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(rate[name] for rate in rates) / len(rates) for name in rates[0]}
