"""Who grades an evaluation: its judges, what a second one says of the first, and the sandbox for programs."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import atomic_directory
from rpsa.evaluation.grading import Graders
from rpsa.evaluation.items import Item
from rpsa.evaluation.judges import (
    NO_ANSWER,
    CachedJudge,
    Judge,
    Judgement,
    check_judge,
    judge_model,
    judge_responses,
    judges_agree,
    make_judge,
)
from rpsa.evaluation.judges.loading import check_access
from rpsa.evaluation.samples import Sample
from rpsa.pipeline.manifests import MadeBy, sources
from rpsa.recipe.sections import Evaluate
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from rpsa.evaluation.sandbox import Sandbox

JUDGEMENTS = "judgements"
REFUSAL = "refusal"
"""The judge that is always there."""


def check_graders(settings: Evaluate, items: Sequence[Item]) -> None:
    """Raises RPSAError if there is no such judge, setting or model of it to be had, or programs have no sandbox."""
    judged = {item.kind for item in items if item.scorer == "judge"}
    judges = [("attack", settings.judge, settings.judge_settings)]
    judges.append(("over_refusal", settings.refusal_judge, settings.refusal_judge_settings))
    if settings.second_judge:
        judges.append(("attack", settings.second_judge, settings.second_judge_settings))
    for kind, name, given in judges:
        check_judge(name, given)
        model = judge_model(name, given)
        if model is not None and kind in judged:
            check_access(model, given.get("revision"))
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
    return judge if name == REFUSAL else CachedJudge(judge, folder / JUDGEMENTS / _code())


def carry_judgements_over(earlier: Sequence[Path], folder: Path) -> None:
    """Start a folder with the judgements of the first of `earlier` folders that has some of this code's."""
    own = folder / JUDGEMENTS / _code()
    stored = next((path for one in earlier if (path := one / JUDGEMENTS / _code()).is_dir()), None)
    if stored is not None and not own.exists():
        with atomic_directory(own, "identity.json") as new:
            shutil.copytree(stored, new, dirs_exist_ok=True)


def _code() -> str:
    """What reads a verdict out of what a judge says: judgements of other code are not taken for this one's."""
    return sources(MadeBy((), ("evaluation/judges",)))["evaluation/judges"]


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
