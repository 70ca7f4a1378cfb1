from pathlib import Path

import pytest

from helpers.shared import made_once
from helpers.small_runs import RECIPE, copied, small
from rpsa.pipeline import run


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of RECIPE as it is, to be read or copied, and not to be written into."""

    def fill(folder: Path) -> None:
        (folder / "small.yaml").write_text(RECIPE)
        run(small(folder / "small.yaml"))

    return made_once(tmp_path_factory, "small-run", fill) / "run"


@pytest.fixture
def finished(recipe_file: Path, whole_run: Path) -> Path:
    """The recipe's run with all of its results."""
    return copied(whole_run, recipe_file.parent / "run", "")


@pytest.fixture
def measured(recipe_file: Path, whole_run: Path) -> Path:
    """The recipe's run with its D_ref and its Fishers: what is trained next."""
    return copied(whole_run, recipe_file.parent / "run", "reference", "fisher")
