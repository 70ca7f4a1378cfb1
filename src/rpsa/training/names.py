"""Under which names the card speaks of models, data and problems. Folders go by their last part alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CardNames:
    """What a trainer cannot see in its own objects; None: derived where possible, left out where not.

    Attributes:
        model: the card's title.
        base: the base model: a Hugging Face id, or what else it is called.
        dataset: the safety data: a Hugging Face id (`id` or `id:split`), a file, or what else it is called.
        problems: the reasoning problems of D_ref, likewise.
        rehearsed: rows of the safety data that are D_ref's.
        tags: more tags.
        front_matter: fields of the card's YAML; they win over derived ones.
    """

    model: str | None = None
    base: str | None = None
    dataset: str | None = None
    problems: str | None = None
    rehearsed: int = 0
    tags: tuple[str, ...] = ()
    front_matter: Mapping[str, Any] = field(default_factory=dict)


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository of the Hugging Face hub; None for folders, files and other names."""
    possible = name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    return name if possible else None


def public_name(name: str) -> str:
    """A folder's or file's last part; other names as they are."""
    path = Path(name)
    return path.resolve().name if path.is_absolute() or path.exists() else name
