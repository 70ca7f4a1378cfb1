import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rpsa
from helpers.command_line import invoke
from helpers.paths import RECIPES
from rpsa.errors import RPSAError

DEMO = str(RECIPES / "tiny" / "demo.yaml")
AUDIT = {
    "gradient_only": False,
    "frozen_element_steps_checked": 1_234_567,
    "frozen_elements_moved": 0,
    "drift": {"since_step": 0, "groups": {"mlp": {"relative": 0.01, "changed": 0.25}}},
    "intervals": [{"start": 0, "end": 2}],
    "trajectory": [{"step": 0, "k": 0.5, "c": 0.4, "tau": 0.1}, {"step": 2, "k": 0.7, "c": 0.5, "tau": 0.1}],
}


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the stages, which take minutes: what is tested here is what happens around them."""
    module = ModuleType("rpsa.pipeline")
    monkeypatch.setitem(sys.modules, "rpsa.pipeline", module)
    monkeypatch.setattr(rpsa, "pipeline", module, raising=False)
    return module


def test_help_imports_little() -> None:
    """Half of it is typer's own."""
    code = (
        "import sys; from rpsa import cli; sys.argv = ['rpsa', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verify" in done.stdout
    modules = done.stderr.split()
    assert not {"torch", "transformers", "matplotlib", "pydantic", "numpy", "filelock"} & set(modules)
    assert len([name for name in modules if name.startswith("rpsa")]) < 12
    assert len(modules) < 400


def test_version_and_schema() -> None:
    assert invoke("--version").stdout.startswith("rpsa ")
    assert "fisher" in json.loads(invoke("schema").stdout)["properties"]


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rpsa", "run", DEMO, "fisher.estimatr=per_token"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: demo.yaml: fisher.estimatr: unknown key; did you mean 'estimator'?\n"


def test_run_passes_the_checked_recipe_on(pipeline: ModuleType) -> None:
    calls: list[Any] = []
    pipeline.run = lambda recipe, *, only, keep_finished: calls.append((recipe, only))  # type: ignore[attr-defined]
    result = invoke("run", DEMO, "fisher.probes=2", "matrix.methods=[original]", "--only", "evaluate")
    assert result.exit_code == 0, result.output
    recipe, only = calls[0]
    assert (recipe.fisher.probes, list(recipe.matrix.methods), only) == (2, ["original"], "evaluate")


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        (RPSAError("two\nlines"), 2, "error: two lines\n"),
        (
            OSError(28, "No space left on device", "/x/y"),
            1,
            "error: No space left on device: /x/y; free some space",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1,
            "error: I/O error: No space left",
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: Permission denied: /x\n"),
        (OSError("tiny/none is not a\nlocal folder"), 1, "error: tiny/none is not a local folder\n"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_what_a_stage_raises(pipeline: ModuleType, raised: BaseException, code: int, expected: str) -> None:
    def run(recipe: object, *, only: str | None, keep_finished: bool) -> None:
        raise raised

    pipeline.run = run  # type: ignore[attr-defined]
    result = invoke("run", DEMO, "matrix.methods=[original]")
    assert result.exit_code == code
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(pipeline: ModuleType) -> None:
    def run(recipe: object, *, only: str | None, keep_finished: bool) -> None:
        raise ZeroDivisionError

    pipeline.run = run  # type: ignore[attr-defined]
    assert isinstance(invoke("run", DEMO, "matrix.methods=[original]").exception, ZeroDivisionError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_disk_that_is_really_full(pipeline: ModuleType) -> None:
    def run(recipe: object, *, only: str | None, keep_finished: bool) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 10)

    pipeline.run = run  # type: ignore[attr-defined]
    result = invoke("run", DEMO, "matrix.methods=[original]")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: No space left on device")


def test_verify_and_audit_name_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for command in ("verify", "audit"):
        result = invoke(command, str(tmp_path / "none"))
        assert (result.exit_code, result.stderr) == (2, f"error: {tmp_path / 'none'}: no such folder\n")
    assert "no such file" in invoke("audit", str(tmp_path)).stderr
    (tmp_path / "rpsa_audit.json").write_text("{")
    assert "not readable as JSON" in invoke("audit", str(tmp_path)).stderr


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "0 frozen elements moved in 1,234,567"),
        ({"frozen_elements_moved": 3}, "Freezing failed"),
        ({"frozen_elements_moved": 3, "gradient_only": True}, "Only gradients were masked"),
        ({"trajectory": [{"k": 0.5}]}, "k never left 0.5"),
    ],
)
def test_audit_reads_aloud(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    (tmp_path / "rpsa_audit.json").write_text(json.dumps(AUDIT | changes))
    result = invoke("audit", str(tmp_path))
    assert result.exit_code == 0
    assert expected in result.stdout
    assert "25.0%" in result.stdout


@pytest.mark.integration
def test_tiny_train_writes_a_model(tmp_path: Path) -> None:
    result = invoke("tiny", "train", "--seed", "3", "--out", str(tmp_path / "base"), "--steps", "2")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "base" / "config.json").is_file()
