"""What a model card and its metadata say of an alternative to freezing."""

from collections.abc import Mapping
from typing import Any

from rpsa.training.freezing_text import bullets
from rpsa.training.names import CardNames

_DEFAULTS = {"penalty": None, "projection": None, "interpolation": 1.0, "restored_ratio": 0.0}


def alternatives_metadata(trainer: Any, names: CardNames) -> dict[str, Any] | None:
    """The settings that a run had, JSON-able; None where nothing was done instead of freezing or beside it."""
    settings = {name: getattr(trainer.args, name, default) for name, default in _DEFAULTS.items()}
    if settings == _DEFAULTS and not names.rehearsed:
        return None
    strength = trainer.args.penalty_strength if settings["penalty"] else None
    return {**settings, "penalty_strength": strength, "rehearsed": names.rehearsed}


def changed_afterwards(done: Mapping[str, Any]) -> bool:
    """Whether the weights are not those that training ended with."""
    return bool(done["interpolation"] < 1 or done["restored_ratio"])


def alternatives_section(metadata: Mapping[str, Any]) -> str:
    """The lines under "What was done instead of freezing"; empty where there was nothing."""
    done = metadata["alternatives"]
    if done is None:
        return ""
    weights = {
        "fisher": "by their Fisher information (elastic weight consolidation)",
        "uniform": "all alike (L2-SP)",
    }
    projections = {
        "agem": "its component against the reasoning gradient, where the two pointed apart (A-GEM)",
        "signs": "every element whose sign was not that of the reasoning gradient",
    }
    return bullets(
        done["penalty"]
        and f"Penalty on moving away from the starting weights, {weights[done['penalty']]}, strength "
        f"{done['penalty_strength']:g}.",
        done["projection"]
        and f"Taken out of the safety gradient at every step: {projections[done['projection']]}.",
        done["rehearsed"]
        and f"Rehearsal: {done['rehearsed']:,} of the {_count(metadata['safety_data']['examples'])}rows trained on are "
        "the model's own responses to reasoning problems.",
        done["restored_ratio"]
        and f"After training, {done['restored_ratio']:g} of the elements with non-zero Fisher information, those "
        "with the most, were put back to their starting values.",
        done["interpolation"] < 1
        and f"After training, the weights were interpolated: {done['interpolation']:g} of the way from the start.",
    )


def _count(rows: int | None) -> str:
    return "" if rows is None else f"{rows:,} "
