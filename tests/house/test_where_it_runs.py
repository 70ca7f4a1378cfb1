"""What `docs/clusters.md` offers: the headers of examples, the image, jobs on other people's machines."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from helpers.paths import ROOT
from rpsa.recipe import load_recipe
from rpsa.recipe.shipped import shipped

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGE = (ROOT / "docs" / "clusters.md").read_text()
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))


def header(script: Path) -> dict[str, object]:
    """What PEP 723 calls a script's metadata."""
    [block] = re.findall(r"^# /// script\n((?:#(?: .*)?\n)*?)# ///$", script.read_text(), re.MULTILINE)
    return tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_what_it_needs(script: Path) -> None:
    said = header(script)
    project = PROJECT["project"]
    assert said["requires-python"] == project["requires-python"]
    needed = [Requirement(str(one)) for one in said["dependencies"]]  # type: ignore[attr-defined]
    known = {one.name: one for one in map(Requirement, [*project["dependencies"], "rpsa"])}
    assert "rpsa" in {one.name for one in needed}
    for one in needed:
        assert not one.specifier or one.specifier == known[one.name].specifier, one


def copied(dockerfile: str) -> list[str]:
    lines = re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)
    return [path for line in lines for path in line.split()]


def test_the_image_copies_what_a_build_reads(tmp_path: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert set(copied(dockerfile)) == admitted
    for path in copied(dockerfile):
        source = ROOT / path
        if source.is_dir():
            shutil.copytree(source, tmp_path / path, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / path)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    [install] = re.findall(r'pip install .*-c (\S+) "\.\[([\w-]+)\]"', dockerfile)
    assert (tmp_path / install[0]).is_file()
    assert install[1] in PROJECT["project"]["optional-dependencies"]


def commands(tool: str) -> list[list[str]]:
    return [shlex.split(line) for line in PAGE.splitlines() if line.startswith(f"{tool} ")]


@pytest.mark.integration
@pytest.mark.parametrize("command", commands("hf"), ids=lambda words: " ".join(words[:4]))
def test_hugging_face_knows_the_jobs(command: list[str]) -> None:
    place = command.index("run") + 1
    call = [*command[1:place], "--dry-run", *command[place:]]
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *call],
        capture_output=True,
        text=True,
        cwd=ROOT / "examples",
    )
    assert done.returncode == 0, done.stderr
    assert "not submitted" in done.stdout + done.stderr


def test_what_skypilot_starts_is_a_run() -> None:
    task = yaml.safe_load(shipped("clusters/skypilot.yaml").read_text())
    command = shlex.split(task["run"].splitlines()[-1])
    assert command[:3] == ["rpsa", "run", "$RECIPE"]
    assert "RECIPE" in task["envs"]
    settings = [word.replace("$SKYPILOT_NUM_GPUS_PER_NODE", "4") for word in command[3:]]
    recipe = load_recipe(shipped("tiny/demo"), [*settings, "matrix.parallel=1"])
    assert recipe.folder.parts[1].lstrip("/") in {place.strip("/") for place in task["file_mounts"]}
    launched = next(words for words in commands("sky") if "launch" in words)
    given = {word.partition("=")[0] for flag, word in pairwise(launched) if flag in ("--env", "--secret")}
    assert given == set(task["envs"]) | set(task["secrets"])
