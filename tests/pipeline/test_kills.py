"""Runs that are killed at random moments (`kill -9`) and started again end in the very files of one that was not."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.small_runs import OWN_WORDS, RECIPE, hidden
from rpsa.artifacts import LOCK
from rpsa.pipeline import verify
from rpsa.provenance import STAGES, TIMING

pytestmark = pytest.mark.slow

KILLS, SEED = 40, 0
SETTINGS = [
    "output_dir=run",
    f"matrix.methods={{original: , fft: , fft+rpsa: , lora+rpsa: , {OWN_WORDS}}}",
    *(
        "train.save_strategy=steps",
        "train.save_steps=3",
        "train.num_train_epochs=6",
        "train.save_total_limit=2",
    ),
    *("reference.n=24", "reference.batch_size=2", "reference.temperature=0.6"),
    *("evaluate.n=8", "evaluate.batch_size=4", "evaluate.temperature=0.6"),
    "analysis={fisher_map: [0.6], perturb: {factors: [0.5, 0.9], selections: [fisher, random], draws: 2}}",
]


def start(folder: Path) -> "subprocess.Popen[str]":
    """`rpsa run` in a session of its own, so that a kill of the group reaches all of it."""
    return subprocess.Popen(
        [sys.executable, "-m", "rpsa", "run", "small.yaml", *SETTINGS],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def artifacts(run: Path) -> dict[str, str]:
    """A hash of every file that is not about the clock or the process."""
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file() and path.name not in (TIMING, LOCK)
    }


def stage_at_work(run: Path) -> str:
    """The last stage that has something unfinished."""
    begun = [stage for stage in STAGES if any(True for _ in unfinished(run, stage))]
    return begun[-1] if begun else "between stages"


def unfinished(run: Path, stage: str) -> Iterator[Path]:
    return run.glob(".report.*") if stage == "report" else (run / stage).rglob(".*")


def is_at_work(run: Path, since: float) -> bool:
    """Whether a stage has written something: what an earlier process has left does not count."""
    places = [*(run / stage for stage in STAGES), *run.glob(".report.*")]
    try:
        paths = [path for place in places if place.exists() for path in [place, *place.rglob("*")]]
        return any(path.stat().st_mtime > since for path in paths)
    except FileNotFoundError:  # somebody has just moved it
        return True


def kill_after(folder: Path, delay: float) -> str | None:
    """Start the run, and kill it `delay` seconds after it began to write: at what stage. None if it ended before."""
    began = time.time()
    process = start(folder)
    while process.poll() is None and not is_at_work(folder / "run", began):
        time.sleep(0.01)
    try:
        _, errors = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return stage_at_work(folder / "run")
    assert process.returncode == 0, errors
    return None


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """A run is killed again and again at random moments until it ends; so are others, until all stages were."""

    def new(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "small.yaml").write_text(RECIPE)
        return tmp_path / name

    untouched = new("untouched")
    assert kill_after(untouched, 3600) is None
    expected = artifacts(untouched / "run")
    verify(untouched / "run")

    rng = random.Random(SEED)
    kills: Counter[str] = Counter()
    while kills.total() < KILLS or not set(STAGES) <= set(kills):
        folder = new(f"killed-{kills.total()}")
        longest = 3.0
        while stage := kill_after(folder, rng.uniform(0, longest)):
            kills[stage] += 1
            longest += (
                0.5  # what cannot be resumed must have the time for all of it once, on a slow machine too
            )
        verify(folder / "run")
        assert not hidden(folder / "run")
        found = artifacts(folder / "run")
        assert set(found) == set(expected)
        assert {name for name in found if found[name] != expected[name]} == set()
    print(f"{kills.total()} kills: {dict(kills)}")
