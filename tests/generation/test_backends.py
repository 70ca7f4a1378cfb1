"""The choice of a backend, and the vLLM adapter on a stand-in.

vLLM is not here, so what runs is a stand-in with the public names and signatures that the adapter uses, on the tiny
model. It shows that prompts, seeds and results go where they belong; tests/generation/test_vllm.py has vLLM itself.
"""

import logging
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.generation import Sampling, sample_seed
from rpsa.generation.backends import BackendConfig, choose_backend, make_generator
from rpsa.generation.server import ServerConfig, ServerGenerator
from rpsa.generation.transformers import TransformersGenerator
from rpsa.generation.vllm import VLLMGenerator
from rpsa.tiny import reasoning_problems, tiny_model_dir

torch.set_num_threads(1)

FOLDER = str(tiny_model_dir(0))
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
PROMPTS = [render_prompt(TOKENIZER, problem.prompt) for problem in reasoning_problems(7, 0, "test")]
IDS = [f"problem {i}" for i in range(len(PROMPTS))]
GREEDY = Sampling(temperature=0, max_new_tokens=40)
SERVER = ServerConfig("http://127.0.0.1:1/v1", "tiny")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    detokenize: bool = True


class TokensPrompt(dict):
    pass


class LLM:
    def __init__(self, model, *, tensor_parallel_size=1, dtype="auto", max_model_len=64, **rest):
        if rest:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {next(iter(rest))!r}")
        if tensor_parallel_size > 1:
            raise ValueError("World size (2) is larger\nthan the number of available GPUs (0)")
        self.model, self.max_model_len, self.waves, self.abort = load(model), max_model_len, [], False

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not use_tqdm
        self.waves.append(sampling_params)
        return [self.output(p, s) for p, s in zip(prompts, sampling_params, strict=True)]

    def output(self, prompt, params):
        assert type(prompt) is TokensPrompt
        ids = prompt["prompt_token_ids"]
        if len(ids) >= self.max_model_len:
            raise ValueError(f"The prompt (length {len(ids)}) is longer than the maximum model length")
        sampling = Sampling(params.temperature, params.top_p, params.max_tokens, params.seed)
        done = next(TransformersGenerator(self.model, TOKENIZER).generate([ids], sampling, ["vllm"]))[1]
        reason = "abort" if self.abort else done.finish_reason
        text = done.text if params.detokenize else ""
        output = types.SimpleNamespace(token_ids=tuple(done.token_ids), text=text, finish_reason=reason)
        return types.SimpleNamespace(outputs=[output])


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, TokensPrompt
    module.__spec__ = types.SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("rpsa.generation.backends._is_installed", lambda package: False)


def test_vllm_equals_the_transformers_backend_where_greedy(vllm):
    generator = VLLMGenerator(FOLDER, TOKENIZER, {"dtype": "float32"}, wave=3)
    found = list(generator.generate(PROMPTS, GREEDY, IDS))
    assert [i for i, _ in found] == list(range(7))
    assert dict(found) == dict(TransformersGenerator(load(FOLDER), TOKENIZER).generate(PROMPTS, GREEDY, IDS))
    assert [len(wave) for wave in generator._llm.waves] == [3, 3, 1]


def test_vllm_seeds_each_sample_by_its_id(vllm):
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=5, seed=8)
    generator = VLLMGenerator(FOLDER, TOKENIZER)
    found = dict(generator.generate(PROMPTS, sampling, IDS))
    (wave,) = generator._llm.waves
    assert wave == [SamplingParams(0.7, 0.9, 5, sample_seed(8, i), False) for i in IDS]
    backwards = dict(generator.generate(PROMPTS[::-1], sampling, IDS[::-1]))
    assert all(backwards[6 - i] == found[i] for i in range(7))


def test_what_vllm_refuses_is_one_line(vllm):
    with pytest.raises(RPSAError, match=r"^vLLM cannot load .*: World size \(2\) is larger than"):
        VLLMGenerator(FOLDER, TOKENIZER, {"tensor_parallel_size": 2})
    with pytest.raises(RPSAError, match="unexpected keyword argument 'tensor_parallel'"):
        VLLMGenerator(FOLDER, TOKENIZER, {"tensor_parallel": 2})
    with pytest.raises(RPSAError, match=r"data_parallel_size 4.*use VLLMServerGenerator"):
        VLLMGenerator(FOLDER, TOKENIZER, {"data_parallel_size": 4})
    generator = VLLMGenerator(FOLDER, TOKENIZER, {"max_model_len": 5})
    with pytest.raises(RPSAError, match=r"vLLM refused a request: The prompt \(length"):
        next(generator.generate(PROMPTS, GREEDY, IDS))
    with pytest.raises(RPSAError, match="7 prompts with 1 sample ids"):
        next(generator.generate(PROMPTS, GREEDY, ["x"]))
    generator = VLLMGenerator(FOLDER, TOKENIZER)
    generator._llm.abort = True
    with pytest.raises(RPSAError, match="ended sample 'problem 0' with 'abort'"):
        next(generator.generate(PROMPTS, GREEDY, IDS))


def test_without_vllm(no_vllm, caplog):
    with pytest.raises(RPSAError, match=r"pip install 'rpsa\[vllm\]'"):
        VLLMGenerator(FOLDER, TOKENIZER)
    assert choose_backend(BackendConfig("vllm")) == "transformers"
    assert "vLLM is not installed (pip install 'rpsa[vllm]')" in caplog.text
    assert choose_backend(BackendConfig()) == "transformers"


def test_the_choice(vllm, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("rpsa.generation.backends.has_gpu", lambda: True)
    assert choose_backend(BackendConfig()) == "vllm"
    assert choose_backend(BackendConfig(server=SERVER)) == "server"
    for backend in ("transformers", "vllm", "server"):
        assert choose_backend(BackendConfig(backend, server=SERVER)) == backend
    monkeypatch.setattr("rpsa.generation.backends.has_gpu", lambda: False)
    assert choose_backend(BackendConfig()) == "transformers"
    assert choose_backend(BackendConfig("vllm")) == "vllm"
    with pytest.raises(RPSAError, match="backend 'server' without a server"):
        choose_backend(BackendConfig("server"))
    assert not caplog.messages


def test_making_one(vllm):
    def never(folder):
        raise AssertionError("the model is loaded for nothing")

    made = make_generator(BackendConfig("vllm", engine={"max_model_len": 50}), FOLDER, TOKENIZER, never)
    assert isinstance(made, VLLMGenerator)
    assert made._llm.max_model_len == 50
    made = make_generator(BackendConfig(server=SERVER), FOLDER, TOKENIZER, never)
    assert isinstance(made, ServerGenerator)
    made = make_generator(BackendConfig("transformers", batch_size=5), FOLDER, TOKENIZER, load)
    assert isinstance(made, TransformersGenerator)
    assert made.batch_size == 5
