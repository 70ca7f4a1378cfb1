"""Claims: the paper's, and those of this implementation's own choices, each with a verdict from the runs at hand.

A claim says that one method does better than another. It is supported where the whole 95% interval of the difference
is on its side, contradicted where it is on the other, and undecided where the interval holds 0: a difference that may
be chance is not support.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rpsa.evaluation.statistics import Interval, mean_interval
from rpsa.report.summaries import RunResult, with_safety_tax
from rpsa.report.tables import Entry, Table

Verdict = Literal["supported", "contradicted", "undecided", "not tested"]
Figure = Literal["STR", "reasoning", "ASR"]


@dataclass(frozen=True)
class Claim:
    """`better` has the lower STR (or ASR), or the higher reasoning, than `worse`."""

    sentence: str
    source: str
    better: str
    worse: str
    figure: Figure = "STR"


@dataclass(frozen=True)
class Judged:
    """A claim with the mean difference `better` less `worse` over `runs` pairs (base and seed), and its interval."""

    claim: Claim
    verdict: Verdict
    difference: float | None = None
    interval: Interval | None = None
    runs: int = 0

    def to_json(self) -> dict[str, Any]:
        interval = list(self.interval) if self.interval else None
        return {**asdict(self.claim), "verdict": self.verdict, "difference": self.difference} | {
            "ci95": interval,
            "pairs": self.runs,
        }


CLAIMS: tuple[Claim, ...] = (
    Claim("Safety fine-tuning costs reasoning: the tax is real", "Table 1", "original", "fft", "reasoning"),
    Claim("LoRA pays less than full fine-tuning", "Table 1", "lora", "fft"),
    Claim("RPSA pays less than full fine-tuning", "Table 1", "fft+rpsa", "fft"),
    Claim("RPSA pays less than LoRA", "Table 1", "lora+rpsa", "lora"),
    Claim("RPSA is safer than full fine-tuning", "Table 1", "fft+rpsa", "fft", "ASR"),
    Claim("A random mask pays less than none", "Fig. 6", "fft+random", "fft"),
    Claim("The Fisher mask pays less than a random one", "Fig. 6", "fft+constant", "fft+random"),
    Claim("and than one with as many elements of each tensor", "beyond", "fft+constant", "fft+random_per_tensor"),
    Claim("A dynamic k pays less than a constant one", "Section 3.3", "fft+rpsa", "fft+constant"),
    Claim("The conflict says more than noise does", "Eq. 6, 7", "fft+rpsa", "fft+noise_k"),
    Claim("Exact freezing pays less than masked gradients alone", "beyond", "fft+rpsa", "fft+gradient_only"),
    Claim("Moments of frozen elements: zero pays less than raw", "beyond", "fft+rpsa", "fft+raw_moments"),
    Claim("Eq. 7 with 2 sigma pays less than with 4", "Eq. 7", "fft+rpsa", "fft+sigma4"),
    Claim("Squares of tokens pay less than squares of sums", "Eq. 4", "fft+constant", "fft+per_sequence"),
    Claim("RPSA pays less than a penalty that goes by the Fisher (EWC)", "beyond", "fft+rpsa", "fft+ewc"),
    Claim("and in LoRA", "beyond", "lora+rpsa", "lora+ewc"),
    Claim("RPSA pays less than rehearsal of reasoning", "beyond", "fft+rpsa", "fft+rehearsal"),
    Claim("RPSA pays less than projected gradients (A-GEM)", "beyond", "fft+rpsa", "fft+agem"),
    Claim("RPSA pays less than interpolation after training", "beyond", "fft+rpsa", "fft+interpolation"),
    Claim("Freezing pays less than putting back afterwards", "beyond", "fft+constant", "fft+restored"),
    Claim("A penalty by the Fisher pays less than a uniform one", "beyond", "fft+ewc", "fft+l2sp"),
    Claim("and is safer (ASR)", "beyond", "fft+ewc", "fft+l2sp", "ASR"),
    Claim("RPSA with rehearsal pays less than RPSA", "beyond", "fft+rpsa+rehearsal", "fft+rpsa"),
)  # fmt: skip


def judge_claims(results: Iterable[RunResult], claims: Sequence[Claim] = CLAIMS) -> list[Judged]:
    """A verdict on each claim from the runs of the matrix; sweeps do not count.

    Runs are paired by base, seed, safety set and learning rate; where each of two methods has one learning rate, of its
    own, by the rest. The interval is Student's t over pairs (three at least).
    """
    matrix = with_safety_tax([result for result in results if result.sweep is None])
    return [_judge(claim, matrix) for claim in claims]


def claims_table(judged: Sequence[Judged]) -> Table | None:
    """The claims that were tested; None where none was."""
    rows = [
        [
            Entry(one.claim.sentence),
            Entry(one.verdict, best=one.verdict != "undecided"),
            Entry(f"{one.claim.better} / {one.claim.worse}"),
            Entry(one.claim.figure),
            Entry(f"{one.difference:+.2f}"),
            Entry(f"{one.interval.low:+.2f} to {one.interval.high:+.2f}" if one.interval else "–"),
            Entry(str(one.runs)),
            Entry(one.claim.source),
        ]
        for one in judged
        if one.difference is not None
    ]
    header = ["Claim", "Verdict", "better / worse", "Figure", "Difference", "95% interval", "Pairs", "Source"]
    return Table(header, rows, frozenset({"better / worse", "Pairs", "Source", "Figure"})) if rows else None


def _judge(claim: Claim, results: Sequence[RunResult]) -> Judged:
    differences = [
        better - worse
        for other in results
        if other.method == claim.worse
        and (worse := _read(other, claim.figure)) is not None
        and (better := _read(_partner(other, claim.better, results), claim.figure)) is not None
    ]
    if not differences:
        return Judged(claim, "not tested")
    mean = sum(differences) / len(differences)
    interval = mean_interval(differences)
    if interval is None:
        return Judged(claim, "undecided", mean, None, len(differences))
    sign = 1 if claim.figure == "reasoning" else -1
    low, high = sorted((sign * interval[0], sign * interval[1]))
    verdict: Verdict = "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
    return Judged(claim, verdict, mean, Interval(*interval), len(differences))


def _partner(run: RunResult, method: str, results: Sequence[RunResult]) -> RunResult | None:
    """The run of `method` with which `run` is compared; the untouched model has no seed."""
    others = [other for other in results if other.method == method and other.base == run.base]
    if untouched := next((other for other in others if other.is_original), None):
        return untouched
    setting = (run.seed, run.safety)
    at_rate = {other.lr: other for other in others if (other.seed, other.safety) == setting}
    if run.lr in at_rate:
        return at_rate[run.lr]
    # LoRA has a learning rate of its own; which one of several would stand against which is anybody's guess
    rates = {name: {one.lr for one in results if one.method == name} for name in (method, run.method)}
    return next(iter(at_rate.values()), None) if all(len(found) == 1 for found in rates.values()) else None


def _read(run: RunResult | None, figure: Figure) -> float | None:
    if run is None or (
        figure != "STR" and run.unreliable("reasoning" if figure == "reasoning" else "attack")
    ):
        return None
    return {"STR": run.tax, "reasoning": run.reasoning["mean"], "ASR": run.asr["mean"]}[figure]
