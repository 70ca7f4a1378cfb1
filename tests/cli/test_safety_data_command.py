"""`rpsa safety-data`: a model's own safety data without a recipe, here and behind a server."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.command_line import invoke
from helpers.completions_server import MODEL, CompletionsServer
from helpers.paths import ROOT
from rpsa.artifacts import locked
from rpsa.generation.transformers import TransformersGenerator
from rpsa.tiny import tiny_model_dir

TINY = ["--prompts", "tiny", "--benign", "tiny", "--steer", "", "--per-prompt", "4"]
SETTINGS = ["--set", "max_new_tokens=48", "--set", "n=16", "--set", "batch_size=64"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.integration
def test_a_file_for_any_trainer_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "own.jsonl"
    done = invoke("safety-data", "tiny:0", *TINY, *SETTINGS, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "Requests" in done.stdout
    assert "not a refusal" in done.stdout
    assert str(out) in done.stdout.replace("\n", "")
    examples = lines(out)
    assert out.read_bytes() == (tmp_path / "own" / "examples.jsonl").read_bytes()
    assert {one["kind"] for one in examples} == {"harmful", "benign"}
    columns = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path)).column_names
    assert {"prompt", "response", "messages", "kind", "prompt_ids", "response_ids"} <= set(columns)

    monkeypatch.setattr(TransformersGenerator, "generate", lambda *_: pytest.fail("asked again"))
    again = invoke("safety-data", "tiny:0", *TINY, *SETTINGS, "--out", str(out))
    assert again.exit_code == 0, again.output
    assert lines(out) == examples
    with locked(tmp_path / "own"):
        refused = invoke("safety-data", "tiny:0", *TINY, *SETTINGS, "--out", str(out))
    assert refused.exit_code == 2
    assert "is in use by process" in refused.stderr


@pytest.mark.integration
def test_a_model_behind_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("RPSA_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    folder = tiny_model_dir(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with CompletionsServer(model, AutoTokenizer.from_pretrained(folder)) as server:
        there = [server.url, "--served-model", MODEL, "--tokenizer", str(folder)]
        done = invoke("safety-data", *there, *TINY, *SETTINGS, "--out", str(tmp_path / "own"))
        assert done.exit_code == 0, done.output
        asked = len(server.requests)
        nameless = invoke("safety-data", server.url, *TINY, "--out", str(tmp_path / "other"))
        assert "give the name of the model there with --served-model" in nameless.stderr
        assert len(server.requests) == asked
    examples = lines(tmp_path / "own" / "examples.jsonl")
    assert {one["kind"] for one in examples} == {"harmful", "benign"}
    assert all(one["exact"] for one in examples)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts", "nowhere/x.jsonl"], "--prompts: no such file or folder: 'nowhere/x.jsonl'"),
        (["--prompts", "tiny", "--benign", "tinyy"], "--benign: 'tinyy' is unknown; did you mean 'tiny'?"),
        (["--prompts", "tiny", "--filter", "lama"], "--filter: judge 'lama' is unknown: choose from refusal"),
        (
            ["--prompts", "tiny", "--set", "temprature=1"],
            "temprature: unknown key; did you mean 'temperature'?",
        ),
        (["--prompts", "tiny", "--set", "temperature"], "--set temperature: write it as key=value"),
        (
            ["--prompts", "tiny", "--set", "filter_settings.api_key=x"],
            "a secret is not written into a recipe",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: list[str], said: str) -> None:
    done = invoke("safety-data", "tiny:0", *options, "--out", str(tmp_path / "own"))
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "own").exists()


def test_an_unknown_model(tmp_path: Path) -> None:
    done = invoke("safety-data", "tiny:9", "--prompts", "tiny", "--out", str(tmp_path / "own"))
    assert done.exit_code == 2
    assert "'tiny:9' is unknown" in done.stderr


@pytest.mark.integration
def test_the_page_shows_what_the_command_prints(tmp_path: Path) -> None:
    """The example of docs/safety-data.md."""
    settings = [*TINY[:-1], "8", "--set", "max_new_tokens=48", "--out", str(tmp_path / "own")]
    done = invoke("safety-data", "tiny:0", *settings)
    assert done.exit_code == 0, done.output
    table = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines()[:3])
    assert table in (ROOT / "docs" / "safety-data.md").read_text()
