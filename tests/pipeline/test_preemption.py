"""SIGTERM, as a cluster sends it: a run ends with a checkpoint, and goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from helpers.launched import workers_of
from helpers.small_runs import copied, hidden, small, wait_for
from rpsa.pipeline import run
from rpsa.pipeline.alignment import CHECKPOINTS
from rpsa.recipe.shipped import shipped

pytestmark = pytest.mark.integration

RANKS = 4
SETTINGS = [
    *(f"launch.num_processes={RANKS}", "train.per_device_train_batch_size=1", "train.num_train_epochs=6"),
    *("train.save_strategy=steps", "train.save_steps=3"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FILES = (
    "log.json",
    "rpsa_metadata.json",
    "rpsa_audit.json",
    "model.safetensors",
    "adapter_model.safetensors",
)
RPSA = [sys.executable, "-m", "rpsa"]


def start(command: list[str], environment: dict[str, str] = ENVIRONMENT) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def arguments(recipe_file: Path, settings: list[str]) -> list[str]:
    return [str(recipe_file), f"output_dir={recipe_file.parent / 'run'}", *settings, "--only", "align"]


def wait_for_checkpoint(folder: Path, process: "subprocess.Popen[str]") -> None:
    wait_for(folder, f"align/*/*/.*.unfinished/{CHECKPOINTS}/checkpoint-*/trainer_state.json", process)


def terminated(process: "subprocess.Popen[str]") -> str:
    """The last line of one that has ended because it was told to."""
    try:
        _, errors = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


def last_step(folder: Path) -> int:
    found = folder.glob(f"align/*/*/.*.unfinished/{CHECKPOINTS}/checkpoint-*/trainer_state.json")
    return max(int(path.parent.name.rpartition("-")[2]) for path in found)


def at_step(folder: Path) -> list[int]:
    return [int(json.loads(path.read_text())["done"]) for path in folder.glob("align/*/*/.*.live")]


def same(folder: Path, other: Path) -> int:
    """How many files of what was trained there are; each has the same bytes in both runs."""
    assert not hidden(folder)
    assert not hidden(other)
    paths = [path.relative_to(other) for name in FILES for path in other.glob(f"align/*/*/seed*/{name}")]
    for path in paths:
        assert (folder / path).read_bytes() == (other / path).read_bytes(), path
    return len(paths)


def to_the_launcher(process: int) -> None:
    os.kill(process, signal.SIGTERM)


def to_one_rank(process: int) -> None:
    os.kill(workers_of(process)[1], signal.SIGTERM)


@pytest.mark.parametrize(("method", "send"), [("fft+rpsa", to_the_launcher), ("lora+rpsa", to_one_rank)])
def test_four_ranks_stop_at_one_step_and_go_on_as_if_undisturbed(
    method: str, send: Callable[[int], None], recipe_file: Path, measured: Path
) -> None:
    settings = [f"matrix.methods=[{method}]", *SETTINGS]
    whole = copied(measured, recipe_file.parent / "whole", "reference", "fisher")
    run(small(recipe_file, *settings, f"output_dir={whole}"), only="align")

    process = start([*RPSA, "run", *arguments(recipe_file, settings)])
    wait_for_checkpoint(measured, process)
    send(process.pid)
    said = terminated(process)
    stopped = f"{method}/tiny-0/seed0: stopped at step {last_step(measured)} of 24; its checkpoint is kept"
    assert stopped in said
    run(small(recipe_file, *settings), only="align")
    assert same(measured, whole) >= 3


STUBS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> "$(dirname "$0")/asked"',
    "rpsa": f'exec {sys.executable} -m rpsa "$@"',
}


def test_the_script_for_slurm_asks_for_the_job_to_be_queued_again(
    recipe_file: Path, measured: Path, tmp_path: Path
) -> None:
    """SLURM itself is two stubs: what it does here is to send SIGTERM to every process of the step."""
    settings = ["matrix.methods=[fft]", *SETTINGS]
    whole = copied(measured, recipe_file.parent / "whole", "reference", "fisher")
    run(small(recipe_file, *settings, f"output_dir={whole}"), only="align")

    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, does in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{does}\n")
        (stubs / name).chmod(0o755)
    environment = ENVIRONMENT | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "1",
    }
    script = ["bash", str(shipped("clusters/slurm.sh")), *arguments(recipe_file, settings)]
    process = start(script, environment)
    wait_for_checkpoint(measured, process)
    [step] = psutil.Process(process.pid).children()
    ranks = workers_of(step.pid)
    assert set(ranks) == set(range(RANKS))
    for one in (step.pid, *ranks.values()):
        os.kill(one, signal.SIGTERM)
    terminated(process)
    assert (stubs / "asked").read_text() == "requeue 17\n"

    again = start(script, environment)
    _, errors = again.communicate(timeout=900)
    assert again.returncode == 0, errors
    assert (stubs / "asked").read_text() == "requeue 17\n"
    assert same(measured, whole) >= 2


@pytest.mark.parametrize("parallel", [1, 2])
def test_without_ranks_training_stops_with_a_checkpoint_too(
    parallel: int, recipe_file: Path, measured: Path
) -> None:
    """In worker processes as in the one that was told; nobody tells the workers but this one."""
    settings = [
        *("matrix.methods=[fft, fft+rpsa]", f"matrix.parallel={parallel}", "train.num_train_epochs=40"),
        *("train.save_strategy=steps", "train.save_steps=100"),
    ]
    process = start([*RPSA, "run", *arguments(recipe_file, settings)])
    while not any(steps > 0 for steps in at_step(measured)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    terminated(process)
    assert 0 < last_step(measured) < 160
