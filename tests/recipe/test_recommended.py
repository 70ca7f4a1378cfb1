"""What is recommended is one thing: in the library, as a method, in the recipes."""

from pathlib import Path

import pytest

import rpsa
from rpsa.recipe import load_recipe
from rpsa.recipe.methods import RECOMMENDED, WELL_KNOWN
from rpsa.recipe.shipped import shipped_recipes

PATHS = [path for name, path in shipped_recipes().items() if name.endswith("/recommended")]


def test_it_is_a_config_and_a_method(tmp_path: Path) -> None:
    given = rpsa.recommended()
    args = rpsa.RPSAConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **given)
    method = WELL_KNOWN[f"fft+{RECOMMENDED}"]
    assert method["align"] | method["alternatives"] == given
    assert args.has_anchor
    assert args.frozen_ratio == given["frozen_ratio"]


def test_every_model_has_a_recipe_of_it() -> None:
    assert {path.parent.name for path in PATHS} == {
        path.parent.name
        for name, path in shipped_recipes().items()
        if not name.startswith(("smoke/", "smollm2-135m/"))
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.parent.name)
def test_it_trains_on_both_kinds(path: Path) -> None:
    recipe = load_recipe(path)
    assert {"original", f"fft+{RECOMMENDED}"} <= set(recipe.matrix.methods)
    cells = [cell for cell in recipe.cells() if cell.method == f"fft+{RECOMMENDED}"]
    for cell in cells:
        assert cell.align is not None
        assert cell.alternatives is not None
        assert cell.alternatives.anchoring["anchor"] == "both"
        assert cell.safety is not None
        assert cell.safety.benign_share > 0 or cell.safety.data == "tiny:balanced"
    assert cells
