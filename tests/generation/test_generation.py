"""Generation: the right law, whatever the batch, and a model left as it was."""

import copy
import hashlib
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken

from helpers.devices import DEVICE
from helpers.real_format import byte_level_tokenizer, small_qwen2
from rpsa.errors import RPSAError
from rpsa.generation import Sampling, sample_id, sample_seed
from rpsa.generation.transformers import TransformersGenerator

pytestmark = pytest.mark.gpu

torch.set_num_threads(1)

TOKENIZER = byte_level_tokenizer(iter(["some text for a small vocabulary"]), 270)
EOS = TOKENIZER.eos_token_id
PROMPTS = [TOKENIZER("a" * n)["input_ids"] for n in (3, 1, 7, 2, 5, 4)]
IDS = [f"problem {i}" for i in range(len(PROMPTS))]


def peaked_model(vocab_size: int = len(TOKENIZER)):
    """Random weights with the head scaled up, so that logits differ by whole units."""
    model = small_qwen2(vocab_size, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
        model.model.embed_tokens.weight.mul_(20)
    return model.to(DEVICE)


def run(model, sampling, prompts=PROMPTS, sample_ids=IDS, batch_size=16, tokenizer=TOKENIZER):
    found = dict(TransformersGenerator(model, tokenizer, batch_size).generate(prompts, sampling, sample_ids))
    assert sorted(found) == list(range(len(prompts)))
    return [found[i] for i in range(len(prompts))]


def law(logits, sampling):
    """The oracle: probabilities after temperature, then after keeping the smallest set of mass top_p."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    kept, mass = set(), 0.0
    for i in p.argsort(descending=True).tolist():
        kept.add(i)
        mass += p[i].item()
        if mass >= sampling.top_p:
            break
    p = torch.tensor([x if i in kept else 0.0 for i, x in enumerate(p.tolist())], dtype=torch.float64)
    return p / p.sum()


@torch.no_grad()
def slow_response(model, prompt, sampling, sample_id):
    """One prompt, no padding, no cache, one number per position."""
    ids, new = list(prompt), []
    while len(new) < sampling.max_new_tokens and (not new or new[-1] != EOS):
        logits = model(torch.tensor([ids], device=DEVICE)).logits[0, -1].cpu()
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            key = f"{sampling.seed}\0{sample_id}\0{len(new)}".encode()
            number = (int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") + 0.5) / 2**32
            token = int((law(logits, sampling).cumsum(0) <= number).sum())
        new.append(token)
        ids.append(token)
    return new


@pytest.mark.parametrize("temperature", [0, 0.6, 1.3])
def test_equals_one_prompt_at_a_time_without_cache_or_padding(temperature):
    model = peaked_model()
    sampling = Sampling(temperature=temperature, top_p=0.9, max_new_tokens=12, seed=3)
    completions = run(model, sampling)
    for prompt, name, completion in zip(PROMPTS, IDS, completions, strict=True):
        assert completion.token_ids == slow_response(model, prompt, sampling, name)


def chi_square(counts, expected, n):
    """Pearson's statistic and its 99.9% point (Wilson and Hilferty), rare cells pooled."""
    cells = [(counts.get(k, 0), n * p) for k, p in expected.items() if n * p >= 5]
    rest = (n - sum(c for c, _ in cells), n - sum(e for _, e in cells))
    cells += [rest] if rest[1] > 1 else []
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return sum((c - e) ** 2 / e for c, e in cells), limit


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, 1.0, 2), Sampling(0.6, 0.95, 2), Sampling(1.5, 0.7, 2, seed=1)]
)
def test_the_law_of_two_tokens_is_right(sampling):
    model = peaked_model(12)
    prompt, n = [5, 6, 7], 4000
    completions = run(model, sampling, [prompt] * n, [str(i) for i in range(n)], 1000)
    with torch.no_grad():
        first = law(model(torch.tensor([prompt], device=DEVICE)).logits[0, -1].cpu(), sampling)
        expected = {}
        for a, p in enumerate(first.tolist()):
            if a == EOS:  # such a response ends early
                expected[(a,)] = p
                continue
            second = law(model(torch.tensor([[*prompt, a]], device=DEVICE)).logits[0, -1].cpu(), sampling)
            expected |= {(a, b): p * q for b, q in enumerate(second.tolist())}
    counts = Counter(tuple(c.token_ids) for c in completions)
    assert all(expected[pair] > 0 for pair in counts)
    statistic, limit = chi_square(counts, expected, n)
    assert statistic < limit
    # the test has teeth: a temperature a little off is rejected
    other = Sampling(1.25 * sampling.temperature, sampling.top_p, 2)
    wrong = {(a,): p for a, p in enumerate(law(model(torch.tensor([prompt])).logits[0, -1], other).tolist())}
    statistic, limit = chi_square(Counter((c.token_ids[0],) for c in completions), wrong, n)
    assert statistic > limit


def test_the_batch_does_not_change_the_text():
    model, sampling = peaked_model(), Sampling(max_new_tokens=24)
    together = run(model, sampling)
    assert run(model, sampling, batch_size=1) == together
    assert run(model, sampling, batch_size=4) == together
    assert run(model, sampling, PROMPTS[::-1], IDS[::-1], 4) == together[::-1]
    again = run(model, Sampling(max_new_tokens=24, seed=43))
    assert sum(a.token_ids != b.token_ids for a, b in zip(again, together, strict=True)) >= 5
    same_prompt = run(model, sampling, [PROMPTS[0]] * 6)
    assert len({tuple(c.token_ids) for c in same_prompt}) == 6


def test_stop_means_that_eos_was_emitted():
    model, sampling = small_qwen2(len(TOKENIZER)), Sampling(max_new_tokens=300, temperature=1.0, top_p=1.0)
    model.generation_config.eos_token_id = [EOS, 30, 31]
    prompts, ids = PROMPTS * 5, [str(i) for i in range(30)]
    reasons = Counter()
    for completion in run(model, sampling, prompts, ids):
        reasons[completion.finish_reason] += 1
        ends = [i for i in completion.token_ids if i in (EOS, 30, 31)]
        if completion.finish_reason == "stop":
            assert ends == completion.token_ids[-1:]
        else:
            assert not ends
            assert len(completion.token_ids) == 300
    assert reasons["stop"] > 5
    assert reasons["length"] > 0


def test_text_leaves_out_special_tokens_but_the_thought():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens([AddedToken(word, special=True) for word in ("<think>", "</think>", "<|tool|>")])
    generator = TransformersGenerator(small_qwen2(len(tokenizer)), tokenizer)
    ids = tokenizer("<think>a<|tool|></think>b<|end|>")["input_ids"]
    assert generator._completion([*ids, tokenizer.pad_token_id]).text == "<think>a</think>b"
    assert generator._completion([*ids, tokenizer.pad_token_id]).token_ids == ids


def test_leaves_the_model_and_the_global_random_state_as_they_were():
    model = peaked_model()
    model.train()
    model.model.layers[0].eval()
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.no_repeat_ngram_size = 2
    before = copy.deepcopy(model.generation_config.to_dict())
    state, flags = torch.get_rng_state(), [m.training for m in model.modules()]
    sampling = Sampling(max_new_tokens=8)
    steps = TransformersGenerator(model, TOKENIZER, batch_size=2).generate(PROMPTS, sampling, IDS)
    next(steps)
    assert [m.training for m in model.modules()] == flags  # between batches too
    assert not torch.is_inference_mode_enabled()
    list(steps)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == before
    # none of those generation settings had a say
    assert run(model, sampling) == run(peaked_model(), sampling)


def test_flags_come_back_after_an_error():
    def fail(module, inputs):
        raise KeyError("boom")

    model = peaked_model().train()
    config = model.generation_config
    model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        run(model, Sampling(max_new_tokens=2))
    assert model.training
    assert model.generation_config is config


def test_peft_model():
    sampling = Sampling(max_new_tokens=8)
    expected = run(peaked_model(), sampling)
    base = peaked_model()
    base.generation_config.repetition_penalty = 1.7
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]))
    assert run(model, sampling) == expected  # B = 0
    assert base.generation_config.repetition_penalty == 1.7
    assert model.generation_config.repetition_penalty == 1.7


class FullGPU:
    """A model's `generate` for which more than `room` sequences are too many."""

    def __init__(self, model, room, error=torch.OutOfMemoryError):
        self.generate, self.room, self.error, self.sizes = model.generate, room, error, []

    def __call__(self, input_ids, **arguments):
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.room:
            raise self.error("CUDA out of memory")
        return self.generate(input_ids=input_ids, **arguments)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, caplog):
    model, sampling = peaked_model(), Sampling(max_new_tokens=8)
    expected = run(model, sampling)
    gpu = FullGPU(model, room=2)
    monkeypatch.setattr(model, "generate", gpu)
    assert run(model, sampling, batch_size=6) == expected
    assert gpu.sizes == [6, 3, 2, 2, 2]
    assert "out of GPU memory with 6 sequences: going on with 3" in caplog.text


def test_a_sequence_that_does_not_fit_is_one_line_and_other_errors_pass(monkeypatch):
    model, sampling = peaked_model(), Sampling(max_new_tokens=8)
    original = model.generate
    monkeypatch.setattr(model, "generate", FullGPU(model, room=0))
    with pytest.raises(RPSAError, match="one sequence of 8 prompt tokens and up to 8 new ones"):
        run(model, sampling)
    monkeypatch.setattr(model, "generate", original)
    monkeypatch.setattr(model, "generate", FullGPU(model, 0, RuntimeError))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        run(model, sampling)


def test_sample_ids_and_seeds():
    triples = [(t, d, i) for t in ("a", "a/b", "a%2Fb", "") for d in ("1", "b/1", 11, "") for i in (0, 1, 11)]
    ids = {sample_id(*triple) for triple in triples}
    assert len(ids) == len(triples)
    assert sample_id("aime24", 3, 0) == "aime24/3/0"
    seeds = {sample_seed(seed, name) for seed in (0, 42) for name in ids}
    assert len(seeds) == 2 * len(ids)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30
    assert sample_seed(42, "aime24/3/0") == 1049702189  # stored samples depend on it


def test_mistakes():
    model = peaked_model()
    with pytest.raises(RPSAError, match="6 prompts with 1 sample ids"):
        run(model, Sampling(), sample_ids=["x"])
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}):
        with pytest.raises(RPSAError, match=next(iter(wrong))):
            Sampling(**wrong)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(RPSAError, match="EOS"):
        TransformersGenerator(model, tokenizer)
