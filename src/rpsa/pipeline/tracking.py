"""Trackers: a study's runs as one group in trackio, Weights & Biases, TensorBoard or MLflow (`train.report_to`).

transformers' callbacks begin a run where none is open, and do not end it: a study trains many models in one process,
and all would be one run there.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from rpsa.recipe.schema import Cell, Recipe

TRACKING = (
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
)
"""Fields of SFTConfig that say where figures are sent: they decide nothing of a result."""

_ENDS = {"wandb": "finish", "trackio": "finish", "mlflow": "end_run"}
"""How a tracker's module ends the run that is open."""


def names_of_run(recipe: Recipe, cell: Cell) -> dict[str, Any]:
    """Fields of SFTConfig: the cell is a run of the recipe's project."""
    return {"run_name": cell.id, "project": recipe.name}


@contextlib.contextmanager
def tracked(recipe: Recipe, cell: Cell) -> Iterator[None]:
    """Within, trackers have the cell's run in the group of its study; afterwards it has ended.

    What is set in the environment stays as it is.
    """
    group = recipe.folder.name
    names = {
        "WANDB_PROJECT": recipe.name,
        "WANDB_RUN_GROUP": group,
        "MLFLOW_EXPERIMENT_NAME": recipe.name,
        "TENSORBOARD_LOGGING_DIR": str(recipe.folder / "tensorboard" / cell.id),
    }
    ours = {name: value for name, value in names.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        for tracker, how in _ENDS.items():
            if tracker in sys.modules:
                _end(sys.modules[tracker], how)


def _end(module: Any, how: str) -> None:
    with contextlib.suppress(Exception):  # there may be none; and a tracker must not cost a trained model
        getattr(module, how)()
