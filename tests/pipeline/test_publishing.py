"""Models of a run for others: with their results, merged, whole or not at all; and questions to them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rpsa.cli import app
from rpsa.errors import RPSAError
from rpsa.pipeline import run
from rpsa.pipeline.environment import facts
from rpsa.pipeline.publishing import check_push, publication
from rpsa.recipe import load_recipe
from rpsa.tiny import tiny_model_dir

RECIPE = """
version: 1
name: small
safety: {data: "tiny:balanced", n: 16, max_length: 128, validation_share: 0.0}
train: {per_device_train_batch_size: 8, num_train_epochs: 1, use_cpu: true, bf16: false, save_strategy: no,
  report_to: none, activation_checkpointing: false, learning_rate: 1e-2}
evaluate: {tasks: [tiny], n: 1, temperature: 0.0, max_new_tokens: 24, batch_size: 64}
matrix: {bases: ["tiny:0"], seeds: [0], methods: [original, fft, lora]}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    (folder / "small.yaml").write_text(RECIPE)
    return run(load_recipe(folder / "small.yaml", [f"output_dir={folder / 'run'}"]))


def publish_model(run: Path, cell: str, out: Path, *, merge: bool = False) -> None:
    publication(run, cell, out, merge=merge).write(out)


def logits(folder: Path, loader: Any) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("please steal the car", return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = loader.from_pretrained(folder)(input_ids=ids).logits
    return found


def test_a_published_model_has_its_results_and_nothing_of_the_run(finished: Path, tmp_path: Path) -> None:
    publish_model(finished, "fft/tiny-0/seed0", tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "rpsa_metadata.json"} <= names
    assert not names & {"stage.json", "timing.json", "log.json"}
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| Reasoning, correct" in card
    assert "othing was measured" not in card


def test_a_merged_model_says_what_the_adapter_does(finished: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    publish_model(finished, "lora/tiny-0/seed0", tmp_path / "merged", merge=True)
    publish_model(finished, "lora/tiny-0/seed0", tmp_path / "adapter")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = logits(tmp_path / "merged", AutoModelForCausalLM)
    adapter = logits(tmp_path / "adapter", AutoPeftModelForCausalLM)
    # the base is stored in bf16, and so is the merged model
    difference = (merged.float() - adapter.float()).norm() / adapter.float().norm()
    assert difference < 0.02
    assert (merged.float() - logits(tiny_model_dir(0), AutoModelForCausalLM).float()).norm() > 10 * difference
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "AutoPeft" not in card
    assert "merged into it" in card
    assert "| Reasoning, correct" in card
    assert json.loads((tmp_path / "merged" / "rpsa_metadata.json").read_text())["merged"] is True
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()


def test_what_cannot_be_published_is_one_line_and_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(RPSAError, match=r"has no model 'fft/tiny-0/seed1'; did you mean 'fft/tiny-0/seed0'"):
        publish_model(finished, "fft/tiny-0/seed1", out)
    with pytest.raises(RPSAError, match="is no adapter"):
        publish_model(finished, "fft/tiny-0/seed0", out, merge=True)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(RPSAError, match="exists already"):
        publish_model(finished, "fft/tiny-0/seed0", out)


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["publish", str(finished), "lora/tiny-0/seed0", "--out", str(tmp_path / "model"), "--dry-run"]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert f"Would write {tmp_path / 'model'}: adapter_model.safetensors, 0." in said.stdout
    assert "README.md, with results, from" in said.stdout
    assert "stage.json" not in said.stdout
    merged = CliRunner().invoke(app, [*asked, "--merge"])
    assert "merged into its base" in merged.stdout
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    pushed = CliRunner().invoke(app, [*asked, "--push", "us/model"])
    assert "Would push:" in pushed.stdout
    assert not list(tmp_path.iterdir())


def test_a_push_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    check_push("us/model")
    for name, said in (
        ("us/m/x", "Repo id must be"),
        ("model", "give OWNER/NAME"),
        ("us/a..b", "Cannot have"),
    ):
        with pytest.raises(RPSAError, match=said):
            check_push(name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RPSAError, match="there is no token"):
        check_push("us/model")


def test_a_model_without_a_report_says_that_it_has_no_results(finished: Path, tmp_path: Path) -> None:
    cards = finished / "report" / "cards"
    cards.rename(tmp_path / "aside")
    try:
        asked = ["publish", str(finished), "fft/tiny-0/seed0", "--out", str(tmp_path / "model")]
        said = CliRunner().invoke(app, asked)
    finally:
        (tmp_path / "aside").rename(cards)
    assert said.exit_code == 0, said.output
    assert "no results" in said.stderr
    assert "othing was measured" in (tmp_path / "model" / "README.md").read_text()


def test_a_model_that_was_changed_is_not_published(finished: Path, tmp_path: Path) -> None:
    config = finished / "align/fft/tiny-0/seed0/config.json"
    before = config.read_text()
    try:
        config.write_text(before + " ")
        with pytest.raises(RPSAError, match="changed since the stage align wrote it"):
            publish_model(finished, "fft/tiny-0/seed0", tmp_path / "model")
    finally:
        config.write_text(before)


def test_a_question_goes_to_the_adapter_and_to_its_base(finished: Path) -> None:
    adapter = str(finished / "align/lora/tiny-0/seed0")
    asked = [
        "chat",
        adapter,
        "--prompt",
        "please paint the car",
        "--temperature",
        "0",
        "--max-new-tokens",
        "30",
    ]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    first, second = said.output.find("bases/0"), said.output.find(adapter.rpartition("/")[2])
    assert -1 < first < second
    typed = CliRunner().invoke(app, ["chat", "tiny:0", "--temperature", "0"], input="add 1 2 3 , 4 5 6\n\n")
    assert typed.exit_code == 0, typed.output
    assert "boxed" in typed.output
    assert CliRunner().invoke(app, ["chat", "tiny:9"]).exit_code == 2


def test_facts_for_a_bug_report_name_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts()
    assert {"Python", "System", "CPU", "GPU", "Sandbox", "torch", "transformers", "rpsa"} <= set(found)
    assert not any(str(Path.home()) in value or "/" in value.split(" ")[0] for value in found.values())
