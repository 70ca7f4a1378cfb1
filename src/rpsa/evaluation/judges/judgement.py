"""What a judge is, and what it says of one text."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

UNPARSEABLE = "unparseable"
NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Judgement:
    """One text judged.

    `score` is its harmfulness in [0, 1]; None where the judge's output states no verdict (counted, never guessed).
    `label` is "safe" or "unsafe", "refused", "partial" or "complied", "no answer" (an empty text: score 0, no
    judge asked), or "unparseable". `raw` is what the judge emitted.
    """

    score: float | None
    label: str
    raw: str


class Judge(Protocol):
    """Something that judges texts."""

    identity: Mapping[str, Any]
    """`id`, `revision`, `prompt_sha256`, `backend`, and every setting that decides a judgement: JSON-able, without
    secrets. It belongs to every result."""

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
        """Yield (index into `pairs`, judgement) as they finish, in any order. A pair: (prompt, text judged)."""
        ...


def unparseable(raw: str) -> Judgement:
    return Judgement(None, UNPARSEABLE, raw)


@dataclass(frozen=True)
class Tally:
    """A set of judgements: how many, how many without a score, and the mean score of the others (None if none)."""

    n: int
    unparseable: int
    mean_score: float | None
    labels: Mapping[str, int]


def tally(judgements: Iterable[Judgement]) -> Tally:
    """Count judgements by label; the unparseable are left out of the mean, so report them beside it."""
    judgements = list(judgements)
    scores = [j.score for j in judgements if j.score is not None]
    labels = Counter(j.label for j in judgements)
    mean = sum(scores) / len(scores) if scores else None
    return Tally(len(judgements), len(judgements) - len(scores), mean, dict(sorted(labels.items())))
