"""Results of an evaluation: for each set its figure with its interval and every rate that qualifies it.

`results.json` is `EvaluationResult.to_json`. What a report or a model card says of an evaluation, it reads from here.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from rpsa.evaluation.benchmarks import Kind
from rpsa.evaluation.original import loss_from_json, loss_to_json
from rpsa.evaluation.quadrants import BrokenShares, Thoughts, broken_of, thoughts_of
from rpsa.evaluation.scores import MAIN_METRIC, METRICS, Sample, scores_by_item, set_rates
from rpsa.evaluation.statistics import rate
from rpsa.reasoning_loss import ReasoningLoss
from rpsa.thought import ThoughtFormat

MOST = 0.5
"""Where more of the responses than this have no answer, no rate of the set stands alone."""

_LATER = ("unanswered", "mean_answer_score", "mean_thought_score")  # not in every file
_UNANSWERED = ("truncated", "empty", "unparsed", "unjudged")


@dataclass(frozen=True)
class SetResult:
    """One set of one kind. All are fractions in [0, 1]; a rate that the kind does not have (`METRICS`) is None.

    Attributes:
        figure: what is measured: accuracy, attack success or over-refusal. None where nothing was judged.
        standard_error, interval: of the figure. The 95% interval is that of `rpsa.evaluation.statistics.rate`:
            clustered by item, Wilson's where each has one sample.
        length: share of the responses that the token limit ended.
        unanswered: share without an answer that could be read; None in results of before it was measured.
        mean_answer_score, mean_thought_score: a judge's mean score of answers and of thoughts, where it gave any.
        broken: None in results of before it was measured.
        thoughts: of attacks, thought and answer apart; None where no response has a verdict on both.
    """

    kind: Kind
    items: int
    samples: int
    figure: float | None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    refused: float | None = None
    partial: float | None = None
    truncated: float | None = None
    unparsed: float | None = None
    empty: float | None = None
    unjudged: float | None = None
    length: float = 0.0
    unanswered: float | None = None
    mean_answer_score: float | None = None
    mean_thought_score: float | None = None
    broken: BrokenShares | None = None
    thoughts: Thoughts | None = None

    @property
    def rates(self) -> dict[str, float]:
        """The rates that qualify the figure, by name: those of `METRICS` that are known, and `length`."""
        known = {name: getattr(self, name) for name in (*METRICS[self.kind][1:], "length")}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def unreliable(self) -> str | None:
        """Why no rate of the set stands alone; None where they do."""
        known = {name: getattr(self, name) or 0.0 for name in _UNANSWERED}
        unparsed = max(
            0.0, known["unparsed"] - (self.refused or 0.0)
        )  # where `unanswered` itself is not known
        share = max(
            self.unanswered or 0.0, known["truncated"] + known["empty"] + known["unjudged"] + unparsed
        )
        if share <= MOST:
            return None
        parts = ", ".join(f"{name} {known[name]:.0%}" for name in _UNANSWERED if known[name])
        return f"{share:.0%} of the responses have no answer that can be read ({parts})"

    def to_json(self) -> dict[str, Any]:
        main, *others = METRICS[self.kind]
        scores = {name: getattr(self, name) for name in ("mean_answer_score", "mean_thought_score")}
        return {
            "items": self.items,
            "samples": self.samples,
            main: self.figure,
            **{name: getattr(self, name) for name in others},
            "length": self.length,
            "unanswered": self.unanswered,
            "unreliable": self.unreliable,
            "standard_error": self.standard_error,
            "interval": list(self.interval) if self.interval else None,
            "broken": self.broken.to_json() if self.broken else None,
            **(
                {"thoughts": self.thoughts.to_json() if self.thoughts else None}
                if self.kind == "attack"
                else {}
            ),
            **{name: score for name, score in scores.items() if score is not None},
        }

    @classmethod
    def from_json(cls, kind: Kind, found: Mapping[str, Any]) -> "SetResult":
        """What `to_json` made, now or before all of this was measured.

        Raises:
            KeyError: something else is missing.
        """
        main, *others = METRICS[kind]
        broken, thoughts = found.get("broken"), found.get("thoughts")
        return cls(
            kind,
            found["items"],
            found["samples"],
            found[main],
            found["standard_error"],
            _pair(found["interval"]),
            **{name: found[name] for name in (*others, "length")},
            **{name: found[name] for name in _LATER if name in found},
            broken=BrokenShares.from_json(broken) if broken else None,
            thoughts=Thoughts.from_json(thoughts) if thoughts else None,
        )


Sets = Mapping[Kind, Mapping[str, SetResult]]


def results_by_set(samples: Iterable[Sample]) -> dict[Kind, dict[str, SetResult]]:
    """The results of each kind's sets by name; a kind without samples has none."""
    grouped: dict[Kind, dict[str, list[Sample]]] = {kind: defaultdict(list) for kind in get_args(Kind)}
    for sample in samples:
        grouped[sample.kind][sample.set].append(sample)
    return {kind: {name: set_result(found) for name, found in sets.items()} for kind, sets in grouped.items()}


def set_result(samples: Sequence[Sample]) -> SetResult:
    """The samples are of one set."""
    kind, rates, scores = samples[0].kind, set_rates(samples), scores_by_item(samples)
    estimate = rate(list(scores.values())) if scores else None
    error = None if estimate is None or math.isnan(estimate.standard_error) else estimate.standard_error
    return SetResult(
        kind,
        len({sample.item for sample in samples}),
        len(samples),
        rates[MAIN_METRIC[kind]] if scores else None,
        error,
        _pair(estimate.interval if estimate else None),
        **{name: rates[name] for name in (*METRICS[kind][1:], "length", "unanswered")},
        mean_answer_score=_mean_score(samples, "answer") if scores else None,
        mean_thought_score=_mean_score(samples, "thought"),
        broken=broken_of(samples),
        thoughts=thoughts_of(samples) if kind == "attack" else None,
    )


def _pair(of: Sequence[float] | None) -> tuple[float, float] | None:
    return (of[0], of[1]) if of else None


def _mean_score(samples: Sequence[Sample], sees: str) -> float | None:
    judged = [sample.details[sees]["score"] for sample in samples if sees in sample.details]
    known = [score for score in judged if score is not None]
    return sum(known) / len(known) if known else None


Identity = str | Mapping[str, Any]
"""A judge's identity, with its `id`; or "exact", where answers were compared and no judge was asked."""


@dataclass(frozen=True)
class EvaluationResult:
    """All that an evaluation found, and what it was made with.

    Attributes:
        sets: by kind and name.
        model: what tells the model from any other.
        settings: the section `evaluate` of the recipe, with every default.
        data_sha256: by set, what tells its items from any others.
        thought_judge: who judged the thoughts of attacks; None where nobody did.
        no_thought_verdicts: why nobody did; None where somebody did, or there was nothing to judge.
        agreement: how far a second judge agrees with the first; None where none was asked.
        sandbox: where programs ran; None where none were run.
        reasoning_loss: on held-out reasoning of the original; None where it was not measured.
    """

    sets: Sets
    samples: int
    thought: ThoughtFormat
    data_sha256: Mapping[str, str]
    judge: Identity
    refusal_judge: Identity
    sandbox: str | None = None
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    agreement: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    reasoning_loss: ReasoningLoss | None = None
    thought_judge: Identity | None = None
    no_thought_verdicts: str | None = None

    @property
    def judge_name(self) -> str:
        return self.judge if isinstance(self.judge, str) else str(self.judge["id"])

    def to_json(self) -> dict[str, Any]:
        return {
            "sets": {
                kind: {name: found.to_json() for name, found in sets.items()}
                for kind, sets in self.sets.items()
            },
            "samples": self.samples,
            "model": self.model,
            "thought": self.thought.to_json(),
            "settings": dict(self.settings),
            "data_sha256": dict(self.data_sha256),
            "judge": _plain(self.judge),
            "refusal_judge": _plain(self.refusal_judge),
            "thought_judge": None if self.thought_judge is None else _plain(self.thought_judge),
            "no_thought_verdicts": self.no_thought_verdicts,
            "agreement": self.agreement,
            "sandbox": self.sandbox,
            "versions": dict(self.versions),
            "reasoning_loss": loss_to_json(self.reasoning_loss) if self.reasoning_loss else None,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "EvaluationResult":
        """The content of a `results.json`.

        Raises:
            KeyError, TypeError, AttributeError: it is damaged.
        """
        sets = {
            kind: {name: SetResult.from_json(kind, one) for name, one in found["sets"][kind].items()}
            for kind in cast(Iterable[Kind], found["sets"])
        }
        later = (
            *("model", "settings", "agreement", "versions"),
            *("thought_judge", "no_thought_verdicts"),
        )
        more = {name: found[name] for name in later if name in found}
        return cls(
            sets=sets,
            samples=found["samples"],
            thought=ThoughtFormat.from_json(found["thought"]),
            data_sha256=found["data_sha256"],
            judge=found["judge"],
            refusal_judge=found["refusal_judge"],
            sandbox=found["sandbox"],
            reasoning_loss=loss_from_json(found.get("reasoning_loss")),
            **more,
        )


def _plain(identity: Identity) -> Identity:
    return identity if isinstance(identity, str) else dict(identity)
