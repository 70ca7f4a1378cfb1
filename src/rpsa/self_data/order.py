"""Command `rpsa safety-data`: a model's own safety data without a recipe, as JSONL that any trainer reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.artifacts import atomic_write, folder_name, locked
from rpsa.errors import RPSAError
from rpsa.evaluation.command import set_from, subject_of
from rpsa.models import quiet, said_model
from rpsa.recipe.problems import source_problem, validation_problems
from rpsa.recipe.sections import SELF_MADE, Reference, Safety
from rpsa.self_data.making import SelfDataConfig, check_filter, make_self_data
from rpsa.self_data.offers import prompts_of
from rpsa.self_data.stored import EXAMPLES, Made, look_at

_SAFETY = ("filter_settings", "n")


@dataclass(frozen=True)
class SafetyDataCommand:
    """What the command line said; `settings` are `key=value` of a recipe's section `reference`, or of the filter."""

    model: str
    prompts: str
    benign: str | None = None
    steer: str | None = None
    filter: str = "refusal"
    per_prompt: int = 4
    out: Path | None = None
    settings: Sequence[str] = ()
    served: str | None = None
    tokenizer: str | None = None
    thought: str = "auto"


def safety_data_command(command: SafetyDataCommand) -> tuple[Made, Path]:
    """Make the data; returns what became of the offers, and the file of those that were kept.

    Raises:
        RPSAError: a setting, a file or the model is wrong, before anything is generated; or nothing was accepted.
    """
    safety, sampled = _sections(command)
    for option, source in (("--prompts", safety.prompts), ("--benign", safety.benign)):
        if source is not None and (problem := source_problem("prompts", source)):
            raise RPSAError(f"{option}: {problem}")
    model = said_model(command.thought, dtype="auto")
    quiet()
    check_filter(safety.filter, safety.filter_settings, "--filter")
    asked = prompts_of(safety, sampled.seed)
    subject = subject_of(command.model, command.served, command.tokenizer, model, sampled)
    config = SelfDataConfig.of(safety, sampled, sampled.seed)
    folder, file = _places(command)
    with locked(folder):
        make_self_data(subject, asked, config, folder)
        if file != folder / EXAMPLES:
            atomic_write(file, (folder / EXAMPLES).read_bytes())
        return look_at(folder, command.model), file


def _sections(command: SafetyDataCommand) -> tuple[Safety, Reference]:
    """The command's settings, checked like a recipe's."""
    raw: dict[str, Any] = {}
    set_from(command.settings, raw)
    of_safety = {name: raw.pop(name) for name in _SAFETY if name in raw}
    of_safety |= {"data": SELF_MADE, "prompts": command.prompts, "benign": command.benign}
    of_safety |= {"steer": command.steer, "filter": command.filter, "per_prompt": command.per_prompt}
    sections = []
    for section, fields in ((Safety, of_safety), (Reference, raw)):
        try:
            sections.append(section.model_validate(fields))
        except ValidationError as error:
            raise RPSAError(f"--set {validation_problems(error, section)[0]}") from None
    safety, sampled = sections
    assert isinstance(safety, Safety)
    assert isinstance(sampled, Reference)
    return safety, sampled


def _places(command: SafetyDataCommand) -> tuple[Path, Path]:
    """The folder to fill, and the file of what is kept: within it, or where `--out` names a file, that one."""
    out = command.out or Path("safety-data") / folder_name(command.model)
    if out.suffix == ".jsonl":
        return out.with_suffix(""), out
    return out, out / EXAMPLES
