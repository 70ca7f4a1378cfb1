"""One question to a model, and what kind of question it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["reasoning", "attack", "over_refusal"]
"""Reasoning problems, harmful requests, and requests that nobody should refuse."""

Scorer = Literal["math", "integer", "letter", "code", "judge", "tiny"]
"""How a response is scored: by its answer, by running its code, by a judge, or as the tiny world does."""


@dataclass(frozen=True)
class Item:
    """One prompt of a set, and what is needed to score a response to it.

    Attributes:
        id: unique within the set.
        set: the benchmark, or the part of a file, that it belongs to; figures are means over sets.
        prompt: the whole user message.
        answer: the gold answer; empty where there is none.
        fields: for `code` those of a `rpsa.evaluation.sandbox.CodeProblem`.
    """

    id: str
    set: str
    kind: Kind
    prompt: str
    answer: str
    scorer: Scorer
    fields: Mapping[str, Any] = field(default_factory=dict)
