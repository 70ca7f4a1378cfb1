"""`rpsa perturb`: Fig. 3 of a saved Fisher and the model that it was measured on."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.analysis.perturbation import Cell, Evaluate, PerturbationConfig, cells, perturb
from rpsa.analysis.perturbation_summary import effects
from rpsa.artifacts import atomic_write, files_below, recover_lines, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.grading import Graders, graded
from rpsa.evaluation.judges import make_judge
from rpsa.evaluation.loading import load_tasks
from rpsa.evaluation.results import why_unreliable
from rpsa.evaluation.samples import Sample, scores_by_item, set_rates
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.generation.backends import has_gpu
from rpsa.pipeline.evaluation import questions
from rpsa.pipeline.graders import REFUSAL, sandbox_for
from rpsa.pipeline.manifests import MADE_BY, MANIFEST, TIMING, MadeBy, sources, versions
from rpsa.pipeline.models import (
    generation_dtype,
    identity,
    load_model,
    load_tokenizer,
    thought_of,
)
from rpsa.pipeline.tasks import tasks_identity
from rpsa.recipe.problems import validation_problems
from rpsa.recipe.sections import Evaluate as EvaluateSettings
from rpsa.recipe.sections import Model
from rpsa.recipe.sources import source_problem
from rpsa.thought import ThoughtFormat

__all__ = ["PerturbationConfig", "evaluation_settings", "run_perturbation"]

log = logging.getLogger(__name__)

CELLS = "cells.jsonl"
_MADE_BY = MadeBy(
    MADE_BY["evaluate"].packages,
    (
        *("pipeline/perturb", "pipeline/models", "analysis/perturbation", "freezing/masks", "fisher"),
        *("generation", "chat", "answers", "evaluation"),
    ),
)
RESULTS = "results.json"


def run_perturbation(
    name: str,
    fisher_folder: Path,
    settings: EvaluateSettings,
    config: PerturbationConfig,
    out: Path,
    data_dir: str | None = None,
    described: Model | None = None,
    *,
    earlier: Sequence[Path] = (),
    any_weights: bool = False,
) -> None:
    """Evaluate a model under each perturbation; writes `results.json` and the bar chart into `out`.

    Cells that `out` or an `earlier` folder holds already are not run again. `described` says in what dtype elements
    are scaled, and in what the model then generates. With `any_weights` the model need not be the one that the Fisher
    was measured on.

    Raises:
        RPSAError: see `perturb`; or no task has reasoning problems.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rpsa.pipeline.quiet import quiet
    from rpsa.report.drawing import write_figure
    from rpsa.report.perturbation_figure import perturbation_bars
    from rpsa.report.perturbation_table import render_effects

    quiet()
    described = described or Model()
    tokenizer = load_tokenizer(name, described)
    thought = thought_of(tokenizer, described)
    evaluate = reasoning_scores(settings, data_dir, thought)
    fisher = FisherDiagonal.load(fisher_folder)
    model: Any = load_model(name, described)
    if any_weights:
        fisher = fisher.for_any_weights()
    fisher.check_weights(model)
    dtype = generation_dtype(described, on_gpu=has_gpu())
    is_cast = dtype not in ("auto", str(model.dtype).removeprefix("torch."))
    if is_cast:
        evaluate = with_weights_of(load_model(name, described, dtype), evaluate)
    inputs = {
        "model": identity(name, described),
        "thought": thought.to_json(),
        "Fisher": _content(fisher_folder),
        "evaluation": settings.model_dump(exclude={"batch_size"}),
        "data": tasks_identity(settings.tasks, data_dir),
        "seed": config.seed,
        "versions": versions(_MADE_BY),
        "sources": sources(_MADE_BY),
        **({"generation_dtype": dtype} if is_cast else {}),
    }
    for folder in earlier:
        _carry_over(folder / CELLS, out / CELLS, inputs)
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task("cells", total=len(cells(config)))

        def on_cell(cell: Cell) -> None:
            bar.advance(shown)

        outcomes = perturb(
            model,
            tokenizer,
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
    write_figure(figure, out, "perturbation")
    render_effects(found)
    print(f"\nNumbers and figure: {out}")


def _content(fisher: Path) -> str:
    """Of its own files, without those of a stage, which hold versions and times."""
    names = [name for name in files_below(fisher) if name not in (MANIFEST, TIMING)]
    return sha256_of({name: sha256_of(fisher / name) for name in names})


def _carry_over(earlier: Path, store: Path, inputs: Mapping[str, Any]) -> None:
    lines = recover_lines(earlier)
    if lines and lines[0].get("inputs") == json.loads(stable_json(inputs)) and not store.exists():
        atomic_write(store, earlier.read_bytes())


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


def reasoning_scores(
    settings: EvaluateSettings,
    data_dir: str | None = None,
    thought: ThoughtFormat | None = None,
) -> Evaluate:
    """What `perturb` calls: the mean score of each problem over its samples, by set of reasoning problems.

    `thought` is the model's format; None: its chat template's.

    Raises:
        RPSAError: a task cannot be read, or none has reasoning problems.
    """
    options = TaskOptions(settings.n, settings.seed, data_dir, prompt_style=settings.prompt_style)
    items = [item for item in load_tasks(settings.tasks, options) if item.kind == "reasoning"]
    if not items:
        raise RPSAError("tasks: none of them has reasoning problems, and a perturbation is measured on these")

    refusal = make_judge(REFUSAL)
    graders = Graders(refusal, refusal, sandbox=sandbox_for(items, settings))
    doubted: set[str] = set()

    def evaluate(model: Any, tokenizer: Any) -> dict[str, list[float]]:
        from rpsa.generation.transformers import TransformersGenerator

        wanted = questions(items, settings, tokenizer, thought)
        generator = TransformersGenerator(model, tokenizer, settings.batch_size, wanted.thought)
        completions = dict(generator.generate(wanted.prompts, wanted.sampling, wanted.ids))
        by_set: dict[str, list[Sample]] = {item.set: [] for item in items}
        for sample in sorted(graded(wanted.responses(completions), graders), key=lambda s: s.id):
            by_set[sample.set].append(sample)
        for name, samples in by_set.items():
            reason = why_unreliable(set_rates(samples))
            if reason and name not in doubted:
                doubted.add(name)
                log.warning("%s: %s; its accuracies say nothing of the model", name, reason)
        return {
            name: [sum(own) / len(own) for own in scores_by_item(samples).values()]
            for name, samples in by_set.items()
        }

    return evaluate


def with_weights_of(generating: Any, evaluate: Evaluate) -> Evaluate:
    """`evaluate` asked of `generating`, which takes the perturbed weights over in its own dtype, as an evaluation does.

    What is perturbed stays in its dtype: scaled there, a weight is rounded once, and its old bits are put back.
    """

    def evaluate_cast(model: Any, tokenizer: Any) -> Mapping[str, Sequence[float]]:
        generating.load_state_dict(model.state_dict())
        return evaluate(generating, tokenizer)

    return evaluate_cast
