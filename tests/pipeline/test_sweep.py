"""`rpsa sweep` on the tiny model: what points share, what is repeated, and what ends what."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.small_runs import RPSA, hidden, leave, wait_for, written
from rpsa.errors import RPSAError
from rpsa.pipeline import sweep as sweeping
from rpsa.pipeline import verify
from rpsa.pipeline.stages import tasks_of
from rpsa.pipeline.sweep import SweepConfig, launched, parse_axes, points_of, sweep
from rpsa.recipe import load_recipe

METHODS = "matrix.methods=[original, lora+constant]"


def start(recipe_file: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*RPSA, "sweep", str(recipe_file), *arguments, "--out", str(recipe_file.parent / "sweep")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def same_file(*paths: Path) -> bool:
    return len({path.stat().st_ino for path in paths}) == 1


def test_a_killed_sweep_goes_on_and_repeats_no_finished_point(recipe_file: Path) -> None:
    out = recipe_file.parent / "sweep"
    first, second = out / "r=1", out / "r=2"
    arguments = ["--over", "lora.r=1,2", METHODS, "--parallel", "2"]

    process = start(recipe_file, *arguments)
    wait_for(first, "reference/*/stage.json", process)
    assert not second.exists()  # the first runs alone, so that there is something to take over
    wait_for(second, "fisher/*/.*.unfinished", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = written(out)
    assert "r=1/report" in before
    (second / "run.log").unlink()

    process = start(recipe_file, *arguments)
    wait_for(second, "run.log", process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("error: interrupted")

    process = start(recipe_file, *arguments)
    shown, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert not hidden(out)
    verify(out)

    # What the rank does not change is one file; its Fisher and its run are the point's own.
    for shared in ("reference/tiny-0", "evaluate/original/tiny-0"):
        assert same_file(first / shared / "stage.json", second / shared / "stage.json")
    assert {p.name for p in first.glob("fisher/*/*")}.isdisjoint(p.name for p in second.glob("fisher/*/*"))

    found = json.loads((out / "sweep.json").read_text())
    assert found["over"] == {"lora.r": ["1", "2"]}
    for point, folder in zip(found["points"], (first, second), strict=True):
        assert point["failure"] is None
        assert point["summary"] == json.loads((folder / "report" / "results.json").read_text())["summary"]
    assert shown.count("lora+constant") == 2
    assert (out / "sweep.png").stat().st_size > 0
    assert (out / "sweep.svg").stat().st_size > 0


def test_a_point_that_fails_does_not_end_the_others_and_a_launcher_starts_each(recipe_file: Path) -> None:
    """The first fails: what it had done before is taken over all the same."""
    out, script = recipe_file.parent / "sweep", recipe_file.parent / "launcher.sh"
    script.write_text(f'#!/bin/sh\necho "$1 $2 $#" >> {recipe_file.parent}/launched\nexec sh -c "$3"\n')
    script.chmod(0o755)
    process = start(
        recipe_file,
        *("--over", "train.learning_rate=1e30,1e-3", METHODS),
        *("--launcher", f"{script} --gpus=1 {{slot}} {{command}}", "--parallel", "2"),
    )
    shown, errors = process.communicate(timeout=900)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    bad, good = (out / f"learning_rate={rate}" for rate in ("1e30", "1e-3"))
    assert f"{bad.name} failed: align lora+constant/tiny-0/seed0: diverged" in " ".join(shown.split())
    assert same_file(bad / "reference/tiny-0/stage.json", good / "reference/tiny-0/stage.json")
    failed, finished = json.loads((out / "sweep.json").read_text())["points"]
    assert failed["summary"] == []
    assert finished["failure"] is None
    assert len(finished["summary"]) == 2
    assert (recipe_file.parent / "launched").read_text() == "--gpus=1 0 3\n--gpus=1 0 3\n"


def test_only_results_for_the_very_same_inputs_are_taken_over(recipe_file: Path) -> None:
    folder = recipe_file.parent
    made = load_recipe(recipe_file, [f"output_dir={folder / 'made'}"])
    [reference] = tasks_of(made, "reference")
    leave(reference)
    leave(tasks_of(made, "fisher")[0])

    def taken(*overrides: str) -> set[str]:
        recipe = load_recipe(recipe_file, [*overrides, f"output_dir={folder / 'other'}"])
        sweeping.take_over(recipe, [folder / "nothing", made.folder])
        return set(written(folder / "other"))

    assert taken("reference.n=7") == set()
    assert taken("fisher.probes=2") == {"reference/tiny-0"}
    assert taken() == {"reference/tiny-0", "fisher/tiny-0/full"}
    assert same_file(folder / "other/reference/tiny-0/traces.jsonl", reference.folder / "traces.jsonl")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["lora.r"], "--over lora.r: write it as section.key=value,value"),
        (["lora.r="], "--over lora.r=: write it as section.key=value,value"),
        (["lora.r=1,2", "lora.r=4"], "lora.r is swept already"),
        (["safety.n=8,16"], "safety.n is set for all points, too"),
        (["lora.r=1,1"], "two points are called r=1; give each value once"),
        (["lora.r=1,2.5,x"], "small.yaml: lora.r: expected a whole number, not 2.5"),
        (["lora.rnk=1,2"], "small.yaml: lora.rnk: unknown key of LoraConfig"),
        (["lora.target_modules=[[a, b]"], "--over lora.target_modules:1: "),
        (["matrix.seeds=1,2"], "small.yaml: matrix.seeds: expected a list, not 1"),
        (["output_dir=a,b"], "output_dir: each point has a folder of its own"),
        # lora+constant says itself that k = 0.6, and no other method has a k
        (["align.frozen_ratio=0.4,0.6"], "frozen_ratio=0.4 and frozen_ratio=0.6 are the same runs"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(recipe_file: Path, over: list[str], message: str) -> None:
    out = recipe_file.parent / "sweep"
    with pytest.raises(RPSAError) as error:
        sweep(SweepConfig(recipe_file, over, [METHODS, "safety.n=16"], out))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_a_sweep_over_nothing_that_is_measured_is_refused(recipe_file: Path) -> None:
    out = recipe_file.parent / "sweep"
    with pytest.raises(RPSAError, match=r"evaluate\.tasks: empty; a sweep shows what is measured on tasks"):
        sweep(SweepConfig(recipe_file, ["lora.r=1,2"], [METHODS, "evaluate.tasks=[]"], out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("sbatch --wrap", "has no {command} or {args}"),
        ("no-such-launcher {args}", "there is no command 'no-such-launcher' here"),
        ("sh -c 'a {command}", "no closing quotation"),
    ],
)
def test_a_wrong_launcher_is_known_before_anything_runs(
    recipe_file: Path, launcher: str, message: str
) -> None:
    out = recipe_file.parent / "sweep"
    with pytest.raises(RPSAError) as error:
        sweep(SweepConfig(recipe_file, ["lora.r=1,2"], [METHODS], out, launcher=launcher))
    assert message in str(error.value)
    assert not out.exists()


def test_a_launcher_that_does_not_wait_or_is_killed_has_not_finished_a_point(recipe_file: Path) -> None:
    for launcher, failure in (
        ("true {command}", "the launcher has returned, and the run is not finished (sbatch needs --wait)"),
        ("sh -c 'kill -9 $$' {args}", "ended by SIGKILL"),
        ("sh -c 'exit 3' {args}", "exit code 3"),
        ("sh -c 'echo starting; echo error: no room >&2; exit 3' {args}", "no room"),
    ):
        config = SweepConfig(
            recipe_file, ["lora.r=1,2"], [METHODS], recipe_file.parent / "sweep", launcher=launcher
        )
        assert [outcome.failure for outcome in sweep(config)] == [failure, failure]


def test_points_run_side_by_side_up_to_the_limit_after_the_first(recipe_file: Path) -> None:
    log = recipe_file.parent / "log"
    launcher = f"sh -c 'echo begin {{slot}} >> {log}; sleep 1; echo end {{slot}} >> {log}' {{args}}"
    over = ["lora.r=1,2,3,4"]
    sweep(SweepConfig(recipe_file, over, [METHODS], recipe_file.parent / "sweep", 2, launcher))
    at_work, most, slots = 0, [], set()
    for line in log.read_text().splitlines():
        at_work += 1 if line.startswith("begin") else -1
        most.append(at_work)
        slots.add(line.split()[1])
    assert most[:2] == [1, 0]
    assert max(most) == 2
    assert slots == {"0", "1"}


def test_values_are_a_comma_list_or_yaml(recipe_file: Path) -> None:
    axes = parse_axes(
        ["train.learning_rate=1e-4, 3e-4", "lora.target_modules=[[q_proj,v_proj],[up_proj],all-linear]"]
    )
    points = points_of(recipe_file, axes, [METHODS], recipe_file.parent)
    assert [point.name for point in points] == [
        f"learning_rate={rate},target_modules={modules}"
        for rate in ("1e-4", "3e-4")
        for modules in ("q_proj+v_proj", "up_proj", "all-linear")
    ]
    [_, cell] = points[3].recipe.cells()
    assert cell.learning_rate == 3e-4
    assert cell.lora["target_modules"] == ["q_proj", "v_proj"]
    [_, cell] = points[2].recipe.cells()
    assert cell.lora["target_modules"] == "all-linear"


def test_a_method_of_its_own_k_is_swept_by_its_name(recipe_file: Path) -> None:
    axes = parse_axes(["matrix.methods.lora+constant.align.frozen_ratio=0.4,dynamic"])
    points = points_of(recipe_file, axes, [METHODS], recipe_file.parent)
    assert [point.name for point in points] == ["frozen_ratio=0.4", "frozen_ratio=dynamic"]
    assert [cell.align.frozen_ratio for p in points for cell in p.recipe.cells() if cell.align] == [
        0.4,
        "dynamic",
    ]


def test_the_words_of_a_launcher() -> None:
    arguments = ["run", "a b.yaml", "lora.r=1"]
    command = f"{sys.executable} -m rpsa run 'a b.yaml' lora.r=1"
    slurm = "sbatch --wait --gpus=1 --output {log} --wrap {command}"
    assert launched(slurm, arguments, Path("f/run.log"), 0) == [
        *("sbatch", "--wait", "--gpus=1", "--output", "f/run.log", "--wrap", command)
    ]
    pinned = "env CUDA_VISIBLE_DEVICES={slot} python -m rpsa {args}"
    assert launched(pinned, arguments, Path("f/run.log"), 3) == [
        *("env", "CUDA_VISIBLE_DEVICES=3", "python", "-m", "rpsa", *arguments)
    ]
