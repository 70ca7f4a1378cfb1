"""From a file and the command line's overrides to a checked `Recipe`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rpsa.errors import RPSAError
from rpsa.recipe.checks import recipe_problems
from rpsa.recipe.hygiene import hygiene_problems
from rpsa.recipe.problems import did_you_mean, validation_problems
from rpsa.recipe.schema import Recipe
from rpsa.recipe.strict_yaml import parse_yaml


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, put `section.key=value` overrides in, and check all of it, the files it names included.

    Raises `RPSAError` with one line: the file, the field's path, what is wrong, the nearest valid name or value.
    """
    path = Path(path)
    raw = parse_yaml(_read(path), path.name)
    if not isinstance(raw, dict):
        raise RPSAError(
            f"{path.name}: expected a mapping with keys such as {', '.join(list(Recipe.model_fields)[:5])}"
        )
    for override in overrides:
        _override(raw, override)
    if problem := next(hygiene_problems(raw), None):
        raise RPSAError(f"{path.name}: {problem}")
    raw = _interpolate(raw, raw.get("data_dir"), path.name)
    # `report:` with nothing below it means the section's defaults.
    raw = {key: value for key, value in raw.items() if value is not None}
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _as_error(path.name, validation_problems(error, Recipe)) from None
    problems = list(recipe_problems(recipe))
    if problems:
        raise _as_error(path.name, problems)
    return recipe


def _read(path: Path) -> str:
    if path.is_dir():
        recipes = ", ".join(sorted(p.name for p in path.glob("*.yaml"))) or "no .yaml file"
        raise RPSAError(f"{path}: is a folder, not a recipe; it holds {recipes}")
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RPSAError(
            f"{path}: no such recipe{did_you_mean(path.name, siblings) if siblings else ''}"
        ) from None
    except UnicodeDecodeError as error:
        raise RPSAError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None


def _as_error(name: str, problems: list[str]) -> RPSAError:
    rest = f" ({len(problems) - 1} more: {'; '.join(problems[1:])})" if len(problems) > 1 else ""
    return RPSAError(f"{name}: {problems[0]}{rest}")


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RPSAError(f"{key!r}: write an override as section.key=value")
    value = parse_yaml(text, key)
    matrix = raw.get("matrix")
    if isinstance(matrix, dict):
        if parts[:2] == ["matrix", "grid"] and len(parts) > 2:
            parts = ["matrix", "grid", ".".join(parts[2:])]
        if isinstance(matrix.get("methods"), list) and len(parts) > 2:
            matrix["methods"] = dict.fromkeys(matrix["methods"])
        _make_way(matrix, parts)
    place = raw
    for part in parts[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise RPSAError(f"{key.strip()!r}: {part!r} is not a section of the recipe")
    place[parts[-1]] = value


def _make_way(matrix: dict[str, Any], parts: list[str]) -> None:
    """Take a setting of the command line out of the places of the recipe that would win over it."""
    if parts[0] not in ("train", "lora", "align", "safety") or len(parts) != 2:
        return
    section, key = parts
    grid = matrix.get("grid")
    if isinstance(grid, dict):
        grid.pop(f"{section}.{key}", None)
    paradigms = matrix.get("paradigms")
    for own in paradigms.values() if isinstance(paradigms, dict) else ():
        if isinstance(own, dict) and isinstance(own.get(section), dict):
            own[section].pop(key, None)


def _interpolate(value: Any, data_dir: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _interpolate(item, data_dir, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, data_dir, name) for item in value]
    if isinstance(value, str):
        for variable in re.findall(r"\$\{(.*?)\}", value):
            if variable != "data_dir":
                raise RPSAError(f"{name}: ${{{variable}}} is unknown; the only variable is ${{data_dir}}")
            if not isinstance(data_dir, str):
                raise RPSAError(f"{name}: data_dir: missing, and {value!r} needs it; set data_dir=FOLDER")
            value = value.replace("${data_dir}", data_dir)
    return value
