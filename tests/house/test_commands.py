"""Every command of README and docs is run, in a folder with a finished run, but for those that say what they need.

"needs a GPU", "a network" or "hours" stands in the comment behind a command, or in one above it for all up to the next
empty line. The commands are those of the page; for names of models that are elsewhere, and for those that a user puts
in, it has those of a tiny model, and runs have settings that make them short.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.shared import made_once
from helpers.small_runs import RECIPE, copied, small
from rpsa.pipeline import run
from rpsa.tiny import safety_examples

PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
RUNS = ("mine", "x", "my-study", "tiny-demo")
NAMES = {
    "Qwen/Qwen3-8B": "tiny:0",
    "Qwen--Qwen3-8B": "tiny-0",
    "seed42": "seed0",
    "fft+rpsa/...": "fft+rpsa/tiny-0/seed0",
    "$STUDY": "recipes/deepseek-r1-distill-llama-8b/paper-study.yaml",
    "tiny-{0,1,2}": "tiny-0",
    ".venv/bin/pytest": "python -m pytest --collect-only",
    "make ": "make --dry-run ",
    "align/lora/": "align/lora+rpsa/",
    "FISHER_DIR": "runs/mine/fisher/tiny-0/full",
    "held-out/BASE": "held-out/tiny-0",
    "NAME": "tiny-0",
    "MODEL": "tiny:0",
    "BASE": "tiny:0",
}
SETTINGS = (
    *("reference.n=8", "safety.n=16", "evaluate.n=2", "train.num_train_epochs=1", "'matrix.bases=[tiny:0]'"),
    *("'matrix.seeds=[0]'", "matrix.parallel=1"),
)
SHORT = {
    "run": SETTINGS,
    "sweep": SETTINGS,
    "evaluate": ("--tasks tiny", "--set n=2"),
    "attack": ("--tasks tiny", "--set evaluate.n=2", "--attack prefill,finetune,prune"),
    "perturb": ("--n 4", "--draws 1"),
    "safety-data": ("--steer ''", "--per-prompt 8"),
}
PROGRAMS = {
    "rpsa": "-m rpsa",
    "python": "",
    "torchrun": "-m torch.distributed.run",
}


def commands(text: str) -> Iterator[str]:
    """The commands of a page's shell blocks that do not say that they need something."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        needy = False
        for line in block.replace("\\\n", " ").splitlines():
            command, _, comment = f" {line}".partition(" #")
            if not line.strip() or not command.strip():
                needy = "needs " in comment
            elif not needy and "needs " not in comment:
                yield " ".join(command.split())


NUMBERS = runpy.run_path(str(ROOT / "benchmarks" / "docs_numbers.py"))
COMMANDS = {name: list(commands(path.read_text())) for name, path in PAGES.items()}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(RECIPE)
        run(small(folder / "recipe.yaml", "reference.held_out=2"))

    return made_once(tmp_path_factory, "run-for-pages", fill) / "run"


@pytest.mark.integration
@pytest.mark.parametrize("page", [name for name, found in COMMANDS.items() if found])
def test_the_commands_of_a_page_run(page: str, finished_run: Path, tmp_path: Path) -> None:
    furnish(tmp_path, finished_run)
    ran = subprocess.run(
        ["bash", "-x", "-e", "-c", "\n".join(map(short, COMMANDS[page]))],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, "\n".join([ran.stdout[-2000:], ran.stderr[-4000:]])


def furnish(folder: Path, finished_run: Path) -> None:
    """What a user has who has come so far: a recipe, data, a run, the models' configs."""
    for name in ("recipes", "examples", "tests", "pyproject.toml", "constraints.txt", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    for name in RUNS:
        copied(finished_run, folder / "runs" / name, "")
    (folder / "recipe.yaml").write_text(RECIPE)
    rows = [{"prompt": one.prompt, "response": one.response} for one in safety_examples("balanced", 64, 0)]
    for name in ("safety", "harmful", "benign"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with NUMBERS["configs"]():
        for config in Path.cwd().iterdir():
            shutil.copytree(config, folder / config.name)
    binaries = folder / "bin"
    binaries.mkdir()
    for name, program in PROGRAMS.items():
        (binaries / name).write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
        (binaries / name).chmod(0o755)


def short(command: str) -> str:
    """The command with names that are there, and settings with which it takes seconds."""
    for name, ours in NAMES.items():
        command = command.replace(name, ours)
    if command.startswith("rpsa plan"):
        models = [model.name for model in NUMBERS["SHIPPED"] if f"/{model.folder}/" in command]
        return " ".join([command, *(f"model.name={name}" for name in models)])
    if command.startswith("rpsa doctor"):
        return f"{command} || test $? -eq 1"  # it has found that this machine lacks something
    words = command.split(" ")
    found = SHORT.get(words[1], ()) if words[0] == "rpsa" else ()
    # settings of the page come after ours, and options before them: the last one counts
    place = 3 if found is SETTINGS else len(words)
    return " ".join([*words[:place], *found, *words[place:]])
