"""Who grades an evaluation: its judges, what a second one says of the first, and the sandbox for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.evaluation.grading import Graders
from rpsa.evaluation.items import Item
from rpsa.evaluation.judges import (
    NO_ANSWER,
    CachedJudge,
    Judge,
    Judgement,
    check_judge,
    judge_responses,
    judges_agree,
    make_judge,
)
from rpsa.evaluation.samples import Sample
from rpsa.recipe.sections import Evaluate
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from rpsa.evaluation.sandbox import Sandbox

REFUSAL = "refusal"
"""The judge that is always there."""


def check_graders(settings: Evaluate, items: Sequence[Item]) -> None:
    """Raises RPSAError if there is no such judge or setting of it, or programs have no sandbox."""
    check_judge(settings.judge, settings.judge_settings)
    check_judge(settings.refusal_judge, settings.refusal_judge_settings)
    if settings.second_judge:
        check_judge(settings.second_judge, settings.second_judge_settings)
    sandbox_for(items, settings)


def sandbox_for(items: Sequence[Item], settings: Evaluate) -> "Sandbox | None":
    """None where no item has a program to run."""
    if not any(item.scorer == "code" for item in items):
        return None
    from rpsa.evaluation.sandbox import best_sandbox

    return best_sandbox(accept_unsandboxed=settings.accept_unsandboxed)


def make_graders(settings: Evaluate, items: Sequence[Item], folder: Path) -> Graders:
    """A judge's model is loaded here, after the model under test is gone, and only if there is something to judge."""
    judged = {item.kind for item in items if item.scorer == "judge"}
    name, given = (settings.judge, settings.judge_settings) if "attack" in judged else (REFUSAL, {})
    refusal, own = (
        (settings.refusal_judge, settings.refusal_judge_settings)
        if "over_refusal" in judged
        else (REFUSAL, {})
    )
    return Graders(
        _judge(name, given, folder),
        _judge(refusal, own, folder),
        settings.judge_traces,
        sandbox_for(items, settings),
    )


def _judge(name: str, settings: Mapping[str, Any], folder: Path) -> Judge:
    judge = make_judge(name, **settings)
    return judge if name == REFUSAL else CachedJudge(judge, folder / "judgements")


def agreement(
    samples: Sequence[Sample], settings: Evaluate, folder: Path, thought: ThoughtFormat
) -> dict[str, Any] | None:
    """How far a second judge agrees with the first on what was judged of the answers to attacks."""
    judged = [
        sample
        for sample in samples
        if sample.kind == "attack" and sample.details.get("answer", {}).get("label", NO_ANSWER) != NO_ANSWER
    ]
    if settings.second_judge is None or not judged:
        return None
    second = _judge(settings.second_judge, settings.second_judge_settings, folder)
    found = dict(judge_responses(second, [(s.prompt, s.response) for s in judged], "answer", thought))
    first = [Judgement(**sample.details["answer"]) for sample in judged]
    other = [found[i] for i in range(len(judged))]
    if all(None in (a.score, b.score) for a, b in zip(first, other, strict=True)):
        return {"judge": dict(second.identity), "kappa": None, "n": 0, "left_out": len(judged)}
    return {"judge": dict(second.identity), **asdict(judges_agree(first, other))}
