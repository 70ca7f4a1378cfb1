"""The points of `rpsa sweep`: every combination of the values that it was given, each checked as a whole recipe."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpsa.errors import RPSAError
from rpsa.recipe.loading import load_recipe
from rpsa.recipe.schema import Recipe, point_name
from rpsa.recipe.strict_yaml import parse_yaml


@dataclass(frozen=True)
class Value:
    """A swept value as YAML, and as folders, tables and figures show it."""

    yaml: str
    label: str


@dataclass(frozen=True)
class Point:
    """One point: the label of each swept setting's value, and the run that it stands for.

    `recipe` writes into the point's own folder; `overrides` make it from the recipe's file.
    """

    settings: Mapping[str, str]
    overrides: Sequence[str]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def name(self) -> str:
        return self.folder.name


def parse_axes(over: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, list[Value]]:
    """The swept settings in the order written, from `section.key=value,value` or `section.key=[value, value]`.

    Raises:
        RPSAError: one cannot be read, comes twice, or may not be swept.
    """
    axes: dict[str, list[Value]] = {}
    fixed = {setting.partition("=")[0].strip() for setting in overrides}
    for setting in over:
        key, _, text = (part.strip() for part in setting.partition("="))
        if not key or not text:
            raise RPSAError(f"--over {setting}: write it as section.key=value,value")
        if key in axes:
            raise RPSAError(f"--over {setting}: {key} is swept already; give all its values at once")
        if key in fixed:
            raise RPSAError(f"--over {setting}: {key} is set for all points, too; leave one of the two out")
        axes[key] = _values(key, text)
        if not axes[key]:
            raise RPSAError(f"--over {key}: give at least one value")
    if "output_dir" in fixed | set(axes):
        raise RPSAError("output_dir: each point has a folder of its own; name the sweep's folder with --out")
    return axes


def points_of(
    recipe: Path, axes: Mapping[str, Sequence[Value]], overrides: Sequence[str], folder: Path
) -> list[Point]:
    """The grid, the last setting fastest.

    Raises:
        RPSAError: a point's recipe is wrong, or two points are the same.
    """
    points: list[Point] = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = point_name({key: value.label for key, value in chosen.items()})
        own = [
            *overrides,
            *(f"{key}={value.yaml}" for key, value in chosen.items()),
            f"output_dir={json.dumps(str(folder / name))}",
        ]
        point = Point({key: value.label for key, value in chosen.items()}, own, load_recipe(recipe, own))
        if not point.recipe.evaluate.tasks:
            raise RPSAError(f"{recipe}: evaluate.tasks: empty; a sweep shows what is measured on tasks")
        for other in points:
            if other.name == name:
                raise RPSAError(f"--over: two points are called {name}; give each value once")
            if _runs(other.recipe) == _runs(point.recipe):
                raise RPSAError(
                    f"--over: {other.name} and {name} are the same runs; does a method, or its paradigm, set its own "
                    "value (matrix.methods.<name>.section.key)?"
                )
        points.append(point)
    return points


def _values(key: str, text: str) -> list[Value]:
    if not text.startswith("["):
        return [_value(key, part.strip()) for part in text.split(",")]
    return [_value(key, json.dumps(value, ensure_ascii=False)) for value in parse_yaml(text, f"--over {key}")]


def _value(key: str, yaml: str) -> Value:
    value = parse_yaml(yaml, f"--over {key}")
    if isinstance(value, list):
        return Value(yaml, "+".join(map(str, value)))
    # A number stays as it was written: 1e-4, not 0.0001.
    return Value(yaml, value if isinstance(value, str) else yaml)


def _runs(recipe: Recipe) -> Any:
    """All that the results depend on."""
    return recipe.cells(), recipe.model, recipe.reference, recipe.fisher, recipe.evaluate, recipe.data_dir
