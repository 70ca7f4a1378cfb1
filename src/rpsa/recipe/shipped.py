"""Shipped recipes: those that come with the package, by name, and copies of them to change.

A name is the path below `recipes` without its ending, `tiny/demo`. In a wheel they lie in the package, in a checkout
beside `src`.
"""

import re
from pathlib import Path

from rpsa.artifacts import atomic_write
from rpsa.errors import RPSAError
from rpsa.recipe.loading import as_yaml, read_raw
from rpsa.recipe.problems import did_you_mean

_PACKAGE = Path(__file__).parents[1]
_HOMES = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")
_PARTS = ("base", "accelerate")
"""Folders of what recipes are made of."""


def recipes_folder() -> Path:
    """Where they lie.

    Raises:
        RPSAError: the installation has none.
    """
    found = next((home for home in _HOMES if (home / "tiny" / "demo.yaml").is_file()), None)
    if found is None:
        raise RPSAError(f"{_HOMES[0]}: the recipes are missing from this installation; install rpsa again")
    return found


def shipped_recipes() -> dict[str, Path]:
    """Every recipe that can be run, by name, in a fixed order."""
    home = recipes_folder()
    paths = {path.relative_to(home).with_suffix("").as_posix(): path for path in sorted(home.rglob("*.yaml"))}
    return {name: path for name, path in paths.items() if name.partition("/")[0] not in _PARTS}


def shipped_recipe(name: str) -> Path:
    """The file of one.

    Raises:
        RPSAError: there is none of that name.
    """
    known = shipped_recipes()
    if name not in known:
        raise RPSAError(f"there is no recipe {name!r}{did_you_mean(name, known)}; see rpsa recipes")
    return known[name]


def said_of(path: Path) -> str:
    """The first sentence of what stands above a recipe."""
    said = " ".join(line.removeprefix("#").strip() for line in _head(path.read_text(encoding="utf-8")))
    return re.split(r"(?<=[.:?])\s", said, maxsplit=1)[0].rstrip(":")


def copy_recipe(name: str, target: Path) -> None:
    """Write a shipped recipe as one file that stands alone, with what it extends, and what is said above it.

    Raises:
        RPSAError: there is none of that name, or there is a file already.
    """
    if target.exists():
        raise RPSAError(f"{target}: exists already; give another --out, or remove it")
    path = shipped_recipe(name)
    text = path.read_text(encoding="utf-8")
    if not re.search(r"^extends:", text, re.MULTILINE):
        atomic_write(target, text)
        return
    head = "".join(f"{line}\n" for line in _head(text))
    atomic_write(target, head + as_yaml(read_raw(path)))


def _head(text: str) -> list[str]:
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def named_recipe(path: Path) -> Path:
    """A file as it is, or the shipped recipe of that name where there is no such file."""
    if path.exists() or path.suffix:
        return path
    return shipped_recipes().get(path.as_posix(), path)
