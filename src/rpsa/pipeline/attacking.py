"""Command `rpsa attack`: one model under attack, without a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.artifacts import folder_name, locked, sha256_of
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TINY_PREFIX, TaskOptions
from rpsa.evaluation.command import as_option, set_from
from rpsa.evaluation.items import load_tasks
from rpsa.evaluation.original import HeldOut
from rpsa.evaluation.robustness.attacks import (
    Attack,
    Target,
    asked_under_attack,
    attacks_of,
    check_attacks,
)
from rpsa.evaluation.robustness.exchange import Exchanged, Stored, read_exchanged, write_behaviours
from rpsa.evaluation.run import Subject, adapter_base, check_evaluation, evaluate
from rpsa.models import check_model, identity, quiet, said_model
from rpsa.recipe.checks import robustness_problems
from rpsa.recipe.problems import did_you_mean, source_problem, validation_problems
from rpsa.recipe.sections import Evaluate, Robustness
from rpsa.report.attacked import UNATTACKED, Attacked
from rpsa.settings import REFERENCE_MAX_LENGTH

KINDS = ("prefill", "many_shot", "templates", "finetune", "direction", "prune", "quantise", "merge")

IN_TINY: dict[str, Any] = {
    "harmful": "tiny",
    "benign": "tiny",
    "prefill": {"thought": ["user wants to", "user wants to . use"], "answer": ["sure :"]},
    "many_shot": {"shots": [1, 2, 4]},
    "finetune": {"fft_learning_rate": 1e-3, "lora_learning_rate": 5e-3},
    "quantise": {"schemes": ["int8", "int4", "int4-32"]},
    "evaluate": {"n": 60, "temperature": 0.0, "max_new_tokens": 64, "batch_size": 256},
}
"""What suits the tiny models: words that they know, learning rates at which they learn."""


@dataclass(frozen=True)
class AttackCommand:
    """What the command line said.

    `attacks` are kinds, none for all that need nothing more; `settings` are `key=value` of a recipe's section
    `robustness`, or `evaluate.key=value`.
    """

    model: str
    tasks: Sequence[str]
    attacks: Sequence[str] = ()
    base: str | None = None
    out: Path | None = None
    harmful: str | None = None
    benign: str | None = None
    data_dir: str | None = None
    judge: str = "refusal"
    held_out: Path | None = None
    settings: Sequence[str] = ()
    export: Path | None = None
    responses: Path | None = None
    thought: str = "auto"


def attack_command(command: AttackCommand) -> tuple[list[Attacked], Path]:
    """Evaluate the model as it is and under each attack, or write what other tools attack it with.

    Returns:
        The results, none where files were written, and the folder or the file that has them.

    Raises:
        RPSAError: a setting, a source or the model is wrong, before anything is generated.
    """
    robustness, evaluation = attack_settings(command)
    options = TaskOptions(evaluation.n, evaluation.seed, command.data_dir, None, evaluation.prompt_style)
    settings = asked_under_attack(robustness, evaluation, options)
    if command.export is not None:
        begun = robustness.prefill.answer if robustness.prefill else ()
        write_behaviours(load_tasks(settings.tasks, options), command.export, next(iter(begun), ""))
        return [], command.export
    quiet()
    target = _target(command)
    items = check_evaluation(settings, options)
    given = read_exchanged(command.responses, items) if command.responses else None
    attacks = [] if given else attacks_of(robustness, has_base=target.base is not None)
    check_attacks(attacks, target, settings, items)
    out = command.out or Path("attacks") / folder_name(command.model)
    held_out = _held_out(command, target)

    def run(name: str, subject: Subject, attack: Attack | None = None) -> Attacked:
        measured = held_out if attack is None or attack.changes_weights else None
        result = evaluate(subject, settings, options, out / name, held_out=measured)
        curve, steps = (attack.curve, attack.steps) if attack else (None, None)
        return Attacked(command.model, command.model, robustness.seed, name, result, curve, steps)

    with locked(out):
        plain = target.subject(settings)
        found = [run(UNATTACKED, plain)]
        if given is not None and command.responses is not None:
            found.append(run(folder_name(command.responses.stem), _exchanging(plain, given, items)))
        for attack in attacks:
            found.append(run(attack.name, target.subject(settings, attack), attack))
    return found, out


def attack_settings(command: AttackCommand) -> tuple[Robustness, Evaluate]:
    """The command's settings, checked like a recipe's sections.

    Raises:
        RPSAError: one is wrong.
    """
    is_tiny = all(task == "tiny" or task.startswith(TINY_PREFIX) for task in command.tasks)
    raw: dict[str, Any] = (
        {name: dict(v) if isinstance(v, dict) else v for name, v in IN_TINY.items()} if is_tiny else {}
    )
    raw |= {name: source for name in ("harmful", "benign") if (source := getattr(command, name)) is not None}
    set_from(command.settings, raw)
    evaluation = {"tasks": list(command.tasks), "judge": command.judge} | raw.pop("evaluate", {})
    wanted = set(command.attacks) or set(KINDS)
    if not command.attacks:
        wanted -= {"many_shot", "direction", "finetune"} if raw.get("harmful") is None else set()
    if unknown := sorted(wanted - set(KINDS)):
        raise RPSAError(f"--attack: there is no attack {unknown[0]!r}{did_you_mean(unknown[0], KINDS)}")
    raw |= {kind: None for kind in KINDS if kind not in wanted}
    try:
        found = Robustness.model_validate(raw)
    except ValidationError as error:
        raise RPSAError(as_option(validation_problems(error, Robustness)[0], "harmful", "benign")) from None
    try:
        evaluated = Evaluate.model_validate(evaluation)
    except ValidationError as error:
        said = as_option(validation_problems(error, Evaluate)[0], "tasks", "judge")
        raise RPSAError(said.replace("--set ", "--set evaluate.", 1)) from None
    problems = [
        as_option(problem.removeprefix("robustness."), "harmful", "benign")
        for problem in robustness_problems(found)
    ]
    problems += [
        f"--tasks: {problem}" for task in evaluated.tasks if (problem := source_problem("task", task))
    ]
    if command.export is None and command.responses is None and problems:
        raise RPSAError(problems[0])
    return found, evaluated


def _target(command: AttackCommand) -> Target:
    """The model, merged with its base where one is known: an adapter's own, or what was said."""
    described = said_model(command.thought)
    name, adapted = command.model, adapter_base(command.model)
    for one in (name, command.base):
        if one is not None and (problem := source_problem("model", one)):
            raise RPSAError(problem)
    check_model(adapted or name, described)
    key = sha256_of([identity(one, described) for one in (name, adapted) if one])
    return Target(key, adapted or name, name if adapted else None, command.base or adapted, described)


def _held_out(command: AttackCommand, target: Target) -> HeldOut | None:
    if command.held_out is None:
        return None
    if not all((command.held_out / name).is_file() for name in ("traces.jsonl", "manifest.json")):
        raise RPSAError(
            f"--held-out {command.held_out}: holds no traces (traces.jsonl, manifest.json); a run has some in held-out/"
        )
    return HeldOut(command.held_out, target.base, REFERENCE_MAX_LENGTH.default, target.model)


def _exchanging(plain: Subject, given: Exchanged, items: Sequence[Any]) -> Subject:
    """The model asked what another tool found, or that tool's responses in its place."""
    asking = replace(plain, rephrase=lambda asked: given.ask(asked, plain.tokenizer))
    if given.responses is None:
        return asking
    key = sha256_of([plain.identity, dict(given.responses)])
    return replace(
        asking, identity=key, load=None, make_generator=lambda: Stored(given, items, plain.tokenizer)
    )
