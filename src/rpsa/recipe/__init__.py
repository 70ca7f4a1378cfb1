"""Recipes: the schema of a study's YAML file, how it is read and checked, and the runs that it stands for."""

from rpsa.recipe.loading import load_recipe
from rpsa.recipe.methods import Method
from rpsa.recipe.schema import Cell, Recipe, recipe_schema
from rpsa.recipe.sections import Align, Evaluate, Fisher, Reference, Safety

__all__ = [
    "Align",
    "Cell",
    "Evaluate",
    "Fisher",
    "Method",
    "Recipe",
    "Reference",
    "Safety",
    "load_recipe",
    "recipe_schema",
]
