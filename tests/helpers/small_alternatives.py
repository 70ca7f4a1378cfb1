"""The smallest recipe with alternatives to freezing."""

from pathlib import Path
from typing import Any

from helpers.small_runs import TRAINING

RECIPE = (
    TRAINING
    + """version: 1
name: small
reference: {problems: tiny, n: 8, max_new_tokens: 48, batch_size: 8}
evaluate: {tasks: [tiny], n: 1, temperature: 0.0, max_new_tokens: 8, batch_size: 64}
matrix: {bases: ["tiny:0"], seeds: [0], methods: [fft]}
"""
)


def recipe(tmp_path: Path, *overrides: str) -> Any:
    from rpsa.recipe import load_recipe

    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, [f"output_dir={tmp_path / 'run'}", *overrides])
