"""Shipped recipes: found by name, listed in a line, copied whole."""

from pathlib import Path

import pytest

from helpers.paths import fetched_prompts
from rpsa.errors import RPSAError
from rpsa.recipe import load_recipe
from rpsa.recipe.shipped import (
    copy_shipped,
    named_recipe,
    said_of,
    shipped,
    shipped_files,
    shipped_recipes,
)


def test_every_recipe_has_a_name_and_says_what_it_is_for() -> None:
    found = shipped_recipes()
    assert "tiny/demo" in found
    assert not any(name.startswith(("base/", "accelerate/")) for name in found)
    assert {"accelerate/fsdp2-4.yaml", "plain_pytorch_loop.py", "clusters/slurm.sh"} <= set(shipped_files())
    for name, path in (found | shipped_files()).items():
        said = said_of(path)
        assert 3 < len(said) < 160, (name, said)
        assert "#" not in said


def test_a_copy_stands_alone_and_is_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, path in shipped_recipes().items():
        if name.startswith("smoke/"):
            continue  # it names files that a user has
        copy = tmp_path / f"{name.replace('/', '-')}.yaml"
        copy_shipped(name, copy)
        text = copy.read_text()
        assert "extends:" not in text
        assert text.startswith("# ")
        assert load_recipe(copy) == load_recipe(path)


def test_other_files_are_copied_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, path in shipped_files().items():
        assert copy_shipped(name) == Path(path.name)
        assert Path(path.name).read_text() == path.read_text()


def test_what_is_not_there_or_is_there_already_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match=r"no recipe 'tiny/dmo'; did you mean 'tiny/demo'\?"):
        shipped("tiny/dmo")
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(RPSAError, match="exists already"):
        copy_shipped("tiny/demo", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_a_file_of_the_same_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_recipe(Path("tiny/demo")) == shipped("tiny/demo")
    assert named_recipe(Path("tiny/demo.yaml")) == Path("tiny/demo.yaml")
    Path("tiny").mkdir()
    Path("tiny/demo").write_text("version: 1")
    assert named_recipe(Path("tiny/demo")) == Path("tiny/demo")
