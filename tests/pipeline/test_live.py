"""What runs: its pulse, what a run says while it works, and `rpsa status` from another shell; trackers."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress as Bars
from typer.testing import CliRunner

from helpers.small_runs import RECIPE, hidden, leave
from rpsa.artifacts import atomic_write
from rpsa.cli import app
from rpsa.errors import RPSAError
from rpsa.pipeline import run
from rpsa.pipeline.live import (
    Monitor,
    Pulse,
    Telling,
    TimeLeft,
    is_finished,
    left_in_words,
    pulse_of,
    telling,
)
from rpsa.pipeline.stages import AlignTask, tasks_of
from rpsa.pipeline.status import run_status
from rpsa.pipeline.tasks import Task
from rpsa.pipeline.tracking import names_of_run, tracked
from rpsa.provenance import STAGES, TIMING
from rpsa.recipe import Recipe, load_recipe


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "small.yaml"
    path.write_text(RECIPE)
    methods = "matrix.methods=[original, fft, lora]"
    return load_recipe(path, [f"output_dir={folder / 'run'}", methods, *overrides])


def align_tasks(folder: Path) -> list[Task]:
    return tasks_of(recipe(folder), "align")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# A pulse


def test_pace_and_time_left_are_those_of_this_process(tmp_path: Path) -> None:
    task, clock = align_tasks(tmp_path)[0], Clock()
    path = tmp_path / "live"
    tell = Telling(task, path, clock)
    assert str(tell.pulse).startswith("starting")
    clock.now += 60  # the model is loaded
    for done in range(1, 101):  # what was stored before
        tell(done, 200, unit="response", tokens=10 * done)
    assert tell.pulse.seconds_left is None
    assert tell.pulse.tokens_per_second is None
    for done in range(101, 151):
        clock.now += 2
        tell(done, 200, unit="response", tokens=10 * done)
    assert tell.pulse.seconds_left == pytest.approx(50 * 2)
    assert tell.pulse.tokens_per_second == pytest.approx(5)
    assert str(tell.pulse) == "response 150/200, 5 tokens/s, 1:40 left"
    tell(1, 200, unit="graded")  # another thing is counted from now on
    assert tell.pulse.seconds_left is None


def test_tokens_that_come_with_logs_alone(tmp_path: Path) -> None:
    clock = Clock()
    tell = Telling(align_tasks(tmp_path)[0], tmp_path / "live", clock)
    for step in range(41):
        logged = {"tokens": 100 * step} if step % 10 == 0 else {}
        tell(step, 80, unit="step", loss=0.1234, k=0.5, **logged)  # type: ignore[arg-type]
        clock.now += 3
    clock.now -= 3
    assert tell.pulse.tokens_per_second == pytest.approx(100 / 3)
    assert str(tell.pulse) == "step 40/80, loss 0.123, k 0.5, 33 tokens/s, 2:00 left"


def test_the_first_count_of_tokens_gives_no_pace(tmp_path: Path) -> None:
    """It comes with the first log, long after the first step: from what count on it has grown nobody knows."""
    clock = Clock()
    tell = Telling(align_tasks(tmp_path)[0], tmp_path / "live", clock)
    for step in range(1, 21):
        clock.now += 3
        tell(step, 40, unit="step", tokens={10: 5000, 20: 6500}.get(step))
        if step == 15:
            assert tell.pulse.tokens_per_second is None
    assert tell.pulse.tokens_per_second == pytest.approx(1500 / 30)


def test_a_pulse_is_written_once_a_second_and_read_as_it_was(tmp_path: Path) -> None:
    [task, *_], clock = align_tasks(tmp_path), Clock()
    task.live_file.parent.mkdir(parents=True)
    tell = Telling(task, task.live_file, clock)
    clock.now += 0.5
    tell(1, 10, unit="step")
    assert pulse_of(task) != tell.pulse
    clock.now += 0.6
    tell(2, 10, unit="step", tokens=5, c=0.25)
    assert pulse_of(task) == tell.pulse
    clock.now += 0.1
    tell(10, 10, unit="step")  # the last is always written
    assert pulse_of(task) == tell.pulse
    task.live_file.write_text(task.live_file.read_text()[:-9])  # torn
    assert pulse_of(task) is None


def test_a_pulse_ends_with_its_task_even_if_that_fails(tmp_path: Path) -> None:
    task = align_tasks(tmp_path)[0]

    def failing() -> None:
        with telling(task) as tell:
            tell(1, 2, unit="step")
            assert pulse_of(task) is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert hidden(tmp_path) == []


# How long the rest takes


def finished_in(task: Task, seconds: float) -> None:
    leave(task)
    atomic_write(task.folder / TIMING, json.dumps({"seconds": seconds}))


def test_the_rest_takes_as_long_as_its_like_took(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "matrix.seeds=[0, 1, 2]")
    tasks = tasks_of(asked, "align")
    fft, lora = tasks[:3], tasks[3:]
    finished_in(fft[0], 100.0)
    finished_in(lora[0], 10.0)
    estimate = TimeLeft()
    estimate.learn(tasks)
    estimate.learn(tasks)
    assert [estimate.of(task) for task in (fft[1], lora[1])] == [100.0, 10.0]
    assert estimate.left([*fft[1:], *lora[1:]], parallel=1) == (220.0, set())
    assert estimate.left([*fft[1:], *lora[1:]], parallel=2) == (110.0, set())
    assert estimate.left(fft[1:2], parallel=2) == (100.0, set()), "one task is not shared"
    evaluations = tasks_of(asked, "evaluate")
    assert estimate.left([fft[1], *evaluations], parallel=1) == (100.0, {"evaluate"})
    assert left_in_words(100.0, {"evaluate"}) == "about 1:40 left, evaluate not counted"
    assert left_in_words(0.0, {"evaluate"}) == ""
    with telling(fft[1]):  # what runs has its own
        atomic_write(fft[1].live_file, json.dumps(vars(pulse(began=time.time() - 30))))
        found, _ = estimate.left([fft[1]], parallel=1)
        assert found == pytest.approx(70, abs=2)


def test_what_runs_says_how_long_its_like_takes_until_one_has_ended(tmp_path: Path) -> None:
    first, second, *_ = tasks_of(recipe(tmp_path, "matrix.seeds=[0, 1, 2]"), "align")
    estimate = TimeLeft()
    with telling(first):
        now = time.time()
        found = replace(pulse(began=now - 30), done=3, total=10, base=(now - 30, 0), updated=now)
        assert found.seconds_left == pytest.approx(70)
        atomic_write(first.live_file, json.dumps(vars(found)))
        assert estimate.left([first, second], parallel=1) == (pytest.approx(170, abs=4), set())
        finished_in(second, 40.0)
        estimate.learn([second])
        assert estimate.left([first, second], parallel=1) == (pytest.approx(110, abs=4), set())


def pulse(*, began: float, process: int | None = None) -> Pulse:
    return Pulse("align", "x", process or os.getpid(), os.uname().nodename, began, began)


def test_slow_is_more_than_twice_what_others_of_its_kind_took(tmp_path: Path) -> None:
    tasks = tasks_of(recipe(tmp_path, "matrix.seeds=[0, 1]"), "align")
    finished_in(tasks[0], 100.0)
    estimate = TimeLeft()
    estimate.learn(tasks)
    assert not estimate.is_slow(tasks[1], pulse(began=time.time() - 190))
    assert estimate.is_slow(tasks[1], pulse(began=time.time() - 210))
    assert not estimate.is_slow(tasks[2], pulse(began=time.time() - 9999))  # of lora nothing is known


def test_what_a_log_file_is_told(tmp_path: Path) -> None:
    tasks = tasks_of(recipe(tmp_path, "matrix.seeds=[0, 1]"), "align")
    finished_in(tasks[0], 0.5)
    out = io.StringIO()
    bars = Bars(console=Console(file=out))
    monitor = Monitor(bars, {"align": tasks}, parallel=1, every=0.0)
    waiting = tasks[1:]
    with monitor.watching():
        monitor.begin("align", waiting)
        with telling(waiting[0]) as tell:
            tell(3, 9, unit="step", loss=1.5)
            atomic_write(
                waiting[0].live_file,
                json.dumps(vars(pulse(began=time.time() - 500)) | {"done": 3, "total": 9, "unit": "step"}),
            )
            deadline = time.monotonic() + 60
            while "slow" not in out.getvalue() and time.monotonic() < deadline:
                time.sleep(0.05)
        monitor.ended(waiting[0])
    said = out.getvalue()
    assert "align 1/4; fft/tiny-0/seed1: step 3/9; whole study: about" in said
    assert said.count("slow: align fft/tiny-0/seed1: 8:2") == 1
    assert "others of its kind took 0:00" in said


# Status


def test_status_of_a_run_in_the_making(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "matrix.seeds=[0, 1]")
    with pytest.raises(RPSAError, match="no run is here"):
        run_status(asked.folder)
    given = asked.model_dump(mode="json", exclude_unset=True)
    atomic_write(asked.folder / "given.json", json.dumps(given))
    first, second, third, _ = tasks_of(asked, "align")
    finished_in(first, 20.0)
    atomic_write(third.failure_file, json.dumps({"why": "no memory", "final": False, "of": "x"}))
    with telling(second) as tell:
        tell(4, 4, unit="step", loss=0.5)
        result = CliRunner().invoke(app, ["status", str(asked.folder)])
        assert result.exit_code == 0
        lines = result.output.splitlines()
        assert lines[0].startswith(f"{asked.folder}: running, about 0:")
        assert "align      1 of 4, 1 running, 1 failed" in lines
        assert "  fft/tiny-0/seed1: step 4/4, loss 0.5" in lines
        assert "  lora/tiny-0/seed0: failed: no memory" in lines
        assert "evaluate   0 of 5" in lines
    assert not run_status(asked.folder).is_running
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    atomic_write(second.live_file, json.dumps(vars(pulse(began=time.time(), process=gone.pid))))
    status = run_status(asked.folder)
    assert not status.is_running
    assert "  fft/tiny-0/seed1: its process is gone" in list(status.lines())


def test_every_stage_of_a_run_tells_and_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(tmp_path, "matrix.methods=[fft+rpsa]", "train.logging_steps=1", "evaluate.n=1")
    told: dict[str, list[str]] = {}
    call = Telling.__call__

    def heard(self: Telling, *args: int, **named: float) -> None:
        call(self, *args, **named)  # type: ignore[arg-type]
        told.setdefault(self.pulse.stage, []).append(str(self.pulse))

    monkeypatch.setattr(Telling, "__call__", heard)
    run(asked)
    assert set(told) == {"reference", "fisher", "align", "evaluate"}
    assert told["reference"][-1].startswith("response 8/8")
    assert told["fisher"][-1] == "sequence 8/8"
    assert told["align"][-1].startswith("step 4/4, loss ")
    assert ", k " in told["align"][-1]
    assert told["evaluate"][-1].startswith("graded ")
    tasks = [task for stage in STAGES if stage != "report" for task in tasks_of(asked, stage)]
    assert all(is_finished(task) and (task.folder / TIMING).is_file() for task in tasks)
    assert hidden(asked.folder) == []
    assert next(run_status(asked.folder).lines()) == f"{asked.folder}: finished"


# Trackers


def test_trackers_have_a_study_as_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    asked = recipe(tmp_path)
    cell = asked.cells()[1]
    ended = []
    open_runs: dict[str, Callable[[], None]] = {"finish": lambda: ended.append("wandb")}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**open_runs))  # type: ignore[arg-type]

    def none_open() -> None:
        raise RuntimeError("call init first")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(finish=none_open))  # type: ignore[arg-type]
    with tracked(asked, cell):
        assert os.environ["WANDB_PROJECT"] == "mine"
        assert os.environ["WANDB_RUN_GROUP"] == "run"
        assert os.environ["MLFLOW_EXPERIMENT_NAME"] == "small"
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(asked.folder / "tensorboard" / cell.id)
    assert ended == ["wandb"]
    assert os.environ["WANDB_PROJECT"] == "mine"
    assert "WANDB_RUN_GROUP" not in os.environ
    assert names_of_run(asked, cell) == {"run_name": "fft/tiny-0/seed0", "project": "small"}


def test_where_figures_are_sent_decides_nothing(tmp_path: Path) -> None:
    plain, sent = (
        next(task for task in tasks_of(recipe(tmp_path, *more), "align") if isinstance(task, AlignTask))
        for more in ([], ["train.report_to=[tensorboard]", "train.run_name=x", "train.project=y"])
    )
    assert plain.inputs() == sent.inputs()
    assert sent.cell.train["report_to"] == ["tensorboard"]
