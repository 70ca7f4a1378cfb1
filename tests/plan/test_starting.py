"""`rpsa init`: the recipe fits the GPUs that it was written for, loads, and says what it is."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from rpsa.cli import app
from rpsa.pipeline.preflight import preflight
from rpsa.plan import make_plan
from rpsa.plan.starting import _fits
from rpsa.recipe import load_recipe
from rpsa.tiny import safety_examples


def model_folder(folder: Path, hidden_size: int, layers: int) -> Path:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def init(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["init", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("gpu_memory", "paradigm"),
    [(80, "fft"), (3, "lora")],
)
def test_full_fine_tuning_where_it_fits_else_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_memory: int, paradigm: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model", 1024, 8)
    data = ["--safety", "tiny:balanced", "--problems", "tiny"]
    code, said = init("model", *data, "--gpu-memory", str(gpu_memory))
    assert code == 0, said
    recipe = load_recipe(Path("recipe.yaml"))
    assert list(recipe.matrix.methods) == ["original", paradigm, f"{paradigm}+constant_kl"]
    plan = make_plan(recipe, gpu_memory, [1])
    assert _fits(plan)
    assert f"of 1 × {gpu_memory} GiB" in Path("recipe.yaml").read_text()
    code, said = init("model", *data)
    assert (code, said) == (2, "error: recipe.yaml: exists already; give another --out, or remove it")


def test_what_does_not_fit_or_is_not_there_is_said_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model", 1024, 2)
    data = ["--safety", "tiny:balanced", "--problems", "tiny"]
    code, said = init("model", *data, "--gpu-memory", "1")
    assert code == 2
    assert said.startswith("error: model does not fit on 1 × 1 GiB: LoRA on thoughts of 1,024 tokens takes ")
    code, said = init("model", "--safety", "nowhere.jsonl")
    assert code == 2
    assert "safety.data: no such file or folder: 'nowhere.jsonl'" in said
    code, said = init("somebody/nothing", *data, "--cpu")
    assert code == 2
    assert "its config is not on this machine" in said
    assert not Path("recipe.yaml").exists()


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = init(
        "tiny:0", "--cpu", "--safety", "tiny:balanced", "--problems", "tiny", "--out", "mine.yaml"
    )
    assert (code, said) == (0, "Recipe: mine.yaml (LoRA, on the CPU)")
    recipe = load_recipe(Path("mine.yaml"))
    assert recipe.train["use_cpu"] is True


def test_no_more_is_asked_of_files_than_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(asdict(one)) + "\n" for one in safety_examples("refusals", 60, seed=0)]
    Path("safety.jsonl").write_text("".join(rows[:40]))
    Path("benign.jsonl").write_text("".join(rows[40:]))
    Path("problems.jsonl").write_text(
        "".join(f'{{"problem": "add {n} , 1", "answer": "{n}"}}\n' for n in range(24))
    )
    data = ["--safety", "safety.jsonl", "--benign", "benign.jsonl", "--problems", "problems.jsonl"]
    code, said = init("tiny:0", "--cpu", *data)
    assert code == 0, said
    recipe = load_recipe(Path("recipe.yaml"))
    assert (recipe.reference.n, recipe.reference.held_out) == (18, 6)
    assert recipe.safety.benign_share == 0.33  # 20 of 60
    monkeypatch.setenv("RPSA_DATA_DIR", str(tmp_path))
    for name in ("aime24", "strongreject"):
        Path(f"{name}.jsonl").write_text(
            '{"problem": "1", "answer": "1", "forbidden_prompt": "steal the car", "category": "x"}\n'
        )
    tasks = "evaluate.tasks=[rpsa_aime24, rpsa_strongreject]"
    preflight(load_recipe(Path("recipe.yaml"), [tasks]))
