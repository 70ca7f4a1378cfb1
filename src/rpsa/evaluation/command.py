"""Command `rpsa evaluate`: one model, without a recipe."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.artifacts import folder_name, locked
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.items import reachable
from rpsa.evaluation.original import HeldOut
from rpsa.evaluation.results import EvaluationResult
from rpsa.evaluation.run import (
    Subject,
    adapter_base,
    check_evaluation,
    evaluate,
    model_subject,
    server_subject,
)
from rpsa.models import check_model, said_model
from rpsa.recipe.loading import hygiene_problems, parse_yaml
from rpsa.recipe.problems import source_problem, validation_problems
from rpsa.recipe.sections import Evaluate, Model, Reference
from rpsa.settings import REFERENCE_MAX_LENGTH
from rpsa.text import hide_credentials

log = logging.getLogger(__name__)

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
    held_out: Path | None = None
    original: str | None = None


def evaluate_command(command: EvaluateCommand) -> tuple[EvaluationResult, Path]:
    """Evaluate; returns what was found, and the folder that has it.

    Raises:
        RPSAError: a setting, a task or the model is wrong, before anything is generated.
    """
    from rpsa.models import quiet

    settings, model = evaluate_settings(command), said_model(command.thought, dtype="auto")
    for task in settings.tasks:
        if problem := source_problem("task", task):
            raise RPSAError(f"--tasks: {problem}")
    if command.reference and not (command.reference / "traces.jsonl").is_file():
        raise RPSAError(f"--reference {command.reference}: holds no D_ref (there is no traces.jsonl)")
    quiet()
    held_out = _held_out(command, model)
    reference = str(command.reference) if command.reference else None
    options = TaskOptions(settings.n, settings.seed, command.data_dir, reference, settings.prompt_style)
    if command.quick:
        settings = _within_reach(settings, options)
    out = command.out or Path("evaluations") / folder_name(
        f"{command.model} quick" if command.quick else command.model
    )
    subject = subject_of(command.model, command.served, command.tokenizer, model, settings)
    check_evaluation(settings, options)
    with locked(out):
        result = evaluate(subject, settings, options, out, held_out=held_out)
    return result, out


def _held_out(command: EvaluateCommand, model: Model) -> HeldOut | None:
    """What --held-out and --original say; an adapter's original is its base."""
    if command.held_out is None:
        if command.original is not None:
            raise RPSAError("--original: give the traces to compare it on, too: --held-out FOLDER")
        return None
    if not all((command.held_out / name).is_file() for name in ("traces.jsonl", "manifest.json")):
        raise RPSAError(
            f"--held-out {command.held_out}: holds no traces (traces.jsonl, manifest.json); a run has some in held-out/"
        )
    original = command.original
    if original is None and not _is_address(command.model):
        original = adapter_base(command.model)
    if original is not None:
        if problem := source_problem("model", original):
            raise RPSAError(f"--original: {problem}")
        check_model(original, model)
    return HeldOut(command.held_out, original, REFERENCE_MAX_LENGTH.default, model)


def _within_reach(settings: Evaluate, options: TaskOptions) -> Evaluate:
    """The settings with the tasks whose data this account and this machine can have; a line for each other."""
    here, away = reachable(settings.tasks, options)
    for name, why in away.items():
        log.warning("%s is skipped: %s", name, why)
    if not here:
        raise RPSAError(
            f"--quick: nothing is left of {', '.join(settings.tasks)}: none of the data can be had"
        )
    return settings.model_copy(update={"tasks": here})


def _is_address(model: str) -> bool:
    return bool(re.match(r"https?://", model))


def evaluate_settings(command: EvaluateCommand) -> Evaluate:
    """The command's settings, checked like a recipe's section `evaluate`."""
    raw: dict[str, Any] = {"tasks": [task.strip() for task in command.tasks], "judge": command.judge}
    raw |= _QUICK if command.quick else {}
    set_from(command.settings, raw)
    try:
        return Evaluate.model_validate(raw)
    except ValidationError as error:
        raise RPSAError(as_option(validation_problems(error, Evaluate)[0], "tasks", "judge")) from None


def as_option(problem: str, *own: str) -> str:
    """What is wrong with a setting, by the name of its option: one of its `own`, or `--set`."""
    key = re.split(r"\W", problem, maxsplit=1)[0]
    return f"--{problem}" if key in own else f"--set {problem}"


def set_from(settings: Sequence[str], raw: dict[str, Any]) -> None:
    """Put what was said as `key=value`, or `key.name=value`, into `raw`.

    Raises:
        RPSAError: it is not of that form, or has no place in a recipe.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise RPSAError(f"--set {key.strip()}: write it as key=value")
        section, dot, name = key.strip().partition(".")
        value = parse_yaml(text, f"--set {key}")
        if dot and not isinstance(raw.setdefault(section, {}), dict):
            raise RPSAError(f"--set {key.strip()}: {section!r} is not a section")
        if dot:
            raw[section][name] = value
        else:
            raw[section] = value
    if problem := next(hygiene_problems(raw), None):
        raise RPSAError(f"--set {problem}")


def subject_of(
    name: str, served: str | None, tokenizer: str | None, model: Model, settings: Evaluate | Reference
) -> Subject:
    """The model that a command line names: a folder, a hub id, an adapter, a shipped base, or a server's url.

    Raises:
        RPSAError: there is none, or what a server needs to be told is missing.
    """
    if _is_address(name):
        if hide_credentials(name) != name:
            raise RPSAError(f"{hide_credentials(name)}: put the key into RPSA_API_KEY, not into the url")
        if served is None:
            raise RPSAError(f"{name}: give the name of the model there with --served-model")
        return server_subject(name, served, tokenizer or served, model)
    if problem := source_problem("model", name):
        raise RPSAError(problem)
    check_model(adapter_base(name) or name, model)
    return model_subject(name, model, settings)
