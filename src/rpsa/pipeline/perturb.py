"""`rpsa perturb`: Fig. 3 of a saved Fisher and the model that it was measured on."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.analysis.perturbation import Cell, Evaluate, PerturbationConfig, cells, perturb
from rpsa.analysis.perturbation_summary import effects
from rpsa.artifacts import atomic_write, package_versions, sha256_of, stable_json
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.evaluation.tasks import load_task
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.generation import Sampling
from rpsa.parameters import canonical_name, fingerprint
from rpsa.pipeline.models import identity, load_model, load_tokenizer
from rpsa.pipeline.tasks import source_identity
from rpsa.recipe.problems import validation_problems
from rpsa.recipe.schema import Evaluate as EvaluateSettings
from rpsa.recipe.schema import Model
from rpsa.recipe.sources import source_problem

__all__ = ["PerturbationConfig", "evaluation_settings", "run_perturbation"]

log = logging.getLogger(__name__)

CELLS = "cells.jsonl"
RESULTS = "results.json"


def run_perturbation(
    name: str, fisher_folder: Path, settings: EvaluateSettings, config: PerturbationConfig, out: Path
) -> None:
    """Evaluate a model under each perturbation; writes `results.json` and the bar chart into `out`.

    Cells that `out` holds already are not run again.

    Raises:
        RPSAError: see `perturb`; or no task has reasoning problems.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rpsa.pipeline.runner import quiet
    from rpsa.report.figures import to_png, to_svg
    from rpsa.report.perturbation_figure import perturbation_bars
    from rpsa.report.perturbation_table import render_effects

    quiet()
    evaluate = reasoning_scores(settings)
    fisher = FisherDiagonal.load(fisher_folder)
    described = Model(name=name)
    model: Any = load_model(name, described)
    _warn_of_another_model(model, fisher)
    inputs = {
        "model": identity(name, described),
        "Fisher": sha256_of(fisher_folder),
        "evaluation": settings.model_dump(exclude={"batch_size"}),
        "data": [source_identity(source, "task") for source in settings.tasks],
        "seed": config.seed,
        "versions": package_versions(),
    }
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task("cells", total=len(cells(config)))

        def on_cell(cell: Cell) -> None:
            bar.advance(shown)

        outcomes = perturb(
            model,
            load_tokenizer(name, described),
            fisher,
            evaluate,
            config,
            out / CELLS,
            inputs,
            on_cell,
        )
        bar.update(shown, completed=len(outcomes))
    found = effects(outcomes)
    atomic_write(out / RESULTS, stable_json({"inputs": inputs, "effects": [e.to_json() for e in found]}))
    figure = perturbation_bars(found)
    atomic_write(out / "perturbation.png", to_png(figure))
    atomic_write(out / "perturbation.svg", to_svg(figure))
    render_effects(found)
    print(f"\nNumbers and figure: {out}")


def evaluation_settings(**settings: Any) -> EvaluateSettings:
    """As in the section `evaluate` of a recipe.

    Raises:
        RPSAError: a setting or a task is impossible.
    """
    try:
        checked = EvaluateSettings(**settings)
    except ValidationError as error:
        raise RPSAError(validation_problems(error, EvaluateSettings)[0]) from None
    for source in checked.tasks:
        if problem := source_problem("task", source):
            raise RPSAError(f"tasks: {problem}")
    return checked


def reasoning_scores(settings: EvaluateSettings) -> Evaluate:
    """What `perturb` calls: 1 for each correct answer, 0 for any other, by set of reasoning problems.

    Raises:
        RPSAError: a task cannot be read, or none has reasoning problems.
    """
    items = [
        item
        for source in settings.tasks
        for item in load_task(source, settings.n, settings.seed)
        if item.kind == "reasoning"
    ]
    if not items:
        raise RPSAError("tasks: none of them has reasoning problems, and a perturbation is measured on these")

    def evaluate(model: Any, tokenizer: Any) -> dict[str, list[float]]:
        from rpsa.generation.transformers import TransformersGenerator

        generator = TransformersGenerator(model, tokenizer, settings.batch_size)
        sampling = Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.seed)
        prompts = [render_prompt(tokenizer, item.prompt) for item in items]
        responses = dict(generator.generate(prompts, sampling, [item.id for item in items]))
        scores: dict[str, list[float]] = defaultdict(list)
        for index, item in enumerate(items):
            scores[item.set].append(float(item.score(responses[index].text) == "correct"))
        return dict(scores)

    return evaluate


def _warn_of_another_model(model: Any, fisher: FisherDiagonal) -> None:
    measured_on = fisher.manifest.get("fingerprint")
    if measured_on and measured_on != fingerprint(
        (canonical_name(n), p) for n, p in model.named_parameters()
    ):
        log.warning("this Fisher was measured on another model than the one that is perturbed")
