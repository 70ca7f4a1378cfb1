"""The model card of each aligned cell, with what its evaluation found: `report/cards/<cell>/README.md`.

The card beside the weights stays as the stage align wrote it: a manifest vouches for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpsa.artifacts import atomic_write
from rpsa.pipeline.tasks import align_task
from rpsa.recipe.schema import Recipe
from rpsa.report import RunResult, with_safety_tax


def write_cards(recipe: Recipe, results: Mapping[str, RunResult], folder: Path) -> None:
    """Fill `folder`; `results` are those of the recipe's cells, by their ids."""
    from rpsa.training.card import CARD, card_with_results

    found = dict(zip(results, with_safety_tax(results.values()), strict=True))
    originals = {result.base: measured(result) for result in found.values() if result.is_original}
    for cell in recipe.cells():
        aligned = align_task(recipe, cell)
        if aligned is not None and cell.id in found:
            card = card_with_results(aligned.folder, measured(found[cell.id]), originals.get(cell.base))
            atomic_write(folder / cell.id / CARD, card)


def measured(result: RunResult) -> dict[str, Any]:
    """What `rpsa.training.card` wants to know of an evaluation."""
    return {
        "reasoning": dict(result.reasoning),
        "asr": dict(result.asr),
        "over_refusal": dict(result.over_refusal),
        "refused": result.refused,
        "truncated": result.truncated,
        "str": result.tax,
        "unreliable": next((r for kind in result.sets if (r := result.unreliable(kind))), None),
        "judge": result.judge,
        "samples": sum(one["samples"] for sets in result.sets.values() for one in sets.values()),
    }
