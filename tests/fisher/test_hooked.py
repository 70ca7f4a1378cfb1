"""The hooked path gives the loop's numbers, and steps aside where it cannot."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.devices import DEVICE
from helpers.fisher_models import exact_fisher, ragged_batch, relative_error, tiny_model, with_lora
from rpsa.fisher import estimators
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.fisher.hooked import NotHookable
from rpsa.fisher.log_probs import evaluation_mode

pytestmark = pytest.mark.gpu

BATCHES = [ragged_batch([(3, 7), (2, 4), (5, 1)]), ragged_batch([(1, 9), (4, 4)], seed=1)]


def estimate(model: nn.Module, **settings: Any) -> FisherDiagonal:
    return estimate_fisher(model, BATCHES, FisherConfig(progress=False, **settings))


def estimate_by_loop(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> FisherDiagonal:
    def refuse(*args: object) -> None:
        raise NotHookable("the test asks for the loop")

    with monkeypatch.context() as patch:
        patch.setattr(estimators, "Hooks", refuse)
        fisher = estimate(model, **settings)
    assert fisher.manifest["estimation"]["path"] == "loop"
    return fisher


def assert_same_by_hooks(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    expected = estimate_by_loop(model, monkeypatch, **settings)
    found = estimate(model, **settings)
    assert found.manifest["estimation"]["path"] == "hooked"
    assert relative_error(found.scores, expected.scores) < 1e-5
    for name, score in expected.scores.items():  # small parameters are not to hide behind large ones
        torch.testing.assert_close(found.scores[name], score, rtol=1e-3, atol=1e-5 * float(score.max()))


@pytest.mark.parametrize("estimator", ["token_signs", "per_sequence"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_lora", [False, True])
def test_hooks_equal_the_loop(
    kind: str, is_lora: bool, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind, tie_word_embeddings=False)
    model = with_lora(model) if is_lora else model
    assert_same_by_hooks(model, monkeypatch, estimator=estimator, probes=2)


def test_the_sampled_part_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 2^20 elements full sums and sampled halves are kept apart, in the embedding by rows."""
    monkeypatch.setattr("rpsa.fisher.squares.SquaredGradients.__init__.__defaults__", (1000,))
    model = tiny_model("llama")
    assert_same_by_hooks(model, monkeypatch)
    expected = estimate_by_loop(model, monkeypatch).manifest["estimation"]["split_half"]
    found = estimate(model).manifest["estimation"]["split_half"]
    assert found == {k: pytest.approx(value, abs=0.02) for k, value in expected.items()}


class Toy(nn.Module):
    """The shape of a causal language model around pieces of one's choice."""

    def __init__(self, *pieces: nn.Module, embedding: nn.Module | None = None, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(23, width) if embedding is None else embedding
        self.pieces = nn.ModuleList(pieces)
        self.head = nn.Linear(width, 23)
        self.to(DEVICE)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for piece in self.pieces:
            x = x + piece(x).cumsum(1)
        return SimpleNamespace(logits=self.head(x))


class InPlace(nn.Module):
    """Changes the output of a linear layer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mul_(3).relu_()


class GemmaRMSNorm(nn.Module):
    """Scales by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Heads(nn.Module):
    """A linear layer on a (B, T, heads, width) tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.unflatten(-1, (2, 3))).tanh().flatten(-2)


def perturbed(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=1.0)
    return module


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), GemmaRMSNorm()])
def test_norms_under_autocast(norm: nn.Module) -> None:
    model = Toy(nn.Sequential(nn.Linear(6, 6), perturbed(norm), nn.Linear(6, 6)))
    expected = estimate(model)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = estimate(model)
    assert found.manifest["estimation"]["path"] == "hooked"
    assert 1e-6 < relative_error(found.scores, expected.scores) < 0.05


@pytest.mark.parametrize(
    "piece",
    [
        perturbed(nn.LayerNorm(6)),
        perturbed(nn.RMSNorm(6)),
        GemmaRMSNorm(),
        Heads(),
        InPlace(),
        nn.Linear(6, 6, bias=False),
        nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)),
    ],
    ids=lambda piece: type(piece).__name__,
)
def test_each_kind_of_module(piece: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_by_hooks(Toy(piece), monkeypatch, probes=2)


def test_the_padding_row_of_an_embedding_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    token = int(BATCHES[0]["input_ids"][0, 5])
    model = Toy(embedding=nn.Embedding(23, 6, padding_idx=token))
    assert_same_by_hooks(model, monkeypatch)
    assert not estimate(model).scores["embedding.weight"][token].any()


def test_a_hook_of_the_user_on_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy(nn.Linear(6, 6))
    model.pieces[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    assert_same_by_hooks(model, monkeypatch)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).tanh())


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)).view(x.shape).tanh()


class Functional(nn.Module):
    """Uses a linear layer's weight without calling it, and once more by calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.linear(x).tanh(), self.linear.weight)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 6**0.5


def tied() -> nn.Module:
    model = Toy()
    model.head.weight = model.embedding.weight
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tied(), "shares its weight"),
        (Toy(Twice()), "called twice"),
        (Toy(Flattened()), "first dimension"),
        (Toy(Functional()), "outside of its module"),
        (Toy(Unknown()), "is a Unknown"),
        (Toy(embedding=ScaledEmbedding(23, 6)), "is a ScaledEmbedding"),
        (Toy(embedding=nn.Embedding(23, 6, sparse=True)), "is a Embedding"),
    ],
    ids=["tied", "twice", "flattened", "functional", "unknown", "subclass", "sparse"],
)
def test_the_loop_takes_the_rest(model: nn.Module, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rpsa"):
        fisher = estimate(model, probes=9)
    assert fisher.manifest["estimation"]["path"] == "loop"
    assert reason in caplog.text
    exact = [exact_fisher(model, batch) for batch in BATCHES]
    expected = {n: (3 * exact[0][n] + 2 * exact[1][n]) / 5 for n in exact[0]}
    assert relative_error(fisher.scores, expected) < 1e-5


def test_a_weight_used_outside_of_its_module_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rpsa"):
        estimate(Toy(Functional()))
    assert "pieces.0.linear.weight" in caplog.text


class SometimesTwice(Twice):
    """Calls its linear layer a second time on batches of more than one row, which the first check cannot see."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.linear(y) if len(x) > 1 else y


def test_a_surprise_in_a_later_batch_starts_again_with_the_loop() -> None:
    model = Toy(SometimesTwice())
    fisher = estimate(model, probes=9)
    assert fisher.manifest["estimation"]["path"] == "loop"
    exact = [exact_fisher(model, batch) for batch in BATCHES]
    expected = {n: (3 * exact[0][n] + 2 * exact[1][n]) / 5 for n in exact[0]}
    assert relative_error(fisher.scores, expected) < 1e-5


def test_modules_that_sit_out_have_no_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    model.spare = nn.Linear(6, 6)
    assert_same_by_hooks(model, monkeypatch)
    assert not estimate(model).scores["spare.weight"].any()


def test_hooks_and_flags_are_gone_after_an_error() -> None:
    model = tiny_model("llama")

    def fail(module: nn.Module, inputs: object) -> None:
        raise KeyError("boom")

    handle = model.get_submodule("model.norm").register_forward_pre_hook(fail)
    model.train()
    with pytest.raises(KeyError):
        estimate(model)
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_mode_has_no_dropout_and_still_recomputes(was_training: bool) -> None:
    model = tiny_model("llama", attention_dropout=0.9)
    inputs = {key: BATCHES[0][key] for key in ("input_ids", "attention_mask")}
    expected = model.eval()(**inputs, use_cache=False).logits
    expected.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(was_training)
    calls = []
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    before = [m.training for m in model.modules()]
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    with evaluation_mode(model):
        found = model(**inputs, use_cache=False).logits
        assert calls == [False]
        found.sum().backward()
    assert calls == [False, False]  # once forward, once recomputed
    torch.testing.assert_close(found, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert [m.training for m in model.modules()] == before
    assert [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()] == functions


def test_dropout_in_a_checkpointed_layer_itself_is_off() -> None:
    """OPT's layer reads its own training flag, the one that switches checkpointing on."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=23,
        hidden_size=8,
        ffn_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=8,
        dropout=0.9,
        layerdrop=0.9,
    )
    model = OPTForCausalLM(config).eval().to(DEVICE)
    inputs = {key: BATCHES[0][key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs, use_cache=False).logits
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with evaluation_mode(model):
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected)


def test_hooks_form_no_parameter_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight-gradient products are left to the hooks: autograd's own would double their cost."""
    model = tiny_model("llama")
    seen: set[bool] = set()
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda module, _: seen.add(module.weight.requires_grad)
    )
    estimate(model)
    assert seen == {True, False}  # the loop once, for the check, then the hooks
