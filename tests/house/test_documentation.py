"""What README and the examples claim to run, run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT
from rpsa import FisherDiagonal
from rpsa.answers import grade
from rpsa.generation.transformers import TransformersGenerator
from rpsa.parameters import trainable_parameters
from rpsa.recipe import load_recipe
from rpsa.reference import ReferenceConfig, build_reference
from rpsa.safety_data import tokenize_safety_data
from rpsa.tiny import reasoning_problems, safety_examples, tiny_model_dir

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.integration
@pytest.mark.parametrize("script", ["plain_pytorch_loop.py", "trl_script.py"])
def test_examples_run_and_move_nothing_frozen(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / script),
            *([str(tmp_path)] if script.startswith("trl") else []),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "0 frozen elements moved" in done.stdout


@pytest.mark.integration
def test_the_notebook_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    stored = nbformat.read(ROOT / "examples" / "first_hour.ipynb", as_version=4)
    nbformat.validate(stored)
    assert not re.search(r"/(home|tmp|root|Users)/", json.dumps(stored))
    notebook = nbformat.from_dict(json.loads(json.dumps(stored)))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    for was, now in zip(stored.cells, notebook.cells, strict=True):
        assert bool(printed(was)) == bool(printed(now))
    assert "0 frozen elements moved" in printed(notebook.cells[-2])
    rows = [line.split() for line in printed(notebook.cells[-5]).splitlines()[1:]]
    solved = {name: int(share.rstrip("%")) for name, share, *_ in rows}
    attacks = {name: int(share.rstrip("%")) for name, _, share, *_ in rows}
    assert solved["RPSA"] >= solved["plain"]
    assert max(attacks["RPSA"], attacks["plain"]) < attacks["original"] / 2


def printed(cell: Any) -> str:
    return "".join(one.text for one in cell.get("outputs", []) if one.get("name") == "stdout")


@pytest.mark.integration
def test_the_fsdp2_example_runs_and_goes_on_with_other_ranks(tmp_path: Path) -> None:
    def start(ranks: int) -> list[str]:
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    str(ranks),
                ),
                *(str(ROOT / "examples" / "fsdp2_loop.py"), str(tmp_path)),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert "\n0 frozen elements moved" in done.stdout
        return [line for line in done.stdout.splitlines() if line.startswith("step ")]

    whole = start(2)
    assert len(whole) == 8
    resumed = start(1)  # from the checkpoint that the first run left at step 4
    assert [line.split()[1] for line in resumed] == ["4", "5", "6", "7"]
    for found, expected in zip(resumed, whole[4:], strict=True):
        (_, loss, c, k), (_, whole_loss, whole_c, whole_k) = numbers(found), numbers(expected)
        assert loss == pytest.approx(whole_loss, abs=2e-3)
        assert c == pytest.approx(whole_c, abs=2e-5)
        assert k == pytest.approx(whole_k, abs=1e-2)


def numbers(line: str) -> list[float]:
    return [float(word) for word in line.split()[1::2]]


@pytest.mark.integration
def test_the_benchmark_at_8b_runs_when_it_is_small(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "gpu_8b.py"), "lora", "--shape", "test"),
            *("--steps", "2", "--length", "16", "--batch", "1"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert '"frozen elements moved": 0' in done.stdout


def test_the_readmes_trl_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(0))
    build_reference(
        TransformersGenerator(model, tokenizer),
        tokenizer,
        reasoning_problems(8, seed=0),
        ReferenceConfig(max_new_tokens=64),
        "reference",
        lambda response, answer: grade(response, answer, "math"),
    )
    dataset, _ = tokenize_safety_data(safety_examples("refusals", 8, seed=0), tokenizer, None)
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "safety_dataset": dataset}
    # the block trains for three epochs on whatever machine it finds; here that is two steps on a CPU
    settings = 'frozen_ratio="dynamic", use_cpu=True, bf16=False, report_to="none", max_steps=2'
    exec(blocks("python")[0].replace('frozen_ratio="dynamic"', settings), names)
    assert (tmp_path / "aligned" / "rpsa_audit.json").is_file()
    assert names["trainer"].rpsa.report()["frozen_elements_moved"] == 0


def test_the_readmes_plain_loop() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    fisher = FisherDiagonal({n: torch.rand(p.shape) + 0.1 for n, p in trainable_parameters(model).items()})
    inputs = torch.randn(30, 2, 4)

    def loss(model: torch.nn.Module, batch: torch.Tensor = inputs[0]) -> torch.Tensor:
        return functional.mse_loss(model(batch), torch.ones(2, 3))

    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "fisher": fisher,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1),
        "batches": list(inputs),
        "reasoning_loss": loss,
        "safety_loss": loss,
    }
    exec(blocks("python")[1], names)
    assert names["freezer"].step == 30
    assert len(names["freezer"].ratio.history) == 2


def test_the_readmes_recipe_and_its_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("math500.jsonl", "safety.jsonl", "benign.jsonl", "aime24.jsonl", "strongreject.csv"):
        (tmp_path / name).write_text("")
    [recipe] = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    cells = load_recipe(tmp_path / "recipe.yaml", []).cells()
    assert [cell.method for cell in cells] == ["original", "fft", "fft+rpsa", "lora", "lora+rpsa"]
    assert [cell.learning_rate for cell in cells] == [None, 1e-5, 1e-5, 1e-4, 1e-4]
    (tmp_path / "recipe.yaml").write_text(recipe + "fisher: {estimatr: per_token}\n")
    done = subprocess.run(
        [sys.executable, "-c", "from rpsa.cli import main; main()", "run", "recipe.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip() in README
