from pathlib import Path

import pytest

from helpers.small_runs import RECIPE


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path
