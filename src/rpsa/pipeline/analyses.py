"""Analyses of Fishers: maps (`rpsa fisher-map`, Fig. 1 and 2) and perturbation (`rpsa perturb`, Fig. 3)."""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.analysis.anatomy import MEANING, Overlap, anatomy, overlap, to_json
from rpsa.analysis.perturbation import Evaluate, PerturbationCell, PerturbationConfig, cells, effects, perturb
from rpsa.artifacts import atomic_write, files_below, recover_lines, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.grading import Graders, graded
from rpsa.evaluation.items import load_tasks
from rpsa.evaluation.judges import make_judge
from rpsa.evaluation.results import set_result
from rpsa.evaluation.run import REFUSAL, questions, sandbox_for
from rpsa.evaluation.scores import Sample, scores_by_item
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.generation.backends import has_gpu
from rpsa.models import generation_dtype, identity, load_model, load_tokenizer, thought_of
from rpsa.parameters import trainable_parameters
from rpsa.pipeline.tasks import MANIFEST, tasks_identity
from rpsa.progress import Progress, progress_bars
from rpsa.provenance import MADE_BY, TIMING, MadeBy, sources, versions
from rpsa.recipe.problems import source_problem, validation_problems
from rpsa.recipe.sections import Evaluate as EvaluateSettings
from rpsa.recipe.sections import Model
from rpsa.thought import ThoughtFormat

__all__ = ["PerturbationConfig", "evaluation_settings", "run_perturbation"]

log = logging.getLogger(__name__)

MAP_RESULTS = "fisher_map.json"
_SMALL = 0.01  # the share whose overlap is always shown beside that of k


def fisher_map(folders: Sequence[Path], ks: Sequence[float], out: Path, model: str | None = None) -> None:
    """Write `fisher_map.json` and the figures of each Fisher into `out`, and print the tables.

    Raises:
        RPSAError: a folder holds no Fisher, a k is not in [0, 1], or `model` has not the Fishers' parameters.
    """
    from rpsa.report.console import render_anatomy, render_overlaps
    from rpsa.report.drawing import write_figure
    from rpsa.report.paper_figures import layer_map, module_bars

    labels = distinct_labels(folders)
    fishers = {label: FisherDiagonal.load(folder) for label, folder in zip(labels, folders, strict=True)}
    content: dict[str, Any] = {"meaning": MEANING, "fishers": {}, "overlap": []}
    for label, folder in zip(labels, folders, strict=True):
        fisher = fishers[label]
        trained, classes = _structure(model, fisher) if model else (None, None)
        at = [anatomy(fisher, k, trained=trained, classes=classes) for k in ks]
        content["fishers"][label] = {"folder": str(folder)} | to_json(at)
        render_anatomy(label, at)
        figures = {"modules": module_bars(at[0], label)}
        if at[0].layers():
            figures["layers"] = layer_map(at[0], label)
        for name, figure in figures.items():
            write_figure(figure, out, f"{label}-{name}")
    overlaps = _overlaps(fishers, [*ks, *([] if _SMALL in ks else [_SMALL])])
    content["overlap"] = [
        {"fishers": list(pair)} | vars(one) for pair, found in overlaps.items() for one in found
    ]
    if overlaps:
        render_overlaps(overlaps)
    atomic_write(out / MAP_RESULTS, stable_json(content))
    print(f"\nNumbers and figures: {out}")


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """Short names, fit for files: the shortest ends of the paths that tell them apart, without a common last part.

    Raises:
        RPSAError: a folder is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise RPSAError(f"{folders[0]}: name each Fisher once")
    while len(parts) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    lengths = range(1, max(map(len, parts)) + 1)
    return next(
        labels
        for length in lengths
        if len(set(labels := ["-".join(part[-length:]).strip("/") for part in parts])) == len(parts)
    )


def _overlaps(
    fishers: dict[str, FisherDiagonal], ks: Sequence[float]
) -> dict[tuple[str, str], list[Overlap]]:
    found = {}
    for first, second in combinations(fishers, 2):
        try:
            found[first, second] = [overlap(fishers[first], fishers[second], k) for k in ks]
        except RPSAError as error:
            log.warning("%s and %s: %s", first, second, error)
    return found


def _structure(name: str, fisher: FisherDiagonal) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of all that the model trains, and the classes of its modules; no weight is loaded.

    Under LoRA only the adapter trains, and the modules are those of the model that it is put on.
    """
    from rpsa.models import empty_model

    model = empty_model(name)
    classes = {path: type(module).__name__ for path, module in model.named_modules() if path}
    if any("lora_" in scored for scored in fisher):
        return {}, {f"base_model.model.{path}": of_class for path, of_class in classes.items()}
    fisher.check_shapes(model)
    return {n: tuple(p.shape) for n, p in trainable_parameters(model).items()}, classes


CELLS = "cells.jsonl"
_MADE_BY = MadeBy(
    MADE_BY["evaluate"].packages,
    (
        *("pipeline/analyses", "models", "analysis/perturbation", "freezing/masks", "fisher"),
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
    progress: Progress | None = None,
) -> None:
    """Evaluate a model under each perturbation; writes `results.json` and the bar chart into `out`.

    Cells that `out` or an `earlier` folder holds already are not run again. `described` says in what dtype elements
    are scaled, and in what the model then generates. With `any_weights` the model need not be the one that the Fisher
    was measured on.

    Raises:
        RPSAError: see `perturb`; or no task has reasoning problems.
    """
    from rpsa.models import quiet
    from rpsa.report.console import render_effects
    from rpsa.report.drawing import write_figure
    from rpsa.report.paper_figures import perturbation_bars

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
    total, done = len(cells(config)), 0
    with progress_bars(disable=progress is not None) as bar:
        shown = bar.add_task("cells", total=total, now="")

        def on_cell(cell: PerturbationCell) -> None:
            nonlocal done
            done += 1
            bar.advance(shown)
            if progress is not None:
                progress(done, total, unit="cell")

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
            reason = set_result(samples).unreliable
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
