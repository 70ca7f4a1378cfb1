"""The folder of a run: whose it is, what vouches for what is in it, and what one failure leaves of the others."""

import errno
import importlib
import json
import logging
import pkgutil
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

import rpsa
from helpers.small_runs import OWN_WORDS, RECIPE, copied, hidden, leave, written
from rpsa import provenance
from rpsa.artifacts import locked, read_json
from rpsa.cli.parsing import readable_errors
from rpsa.errors import RPSAError
from rpsa.generation.transformers import TransformersGenerator
from rpsa.models import load_model
from rpsa.pipeline import alignment, run, runner, stages, verify
from rpsa.pipeline.runner import attempt
from rpsa.pipeline.stages import tasks_of
from rpsa.pipeline.tasks import (
    altered_files,
    is_current,
    keep,
    outdated,
    read_manifest,
    write_manifest,
)
from rpsa.provenance import MADE_BY, STAGES, TIMING, Stage
from rpsa.recipe import Recipe, load_recipe

SOURCE = Path(rpsa.__file__).parent
ONE = "matrix.methods=[original, fft]"


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "small.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, [f"output_dir={folder / 'run'}", ONE, *overrides])


# Manifests


def test_a_stage_is_current_until_anything_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    (tmp_path / "log.json").write_text("{}")
    inputs: dict[str, Any] = {"seed": 1, "parts": {"fisher": "abc"}}
    assert outdated(tmp_path, "align", inputs) == ["no result"]
    write_manifest(tmp_path, "align", inputs)
    assert is_current(tmp_path, "align", inputs)
    assert outdated(tmp_path, "align", inputs | {"seed": 2}) == ["another seed"]
    assert outdated(tmp_path, "fisher", inputs) == ["no result"]
    (tmp_path / TIMING).write_text("a clock has no say")
    assert is_current(tmp_path, "align", inputs)
    with monkeypatch.context() as other:
        other.setattr("rpsa.pipeline.tasks.versions", lambda made_by: {"torch": "0.0"})
        assert any(reason.startswith("torch ") for reason in outdated(tmp_path, "align", inputs))
        keep(tmp_path, "align", inputs | {"seed": 2})
        assert not is_current(tmp_path, "align", inputs)
        keep(tmp_path, "align", inputs)
        assert is_current(tmp_path, "align", inputs)
    assert is_current(tmp_path, "align", inputs)
    (tmp_path / "model" / "weights").write_text("longer")
    assert outdated(tmp_path, "align", inputs) == ["model/weights is missing or cut off"]


def test_a_folder_without_what_a_stage_leaves_is_no_result(tmp_path: Path) -> None:
    for stage, made_by in MADE_BY.items():
        folder = tmp_path / stage
        with pytest.raises(RPSAError, match=f"so stage {stage} has no result"):
            write_manifest(folder, stage, {})
        folder.mkdir()
        for name in (*made_by.files, "file")[1:]:
            (folder / name).write_text("x")
        if made_by.files:
            with pytest.raises(RPSAError, match=f"lacks {made_by.files[0]}, so stage {stage} has no result"):
                write_manifest(folder, stage, {})
        assert read_manifest(folder) is None


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    for name in ("a", "b", "log.json"):
        (tmp_path / name).write_text("1")
    write_manifest(tmp_path, "align", {})
    assert altered_files(tmp_path) == []
    (tmp_path / "a").write_text("!")
    (tmp_path / "b").unlink()
    found = altered_files(tmp_path)
    assert len(found) == 2
    assert "changed" in found[0]
    assert "missing" in found[1]


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "{", "{}", "null", "\xff", "[" * 100_000),
        '{"stage": "align", "inputs": {}, "versions": {}, "sources": {}, "inputs_sha256": "x", "files": {}}',
        '{"stage": "align", "inputs": {}, "versions": {}, "sources": {}, "inputs_sha256": "x", "files": {"a": 1}}',
    ],
)
def test_a_broken_manifest_is_no_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "stage.json").write_text(content, encoding="latin-1")
    assert read_manifest(tmp_path) is None
    assert not is_current(tmp_path, "align", {})
    assert "missing or unreadable" in altered_files(tmp_path)[0]


def test_only_code_that_does_something_is_in_a_digest(tmp_path: Path) -> None:
    def code(text: str) -> str:
        path = tmp_path / "room.py"
        path.write_text(text)
        return provenance._code(path)

    one = code('"""What it is."""\n\ndef f(x):\n    """Twice."""\n    return 2 * x\n')
    assert one == code("def f(x):\n    # as Eq. 1 says\n    return (2 * x)\n")
    assert one != code("def f(x):\n    return 3 * x\n")
    assert one != code("def f(x):\n    x = 'Twice.'\n    return 2 * x\n")


@pytest.mark.parametrize("stage", MADE_BY)
def test_the_rooms_of_a_stage_are_there(stage: Stage) -> None:
    rooms = [room for room in MADE_BY[stage].rooms if not room.startswith("-")]
    assert len(set(rooms)) == len(rooms)
    assert set(provenance.sources(MADE_BY[stage])) == set(rooms)


# Who is in the folder


def test_one_process_at_a_time(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from rpsa.artifacts import locked\n"
            "with locked(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()",
            str(tmp_path / "run"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    # a filelock before 4.0 empties the file that says who
    named = rf"run is in use by (process {holder.pid} on .*|another process): wait for it"
    with pytest.raises(RPSAError, match=named):
        run(recipe(tmp_path))
    assert not (tmp_path / "run" / "recipe.json").exists()
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not end a process with its parent")
def test_workers_end_with_a_run_that_is_killed() -> None:
    """Else they would go on writing into the folder that the next run is in."""
    program = """
import os, sys, time
from rpsa.pipeline.runner import workers
if __name__ == "__main__":
    with workers(1) as executor:
        print(executor.submit(os.getpid).result(), flush=True)
        executor.submit(time.sleep, 86400)
        sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = Path(f"/proc/{int(process.stdout.readline())}")
    assert worker.exists()
    process.kill()
    process.wait()
    while worker.exists() and " Z " not in (worker / "stat").read_text():
        time.sleep(0.05)


def test_what_nobody_here_has_written_is_not_replaced(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    [task] = tasks_of(asked, "align")
    task.folder.mkdir(parents=True)
    (task.folder / "thesis.tex").write_text("years of work")
    failure = attempt(task)
    assert failure is not None
    assert "not written by this (stage.json is missing)" in failure.why
    assert (task.folder / "thesis.tex").read_text() == "years of work"


def test_a_finished_result_is_never_replaced_by_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(tmp_path, "matrix.methods=[fft+rpsa]")
    [task] = tasks_of(asked, "reference")
    leave(task)
    before = read_manifest(task.folder)
    changed = recipe(tmp_path, "matrix.methods=[fft+rpsa]", "reference.n=7")

    def work_that_loses_its_folder(task: Any, folder: Path, progress: Any) -> None:
        shutil.rmtree(folder)

    monkeypatch.setattr(stages.ReferenceTask, "run", work_that_loses_its_folder)
    failure = attempt(tasks_of(changed, "reference")[0])
    assert failure is not None
    assert "lacks traces.jsonl, so stage reference has no result" in failure.why
    assert read_manifest(task.folder) == before
    assert altered_files(task.folder) == []


def test_only_a_tasks_own_unfinished_work_goes(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "matrix.bases=[tiny:0, tiny:1]")
    [task, _] = tasks_of(asked, "evaluate")[::2]
    ours = [task.unfinished_folder(key) for key in ("a" * 64, "b" * 64)]
    others = [
        task.folder.parent / f".{task.folder.name}{end}"
        for end in (".5.0123abcd.unfinished", "x.0123abcd.unfinished")
    ]
    for folder in (*ours, *others):
        folder.mkdir(parents=True)
    assert task.unfinished_folders() == ours


def test_what_was_finished_before_a_kill_is_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tmp_path, "matrix.methods=[fft+rpsa]")
    [task] = tasks_of(asked, "reference")
    leave(task)
    task.folder.rename(task.unfinished_folder(task.identity()))
    monkeypatch.setattr(stages.ReferenceTask, "run", lambda *_: pytest.fail("done again"))
    assert attempt(task) is None
    assert is_current(task.folder, "reference", task.inputs())
    assert not hidden(asked.folder)


# What verify knows


UNTOUCHED_AND_FFT = ("align/fft", "evaluate/original", "evaluate/fft")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, whole_run: Path) -> Path:
    asked = recipe(tmp_path_factory.mktemp("finished"), "matrix.methods=[original, fft, lora]")
    copied(whole_run, asked.folder, *UNTOUCHED_AND_FFT)
    return run(asked)


def damaged(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


FFT, LORA, ORIGINAL = "fft/tiny-0/seed0", "lora/tiny-0/seed0", "original/tiny-0"


def mangle(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = read_json(folder / name)
    change(content)
    (folder / name).write_text(json.dumps(content))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a manifest": (lambda run: (run / "evaluate" / FFT / "stage.json").unlink(), "no readable stage.json"),
    "a stage": (lambda run: shutil.rmtree(run / "evaluate" / FFT), "the stage evaluate has no result here"),
    "all evaluations": (lambda run: shutil.rmtree(run / "evaluate"), "(and 3 more)"),
    "the report": (lambda run: shutil.rmtree(run / "report"), "the stage report has no result"),
    "the recipe": (lambda run: (run / "given.json").unlink(), "no run here"),
    "a torn recipe": (lambda run: (run / "given.json").write_text('{"version"'), "given.json: not readable"),
    "another recipe": (lambda run: (run / "given.json").write_text("[]"), "given.json: recipe: expected"),
    "a torn manifest": (
        lambda run: (run / "align" / FFT / "stage.json").write_text("{"),
        "no readable stage.json",
    ),
    "swapped evaluations": (
        lambda run: swap(run / "evaluate" / FFT, run / "evaluate" / LORA),
        "holds the result of another place, evaluate/lora/tiny-0/seed0",
    ),
    "swapped results": (
        lambda run: swap(run / "evaluate" / FFT / "results.json", run / "evaluate" / LORA / "results.json"),
        "changed since the stage evaluate wrote it",
    ),
    "an evaluation for the untouched model's": (
        lambda run: swap(run / "evaluate" / FFT, run / "evaluate" / ORIGINAL),
        "holds the result of another place",
    ),
    "other settings": (
        lambda run: mangle(run, "given.json", lambda given: given["evaluate"].update(n=3)),
        "was made with another evaluate than the run has",
    ),
    "one more method": (
        lambda run: mangle(
            run,
            "given.json",
            lambda given: given["matrix"]["methods"].update({"lora+rpsa": {"paradigm": "lora", "align": {}}}),
        ),
        "deleted, or never run",
    ),
    "a manifest's inputs": (
        lambda run: mangle(run / "evaluate" / FFT, "stage.json", lambda stage: stage.update(inputs={})),
        "edited: its inputs are not those",
    ),
    "another model below": (
        lambda run: mangle(
            run / "align" / FFT, "stage.json", lambda stage: stage.update(inputs_sha256="0" * 64)
        ),
        "was made with another model than the run has",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_knows_from_the_recipe_what_there_should_be(
    finished: Path, tmp_path: Path, damage: str
) -> None:
    copy = damaged(finished, tmp_path)
    verify(copy)
    change, message = DAMAGES[damage]
    change(copy)
    with pytest.raises(RPSAError) as caught:
        verify(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_no_stage_wrote_are_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(finished, tmp_path)
    (copy / "align" / FFT / "adapter_config.json").write_text("{}")
    verify(copy)
    assert (
        "holds 1 files that its stage has not written, such as adapter_config.json" in capsys.readouterr().out
    )


def test_a_moved_run_on_another_machine_is_whole(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(finished, tmp_path)
    monkeypatch.chdir(tmp_path)
    real = provenance.versions
    monkeypatch.setattr("rpsa.pipeline.tasks.versions", lambda made_by: real(made_by) | {"torch": "99.0"})
    verify(Path("copy"))
    shown = capsys.readouterr().out
    assert "align: out of date for rpsa run: " in shown
    assert f"torch {version('torch')} -> 99.0" in shown
    assert "stage folders verified" in shown
    assert copy.is_dir()


def test_no_pickle_stays_and_two_runs_are_alike_to_the_bit(finished: Path, tmp_path: Path) -> None:
    again = run(recipe(tmp_path, "matrix.methods=[original, fft, lora]"))
    names = {p.relative_to(finished) for p in finished.rglob("*") if p.is_file()}
    assert names == {p.relative_to(again) for p in again.rglob("*") if p.is_file()}
    different = {n.as_posix() for n in names if (finished / n).read_bytes() != (again / n).read_bytes()}
    assert {n for n in different if not n.endswith(TIMING)} <= {".lock", "given.json", "recipe.json"}
    assert not [name for name in names if name.suffix in (".bin", ".pt", ".pth", ".pkl")]


# One failure and the others


def test_a_run_that_diverges_is_one_line_and_the_others_are_reported(
    tmp_path: Path,
    whole_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = '"bad|$x_1$[b]"'
    methods = (
        f"matrix.methods={{original: , fft: , {bad}: {{paradigm: fft, train: {{learning_rate: 1e30}}}}}}"
    )
    asked = recipe(tmp_path, methods)
    copied(whole_run, asked.folder, *UNTOUCHED_AND_FFT)
    with pytest.raises(
        RPSAError,
        match=r"^align bad\S*/tiny-0/seed0: diverged: after 4 steps the loss or the weights are no longer numbers",
    ):
        run(asked)
    errors = capsys.readouterr().err
    assert errors.count("failed: align bad") == 1
    assert "Traceback" not in errors
    found = read_json(asked.folder / "report" / "results.json")
    assert [one["method"] for one in found["runs"]] == ["original", "fft"]
    [[name, why]] = found["missing"].items()
    assert name.startswith("bad")
    assert "align failed: diverged" in why
    for file in ("table.md", "index.html"):
        assert "Without a result: bad" in (asked.folder / "report" / file).read_text()
    assert tasks_of(asked, "align")[1].failure_file.is_file()

    monkeypatch.setattr(stages.AlignTask, "run", lambda *_: pytest.fail("trained again"))
    with pytest.raises(RPSAError, match="diverged"):
        run(asked)
    with pytest.raises(RPSAError, match=r"has no result here \(failed: diverged"):
        verify(asked.folder)


def test_a_history_is_kept_apart_from_its_times() -> None:
    entry = {"loss": None, "grad_norm": 1.0, "step": 3, "train_runtime": 1.0}
    assert alignment._figures(entry) == {"loss": None, "grad_norm": 1.0, "step": 3}
    assert alignment._figures(entry, times=True) == {"train_runtime": 1.0}


def test_an_exception_ends_one_cell_and_a_full_disk_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tmp_path, "matrix.methods=[fft, lora]")
    tasks = tasks_of(asked, "align")

    def work(error: Exception) -> Callable[..., None]:
        def raising(task: Any, folder: Path, progress: Any) -> None:
            raise error

        return raising

    monkeypatch.setattr(stages.AlignTask, "run", work(ZeroDivisionError("in\nour code")))
    failure = attempt(tasks[0])
    assert failure is not None
    assert failure.why.startswith("ZeroDivisionError: in (more in ")
    assert "Traceback" in Path(failure.why.partition("more in ")[2][:-1]).read_text()
    assert runner.failure_of(tasks[0]) == failure
    monkeypatch.setattr(stages.AlignTask, "run", work(FileNotFoundError(errno.ENOENT, "No such file", "x")))
    failure = attempt(tasks[0])
    assert failure is not None
    assert failure.why == "No such file: x"
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "x"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ):
        monkeypatch.setattr(stages.AlignTask, "run", work(error))
        with pytest.raises(type(error)):
            attempt(tasks[0])


@pytest.mark.parametrize("full_at", ["weights", "optimizer"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], full_at: str
) -> None:
    """A limit on the size of files stands in for it: the same calls fail, of safetensors' or of torch's."""
    saving = ["train.save_strategy=steps", "train.save_steps=1", "train.num_train_epochs=2"]
    asked = recipe(tmp_path, "matrix.methods=[fft]", *saving)
    [task] = tasks_of(asked, "align")
    parameters = sum(p.numel() for p in load_model("tiny:0", asked.model).parameters())
    size = {"weights": 2 * parameters, "optimizer": 5 * parameters}[full_at]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(Exception) as caught:
            attempt(task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert runner.is_of_the_machine(caught.value), caught.value
    assert not task.folder.exists()
    assert runner.failure_of(task) is None

    capsys.readouterr()
    with pytest.raises(typer.Exit) as stopped, readable_errors():
        raise caught.value
    assert stopped.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "free some space and run the same command again" in said
    assert attempt(task) is None
    assert not hidden(asked.folder)


# What other code and other versions have made


def test_a_mended_grader_asks_no_model_and_trains_none(
    tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(tmp_path)
    copied(whole_run, asked.folder, *UNTOUCHED_AND_FFT)
    folder = run(asked)
    before = written(folder)
    real = provenance._digest

    def mended(room: str, left_out: tuple[str, ...]) -> str:
        return "mended" if room == "evaluation" else real(room, left_out)

    monkeypatch.setattr(provenance, "_digest", mended)
    monkeypatch.setattr(TransformersGenerator, "generate", lambda *_: pytest.fail("asked again"))
    with monkeypatch.context() as kept:
        kept.setattr(stages.EvaluateTask, "run", lambda *_: pytest.fail("evaluated again"))
        run(asked, keep_finished=True)
        assert {n: t for n, t in written(folder).items() if "align" in n} == {
            n: t for n, t in before.items() if "align" in n
        }
        verify(folder)
    for path in folder.glob("evaluate/**/stage.json"):
        mangle(path.parent, path.name, lambda stage: stage.pop("kept_for"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(asked)
    assert caplog.messages.count("evaluate: 2 finished, to be done again: rpsa/evaluation has changed") == 1
    after = written(folder)
    assert {name.split("/")[0] for name in before if after[name] != before[name]} == {"evaluate", "report"}
    assert read_json(folder / "report" / "results.json")["runs"]


def test_the_stages_of_a_run_may_be_done_in_two_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One generates and judges with vLLM, the other trains: neither does again what the other has done."""
    asked = recipe(tmp_path, "matrix.methods=[original, fft+rpsa]", "evaluate.n=1")
    real = provenance.package_versions

    def use(transformers: str) -> None:
        def versions(names: Iterable[str]) -> dict[str, str]:
            return {name: transformers if name == "transformers" else v for name, v in real(names).items()}

        monkeypatch.setattr(provenance, "package_versions", versions)

    use("5.1, with vLLM")
    run(asked, only="reference")
    use("5.2, without")
    with pytest.raises(RPSAError, match=r"stage reference is out of date \(transformers 5.1, with vLLM"):
        run(asked, only="fisher")
    run(asked, only="fisher", keep_finished=True)
    run(asked, only="align", keep_finished=True)
    made = {path: path.stat().st_mtime_ns for path in asked.folder.rglob(TIMING)}
    assert {path.relative_to(asked.folder).parts[0] for path in made} == {"reference", "fisher", "align"}
    use("5.1, with vLLM")
    run(asked, keep_finished=True)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (asked.folder / "report" / "index.html").is_file()


_FREE = {
    *("__init__", "errors", "text", "artifacts", "recipe", "cli", "http", "progress", "provenance"),
    "settings",
    "report/console",
    *(
        f"pipeline/{name}"
        for name in (
            "__init__",
            "launch",
            "live",
            "preflight",
            "runner",
            "tasks",
            "termination",
            "tracking",
            "watching",
        )
    ),
}
"""What has no say in a result: what it decides is among a stage's inputs, or only when it is made."""


@pytest.mark.integration
def test_every_line_that_runs_in_a_stage_is_among_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            ran.add(frame.f_code.co_filename)

    def recording(work: Callable[..., Any]) -> Callable[..., None]:
        def recorded(*arguments: Any, **more: Any) -> None:
            threading.setprofile(note)
            sys.setprofile(note)
            try:
                work(*arguments, **more)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)

        return recorded

    for module in pkgutil.walk_packages([str(SOURCE)], "rpsa."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)  # what an import runs is not the stage's own
    asked = recipe(
        tmp_path,
        f"matrix.methods={{original: , fft: , fft+rpsa: , lora+rpsa: , fft+ewc: , fft+rehearsal: , {OWN_WORDS}}}",
        "analysis={fisher_map: [0.6], perturb: {factors: [0.5], selections: [fisher, random], draws: 1}}",
        *("reference.held_out=4", "train.eval_strategy=epoch", "safety.validation_share=0.2"),
        "robustness={harmful: tiny, benign: tiny, many_shot: {shots: [1]}, prefill: {thought: [user], answer: []}, "
        "finetune: {rows: 4, steps: [1]}, direction: {prompts: 4}, prune: {ratios: [0.1]}, merge: {weights: [0.5]}}",
    )
    for stage in STAGES:
        ran.clear()
        if stage == "report":
            recording(run)(asked, only="report")
        else:
            for task in tasks_of(asked, stage):
                with monkeypatch.context() as patch:
                    patch.setattr(type(task), "run", recording(type(task).run))
                    assert attempt(task) is None
        rooms = {room.removeprefix("-") for room in MADE_BY[stage].rooms} | _FREE
        if stage == "report":  # here the whole command is seen, which asks what the inputs of each stage are
            rooms |= {"models", "sharding", "tiny", "pipeline/stages", "pipeline/groundwork"}
            rooms |= {"evaluation/robustness", "evaluation/items", "evaluation/data"}
        if stage == "align":
            # whether evaluation prompts, and how many refusals, are among the examples is noted, and trains nothing
            rooms |= {"evaluation/items", "evaluation/refusals", "answers"}
        modules = {
            Path(name).relative_to(SOURCE).as_posix().removesuffix(".py")
            for name in ran
            if Path(name).is_relative_to(SOURCE)
        }
        assert modules
        unknown = {m for m in modules if not any(m == room or m.startswith(f"{room}/") for room in rooms)}
        assert unknown == set(), stage
