"""Eq. 4 against one plain backward pass a token, and what must not change the numbers."""

import copy
import logging
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import LlamaConfig

from helpers.devices import DEVICE
from helpers.examples import examples
from helpers.fisher_models import (
    VOCABULARY,
    exact_fisher,
    ragged_batch,
    relative_error,
    rows_of,
    tiny_model,
    token_gradients,
    with_lora,
)
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.fisher.log_probs import label_log_probs
from rpsa.fisher.overlap import sampled_elements, split_half_overlap
from rpsa.fisher.probes import random_signs, sample_key
from rpsa.fisher.samples import read_samples
from rpsa.fisher.squares import SquaredGradients
from rpsa.parameters import trainable_parameters
from rpsa.training.reasoning import negative_log_likelihood, warm_up

pytestmark = pytest.mark.gpu

BATCH = ragged_batch([(3, 7), (2, 4), (5, 1), (1, 9)])


def estimate(model: nn.Module, *batches: dict[str, Any], **fields: Any) -> FisherDiagonal:
    return estimate_fisher(model, batches or [BATCH], FisherConfig(progress=False, **fields))


def trace(scores: Any) -> float:
    return sum(float(score.double().sum()) for score in scores.values())


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "llama+lora", "qwen2+lora", "llama+lora0"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its exact Fisher on BATCH."""
    kind, _, lora = request.param.partition("+")
    model = tiny_model(kind)
    if lora:
        model = with_lora(model, is_b_random=lora == "lora")
    return model, exact_fisher(model, BATCH)


def test_per_token_is_equation_4(case: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, exact = case
    assert relative_error(estimate(model, estimator="per_token").scores, exact) < 1e-5


def test_per_token_without_batched_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsa.fisher.loop._VJP_ELEMENTS", 1)
    model = tiny_model("qwen3")
    assert relative_error(estimate(model, estimator="per_token").scores, exact_fisher(model, BATCH)) < 1e-5


def test_signs_are_exact_with_a_probe_for_every_token(case: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, exact = case
    assert relative_error(estimate(model, probes=9).scores, exact) < 1e-4
    assert relative_error(estimate(model, probes=12).scores, exact) < 1e-4


def test_only_b_has_a_fisher_where_b_is_zero() -> None:
    model = with_lora(tiny_model("llama"), is_b_random=False)
    scores = estimate(model).scores
    assert all(bool((score > 0).any()) == ("lora_B" in name) for name, score in scores.items())


@pytest.mark.parametrize("probes", [1, 3])
def test_probes_are_sums_over_interleaved_groups(probes: int) -> None:
    model = tiny_model("llama")
    expected: dict[str, Tensor] = {}
    for row, gradients in enumerate(token_gradients(model, BATCH)):
        positions = (BATCH["labels"][row] != -100).nonzero()[:, 0]
        keys = torch.full_like(positions, sample_key(42, BATCH["sample_ids"][row]))
        signs = random_signs(keys, positions).double()
        for name, gradient in gradients.items():
            signed = gradient * signs.view(-1, *[1] * (gradient.dim() - 1))
            for group in range(probes):
                square = signed[group::probes].sum(0).square() / len(signs) / len(BATCH["labels"])
                expected[name] = expected.get(name, 0) + square
    assert relative_error(estimate(model, probes=probes).scores, expected) < 1e-5


def test_per_sequence_is_the_squared_sum_over_y() -> None:
    model = tiny_model("qwen2")
    rows = token_gradients(model, BATCH)
    expected = {n: sum(r[n].sum(0).square() / len(r[n]) for r in rows) / len(rows) for n in rows[0]}
    assert relative_error(estimate(model, estimator="per_sequence").scores, expected) < 1e-5


def test_one_probe_is_unbiased() -> None:
    model = tiny_model("llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    batch = ragged_batch([(2, 5), (1, 6)])
    exact = exact_fisher(model, batch)
    draws = [estimate(model, batch, probes=1, seed=seed).scores for seed in range(200)]
    flat = torch.stack([torch.cat([draw[n].flatten() for n in exact]) for draw in draws]).double()
    target = torch.cat([exact[n].flatten() for n in exact])
    total = flat.sum(1)
    assert abs(total.mean() - target.sum()) < 3 * total.std() / math.sqrt(200)
    error = (flat.mean(0) - target).abs()
    allowed = 3 * flat.std(0) / math.sqrt(200) + 1e-5 * target
    assert (error <= allowed).double().mean() >= 0.99


def test_signs_stay_unbiased_where_per_sequence_is_not() -> None:
    model = tiny_model("llama")
    batch = ragged_batch([(3, 16), (2, 20), (4, 12)])
    is_response = batch["labels"] != -100
    batch["input_ids"][is_response] = batch["labels"][is_response] = 7
    exact = trace(estimate(model, batch, estimator="per_token").scores)
    signed = [trace(estimate(model, batch, probes=4, seed=seed).scores) for seed in range(30)]
    assert abs(sum(signed) / 30 / exact - 1) < 0.1
    assert trace(estimate(model, batch, estimator="per_sequence").scores) > 3 * exact


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("estimator", ["token_signs", "per_token", "per_sequence"])
def test_neither_batching_nor_padding_changes_anything(kind: str, estimator: str) -> None:
    model = tiny_model(kind)
    whole = estimate(model, estimator=estimator)
    split = estimate(model, rows_of(BATCH, [0]), rows_of(BATCH, [1, 2, 3]), estimator=estimator)
    padded_batch = ragged_batch([(3, 7), (2, 4), (5, 1), (1, 9)], padding=5)
    padded = estimate(model, padded_batch, estimator=estimator)
    assert relative_error(split.scores, whole.scores) < 1e-5
    assert relative_error(padded.scores, whole.scores) < 1e-5
    assert {f.manifest["data_fingerprint"] for f in (whole, split, padded)} == {
        whole.manifest["data_fingerprint"]
    }
    order = [2, 0, 3, 1]
    shuffled = estimate(model, rows_of(BATCH, order), estimator=estimator)
    assert relative_error(shuffled.scores, whole.scores) < 1e-5
    assert shuffled.manifest["data_fingerprint"] != whole.manifest["data_fingerprint"]


def test_the_seed_and_the_id_set_the_signs() -> None:
    model = tiny_model("llama")
    first = estimate(model, probes=1)
    noise = 0 if DEVICE.type == "cpu" else 1e-6  # a GPU adds in another order each time
    assert relative_error(estimate(model, probes=1).scores, first.scores) <= noise
    assert relative_error(estimate(model, probes=1, seed=1).scores, first.scores) > 0.01
    renamed = BATCH | {"sample_ids": ["a", "b", "c", "d"]}
    assert relative_error(estimate(model, renamed, probes=1).scores, first.scores) > 0.01
    unnamed = {key: value for key, value in BATCH.items() if key != "sample_ids"}
    numbered = BATCH | {"sample_ids": ["0", "1", "2", "3"]}
    halves = [rows_of(unnamed, [0, 1]), rows_of(unnamed, [2, 3])]
    assert relative_error(estimate(model, *halves).scores, estimate(model, numbered).scores) < 1e-5


def test_the_first_label_is_not_counted() -> None:
    batch = copy.deepcopy(BATCH)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    model = tiny_model("llama")
    fisher = estimate(model, batch)
    assert fisher.manifest["estimation"]["tokens"] == 21
    assert relative_error(fisher.scores, estimate(model).scores) < 1e-6


@pytest.mark.parametrize("estimator", ["token_signs", "per_token"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama+lora"])
def test_gradient_checkpointing_changes_nothing(kind: str, estimator: str) -> None:
    model = tiny_model(kind.partition("+")[0], attention_dropout=0.5)
    model = with_lora(model) if "lora" in kind else model
    expected = estimate(model, estimator=estimator)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = estimate(model, estimator=estimator)
    assert relative_error(found.scores, expected.scores) < 1e-6
    assert found.manifest["estimation"]["path"] == expected.manifest["estimation"]["path"]


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RPSAError, match="reentrant"):
        estimate(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_low_precision_weights_give_float32_scores(kind: str) -> None:
    model = tiny_model(kind).bfloat16()
    exact = exact_fisher(model, BATCH)
    for estimator, fields in (("token_signs", {"probes": 9}), ("per_token", {})):
        fisher = estimate(model, estimator=estimator, **fields)
        assert all(score.dtype == torch.float32 for score in fisher.scores.values())
        assert relative_error(fisher.scores, exact) < 0.05


def test_under_autocast() -> None:
    model = tiny_model("llama")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        fisher = estimate(model, probes=9)
    assert fisher.manifest["estimation"]["path"] == "hooked"
    assert 1e-6 < relative_error(fisher.scores, exact_fisher(model, BATCH)) < 0.05


def test_float64_weights() -> None:
    model = tiny_model("qwen2").double()
    assert relative_error(estimate(model, probes=9).scores, exact_fisher(model, BATCH)) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_scope_takes_a_part_and_leaves_the_rest(kind: str) -> None:
    model = tiny_model(kind)
    whole = estimate(model)
    part = estimate(model, scope=r"mlp\.(up|down)_proj")
    assert set(part.scores) == {n for n in whole.scores if "up_proj" in n or "down_proj" in n}
    assert part.manifest["estimation"]["path"] == "hooked"
    assert relative_error(part.scores, {n: whole.scores[n] for n in part.scores}) < 1e-5
    with pytest.raises(RPSAError, match="nothing_like_it"):
        estimate(model, scope="nothing_like_it")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_model_is_as_it_was(kind: str) -> None:
    model = tiny_model(kind)
    frozen = next(p for n, p in model.named_parameters() if "q_proj" in n)
    frozen.requires_grad_(False)
    norm = model.get_submodule("model.norm").weight
    norm.grad = torch.ones_like(norm)
    model.train()
    model.get_submodule("model.layers.1").eval()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        fisher = estimate(model)
    estimate(model, estimator="per_token")
    assert "model.layers.0.self_attn.q_proj.weight" not in fisher.scores
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert [p.grad is not None for p in model.parameters()] == [p is norm for p in model.parameters()]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def poisoned(kind: str) -> nn.Module:
    """A model whose log-probabilities are NaN after token 22, which BATCH does not have at these places."""
    model = tiny_model(kind)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = math.nan
    return model


@pytest.mark.parametrize("estimator", ["token_signs", "per_token"])
def test_a_sample_that_is_not_finite_is_left_out(estimator: str, caplog: pytest.LogCaptureFixture) -> None:
    batch = copy.deepcopy(BATCH)
    batch["input_ids"].clamp_(max=VOCABULARY - 2)
    batch["labels"].clamp_(max=VOCABULARY - 2)
    batch["input_ids"][1, 1] = VOCABULARY - 1
    model = poisoned("llama")
    with caplog.at_level(logging.WARNING):
        fisher = estimate(model, batch, estimator=estimator)
    assert fisher.manifest["estimation"]["skipped"] == ["problem-0-1"]
    assert fisher.manifest["estimation"]["samples"] == 3
    assert fisher.manifest["estimation"]["tokens"] == 17
    assert "problem-0-1" in caplog.text
    expected = estimate(model, rows_of(batch, [0, 2, 3]), estimator=estimator)
    assert relative_error(fisher.scores, expected.scores) < 1e-5
    with pytest.raises(RPSAError, match="problem-0-1"):
        estimate(model, batch, estimator=estimator, on_nonfinite="stop")
    with pytest.raises(RPSAError, match="no sample"):
        estimate(model, rows_of(batch, [1]), estimator=estimator)


class _InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient at token 22."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return gradient.masked_fill((tokens == VOCABULARY - 1)[..., None], math.inf), None


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gradient_that_is_not_finite_starts_again_without_the_sample(kind: str) -> None:
    model = tiny_model(kind)
    batch = copy.deepcopy(BATCH)
    batch["input_ids"].clamp_(max=VOCABULARY - 2)
    batch["labels"].clamp_(max=VOCABULARY - 2)
    for row in (0, 2):
        batch["input_ids"][row, 1] = VOCABULARY - 1
    model.get_submodule("model.embed_tokens").register_forward_hook(
        lambda module, inputs, output: _InfiniteGradient.apply(output, inputs[0])
    )
    fisher = estimate(model, rows_of(batch, [0, 1]), rows_of(batch, [2, 3]))
    assert fisher.manifest["estimation"]["skipped"] == ["problem-0-0", "problem-0-2"]
    expected = estimate(model, rows_of(batch, [1, 3]))
    assert relative_error(fisher.scores, expected.scores) < 1e-5
    with pytest.raises(RPSAError, match="problem-0-0"):
        estimate(model, batch, on_nonfinite="stop")


def test_mistakes_are_named() -> None:
    model = tiny_model("llama")
    mute = copy.deepcopy(BATCH)
    mute["labels"][2, 1:] = -100
    with pytest.raises(RPSAError, match="problem-0-2"):
        estimate(model, mute)
    with pytest.raises(RPSAError, match="left"):
        estimate(
            model,
            BATCH
            | {"attention_mask": ragged_batch([(3, 7), (2, 4), (5, 1), (1, 9)])["attention_mask"].flip(1)},
        )
    with pytest.raises(RPSAError, match="labels"):
        estimate(model, {k: v for k, v in BATCH.items() if k != "labels"})
    with pytest.raises(RPSAError, match="empty"):
        estimate_fisher(model, [])
    with pytest.raises(RPSAError, match="requires_grad"):
        estimate(copy.deepcopy(model).requires_grad_(False))
    for fields, message in (
        ({"estimator": "per_tokn"}, "per_token"),
        ({"probes": 0}, "probes"),
        ({"scope": "("}, "regular expression"),
        ({"on_nonfinite": "no"}, "skip"),
    ):
        with pytest.raises(RPSAError, match=message):
            FisherConfig(**fields)


def test_the_manifest_says_what_was_done() -> None:
    model = tiny_model("llama")
    manifest = estimate(model).manifest
    estimation = manifest["estimation"]
    assert estimation["estimator"] == "token_signs"
    assert (estimation["probes"], estimation["seed"]) == (4, 42)
    assert (estimation["samples"], estimation["tokens"], estimation["skipped"]) == (4, 21, [])
    assert estimation["path"] == "hooked"
    assert set(estimation["split_half"]) == {"0.01", "0.1", "0.5", "0.6"}
    assert manifest["adapter_fingerprint"] is None
    assert set(manifest["versions"]) >= {"torch", "rpsa"}
    assert estimate(with_lora(model)).manifest["adapter_fingerprint"]


# --- logits and labels ---

PROMPT_LEARNING: dict[str, Any] = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix projection": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
}


def with_prompt(name: str) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), PROMPT_LEARNING[name])
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


def fisher_by_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Eq. 4 by the model's own loss on one label at a time: where its logits lie is not our business."""
    model = copy.deepcopy(model).double().eval()
    parameters = trainable_parameters(model)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        places = [t for t in range(1, length) if labels[t] != -100]
        for t in places:
            label = torch.full((1, length), -100, device=ids.device)
            label[0, t] = labels[t]
            loss = model(input_ids=ids[None, :length], labels=label).loss
            for name, gradient in zip(
                parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True
            ):
                sums[name] += gradient.square() / len(places) / len(batch["labels"])
    return sums


@pytest.mark.parametrize("name", PROMPT_LEARNING)
def test_virtual_tokens_do_not_shift_the_labels(name: str) -> None:
    model = with_prompt(name)
    exact = fisher_by_loss(model, BATCH)
    assert relative_error(estimate(model, probes=9).scores, exact) < 1e-4
    assert relative_error(estimate(model, estimator="per_token").scores, exact) < 1e-4
    [samples] = read_samples([BATCH])
    loss = negative_log_likelihood(model.eval(), samples, DEVICE)
    found = torch.autograd.grad(loss, [*trainable_parameters(model).values()])
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask", "labels")}
    tokens = int((BATCH["labels"][:, 1:] != -100).sum())
    expected = torch.autograd.grad(model(**inputs).loss * tokens, [*trainable_parameters(model).values()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    """A causal language model with a position more, or less, than ids."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.model, self.more = tiny_model("llama"), more

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        first = output.logits[:, :1]
        output.logits = torch.cat([first, output.logits], 1) if self.more else output.logits[:, 1:]
        return output


class LooksAhead(Shifted):
    """Every token knows the last one, a little."""

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits + 0.01 * output.logits[:, -1:]
        return output


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MULTITASK = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2)
ROWS = "not one row a token"
NOT_ALIGNED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "reward": (lambda: transformers.LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)), ROWS),
    "classes": (lambda: transformers.LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=3)), "for 3"),
    "no head": (lambda: transformers.LlamaModel(LlamaConfig(**SIZES)), "has no logits"),
    "masked": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), "later tokens"),
    "looks ahead": (lambda: LooksAhead(more=True), "later tokens"),
    "encoder-decoder": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)), "encoder-decoder"
    ),
    "one more": (lambda: Shifted(more=True), ROWS),
    "one less": (lambda: Shifted(more=False), ROWS),
    "asks for more": (lambda: get_peft_model(tiny_model("llama"), MULTITASK), "task_ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_ALIGNED)
def test_logits_that_are_not_the_ids_are_refused(name: str) -> None:
    build, said = NOT_ALIGNED[name]
    torch.manual_seed(0)
    model = build()
    with pytest.raises(RPSAError, match=said) as error:
        estimate(model)
    assert "\n" not in str(error.value)
    with pytest.raises(RPSAError, match=said):
        warm_up(model, [BATCH], 1e-3)


# --- the pieces ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chunked_log_probs_equal_log_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsa.fisher.log_probs._CHUNK_ELEMENTS", 3 * 11)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(13, 11, generator=generator)).to(dtype).requires_grad_()
    rows, labels = torch.tensor([0, 3, 4, 5, 9, 11, 12]), torch.randint(11, (7,), generator=generator)
    weights = torch.randn(7, generator=generator)
    found = label_log_probs(logits, rows, labels)
    expected = logits.to(found.dtype)[rows].log_softmax(-1)[torch.arange(7), labels]
    torch.testing.assert_close(found, expected)
    seeds = weights.to(found.dtype)
    (gradient,) = torch.autograd.grad(found, logits, seeds)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits, seeds)[0])


def splitmix64(state: int) -> int:
    """The plain integer version."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 100_000))
def test_signs_follow_splitmix64(key: int, position: int) -> None:
    state = (key + position * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    expected = (splitmix64(state) & 1) * 2 - 1
    assert random_signs(torch.tensor([key]), torch.tensor([position])).tolist() == [expected]


def test_signs_are_balanced_and_independent() -> None:
    keys = torch.tensor([[sample_key(0, f"sample {i}")] for i in range(400)])
    signs = random_signs(keys.expand(400, 500), torch.arange(500).expand(400, 500))
    assert abs(float(signs.mean())) < 4 / math.sqrt(signs.numel())
    for lagged in (signs[:, 1:] * signs[:, :-1], signs[1:] * signs[:-1], signs[:, ::4] * signs[:, 1::4]):
        assert abs(float(lagged.mean())) < 4 / math.sqrt(lagged.numel())


def brute_force_overlap(first: list[float], second: list[float], k: float) -> float | None:
    n = sum(a > 0 or b > 0 for a, b in zip(first, second, strict=True))
    count = math.floor(Fraction(repr(k)) * n)
    if count == 0 or not any(first) or not any(second):
        return None
    tops = []
    for half in (first, second):
        last = sorted(half, reverse=True)[count - 1]
        tops.append({i for i, value in enumerate(half) if value >= last and value > 0})
    return len(tops[0] & tops[1]) / max(count, *map(len, tops))


@examples(200)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 2.5]) | st.floats(0, 1e3, width=32), st.floats(0, 10, width=32)),
        min_size=1,
    )
)
def test_overlap_equals_brute_force(pairs: list[tuple[float, float]]) -> None:
    first, second = map(list, zip(*pairs, strict=True))
    found = split_half_overlap(torch.tensor(first), torch.tensor(second), (0.1, 0.5, 0.6))
    assert found == {repr(k): brute_force_overlap(first, second, k) for k in (0.1, 0.5, 0.6)}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("sample_size", [None, 300])
def test_split_half_overlap_is_that_of_even_and_odd_samples(
    kind: str, sample_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind)
    if sample_size is not None:
        monkeypatch.setattr(SquaredGradients.__init__, "__defaults__", (sample_size,))
    fisher = estimate(model, rows_of(BATCH, [0]), rows_of(BATCH, [1, 2, 3]))
    even, odd = (estimate(model, rows_of(BATCH, rows)) for rows in ([0, 2], [1, 3]))
    names = list(fisher.scores)
    elements = sampled_elements([fisher.scores[n].numel() for n in names], 42, sample_size or 1 << 24)
    halves = [
        torch.cat(
            [
                h.scores[n].flatten().cpu()[slice(None) if e is None else e]
                for n, e in zip(names, elements, strict=True)
            ]
        )
        for h in (even, odd)
    ]
    expected = split_half_overlap(*halves)
    found = fisher.manifest["estimation"]["split_half"]
    assert found.keys() == expected.keys()
    for k, value in expected.items():  # rounding may swap neighbours
        assert value is not None
        assert found[k] == pytest.approx(value, abs=0.02)
    mean = {n: (even.scores[n] + odd.scores[n]) / 2 for n in names}
    assert relative_error(fisher.scores, mean) < 1e-5


def test_sampled_elements_are_uniform_and_within_bounds() -> None:
    sizes = [5, 0, 4000, 1, 6000]
    assert sampled_elements(sizes, 0, limit=10_006) == [None] * 5
    drawn = sampled_elements(sizes, 0, limit=1000)
    counts = [0 if d is None else len(d) for d in drawn]
    assert 900 < sum(counts) <= 1000
    assert counts[4] / counts[2] == pytest.approx(1.5, rel=0.2)
    for part, size in zip(drawn, sizes, strict=True):
        assert part is not None
        assert len(part.unique()) == len(part)
        assert all(0 <= i < size for i in part.tolist())
