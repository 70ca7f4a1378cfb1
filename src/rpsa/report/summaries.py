"""Summaries: what came out of each run of the matrix, its STR, and means over runs: the content of `results.json`.

The interval of an STR is over runs. Of a single run it is over the problems that were asked (`with_problem_intervals`):
an 8B model is aligned once for each method, so that there are no runs to take an interval over, but the stored samples
still say what other problems of the same kinds would have given. Of another training seed they know nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import Kind
from rpsa.evaluation.original import LossName, loss_interval, loss_to_json
from rpsa.evaluation.quadrants import Thoughts, Verdict, attack_score
from rpsa.evaluation.results import Sets
from rpsa.evaluation.scores import read_samples
from rpsa.evaluation.statistics import (
    Interval,
    Problems,
    mean_interval,
    ratio_interval,
    safety_tax,
    safety_tax_difference,
    safety_tax_interval,
)
from rpsa.reasoning_loss import ReasoningLoss

LOSSES: tuple[LossName, ...] = ("nll", "kl")
_COMPARED: tuple[Kind, ...] = ("reasoning", "attack")


@dataclass(frozen=True)
class RunResult:
    """One evaluated cell. All rates are fractions in [0, 1].

    Attributes:
        lr: learning rate; None where nothing was trained.
        is_original: the untouched model, with which the others of its base are compared.
        reasoning: accuracy of each family, and their "mean".
        refused: share of the reasoning problems that were refused rather than got wrong.
        truncated: share of all responses that ran out of tokens.
        asr: attack success rate on each set of harmful requests, and their "mean".
        over_refusal: share refused of each set of requests that nobody should refuse, if there is one.
        safety: name of the safety data; None for the untouched model.
        refusing: the share of the safety data that refuses, where it is known.
        loss: on held-out reasoning of the untouched model, where it was measured.
        examples, perplexity: how many safety examples were trained on, and how foreign their responses were to the
            model before training, likewise.
        trajectory: {"step", "k", "c", "tau"}, equally long lists with an entry for each measurement of the conflict;
            None where k is constant.
        audit: the content of rpsa_audit.json.
        sets: what the evaluation found, by kind and set.
        judge, sandbox: who judged, and where programs ran.
        samples: the evaluation's `samples.jsonl`, for a look at the responses themselves.
        sweep: the sweep of the recipe that this cell belongs to; None for a cell of the matrix.
        point: the settings that the sweep or the grid gave this cell.
        no_thought_verdicts: why nobody judged the thoughts of attacks, where nobody did.
        verdict: what `asr` is by; `by_verdict` has the same run by another.
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
    trajectory: Mapping[str, Sequence[float | None]] | None = None
    audit: Mapping[str, Any] | None = None
    sets: Sets = field(default_factory=dict)
    judge: str = ""
    sandbox: str | None = None
    samples: Path | None = None
    sweep: str | None = None
    point: Mapping[str, Any] = field(default_factory=dict)
    is_original: bool = False
    refusing: float | None = None
    loss: ReasoningLoss | None = None
    examples: int | None = None
    perplexity: float | None = None
    no_thought_verdicts: str | None = None
    verdict: Verdict = "answer"
    tax: float | None = None
    tax_reason: str | None = None

    def rates(self, kind: Kind) -> Mapping[str, float]:
        """By set, and "mean" where there is one."""
        return {"reasoning": self.reasoning, "attack": self.asr, "over_refusal": self.over_refusal}[kind]

    @property
    def thoughts(self) -> Mapping[str, Thoughts] | None:
        """Thought and answer apart on each set of attacks; None where that is not known of all of them."""
        sets = self.sets.get("attack", {})
        known = {name: found.thoughts for name, found in sets.items() if found.thoughts}
        return known if known and len(known) == len(sets) else None

    def unreliable(self, kind: Kind, name: str = "mean") -> str | None:
        """Why the rate on a set, or the mean over a kind's sets, does not stand alone; None where it does."""
        sets = self.sets.get(kind, {})
        reasons = ((one, found.unreliable) for one, found in sets.items() if name in (one, "mean"))
        return next((f"{one}: {reason}" for one, reason in reasons if reason), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "base": self.base,
            "seed": self.seed,
            "lr": self.lr,
            "safety": self.safety,
            "perplexity": self.perplexity,
            "sweep": self.sweep,
            "point": dict(self.point),
            "reasoning": dict(self.reasoning),
            "refused": self.refused,
            "truncated": self.truncated,
            "asr": dict(self.asr),
            "over_refusal": dict(self.over_refusal),
            "reasoning_loss": _loss_json(self.loss),
            "unreliable": _unreliable_sets([self]),
            "str": self.tax,
            "reason": self.tax_reason,
        }


@dataclass(frozen=True)
class Summary:
    """Means over the bases and seeds of one method at one learning rate on one safety set.

    Attributes:
        tax_interval: 95% interval of the STR over what `interval_over` says; None where there is none.
        no_interval: why one over problems cannot be had.
        difference: 95% interval of the STR less that of the plain method, over the same; below 0 is better.
    """

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
    is_original: bool = False
    interval_over: Literal["runs", "problems"] = "runs"
    difference: tuple[float, float] | None = None
    no_interval: str | None = None

    def rates(self, kind: Kind) -> Mapping[str, float]:
        """By set, and "mean" where there is one."""
        return {"reasoning": self.reasoning, "attack": self.asr, "over_refusal": self.over_refusal}[kind]

    @property
    def paradigm(self) -> str:
        return self.method.partition("+")[0]

    def loss(self, name: LossName) -> tuple[float, Interval | None] | None:
        """The mean over runs in nats per token, and its 95% interval: of one run over traces, of several over runs.

        None where a run has none.
        """
        known = [getattr(run.loss, name) for run in self.runs if run.loss]
        values = [float(value) for value in known if value is not None]
        if len(values) < len(self.runs):
            return None
        first = self.runs[0].loss
        assert first is not None
        interval = loss_interval(first, name) if len(values) == 1 else mean_interval(values)
        return sum(values) / len(values), interval

    def unreliable(self, kind: Kind, name: str = "mean") -> str | None:
        """As `RunResult.unreliable`, of the first run of which it holds."""
        return next((reason for run in self.runs if (reason := run.unreliable(kind, name))), None)

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
            "reasoning_loss": {name: _bounded_json(self.loss(name)) for name in LOSSES},
            "unreliable": _unreliable_sets(self.runs),
            "str": {
                "mean": self.tax,
                "ci95": list(self.tax_interval) if self.tax_interval else None,
                "ci95_over": self.interval_over if self.tax_interval else None,
                "ci95_of_difference_to_plain": list(self.difference) if self.difference else None,
                "reason": self.tax_reason,
            },
        }


def _loss_json(loss: ReasoningLoss | None) -> dict[str, Any] | None:
    """As an evaluation has it, without the single traces."""
    if loss is None:
        return None
    return {name: value for name, value in loss_to_json(loss).items() if name != "per_trace"}


def _bounded_json(found: tuple[float, Interval | None] | None) -> dict[str, Any] | None:
    return {"mean": found[0], "ci95": list(found[1]) if found[1] else None} if found else None


def by_verdict(results: Iterable[RunResult], verdict: Verdict) -> list[RunResult]:
    """The results with attack success by this verdict, so that STR, summaries and intervals made of them are by it.

    Those of which it is not known are left out; so are all of a base whose untouched model is left out. By "thought"
    and "either" only responses with both verdicts count (`rpsa.evaluation.quadrants`).
    """
    results = list(results)
    if verdict == "answer":
        return results
    known = [_by_verdict(result, result.thoughts, verdict) for result in results if result.thoughts]
    bases = {result.base for result in known if result.is_original}
    return [result for result in known if result.base in bases]


def _by_verdict(result: RunResult, thoughts: Mapping[str, Thoughts], verdict: Verdict) -> RunResult:
    rates = {name: found.asr[verdict].rate for name, found in thoughts.items()}
    asr = rates | {"mean": sum(rates.values()) / len(rates)}
    return replace(result, asr=asr, verdict=verdict, tax=None, tax_reason=None)


def with_safety_tax(results: Iterable[RunResult]) -> list[RunResult]:
    """The results with each run's STR against the untouched model of the same base."""
    results = list(results)
    originals = {result.base: result for result in results if result.is_original}
    return [_taxed(result, originals.get(result.base)) for result in results]


def summarise(results: Iterable[RunResult]) -> list[Summary]:
    """One summary for each method, learning rate and safety set of the matrix, in order of appearance.

    Cells of a sweep are left out. Intervals are over runs; `with_problem_intervals` has those of single runs.
    """
    results = [result for result in with_safety_tax(results) if result.sweep is None]
    originals = {result.base: result for result in results if result.is_original}
    groups: dict[tuple[str, float | None, str | None], list[RunResult]] = defaultdict(list)
    for result in results:
        groups[result.method, result.lr, result.safety].append(result)
    summaries = [_summary(runs, originals) for runs in groups.values()]
    return [replace(s, difference=_difference(s, plain_method(s, summaries))) for s in summaries]


def plain_method(summary: Summary, summaries: Sequence[Summary]) -> Summary | None:
    """The same paradigm without freezing, at the same setting; None for that method itself."""
    if summary.method == summary.paradigm:
        return None
    setting = (summary.paradigm, summary.lr, summary.safety)
    return next((s for s in summaries if (s.method, s.lr, s.safety) == setting), None)


def _difference(summary: Summary, plain: Summary | None) -> tuple[float, float] | None:
    """Of the mean difference, run by run on the same base and seed."""
    if plain is None:
        return None
    taxes = {(run.base, run.seed): run.tax for run in plain.runs}
    pairs = [(run.tax, taxes.get((run.base, run.seed))) for run in summary.runs]
    return mean_interval([a - b for a, b in pairs if a is not None and b is not None])


def _taxed(result: RunResult, original: RunResult | None) -> RunResult:
    if result.is_original:
        return result
    if original is None:
        return replace(result, tax=None, tax_reason="the untouched model of this base was not evaluated")
    if reason := no_comparison(original, result):
        return replace(result, tax=None, tax_reason=reason)
    families = [name for name in original.reasoning if name != "mean"]
    attacks = [name for name in original.asr if name != "mean"]
    value, reason = safety_tax(
        reasoning_before=[original.reasoning[name] for name in families],
        reasoning_after=[result.reasoning[name] for name in families],
        attack_before=[original.asr[name] for name in attacks],
        attack_after=[result.asr[name] for name in attacks],
    )
    return replace(result, tax=value, tax_reason=reason)


def no_comparison(original: RunResult, run: RunResult) -> str | None:
    """Why an STR of the two would say nothing: a rate that it is made from does not stand alone."""
    for whose, one in (("the untouched model's ", original), ("", run)):
        for kind in _COMPARED:
            if reason := one.unreliable(kind):
                return f"{whose}{reason}"
    return None


def _unreliable_sets(runs: Sequence[RunResult]) -> dict[str, str]:
    """By set, why its rate does not stand alone."""
    found = {
        name: reason
        for run in runs
        for kind, sets in run.sets.items()
        for name in sets
        if (reason := run.unreliable(kind, name))
    }
    return {name: reason.removeprefix(f"{name}: ") for name, reason in found.items()}


def _summary(runs: list[RunResult], originals: Mapping[str, RunResult]) -> Summary:
    first = runs[0]
    compared = [(run, originals[run.base]) for run in runs if run.base in originals and not run.is_original]
    drops = [original.reasoning["mean"] - run.reasoning["mean"] for run, original in compared]
    gains = [original.asr["mean"] - run.asr["mean"] for run, original in compared]
    unreliable = next(
        (reason for run, original in compared if (reason := no_comparison(original, run))), None
    )
    has_tax = sum(gains) > 0 and not unreliable
    return Summary(
        method=first.method,
        lr=first.lr,
        safety=first.safety,
        reasoning=_means([run.reasoning for run in runs]),
        refused=sum(run.refused for run in runs) / len(runs),
        asr=_means([run.asr for run in runs]),
        over_refusal=_means([run.over_refusal for run in runs]),
        tax=sum(drops) / sum(gains) if has_tax else None,
        tax_interval=ratio_interval(drops, gains) if has_tax else None,
        tax_reason=None
        if has_tax or first.is_original
        else unreliable or first.tax_reason or "attack success did not fall on average",
        runs=runs,
        is_original=first.is_original,
    )


def _means(rates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(rate[name] for rate in rates) / len(rates) for name in rates[0]}


_REPLICATES = 2_000

Scores = dict[tuple[str, str], dict[str, list[float]]]
"""By kind and set: the scores of each item's samples."""


def with_problem_intervals(summaries: Sequence[Summary]) -> list[Summary]:
    """The summaries; those of one run get their intervals from the samples of that run and of the untouched model.

    No interval, but a reason, where the safety gain may be chance, where no score of a problem changed (of which a
    bootstrap would make an interval of no width), and where a set has one problem.
    """
    single = [s for s in summaries if not s.is_original and len(s.runs) == 1]
    bases = {s.runs[0].base for s in single}
    originals = {run.base: run for s in summaries if s.is_original for run in s.runs if run.base in bases}
    runs = [*originals.values(), *(s.runs[0] for s in single)]
    scores: dict[Path | None, Scores] = {
        run.samples: _scores(run.samples, run.verdict) for run in runs if run.samples
    }

    def with_intervals(summary: Summary) -> Summary:
        if summary.is_original or len(summary.runs) > 1 or summary.runs[0].base not in originals:
            return summary
        run, plain = summary.runs[0], plain_method(summary, summaries)
        original = originals[run.base]
        if no_comparison(original, run):
            return summary
        before, after = scores.get(original.samples), scores.get(run.samples)
        if before is None or after is None:
            return summary
        is_beside = plain and plain.runs[0].base == run.base and not no_comparison(original, plain.runs[0])
        beside = scores.get(plain.runs[0].samples) if plain and is_beside else None
        try:
            interval, reason = _interval_over_problems(before, after)
            difference = _difference_over_problems(before, beside, after) if beside else None
        except RPSAError as error:
            return replace(summary, no_interval=str(error))
        return replace(
            summary,
            tax_interval=interval,
            no_interval=reason,
            difference=difference,
            interval_over="problems",
        )

    return [with_intervals(summary) for summary in summaries]


def _scores(path: Path, verdict: Verdict) -> Scores:
    found: Scores = defaultdict(lambda: defaultdict(list))
    for sample in read_samples(path):
        score = attack_score(sample, verdict) if sample.kind == "attack" else sample.score
        if score is not None:
            found[sample.kind, sample.set][sample.item].append(score)
    return found


def _interval_over_problems(before: Scores, after: Scores) -> tuple[tuple[float, float] | None, str | None]:
    reasoning, attack = _matched("reasoning", before, after), _matched("attack", before, after)
    if reasoning[0] == reasoning[1]:
        return None, "not one reasoning problem got another score"
    found = safety_tax_interval(
        reasoning_before=reasoning[0],
        reasoning_after=reasoning[1],
        attack_before=attack[0],
        attack_after=attack[1],
        replicates=_REPLICATES,
    )
    return found.interval, found.reason


def _difference_over_problems(before: Scores, plain: Scores, other: Scores) -> tuple[float, float] | None:
    reasoning, attack = _matched("reasoning", before, plain, other), _matched("attack", before, plain, other)
    return safety_tax_difference(
        reasoning_before=reasoning[0],
        reasoning_plain=reasoning[1],
        reasoning_other=reasoning[2],
        attack_before=attack[0],
        attack_plain=attack[1],
        attack_other=attack[2],
        replicates=_REPLICATES,
    ).interval


def _matched(kind: str, *models: Scores) -> list[dict[str, Problems]]:
    """For each model its benchmarks, with the items that all models have a score for, in one order."""
    common = {
        key: [item for item in items if all(item in model.get(key, {}) for model in models)]
        for key, items in models[0].items()
        if key[0] == kind
    }
    return [
        {key[1]: [model[key][item] for item in items] for key, items in common.items()} for model in models
    ]
