"""A recipe's settings by the names that the installed libraries know them by: recipes have the newest."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_BEFORE = {  # by today's name the one before transformers 5.20
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def installed_names(settings: Mapping[str, Any], config: type) -> dict[str, Any]:
    """`settings` with today's names replaced by older ones where the dataclass `config` has only those."""
    known = {field.name for field in fields(config)}
    return {_BEFORE.get(key, key) if key not in known else key: value for key, value in settings.items()}
