"""`rpsa sweep`: the recipe that it writes, and that running it with more values does the new ones alone."""

import json
from pathlib import Path

import pytest

from helpers.command_line import invoke
from helpers.small_runs import copied, written
from rpsa.errors import RPSAError
from rpsa.pipeline import verify
from rpsa.pipeline.runner import devices_of_workers
from rpsa.recipe import load_recipe
from rpsa.recipe.loading import load_sweep, write_recipe

METHODS = "matrix.methods=[original, lora, lora+constant]"


def test_a_sweep_is_a_section_of_the_recipe(recipe_file: Path) -> None:
    over = [
        "train.learning_rate=1e-4, 3e-4",
        "lora.target_modules=[[q_proj,v_proj],[up_proj],all-linear]",
        "align.frozen_ratio=0.4,dynamic",
    ]
    recipe = load_sweep(recipe_file, over, [METHODS, 'name="1e-3"'], recipe_file.parent / "swept")
    assert list(recipe.matrix.methods) == ["original"]
    [(name, sweep)] = recipe.sweeps.items()
    assert name == "learning_rate-target_modules-frozen_ratio"
    assert list(sweep.methods) == ["lora", "lora+constant"]
    untouched, *cells = recipe.cells()
    assert untouched.paradigm == "none"
    # plain LoRA has no k
    assert [cell.method for cell in cells] == ["lora"] * 6 + ["lora+constant"] * 12
    assert cells[-1].id == (
        "sweep-learning_rate-target_modules-frozen_ratio/lora+constant/tiny-0/"
        "seed0,learning_rate=0.0003,target_modules=all-linear,frozen_ratio=dynamic"
    )
    assert cells[-1].align is not None
    assert cells[-1].align.frozen_ratio == "dynamic"
    assert cells[6].lora["target_modules"] == ["q_proj", "v_proj"]

    path = recipe.folder / "sweep.yaml"
    write_recipe(recipe, path)
    assert load_recipe(path) == recipe
    assert load_recipe(path).name == "1e-3"


def test_a_grid_of_the_recipes_own_is_swept_too_and_the_fisher_can_be(recipe_file: Path) -> None:
    settings = ["matrix.methods=[fft+constant]", "matrix.grid={safety.n: [8, 16]}"]
    recipe = load_sweep(recipe_file, ["fisher.probes=1,2"], settings)
    assert recipe.folder == Path("sweeps/small/n-probes")
    assert recipe.matrix.grid == {}
    untouched, *cells = recipe.cells()
    assert untouched.paradigm == "none"  # which a Safety Tax Rate is measured against
    assert [(cell.safety.n, cell.fisher.probes) for cell in cells if cell.safety] == [
        *((8, 1), (8, 2), (16, 1), (16, 2))
    ]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["lora.r"], "--over lora.r: write it as section.key=value,value"),
        (["lora.r="], "--over lora.r=: write it as section.key=value,value"),
        (["lora.r=[]"], "--over lora.r: give at least one value"),
        (["lora.r=1,2", "lora.r=4"], "lora.r is swept already"),
        (["safety.n=8,16"], "safety.n is set for all points, too"),
        (["lora.r=1,1"], "small.yaml: sweeps.r.over.lora.r: 1 appears twice"),
        (["lora.r=1,2.5,x"], "small.yaml: sweeps.r.over.lora.r: expected a whole number, not 2.5"),
        (["lora.rnk=1,2"], "small.yaml: sweeps.rnk.over.lora.rnk: unknown key of LoraConfig"),
        (["lora.target_modules=[[a, b]"], "--over lora.target_modules:1: "),
        (["matrix.seeds=1,2"], "sweeps.seeds.over.matrix.seeds: a grid key is"),
        (["alternatives.penalty_strength=1,2"], "concerns none of the sweep's methods"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    recipe_file: Path, over: list[str], message: str
) -> None:
    before = sorted(recipe_file.parent.iterdir())
    with pytest.raises(RPSAError) as error:
        load_sweep(recipe_file, over, [METHODS, "safety.n=16"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(recipe_file.parent.iterdir()) == before


def test_a_sweep_over_nothing_that_is_measured_is_refused(recipe_file: Path) -> None:
    with pytest.raises(RPSAError, match=r"evaluate\.tasks: empty; sweeps and analysis\.perturb show"):
        load_sweep(recipe_file, ["lora.r=1,2"], [METHODS, "evaluate.tasks=[]"])


def test_more_values_run_the_new_ones_alone(recipe_file: Path, whole_run: Path) -> None:
    out = copied(whole_run, recipe_file.parent / "sweep", "reference", "evaluate/original")

    def sweep(values: str) -> str:
        methods = "matrix.methods=[original, lora+constant]"
        done = invoke("sweep", str(recipe_file), "--over", f"lora.r={values}", "--out", str(out), methods)
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    sweep("1")
    before = written(out)
    shown = sweep("1,2")
    after = written(out)
    assert {name: after[name] for name in before if name != "report"} == {
        name: time for name, time in before.items() if name != "report"
    }
    for rank in (1, 2):
        assert f"evaluate/sweep-r/lora+constant/tiny-0/seed0,r={rank}" in after
    assert f"Recipe: {out / 'sweep.yaml'}" in " ".join(shown.split())
    assert shown.count("lora+constant") == 2  # a row at each point; the matrix has the untouched model alone
    assert (out / "report" / "sweep-r.png").stat().st_size > 0
    runs = json.loads((out / "report" / "results.json").read_text())["runs"]
    assert [run["point"] for run in runs if run["sweep"] == "r"] == [{"lora.r": 1}, {"lora.r": 2}]
    verify(out)


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_of_workers(3) == ["0", "1", "2"]
    assert devices_of_workers(5) == ["0", "1", "2", "3", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert devices_of_workers(2) == ["2", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert devices_of_workers(2) == [None, None]  # as they are
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices_of_workers(2) == [None, None]
