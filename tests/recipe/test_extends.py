"""`extends` in a recipe: what is laid over what, and whose mistake it is."""

from pathlib import Path

import pytest

from rpsa.errors import RPSAError
from rpsa.recipe import Recipe, load_recipe

BASE = """
version: 1
reference: {problems: tiny}
safety: {data: tiny:refusals, n: 8}
train: {learning_rate: 1e-3, use_cpu: true, bf16: false}
matrix: {methods: [original, fft+rpsa], seeds: [0, 1]}
"""


def written(folder: Path, **files: str) -> Path:
    """The files by their stems; the path of the one that is called top."""
    for stem, text in files.items():
        (folder / f"{stem}.yaml").write_text(text)
    return folder / "top.yaml"


def loaded(folder: Path, top: str, *overrides: str, **files: str) -> Recipe:
    return load_recipe(written(folder, top=top, **{"base": BASE} | files), overrides)


def refused(folder: Path, top: str, *overrides: str, **files: str) -> str:
    with pytest.raises(RPSAError) as caught:
        loaded(folder, top, *overrides, **files)
    message = str(caught.value)
    assert "\n" not in message
    return message


TOP = "extends: base.yaml\nname: top\nmodel: {name: tiny:0}\n"


def test_mappings_are_merged_and_all_else_is_replaced(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, TOP + "train: {learning_rate: 2e-3, max_steps: 4}\nmatrix: {seeds: [7]}\n")
    assert recipe.train == {"learning_rate": 2e-3, "use_cpu": True, "bf16": False, "max_steps": 4}
    assert recipe.matrix.seeds == [7]
    assert list(recipe.matrix.methods) == ["original", "fft+rpsa"]
    assert (recipe.safety.data, recipe.safety.n) == ("tiny:refusals", 8)


def test_the_merged_recipe_is_the_one_that_is_written_out_whole(tmp_path: Path) -> None:
    """Stored recipes and fingerprints are made of the merged recipe: nothing says which file a setting came from."""
    extended = loaded(tmp_path, TOP)
    whole = loaded(tmp_path, BASE + "name: top\nmodel: {name: tiny:0}\n")
    assert extended.model_dump(exclude_unset=True) == whole.model_dump(exclude_unset=True)
    assert extended.cells() == whole.cells()


def test_null_removes_what_is_below(tmp_path: Path) -> None:
    recipe = loaded(
        tmp_path,
        TOP + "reference: null\ntrain: {use_cpu: null}\nsafety: {n: null}\nmatrix: {methods: [fft]}\n",
    )
    assert recipe.reference.problems is None
    assert "reference" not in recipe.model_fields_set
    assert recipe.train == {"learning_rate": 1e-3, "bf16": False}
    assert recipe.safety.n is None
    # where there is nothing below, null is the value that it is anywhere else
    assert loaded(tmp_path, TOP + "train: {save_total_limit: null}\n").train["save_total_limit"] is None


def test_a_method_without_settings_is_not_removed_by_itself(tmp_path: Path) -> None:
    below = BASE.replace("[original, fft+rpsa]", "{original: , fft+rpsa: , fft: }")
    methods = "matrix: {methods: {fft: , lora: , fft+rpsa: {align: {window: 4}}}}\n"
    recipe = loaded(tmp_path, TOP + methods, base=below)
    assert list(recipe.matrix.methods) == ["original", "fft+rpsa", "fft", "lora"]


def test_a_chain_is_laid_on_from_the_bottom_and_paths_are_relative_to_each_file(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    written(tmp_path / "shared", base=BASE, middle="extends: base.yaml\nsafety: {n: 9}\nalign: {window: 3}\n")
    top = TOP.replace("base.yaml", "shared/middle.yaml") + "align: {window: 5}\n"
    recipe = loaded(tmp_path, top)
    assert (recipe.safety.n, recipe.align.window) == (9, 5)
    (tmp_path / "shared" / "middle.yaml").write_text("extends: base.yaml\nsafety: {nn: 9}\n")
    assert refused(tmp_path, top).startswith("shared/middle.yaml: safety.nn: unknown key")


def test_the_command_line_wins_over_all_files(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, TOP, "train.learning_rate=5e-3", "safety.n=3")
    assert (recipe.train["learning_rate"], recipe.safety.n) == (5e-3, 3)
    assert refused(tmp_path, TOP, "safety.n=none").startswith("top.yaml: safety.n: ")
    assert refused(tmp_path, TOP, "extends=base.yaml").startswith("extends: ")


@pytest.mark.parametrize(
    ("top", "below", "message"),
    [
        ("", "aligne: {window: 3}\n", "base.yaml: aligne: unknown key; did you mean 'align'?"),
        ("", "align: {windw: 3}\n", "base.yaml: align.windw: unknown key; did you mean 'window'?"),
        ("align: {windw: 3}\n", "align: {every: 2}\n", "top.yaml: align.windw: unknown key"),
        ("align: {every: 3}\n", "align: {every: 2, window: 0}\n", "base.yaml: align.window: "),
        ("align: {every: 0}\n", "align: {every: 2}\n", "top.yaml: align.every: "),
        ("train: {max_steps: x}\n", "", "top.yaml: train.max_steps: expected a whole number"),
        ("", "evaluate: {tasks: ['${nowhere}/a.jsonl']}\n", "base.yaml: ${nowhere} is unknown"),
        ("", "evaluate: {judge_settings: {api_key: abc}}\n", "base.yaml: evaluate.judge_settings.api_key: "),
        ("model: null\n", "model: {name: tiny:0}\n", "top.yaml: model.name: missing"),
    ],
)
def test_a_mistake_is_said_of_the_file_in_which_it_stands(
    top: str, below: str, message: str, tmp_path: Path
) -> None:
    start = TOP.replace("model: {name: tiny:0}\n", "") if "model:" in below else TOP
    assert refused(tmp_path, start + top, base=BASE + below).startswith(message)


def test_several_mistakes_name_the_files_that_differ(tmp_path: Path) -> None:
    message = refused(tmp_path, TOP + "fishr: {}\n", base=BASE + "align: {windw: 3}\n")
    assert "top.yaml: fishr: unknown key" in message
    assert "base.yaml: align.windw: unknown key" in message


def test_a_base_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    message = refused(tmp_path, TOP.replace("base.yaml", "bse.yaml"))
    assert message.startswith("top.yaml: extends: ")
    assert message.endswith("bse.yaml: no such recipe; did you mean 'base.yaml'?")
    assert "is a folder" in refused(tmp_path, TOP.replace("base.yaml", "."))
    for wrong in ("[base.yaml]", "''", "3"):
        assert "top.yaml: extends: expected the path" in refused(tmp_path, TOP.replace("base.yaml", wrong))
    assert refused(tmp_path, TOP, base="- a list\n").startswith("base.yaml: expected a mapping")
    assert refused(tmp_path, TOP, base="a: [\n").startswith("base.yaml:")


def test_a_circle_is_one_line(tmp_path: Path) -> None:
    message = refused(tmp_path, TOP, base="extends: other.yaml\n", other="extends: ./top.yaml\n")
    assert message == (
        "other.yaml: extends: a recipe cannot extend itself: top.yaml -> base.yaml -> other.yaml -> top.yaml"
    )
    assert "top.yaml -> top.yaml" in refused(tmp_path, TOP.replace("base.yaml", "top.yaml"))
