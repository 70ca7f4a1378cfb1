"""`rpsa evaluate`: one model, without a recipe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.pipeline.evaluation import Subject, evaluate
from rpsa.pipeline.models import said_model
from rpsa.pipeline.subjects import model_subject, server_subject
from rpsa.recipe.problems import validation_problems
from rpsa.recipe.schema import slug
from rpsa.recipe.sections import Evaluate, Model
from rpsa.recipe.sources import source_problem
from rpsa.recipe.strict_yaml import parse_yaml

_QUICK = {"n": 20, "samples": 1, "max_new_tokens": 4096}


@dataclass(frozen=True)
class EvaluateCommand:
    """What the command line said; `settings` are `key=value` of a recipe's section `evaluate`, and win."""

    model: str
    tasks: Sequence[str]
    out: Path | None = None
    quick: bool = False
    data_dir: str | None = None
    judge: str = "refusal"
    settings: Sequence[str] = ()
    served: str | None = None
    tokenizer: str | None = None
    reference: Path | None = None
    thought: str = "auto"


def evaluate_command(command: EvaluateCommand) -> dict[str, Any]:
    """Evaluate, print the table, and return the content of `results.json`.

    Raises:
        RPSAError: a setting, a task or the model is wrong, before anything is generated.
    """
    from rpsa.pipeline.quiet import quiet
    from rpsa.report.evaluation import render_evaluation

    settings, model = evaluate_settings(command), said_model(command.thought, dtype="auto")
    for task in settings.tasks:
        if problem := source_problem("task", task):
            raise RPSAError(f"--tasks: {problem}")
    quiet()
    reference = str(command.reference) if command.reference else None
    options = TaskOptions(settings.n, settings.seed, command.data_dir, reference, settings.prompt_style)
    out = command.out or Path("evaluations") / f"{slug(command.model)}{'-quick' if command.quick else ''}"
    results = evaluate(_subject(command, settings, model), settings, options, out)
    render_evaluation(results)
    print(f"\nEvery sample: {out / 'samples.jsonl'}")
    return results


def evaluate_settings(command: EvaluateCommand) -> Evaluate:
    """The command's settings, checked like a recipe's section `evaluate`."""
    raw: dict[str, Any] = {"tasks": [task.strip() for task in command.tasks], "judge": command.judge}
    raw |= _QUICK if command.quick else {}
    for setting in command.settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise RPSAError(f"--set {setting}: write it as key=value")
        section, dot, name = key.strip().partition(".")
        value = parse_yaml(text, f"--set {key}")
        if dot:
            raw.setdefault(section, {})[name] = value
        else:
            raw[section] = value
    try:
        return Evaluate.model_validate(raw)
    except ValidationError as error:
        raise RPSAError(f"--set {validation_problems(error, Evaluate)[0]}") from None


def _subject(command: EvaluateCommand, settings: Evaluate, model: Model) -> Subject:
    if re.match(r"https?://", command.model):
        if command.served is None:
            raise RPSAError(f"{command.model}: give the name of the model there with --served-model")
        return server_subject(command.model, command.served, command.tokenizer or command.served, model)
    if problem := source_problem("model", command.model):
        raise RPSAError(problem)
    return model_subject(command.model, model, settings)
