"""`make gpu`: what fails, crashes or takes too long is one line, the rest goes on, and a page is made of the file."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.paths import ROOT


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")


def given(tmp_path: Path, **settings: Any) -> argparse.Namespace:
    found = {
        "device": "cuda",
        "shape": "8b",
        "batch": 2,
        "length": 2048,
        "steps": 2,
        "minutes": 9.0,
        "only": None,
    }
    found |= {"smollm2": None, "out": tmp_path / "gpu.json", "logs": tmp_path / "logs"}
    return argparse.Namespace(**found | settings)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def some_parts(tmp_path: Path) -> list[Any]:
    left = tmp_path / "left.json"
    broken = tmp_path / "broken.json"
    sleeping = "import os, time; os.fork(); print('at work', flush=True); time.sleep(600)"
    return [
        gpu.Part("fails", python("print('much'); raise ValueError('a wrong device')"), 60),
        gpu.Part(
            "full",
            python("print('torch.OutOfMemoryError: CUDA out of memory. Tried', flush=True); exit(1)"),
            60,
        ),
        gpu.Part("dies", python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), 60),
        gpu.Part("hangs", python(sleeping), 3),
        gpu.Part(
            "leaves",
            python(f"open({str(left)!r}, 'w').write('{{}}')"),
            60,
            lambda: {"n": len(left.read_text())},
        ),
        gpu.Part("garbage", python(f"open({str(broken)!r}, 'w').write('{{')"), 60, lambda: gpu._read(broken)),
        gpu.Part("absent", python("1"), 60, missing="it is not installed"),
        gpu.Part("late", python("1"), 10**6),
    ]


def test_no_part_takes_the_others_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "parts", lambda *_: some_parts(tmp_path)[:-1])
    gpu.run(given(tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    said = {name: (one["outcome"], one["said"]) for name, one in found.items()}
    assert said["fails"] == ("failed", "ValueError: a wrong device")
    assert said["full"][0] == "out of memory"
    assert said["dies"] == ("failed", "killed by signal 11: ")
    assert said["hangs"] == ("out of time", "stopped after 3 s: at work")
    assert said["leaves"] == ("passed", "")
    assert found["leaves"]["n"] == 2
    assert said["garbage"][0] == "passed"
    assert "unreadable" in said["garbage"][1]
    assert said["absent"] == ("skipped", "it is not installed")


def test_what_has_no_time_left_is_not_begun_and_the_rest_of_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "parts", lambda *_: some_parts(tmp_path))
    gpu.run(given(tmp_path, only=["absent"]))
    gpu.run(given(tmp_path, only=["late"], minutes=0.1))
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: one["outcome"] for name, one in found.items()} == {"absent": "skipped", "late": "not begun"}


def test_of_a_process_that_dies_it_is_known_in_which_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_skipped(): pass\n"
        "def test_crash(): os._exit(9)\n"
        "def test_never(): pass\n"
    )
    outcomes = tmp_path / "outcomes.jsonl"
    environment = gpu.environment_of("cpu") | {"RPSA_TEST_OUTCOMES": str(outcomes)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "helpers.outcomes",
        "-p",
        "no:cacheprovider",
        "test_it.py",
    ]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    tests = {name.partition("::")[2]: entry for name, entry in gpu._outcomes(outcomes).items()}
    assert {name: outcome for name, (outcome, *_) in tests.items()} == {
        "test_good": "passed",
        "test_wrong": "failed",
        "test_skipped": "skipped",
        "test_crash": "died",
    }
    assert tests["test_wrong"][2] == "assert 1 == 2"
    assert tests["test_skipped"][2] == "no GPU"
    assert gpu.counted(tests) == {"died": 1, "failed": 1, "passed": 1, "skipped": 1}


def test_the_page_shows_what_was_measured_beside_the_plan() -> None:
    figures = {
        "tokens a second": 5000.0,
        "peak GiB": 70.0,
        "fisher seconds a sample": 0.5,
        "fisher peak GiB": 52.0,
    }
    done = {"outcome": "passed", "seconds": 60.0, "said": ""}
    failed = {"outcome": "failed", "seconds": 9.0, "said": "FAILED a | b"}
    tests = {
        "fisher/test_a.py::test_b": ["failed", 1.0, "cuda:0 and cpu"],
        "fisher/test_a.py::test_c": ["passed", 1.0, ""],
    }
    found = {
        "device": "cuda",
        "shape": "8b",
        "batch": 2,
        "length": 2048,
        "parts": {
            "machine": done | {"facts": {"GPU": "NVIDIA H200 (140 GiB)", "CUDA": "12.8", "torch": "2.13.0"}},
            "tests: fisher/test_a.py": failed | {"tests": tests},
            "8b fft plain": {"outcome": "out of memory", "seconds": 30.0, "said": "torch.OutOfMemoryError"},
            "8b fft compact": done | figures,
            "plan": done | {"planned": {"fft": {"compact": figures | {"peak GiB": 65.0}}}},
        },
    }
    page = gpu.page(found)
    assert page.startswith("GPU NVIDIA H200 (140 GiB), CUDA 12.8, torch 2.13.0.\n")
    assert "| tests: fisher/test_a.py | failed | 9 s | 1 failed, 1 passed | FAILED a \\| b |" in page
    assert "| `fisher/test_a.py::test_b` | failed | cuda:0 and cpu |" in page
    assert "| fft compact | 5,000 | 5,000 | 70.0 | 65.0 | 0.50 | 0.50 | 52.0 | 52.0 |" in page
    assert "fft plain |" not in page.partition("Tokens/s")[2]
    assert "has not run on a GPU" in gpu.page({})
    with pytest.raises(SystemExit, match="rehearsal"):
        gpu.page(found | {"device": "cpu"})


def test_every_test_file_that_it_runs_has_tests_for_a_gpu() -> None:
    for file in gpu.TESTED:
        assert "pytest.mark.gpu" in (ROOT / "tests" / file).read_text(), file
    marked = {
        p.relative_to(ROOT / "tests")
        for p in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in p.read_text()
    }
    assert {str(path) for path in marked} - {"house/test_gpu_acceptance.py"} == set(gpu.TESTED)


@pytest.mark.integration
def test_the_rehearsal_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--shape", "test"]
    command += ["--out", str(tmp_path / "gpu.json"), "--logs", str(tmp_path / "logs"), "--minutes", "60"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    tests = [outcome for one in found.values() for outcome, *_ in one.get("tests", {}).values()]
    assert tests.count("passed") >= 5
    for paradigm, methods in gpu.REHEARSED_METHODS.items():
        for method in methods:
            figures = found[f"test {paradigm} {method}"]
            assert figures["tokens a second"] > 0
            assert figures.get("frozen elements moved", 0) == 0
            assert found["plan"]["planned"][paradigm][method]["peak GiB"] > 0
