"""The trainer of a cell: its settings, the model that it starts from, and what goes by Fisher or D_ref."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.checkpoints import load_adapter
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.pipeline.models import ADAPTER, add_adapter, alignment_dtype, load_model, will_be_sharded
from rpsa.pipeline.tasks import fisher_task, reference_task
from rpsa.recipe.names import installed_names
from rpsa.recipe.schema import Cell, Recipe
from rpsa.reference import ReferenceDataset

if TYPE_CHECKING:
    from datasets import Dataset

CHECKPOINTS = "checkpoints"


def make_trainer(
    recipe: Recipe,
    cell: Cell,
    tokenizer: Any,
    dataset: "Dataset",
    validation: "Dataset | None",
    folder: Path,
    *,
    quiet: bool,
) -> Any:
    """RPSA's trainer or the alternatives' if the cell asks for it, else TRL's own; on the same start."""
    from transformers.trainer_callback import PrinterCallback

    from rpsa.training.alternatives import AlternativesTrainer
    from rpsa.training.trainer import ResumableSFTTrainer, RPSATrainer

    common: dict[str, Any] = {
        "args": training_arguments(recipe, cell, folder, quiet=quiet),
        "train_dataset": dataset,
        "eval_dataset": validation,
        "processing_class": tokenizer,
    }
    if not _is_plain(cell):
        fisher = fisher_task(recipe, cell)
        reference = reference_task(recipe, cell)
        common["fisher"] = FisherDiagonal.load(fisher.folder) if fisher else None
        common["reference_dataset"] = ReferenceDataset.load(reference.folder) if reference else None
    trainer_class: Any = RPSATrainer if cell.align else AlternativesTrainer
    if _is_plain(cell):
        trainer_class = ResumableSFTTrainer
    with refusals_of_trl(cell):
        trainer = trainer_class(model=starting_model(recipe, cell), **common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(recipe: Recipe, cell: Cell, folder: Path, *, quiet: bool) -> Any:
    """The cell's `RPSAConfig` or `AlternativesConfig`, or `SFTConfig` where training itself is plain.

    Raises:
        RPSAError: the settings contradict each other, or are not supported.
    """
    from trl import SFTConfig

    from rpsa.training.alternatives import AlternativesConfig
    from rpsa.training.config import RPSAConfig

    settings = installed_names(cell.train, SFTConfig)
    ours = {
        "output_dir": str(folder / CHECKPOINTS),
        "enable_jit_checkpoint": False,
    }  # see `stopped_by_sigterm`
    arguments: dict[str, Any] = {"disable_tqdm": quiet} | settings | ours
    longest: dict[str, Any] = {"reference_max_length": recipe.reference.reference_max_length}
    with refusals_of_trl(cell):
        if cell.align is not None:
            own = cell.align.model_dump() | {"compact": bool(cell.align.compact)}
            made = RPSAConfig(**arguments, **own, **longest)
            if cell.align.compact is None:
                made.compact = _may_be_compact(made)
            return made
        if _is_plain(cell):
            return SFTConfig(**arguments)
        assert cell.alternatives is not None
        own = cell.alternatives.model_dump(exclude={"rehearsal_share"})
        return AlternativesConfig(**arguments, **own, **longest)


def _may_be_compact(arguments: Any) -> bool:
    """Where a recipe does not say: it trains the same for less where k is constant and nothing is sharded."""
    from rpsa.training.config import why_not_compact

    is_constant = not isinstance(arguments.frozen_ratio, str)
    return is_constant and not why_not_compact(arguments) and not will_be_sharded()


def _is_plain(cell: Cell) -> bool:
    """Rehearsal changes the data alone."""
    changed = cell.alternatives is not None and cell.alternatives.changes_training
    return cell.align is None and not changed


@contextmanager
def refusals_of_trl(cell: Cell) -> Iterator[None]:
    """What the libraries refuse is a mistake in the recipe: one line that names the run."""
    try:
        yield
    except RPSAError as error:
        raise RPSAError(f"{cell.id}: {error}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise RPSAError(f"{cell.id}: train: {str(error).strip().partition(chr(10))[0]}") from error


def starting_model(recipe: Recipe, cell: Cell) -> Any:
    """The base, under LoRA with the adapter on which the Fisher was measured."""
    model: Any = load_model(cell.base, recipe.model, alignment_dtype(cell, recipe.model))
    if cell.paradigm != "lora":
        return model
    fisher = fisher_task(recipe, cell)
    if fisher is None:
        return add_adapter(model, cell)
    folder = fisher.folder / ADAPTER
    return load_adapter(model, str(folder), f"adapter {folder}", is_trainable=True)
