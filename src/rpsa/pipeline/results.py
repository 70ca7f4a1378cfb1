"""What the finished cells of a run found, as the report wants it."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rpsa.artifacts import AUDIT_FILE, package_versions, read_manifest
from rpsa.errors import RPSAError
from rpsa.pipeline.evaluation import RESULTS, SAMPLES
from rpsa.pipeline.tasks import (
    align_task,
    analysis_tasks,
    evaluate_task,
    fisher_task,
    reference_task,
    upstream,
)
from rpsa.recipe.schema import Cell, Recipe
from rpsa.report import RunResult, Shown
from rpsa.thought import ThoughtFormat

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


def collect(recipe: Recipe) -> list[RunResult]:
    """One result for each cell of the matrix.

    Raises:
        RPSAError: a cell has not been evaluated.
    """
    return [_result(recipe, cell) for cell in recipe.cells()]


def _result(recipe: Recipe, cell: Cell) -> RunResult:
    import json

    evaluated = evaluate_task(recipe, cell)
    upstream(evaluated)
    found = json.loads((evaluated.folder / RESULTS).read_text())
    sets, judge = found["sets"], found["judge"]
    for kind, wanted in (("reasoning", "reasoning problems"), ("attack", "harmful requests")):
        if not sets[kind]:
            raise RPSAError(
                f"evaluate.tasks: no task has {wanted}, so there is no safety tax to report; add one"
            )
    aligned = align_task(recipe, cell)
    audit = None
    if aligned is not None and (aligned.folder / AUDIT_FILE).is_file():
        audit = json.loads((aligned.folder / AUDIT_FILE).read_text())
    log = json.loads((aligned.folder / "log.json").read_text()) if aligned is not None else {}
    return RunResult(
        method=_label(cell),
        base=cell.base,
        seed=cell.seed,
        lr=cell.learning_rate,
        reasoning=_with_mean(sets["reasoning"], "pass_at_1"),
        refused=_mean(one["refused"] for one in sets["reasoning"].values()),
        truncated=_mean(one["length"] for kind in sets.values() for one in kind.values()),
        asr=_with_mean(sets["attack"], "attack_success_rate"),
        over_refusal=_figures(sets["over_refusal"], "over_refusal"),
        safety=cell.safety.data if cell.safety else None,
        trajectory=_columns(audit["trajectory"]) if audit and audit["trajectory"] else None,
        audit=audit,
        seconds=log.get("seconds"),
        sets=sets,
        judge=judge if isinstance(judge, str) else str(judge["id"]),
        sandbox=found["sandbox"],
        samples=evaluated.folder / SAMPLES,
        sweep=cell.sweep,
        point=dict(cell.grid),
    )


def _label(cell: Cell) -> str:
    """The method; on a grid over more than the learning rate and the safety data, with the rest of its point.

    What stands under one label is averaged. A sweep's point has a place of its own.
    """
    rest = {k: v for k, v in cell.grid.items() if k not in ("train.learning_rate", "safety.data")}
    if cell.sweep is not None or not rest:
        return cell.method
    return " ".join([cell.method, *(f"{key.rpartition('.')[2]}={value}" for key, value in rest.items())])


def _with_mean(sets: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    """The figure of each set, and the paper's average, in which every set counts alike."""
    values = _figures(sets, metric)
    return values | {"mean": _mean(values.values())}


def _figures(sets: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    for name, found in sets.items():
        if found[metric] is None:
            raise RPSAError(f"{name}: the judge gave no verdict on any response; take another judge")
    return {name: float(found[metric]) for name, found in sets.items()}


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def report_inputs(recipe: Recipe) -> dict[str, Any]:
    """What a report is made of: the recipe, wherever it writes, and the results that it shows.

    Raises:
        RPSAError: a cell has not been evaluated.
    """
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"output_dir"}),
        "evaluated": {cell.id: upstream(evaluate_task(recipe, cell)) for cell in recipe.cells()},
    }


def analysis_figures(recipe: Recipe) -> list[Shown]:
    """Fig. 1 to 3 of the bases, as far as the recipe asks for them."""
    figures = []
    for task in analysis_tasks(recipe):
        upstream(task)
        for path in sorted(task.folder.glob("*.svg")):
            label, _, kind = path.stem.rpartition("-")
            title, caption = _ANALYSES[kind]
            base = label or task.base
            figures.append(
                Shown(f"{task.folder.name}-{path.stem}", path.read_bytes(), f"{title}: {base}", caption)
            )
    return figures


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Where the numbers come from: versions, D_ref and the Fishers, judges, sandbox, data, and the recipe."""
    import json

    references: dict[str, Any] = {}
    fishers: dict[str, Any] = {}
    for cell in recipe.cells():
        reference, fisher = reference_task(recipe, cell), fisher_task(recipe, cell)
        if reference is None or fisher is None or read_manifest(fisher.folder) is None:
            continue
        built = json.loads((reference.folder / "manifest.json").read_text())
        references[reference.name] = (
            f"{built['traces']} traces, {built['correct']} correct, {built['truncated']} truncated"
        )
        estimation = json.loads((fisher.folder / "manifest.json").read_text())["estimation"]
        fishers[fisher.name] = estimated(estimation)
    return {
        "name": recipe.name,
        "versions": package_versions() | {"python": platform.python_version()},
        "D_ref": references,
        "Fisher (split-half overlap of the top k)": fishers,
        **_graded_by(recipe),
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
    }


def estimated(estimation: Mapping[str, Any]) -> str:
    """What a Fisher's manifest tells of its estimation; no overlap is known of one sample, or of a few elements."""
    shares = estimation["split_half"].items()
    overlap = ", ".join(f"{k}: {'not known' if share is None else f'{share:.3f}'}" for k, share in shares)
    return f"{estimation['samples']} samples, {estimation['tokens']} tokens; overlap {overlap}"


def _graded_by(recipe: Recipe) -> dict[str, Any]:
    """Who judged, where programs ran, and what tells the data from any other: of every evaluation, each once."""
    import json

    graded: dict[str, dict[str, None]] = {
        name: {} for name in ("Thoughts", "Judge of attacks", "Judge of over-refusal", "Sandbox")
    }
    data: dict[str, str] = {}
    for cell in recipe.cells():
        found = json.loads((evaluate_task(recipe, cell).folder / RESULTS).read_text())
        sandbox = found["sandbox"] or "no programs were run"
        refusal_judge = "exact" if found["judge"] == "exact" else found["refusal_judge"]
        thoughts = str(ThoughtFormat.from_json(found["thought"]))
        said = (thoughts, _judge(found["judge"]), _judge(refusal_judge), sandbox)
        for name, value in zip(graded, said, strict=True):
            graded[name][value] = None
        data |= found["data_sha256"]
    return {name: list(values) for name, values in graded.items()} | {"Data (SHA-256)": data}


def _judge(identity: str | Mapping[str, Any]) -> str:
    if isinstance(identity, str):
        return "exact comparison"
    return ", ".join(f"{key} {value}" for key, value in identity.items() if value is not None)
