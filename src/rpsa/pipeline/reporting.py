"""The stage report: what the finished cells of a run found, and the model card of each with its results.

The cards are in `report/cards/<cell>/README.md`: the one beside the weights stays as the stage align wrote it, since a
manifest vouches for it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rpsa.artifacts import AUDIT_FILE, LOG_FILE, atomic_write, read_json
from rpsa.errors import RPSAError
from rpsa.evaluation.results import EvaluationResult, Identity, SetResult
from rpsa.evaluation.run import RESULTS, SAMPLES
from rpsa.pipeline.stages import (
    EvaluateTask,
    align_task,
    analysis_tasks,
    fisher_task,
    reference_task,
    robustness_tasks,
    tasks_of,
)
from rpsa.pipeline.tasks import Task, read_manifest
from rpsa.progress import Progress
from rpsa.provenance import Stage
from rpsa.recipe.schema import Cell, Recipe
from rpsa.report import RunResult, Shown, with_safety_tax, write_report
from rpsa.report.attacked import UNATTACKED, Attacked
from rpsa.report.summaries import Summary
from rpsa.report.thoughts import broken_json
from rpsa.self_data.stored import Made, look_at
from rpsa.training.card import CARD, Measured, card_with_results

_ANALYSES = {
    "layers": (
        "Fisher by layer and module",
        "Mean Fisher of each module in each layer, and of each layer (Fig. 1).",
    ),
    "modules": ("Fisher by matrix", "Mean Fisher of each matrix, and of attention against MLP (Fig. 2)."),
    "perturbation": (
        "Perturbation",
        "Accuracy after scaling the elements with the largest Fisher, and as many others (Fig. 3).",
    ),
}


def collect(
    recipe: Recipe, without_result: Mapping[Path, str] | None = None
) -> tuple[dict[str, RunResult], dict[str, str]]:
    """The results of the cells by their ids, and why the others have none.

    Args:
        without_result: folders of tasks of which it is known why they have no result.
    """
    results, missing = {}, {}
    for cell in recipe.cells():
        try:
            results[cell.id] = _result(recipe, cell, without_result or {})
        except RPSAError as error:
            missing[cell.id] = str(error)
        except (KeyError, TypeError, AttributeError) as error:
            missing[cell.id] = f"its files are damaged ({type(error).__name__}: {error}); see rpsa verify"
    return results, missing


def _require(task: Task, without_result: Mapping[Path, str]) -> None:
    why = without_result.get(task.folder) or task.why_not()
    if why:
        raise RPSAError(why)


def _result(recipe: Recipe, cell: Cell, without_result: Mapping[Path, str]) -> RunResult:
    evaluated = EvaluateTask(recipe, cell)
    _require(evaluated, without_result)
    found = _evaluation(evaluated)
    aligned = align_task(recipe, cell)
    audit, trained_on = None, {}
    if aligned is not None:
        trained_on = read_json(aligned.folder / LOG_FILE)["safety_data"]
    if aligned is not None and (aligned.folder / AUDIT_FILE).is_file():
        audit = read_json(aligned.folder / AUDIT_FILE)
    reasoning = found.sets["reasoning"]
    return RunResult(
        method=_label(cell),
        base=cell.base,
        seed=cell.seed,
        lr=cell.learning_rate,
        reasoning=_with_mean(reasoning),
        refused=_mean(one.refused or 0.0 for one in reasoning.values()),
        truncated=_mean(one.length for sets in found.sets.values() for one in sets.values()),
        asr=_with_mean(found.sets["attack"]),
        over_refusal=_figures(found.sets["over_refusal"]),
        safety=cell.safety.data if cell.safety else None,
        trajectory=_columns(audit["trajectory"]) if audit and audit["trajectory"] else None,
        audit=audit,
        sets=found.sets,
        judge=found.judge_name,
        sandbox=found.sandbox,
        no_thought_verdicts=found.no_thought_verdicts,
        samples=evaluated.folder / SAMPLES,
        sweep=cell.sweep,
        point=dict(cell.grid),
        is_original=cell.paradigm == "none",
        loss=found.reasoning_loss,
        refusing=trained_on.get("refusing"),
        examples=trained_on.get("examples"),
        perplexity=trained_on.get("perplexity"),
    )


def _evaluation(of: EvaluateTask) -> EvaluationResult:
    return EvaluationResult.from_json(read_json(of.folder / RESULTS))


def _label(cell: Cell) -> str:
    """The method; on a grid over more than the learning rate and the safety data, with the rest of its point.

    What stands under one label is averaged. A sweep's point has a place of its own.
    """
    rest = {k: v for k, v in cell.grid.items() if k not in ("train.learning_rate", "safety.data")}
    if cell.sweep is not None or not rest:
        return cell.method
    return " ".join([cell.method, *(f"{key.rpartition('.')[2]}={value}" for key, value in rest.items())])


def _with_mean(sets: Mapping[str, SetResult]) -> dict[str, float]:
    """The figure of each set, and the paper's average, in which every set counts alike."""
    values = _figures(sets)
    return values | {"mean": _mean(values.values())}


def _figures(sets: Mapping[str, SetResult]) -> dict[str, float]:
    figures = {}
    for name, found in sets.items():
        if found.figure is None:
            raise RPSAError(f"{name}: the judge gave no verdict on any response; take another judge")
        figures[name] = float(found.figure)
    return figures


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


@dataclass(frozen=True)
class ReportTask(Task):
    """The report of the cells that have a result.

    `without_result` has folders of tasks of which it is known why they have none.
    """

    without_result: Mapping[Path, str] = field(default_factory=dict)

    stage: ClassVar[Stage] = "report"
    name = ""
    place = "report"

    def inputs(self) -> dict[str, Any]:
        return report_inputs(self.recipe)

    def run(self, folder: Path, progress: Progress) -> None:
        self.write(folder)

    def write(self, folder: Path) -> list[Summary]:
        """The report and the models' cards; returns the rows of its table."""
        results, (figures, _) = self.results, self._figures
        told = provenance(self.recipe, results)
        summaries = write_report(
            *(list(results.values()), folder, told, figures, self.missing, self.made),
            attacked=self.attacked,
        )
        write_cards(self.recipe, results, folder / "cards")
        return summaries

    @property
    def results(self) -> dict[str, RunResult]:
        """By the cells' ids."""
        return self._collected[0]

    @property
    def missing(self) -> dict[str, str]:
        """Why the other cells, and figures, are not there."""
        return self._collected[1] | self._figures[1] | self._attacked[1]

    @property
    def attacked(self) -> list[Attacked]:
        """The cells of the matrix under attack, each beside what it is without one."""
        return self._attacked[0]

    @cached_property
    def made(self) -> list[Made]:
        """What became of the safety data that the bases were to make themselves, as far as it is known."""
        tasks = [task for task in tasks_of(self.recipe, "safety") if not task.why_not()]
        return [look_at(task.folder, task.name) for task in tasks]

    @cached_property
    def _collected(self) -> tuple[dict[str, RunResult], dict[str, str]]:
        return collect(self.recipe, self.without_result)

    @cached_property
    def _attacked(self) -> tuple[list[Attacked], dict[str, str]]:
        return attacked_runs(self.recipe, self.without_result)

    @cached_property
    def _figures(self) -> tuple[list[Shown], dict[str, str]]:
        return analysis_figures(self.recipe, self.without_result)


def report_inputs(recipe: Recipe, *, current: bool = True) -> dict[str, Any]:
    """What a report is made of: the recipe, wherever it writes, and the results that it shows.

    Raises:
        RPSAError: a model or a file that the recipe names cannot be read.
    """
    evaluated = {cell.id: _inputs_of(EvaluateTask(recipe, cell), current=current) for cell in recipe.cells()}
    attacked = {task.name: _inputs_of(task, current=current) for task in robustness_tasks(recipe)}
    said = recipe.model_dump(mode="json", exclude={"output_dir"})
    if recipe.robustness is None:
        del said["robustness"]  # the inputs of others are what they were before there was the section
    return {"recipe": said, "evaluated": evaluated, **({"attacked": attacked} if attacked else {})}


def _inputs_of(task: Task, *, current: bool) -> str | None:
    """What tells a task's result from any other; None where there is none, or with `current` none that is."""
    manifest = None if current and task.why_not() else read_manifest(task.folder)
    return manifest["inputs_sha256"] if manifest else None


def attacked_runs(
    recipe: Recipe, without_result: Mapping[Path, str]
) -> tuple[list[Attacked], dict[str, str]]:
    """What each attack made of each run, by attack, and why some are not there; attacks on sets of the evaluation's."""
    found: dict[str, Attacked] = {}
    missing = {}
    for task in robustness_tasks(recipe):
        try:
            _require(task, without_result)
            _require(task.evaluation, without_result)
        except RPSAError as error:
            missing[task.name] = str(error)
            continue
        cell, attack = task.cell, task.attack
        under_attack = EvaluationResult.from_json(read_json(task.folder / RESULTS))
        run = Attacked(
            _label(cell), cell.base, cell.seed, attack.name, under_attack, attack.curve, attack.steps
        )
        plain = _same_sets(_evaluation(task.evaluation), under_attack)
        found.setdefault(cell.id, replace(run, attack=UNATTACKED, result=plain, curve=None, steps=None))
        found[task.name] = run
    order = {name: place for place, name in enumerate(dict.fromkeys(one.attack for one in found.values()))}
    return sorted(found.values(), key=lambda one: order[one.attack]), missing


def _same_sets(evaluated: EvaluationResult, attacked: EvaluationResult) -> EvaluationResult:
    """An evaluation, of the sets alone that were asked under attack, too."""
    sets = {
        kind: {name: one for name, one in found.items() if name in attacked.sets[kind]}
        for kind, found in evaluated.sets.items()
    }
    return replace(evaluated, sets=sets)


def analysis_figures(
    recipe: Recipe, without_result: Mapping[Path, str]
) -> tuple[list[Shown], dict[str, str]]:
    """Fig. 1 to 3 of the bases, as far as the recipe asks for them, and why some are not there."""
    figures, missing = [], {}
    for task in analysis_tasks(recipe):
        try:
            _require(task, without_result)
        except RPSAError as error:
            missing[task.name] = str(error)
            continue
        for path in sorted(task.folder.glob("*.svg")):
            label, _, kind = path.stem.rpartition("-")
            title, caption = _ANALYSES[kind]
            base = label or task.needs()[0].base
            figures.append(
                Shown(f"{task.folder.name}-{path.stem}", path.read_bytes(), f"{title}: {base}", caption)
            )
    return figures, missing


def provenance(recipe: Recipe, results: Iterable[str]) -> dict[str, Any]:
    """Where the numbers come from: versions, D_ref and the Fishers, judges, sandbox, data, and the recipe.

    Args:
        results: the ids of the cells that have a result.
    """
    references: dict[str, Any] = {}
    fishers: dict[str, Any] = {}
    results = set(results)
    cells = [cell for cell in recipe.cells() if cell.id in results]
    for cell in cells:
        reference, fisher = reference_task(recipe, cell), fisher_task(recipe, cell)
        if reference is None or fisher is None:
            continue
        built = read_json(reference.folder / "manifest.json")
        graded = built.get("graded", built["traces"])  # which manifests of earlier versions lack
        solved = f"{built['correct']} of {graded} correct" if graded else "no right answers to compare with"
        references[reference.name] = f"{built['traces']} traces, {solved}, {built['truncated']} truncated"
        estimation = read_json(fisher.folder / "manifest.json")["estimation"]
        fishers[fisher.name] = estimated(estimation)
    return {
        "name": recipe.name,
        "versions": _versions(recipe, cells),
        "D_ref": references,
        "Fisher (split-half overlap of the top k)": fishers,
        **_graded_by(recipe, cells),
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir"}),
    }


def estimated(estimation: Mapping[str, Any]) -> str:
    """What a Fisher's manifest tells of its estimation; no overlap is known of one sample, or of a few elements."""
    shares = (estimation["split_half"] or {}).items()
    overlap = ", ".join(f"{k}: {'not known' if share is None else f'{share:.3f}'}" for k, share in shares)
    return f"{estimation['samples']} samples, {estimation['tokens']} tokens; overlap {overlap or 'not known'}"


def _versions(recipe: Recipe, cells: Iterable[Cell]) -> dict[str, str]:
    """What the models were made and measured with: where results were kept, several versions of a package."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for task in (align_task(recipe, cell), EvaluateTask(recipe, cell)):
            manifest = read_manifest(task.folder) if task else None
            for name, version in (manifest or {"versions": {}})["versions"].items():
                if version != "absent":
                    found.setdefault(name, {})[version] = None
    return {name: " and ".join(found[name]) for name in sorted(found)}


def _graded_by(recipe: Recipe, cells: Iterable[Cell]) -> dict[str, Any]:
    """Who judged, where programs ran, and what tells the data from any other: of every evaluation, each once."""
    graded: dict[str, dict[str, None]] = {
        name: {}
        for name in ("Thoughts", "Judge of attacks", "Judge of thoughts", "Judge of over-refusal", "Sandbox")
    }
    data: dict[str, str] = {}
    for cell in cells:
        found = _evaluation(EvaluateTask(recipe, cell))
        refusal_judge = "exact" if found.judge == "exact" else found.refusal_judge
        said = (
            str(found.thought),
            _judge(found.judge),
            found.no_thought_verdicts or _judge(found.thought_judge or "exact"),
            _judge(refusal_judge),
            found.sandbox or "no programs were run",
        )
        for name, value in zip(graded, said, strict=True):
            graded[name][value] = None
        data |= found.data_sha256
    return {name: list(values) for name, values in graded.items()} | {"Data (SHA-256)": data}


def _judge(identity: Identity) -> str:
    if isinstance(identity, str):
        return "exact comparison"
    return ", ".join(f"{key} {value}" for key, value in identity.items() if value is not None)


def write_cards(recipe: Recipe, results: Mapping[str, RunResult], folder: Path) -> None:
    """Fill `folder`; `results` are those of the recipe's cells, by their ids."""
    found = dict(zip(results, with_safety_tax(results.values()), strict=True))
    originals = {result.base: measured(result) for result in found.values() if result.is_original}
    for cell in recipe.cells():
        aligned = align_task(recipe, cell)
        if aligned is not None and cell.id in found:
            card = card_with_results(aligned.folder, measured(found[cell.id]), originals.get(cell.base))
            atomic_write(folder / cell.id / CARD, card)


def measured(result: RunResult) -> Measured:
    return Measured(
        reasoning=result.reasoning,
        asr=result.asr,
        over_refusal=result.over_refusal,
        refused=result.refused,
        truncated=result.truncated,
        thought_asr=_of_thoughts(result),
        broken=broken_json([result]),
        tax=result.tax,
        unreliable=next((r for kind in result.sets if (r := result.unreliable(kind))), None),
        judge=result.judge,
        reasoning_nll=result.loss.nll if result.loss else None,
        reasoning_kl=result.loss.kl if result.loss else None,
        samples=sum(one.samples for sets in result.sets.values() for one in sets.values()),
    )


def _of_thoughts(result: RunResult) -> dict[str, float] | None:
    """Attack success in thoughts on each set, and the mean; None where it is not known."""
    if result.thoughts is None:
        return None
    rates = {name: found.asr["thought"].rate for name, found in result.thoughts.items()}
    return rates | {"mean": _mean(rates.values())}
