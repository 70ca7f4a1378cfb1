"""A recipe that runs in seconds, its command, and a look into the folder of a run."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rpsa.artifacts import LOCK, atomic_write
from rpsa.errors import RPSAError
from rpsa.pipeline.tasks import MADE_BY, Task, write_manifest
from rpsa.recipe import Recipe, load_recipe

RPSA = [sys.executable, "-c", "from rpsa.cli import main; main()"]

TRAINING = """
fisher: {probes: 1, batch_size: 8}
safety: {data: "tiny:refusals", n: 16, max_length: 128, validation_share: 0.0}
train:
  per_device_train_batch_size: 4
  learning_rate: 1e-3
  num_train_epochs: 1
  use_cpu: true
  bf16: false
  save_strategy: no
  report_to: none
  activation_checkpointing: false
"""
"""A few steps on refusals, as every small recipe has them."""

RECIPE = (
    TRAINING
    + """version: 1
name: small
reference: {problems: tiny, n: 8, held_out: 0, max_new_tokens: 48, batch_size: 8}
align: {frozen_ratio: dynamic, window: 2, every: 1}
evaluate: {tasks: [tiny], n: 2, temperature: 0.0, max_new_tokens: 48, batch_size: 64}
matrix: {methods: [original, fft, fft+rpsa, lora+rpsa], bases: ["tiny:0"], seeds: [0], parallel: 1}
"""
)

OWN_WORDS = (
    'own: {paradigm: fft, safety: {data: self, prompts: tiny, benign: tiny, steer: "", per_prompt: 8}}'
)
"""A method that trains on the model's own safety data."""


def small(recipe_file: Path, *overrides: str) -> Recipe:
    return load_recipe(recipe_file, [f"output_dir={recipe_file.parent / 'run'}", *overrides])


def copied(run: Path, to: Path, *places: str) -> Path:
    """A run that has what another one has in these places."""
    for place in places:
        shutil.copytree(run / place, to / place, dirs_exist_ok=True)
    return to


def written(folder: Path) -> dict[str, int]:
    """When each stage was last finished."""
    return {str(p.parent.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("stage.json")}


def hidden(folder: Path) -> list[Path]:
    """Unfinished work, leftovers and records of failures."""
    return [path for path in folder.rglob(".*") if path.name != LOCK]


def wait_for(folder: Path, pattern: str, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 900
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(0.02)


def leave(task: Task) -> None:
    """A result without content."""
    for name in (*MADE_BY[task.stage].files, "file"):
        atomic_write(task.folder / name, task.name)
    try:
        inputs = task.inputs()
    except RPSAError:  # what it stands on is not there
        inputs = {}
    write_manifest(task.folder, task.stage, inputs, task.place)


def unfinished(tasks: Iterable[Task]) -> list[Task]:
    return [task for task in tasks if not task.is_done()]
