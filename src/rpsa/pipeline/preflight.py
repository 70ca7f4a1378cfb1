"""Preflight: what can be known before hours of work, such as what libraries refuse, or missing data."""

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rpsa.alternatives.product import lora_updates
from rpsa.analysis.perturbation import PerturbationConfig
from rpsa.artifacts import reading
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.evaluation.robustness.attacks import Target, asked_under_attack, attacks_of, check_attacks
from rpsa.evaluation.run import check_evaluation, questions
from rpsa.models import add_adapter, check_model, empty_model, load_tokenizer, thought_of
from rpsa.parameters import trainable_parameters
from rpsa.pipeline.alignment import refusals_of_trl, training_arguments, training_data
from rpsa.pipeline.groundwork import HeldOutTask, held_out_problems, reference_problems
from rpsa.pipeline.stages import full_fishers, tasks_of
from rpsa.pipeline.tasks import task_options
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import Safety
from rpsa.reference import check_ids
from rpsa.safety_data import ALL_REFUSE, REFUSALS_ALONE
from rpsa.self_data.making import check_filter, rendered
from rpsa.self_data.offers import prompts_of
from rpsa.training.packing import refuse_wrapped

log = logging.getLogger(__name__)


def preflight(recipe: Recipe) -> None:
    """Try what is cheap of every stage.

    Raises:
        RPSAError: some of it will not work.
    """
    trained = [cell for cell in recipe.cells() if cell.paradigm != "none"]
    settled = list(
        _first_of(
            trained, lambda cell: (cell.trainer, cell.train, cell.align, cell.alternatives, _keeps(cell))
        )
    )
    for cell in settled:
        _check_training(recipe, cell)
    for base in recipe.bases:
        check_model(base, recipe.model)
        thought_of(load_tokenizer(base, recipe.model), recipe.model)
    for cell in _first_of(
        trained, lambda cell: (cell.trainer, {**cell.train, "seed": 0, "learning_rate": 0.0})
    ):
        _check_trainer(recipe, cell)
    _check_reference(recipe)
    _check_evaluation(recipe)
    refusals_alone: dict[str, float] = {}
    for cell in _first_of(trained, lambda cell: (cell.base, cell.trainer, cell.safety)):
        with _naming(cell):
            assert cell.safety is not None
            refusing = _check_safety_data(recipe, cell, cell.safety)
            if refusing >= ALL_REFUSE:
                refusals_alone[str(cell.safety.data)] = refusing
    for name, share in refusals_alone.items():
        log.warning("%s (%.0f%%): %s", name, 100 * share, REFUSALS_ALONE)
    for cell in _first_of(
        trained,
        lambda cell: (
            cell.base,
            cell.lora,
            cell.needs_fisher and (cell.fisher.scope, cell.starts_from_fisher),
        ),
    ):
        scope = cell.fisher.scope if cell.needs_fisher else None
        if cell.lora or scope:
            with _naming(cell):
                _check_model(recipe, cell, scope)
    _check_analysis(recipe)
    _check_robustness(recipe)


def _keeps(cell: Cell) -> str | None:
    return cell.safety.keep_best if cell.safety else None


def _first_of(cells: Iterable[Cell], settings: Callable[[Cell], tuple[Any, ...]]) -> Iterator[Cell]:
    """The first cell with each of the `settings`."""
    seen = []
    for cell in cells:
        if (own := settings(cell)) not in seen:
            seen.append(own)
            yield cell


def _check_safety_data(recipe: Recipe, cell: Cell, safety: Safety) -> float:
    """Every example, or where the model is to write them every request and the judge; the share that refuses."""
    tokenizer = load_tokenizer(cell.base, recipe.model)
    thought = thought_of(tokenizer, recipe.model)
    if not safety.is_self_made:
        return training_data(cell, tokenizer, thought).refusing
    check_filter(safety.filter, safety.filter_settings)
    asked = prompts_of(safety, safety.drawing_seed(cell.seed))
    rendered(asked, safety.steer, tokenizer, thought)
    return 0.0 if any(one.kind == "benign" for one in asked) else 1.0


@contextmanager
def _naming(cell: Cell) -> Iterator[None]:
    try:
        yield
    except RPSAError as error:
        raise RPSAError(f"{cell.id}: {error}") from error


def _check_training(recipe: Recipe, cell: Cell) -> None:
    """Arguments, optimizer, learning rate schedule and trackers, without the model."""
    from transformers.utils import is_liger_kernel_available

    arguments = training_arguments(recipe, cell, recipe.folder)
    with refusals_of_trl(cell):
        _check_trackers(arguments)
        asked = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
        asked = "eval_on_start" if asked == "no" and arguments.eval_on_start else f"eval_strategy: {asked}"
        if asked != "eval_strategy: no" and not (cell.safety and cell.safety.validation_share):
            raise ValueError(f"{asked}, and safety.validation_share holds nothing out to evaluate on")
        _check_optimizer(arguments)
        refuse_wrapped(arguments)
        if arguments.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("use_liger_kernel: liger-kernel is not installed; install it, or leave this off")


def _check_trainer(recipe: Recipe, cell: Cell) -> None:
    """TRL's trainer around a toy model and one example: it refuses what it does not support when it is made."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTTrainer

    from rpsa.training.preferences import PreferenceTrainer

    tokenizer = load_tokenizer(cell.base, recipe.model)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    is_dpo = cell.trainer == "dpo"
    columns = ("prompt_ids", "chosen_ids", "rejected_ids") if is_dpo else ("input_ids", "labels")
    example = Dataset.from_dict({name: [[0, 0]] for name in columns})
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)) for _ in range(2))
    make: Any = partial(PreferenceTrainer, ref_model=reference) if is_dpo else SFTTrainer
    arguments = training_arguments(recipe, cell, recipe.folder)
    with TemporaryDirectory() as folder, reading(f"{cell.id}: train", "TRL refuses it"):
        arguments.output_dir, arguments.push_to_hub, arguments.report_to = folder, False, []
        trainer = make(
            model,
            args=arguments,
            train_dataset=example,
            eval_dataset=example if cell.safety and cell.safety.validation_share else None,
            processing_class=tokenizer,
        )
        if is_dpo:  # some of whose settings are looked at in the first step alone
            trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator([example[0]])))


def _check_model(recipe: Recipe, cell: Cell, scope: str | None) -> None:
    """A model without weights: whether the adapter fits it, and the Fisher's scope is of something that trains."""
    model: Any = empty_model(cell.base, recipe.model)
    if cell.lora:
        # what starts from the model's weights has none here
        started = replace(cell, lora={**cell.lora, "init_lora_weights": False})
        with torch.device("meta"):
            model = add_adapter(model, started)
    trainable = trainable_parameters(model)
    if cell.lora and cell.needs_fisher and not cell.starts_from_fisher:
        _check_adapted(model, scope)
    elif scope and not any(re.search(scope, name) for name in trainable):
        raise RPSAError(
            f"fisher.scope {scope!r} matches no trainable parameter (there is {next(iter(trainable))!r}, ...)"
        )


def _check_adapted(model: Any, scope: str | None) -> None:
    """A penalty on B A: whether it knows this adapter, and the Fisher's scope has all weights that are adapted."""
    out = next((name for name in lora_updates(model) if scope and not re.search(scope, name)), "")
    if out:
        raise RPSAError(
            f"fisher.scope {scope!r} leaves out {out!r}, which is adapted; penalty 'product' needs it"
        )


def _check_trackers(arguments: Any) -> None:
    from transformers.integrations import get_available_reporting_integrations as available
    from transformers.integrations import get_reporting_integration_callbacks

    get_reporting_integration_callbacks(arguments.report_to)
    for tracker in arguments.report_to:
        if tracker not in available():
            raise ValueError(
                f"report_to: {tracker} is not installed; install it, or set train.report_to=none"
            )


def _check_optimizer(arguments: Any) -> None:
    from transformers import Trainer, get_scheduler

    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    weight = torch.nn.Parameter(torch.zeros(2, 2, device=arguments.device))
    try:
        try:
            made_by, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        except ValueError as error:
            if " a model" in str(error) or " a `model`" in str(error):
                return  # some optimizers cannot be made without it
            raise
        made = made_by([{"params": [weight], "weight_decay": arguments.weight_decay}], **settings)
        get_scheduler(
            arguments.lr_scheduler_type,
            made,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except Exception as error:  # each optimizer refuses in its own way
        raise ValueError(f"{optimizer}: {error or type(error).__name__}") from error


def _check_reference(recipe: Recipe) -> None:
    settings = recipe.reference
    wanted = tasks_of(recipe, "reference")
    if settings.problems is None or not wanted:
        return
    problems = {"reference": reference_problems(settings.problems, settings.n, settings.seed)}
    if any(isinstance(task, HeldOutTask) for task in wanted):
        problems["held out"] = held_out_problems(settings)
    for drawn in problems.values():
        check_ids(drawn)
    for base in recipe.bases:
        tokenizer = load_tokenizer(base, recipe.model)
        thought = thought_of(tokenizer, recipe.model)
        for problem in itertools.chain.from_iterable(problems.values()):
            render_prompt(tokenizer, problem.prompt, thought)


def _check_evaluation(recipe: Recipe) -> None:
    """Its items, what they can say together, who grades them, and every prompt through every template."""
    if not recipe.evaluate.tasks:
        return
    items = check_evaluation(recipe.evaluate, task_options(recipe))
    for kind, wanted in (("reasoning", "reasoning problems"), ("attack", "harmful requests")):
        if not any(item.kind == kind for item in items):
            raise RPSAError(
                f"evaluate.tasks: no task has {wanted}, and without them there is no safety tax to report; add one"
            )
    for base in recipe.bases:
        tokenizer = load_tokenizer(base, recipe.model)
        questions(items, recipe.evaluate, tokenizer, thought_of(tokenizer, recipe.model))


def _check_analysis(recipe: Recipe) -> None:
    settings = recipe.analysis.perturb
    if (settings or recipe.analysis.fisher_map) and not full_fishers(recipe):
        log.warning("analysis: no method measures a whole model's Fisher, and there is nothing to analyse")
    if settings is None:
        return
    if not recipe.evaluate.tasks:
        raise RPSAError(
            "analysis.perturb: evaluate.tasks names nothing, and a perturbation is measured on reasoning problems"
        )
    fractions, factors, selections = (settings.fractions, settings.factors, settings.selections)
    try:
        PerturbationConfig(tuple(fractions), tuple(factors), tuple(selections), settings.draws)
    except RPSAError as error:
        raise RPSAError(f"analysis.perturb: {error}") from error


def _check_robustness(recipe: Recipe) -> None:
    """Every attack on every base as far as it needs no weights: its rows, its prompts, its words."""
    if recipe.robustness is None:
        return
    options = task_options(recipe)
    settings = asked_under_attack(recipe.robustness, recipe.evaluate, options)
    items = check_evaluation(settings, options)
    attacks = attacks_of(recipe.robustness, has_base=True)
    for base in recipe.bases:
        target = Target("", base, None, base, recipe.model)
        try:
            check_attacks(attacks, target, settings, items)
        except RPSAError as error:
            raise RPSAError(f"robustness: {base}: {error}") from error
