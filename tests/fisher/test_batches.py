"""How a batch's squares are formed: each short cut against its slow and obvious form."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.devices import DEVICE
from helpers.fisher_models import ragged_batch, relative_error, rows_of, tiny_model, with_lora
from helpers.waits import Waits
from rpsa.errors import RPSAError
from rpsa.fisher import hooked
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import Estimation, FisherConfig, estimate_fisher
from rpsa.fisher.log_probs import evaluation_mode, is_low_precision
from rpsa.fisher.overlap import sampled_elements
from rpsa.fisher.probes import signed_probes
from rpsa.fisher.samples import read_samples
from rpsa.fisher.squares import SquaredGradients
from rpsa.parameters import trainable_parameters
from rpsa.pipeline.groundwork import _fisher_settings
from rpsa.recipe.sections import Fisher

pytestmark = pytest.mark.gpu

BATCH = ragged_batch([(3, 7), (2, 4), (5, 1), (1, 9)])


def estimate(model: nn.Module, *batches: dict[str, Any], **fields: Any) -> FisherDiagonal:
    return estimate_fisher(model, batches or [BATCH], FisherConfig(progress=False, **fields))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llama+lora"])
@pytest.mark.parametrize("probes", [1, 3])
def test_a_batch_waits_for_the_device_once(kind: str, probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SquaredGradients.__init__, "__defaults__", (300,))
    model = tiny_model(kind.removesuffix("+lora"), tie_word_embeddings=False)
    model = with_lora(model) if "lora" in kind else model
    [samples] = read_samples([BATCH])
    settings = FisherConfig(probes=probes, progress=False)
    estimation = Estimation(model, trainable_parameters(model), [samples], settings)
    with evaluation_mode(model), Waits() as forward:
        ids, mask = samples.input_ids.to(DEVICE), samples.attention_mask.to(DEVICE)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    with evaluation_mode(model):
        estimation._choose_path()
        batch = estimation._batch(samples.select([0, 2, 1, 3]))
        with estimation.installed(), Waits() as whole:
            assert estimation._add(batch)
    assert estimation.path == "hooked"
    assert whole.count - forward.count == 1


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 2, 3)])
def test_an_embeddings_gradients_by_token(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, delta = torch.randint(0, 4, shape), torch.randn(*shape, 6)
    tokens, gradients = (part.cpu() for part in hooked._gradients_by_token(x.to(DEVICE), delta.to(DEVICE)))
    expected = torch.zeros(7, 6)
    for row, its_delta in zip(x, delta, strict=True):
        gradient = torch.zeros(7, 6)
        for token, part in zip(row.flatten().tolist(), its_delta.reshape(-1, 6), strict=True):
            gradient[token] += part
        expected += gradient.square()
    torch.testing.assert_close(torch.zeros(7, 6).index_add_(0, tokens, gradients.square()), expected)


@pytest.mark.parametrize(
    ("block", "stack"), [(1 << 19, 1 << 18), (1, 0), (40, 0)], ids=["stacked", "by outputs", "in blocks"]
)
def test_a_linear_layers_gradient_may_come_in_pieces(
    block: int, stack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    expected = estimate(model, probes=2)
    monkeypatch.setattr(hooked, "_CPU_BLOCK", block)
    monkeypatch.setattr(hooked, "_CPU_STACK", stack)
    found = estimate(model, probes=2)
    assert found.manifest["estimation"]["path"] == "hooked"
    assert relative_error(found.scores, expected.scores) < 1e-6


class OwnShape(nn.Module):
    """A norm whose code takes a weight of its own shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (6,), self.weight)


class Flat(OwnShape):
    """A norm that flattens what it gets, and would take a wider weight in silence."""

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.normalize(x, dim=-1).flatten(0, -2) * self.weight).view_as(x)


class Heads(OwnShape):
    """A norm with a weight for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 12).view(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * self.weight


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 5, 2, 6), (2, 1, 2, 6)])
@pytest.mark.parametrize(
    "norm", [LlamaRMSNorm(6), OwnShape(), Flat(), Heads(), nn.LayerNorm(6), nn.RMSNorm(6)],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_a_norms_gradients_for_each_row(norm: nn.Module, shape: tuple[int, ...]) -> None:
    if isinstance(norm, Heads) and len(shape) == 3:
        pytest.skip("it wants heads")
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    norm.to(DEVICE)
    names = [name for name, _ in norm.named_parameters()]
    x, delta = torch.randn(shape).to(DEVICE), torch.randn(shape).to(DEVICE)
    found = hooked._gradients_by_row(norm, names, x, delta)
    for row in range(len(x)):
        expected = torch.autograd.grad(norm(x[row : row + 1]), list(norm.parameters()), delta[row : row + 1])
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][row], gradient)


def test_hugging_faces_norms_need_no_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooked, "_gradients_by_vmap", None)
    assert estimate(tiny_model("llama")).manifest["estimation"]["path"] == "hooked"


def test_a_cut_keeps_the_start_of_the_response() -> None:
    [samples] = read_samples([BATCH])
    cut = samples.select([0]).cut(2)
    assert cut.input_ids.tolist() == samples.input_ids[:1, :5].tolist()
    assert cut.responses().positions.tolist() == [3, 4]
    assert samples.select([2]).cut(9).input_ids.shape == (1, 6)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_every_response_token_is_in_one_probe(count: int) -> None:
    [samples] = read_samples([BATCH])
    responses = samples.responses()
    found = signed_probes(samples, responses, count, seed=42)
    assert len(found) == min(count, 9)
    tokens = torch.cat([probe.tokens for probe in found])
    assert tokens.sort().values.tolist() == list(range(21))
    for group, probe in enumerate(found):
        assert set((responses.ranks[probe.tokens] % count).tolist()) == {group}
        lengths = responses.lengths[responses.rows[probe.tokens]]
        torch.testing.assert_close(probe.weights.square(), 1 / lengths)


def test_sampled_elements_of_the_halves_are_read_from_the_sums() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(40, 5)), "b": nn.Parameter(torch.zeros(7))}
    squares = SquaredGradients(parameters, 0, 50)
    generator = torch.Generator().manual_seed(0)
    expected = {name: torch.zeros(2, *p.shape) for name, p in parameters.items()}
    for halves in ([0, 0, 1], [1, 1], [0], [0, 1]):
        squares.begin(halves)
        for _ in range(2):  # passes
            for name, parameter in parameters.items():
                for group, rows in enumerate(squares.groups):
                    half = halves[rows.start]
                    assert set(halves[rows]) == {half}
                    for _ in halves[rows]:
                        gradient = torch.randn(parameter.shape, generator=generator)
                        gradient[half::2] = 0  # elements that one half alone has
                        squares.add(name, group, gradient)
                        expected[name][half] += gradient.square()
                    squares.look(name, group)
    drawn = sampled_elements([200, 7], 0, 50)
    for half, found in enumerate(squares.sampled_halves()):
        wanted = torch.cat(
            [e[half].flatten()[d] for e, d in zip(expected.values(), drawn, strict=True) if d is not None]
        )
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found == 0, wanted == 0)


def test_sums_beyond_float32_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SquaredGradients, "is_finite", lambda self: torch.tensor(False))
    with pytest.raises(RPSAError, match="too large for float32"):
        estimate(tiny_model("llama"))


# --- precision ---


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_bf16_is_autocast_with_float32_sums(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(kind)
    expected = estimate(model)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        by_autocast = estimate(model)
    with caplog.at_level(logging.INFO, logger="rpsa"):
        found = estimate(model, precision="bf16")
    assert all(score.dtype == torch.float32 for score in found.scores.values())
    assert relative_error(found.scores, by_autocast.scores) < 1e-6
    assert 1e-6 < relative_error(found.scores, expected.scores) < 0.05
    said = found.manifest["estimation"]
    assert said["precision"] == "bf16"
    assert said["path"] == expected.manifest["estimation"]["path"]
    assert 0.8 < said["overlap_with_fp32"]["0.6"] <= 1
    assert "overlap_with_fp32" in caplog.text
    assert "overlap_with_fp32" not in expected.manifest["estimation"]


def test_the_overlap_with_fp32_leaves_nothing_in_the_sums() -> None:
    model = tiny_model("llama")
    both = [estimate(model, rows_of(BATCH, rows), precision="bf16").scores for rows in ([0, 1], [2, 3])]
    mean = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
    assert relative_error(estimate(model, precision="bf16").scores, mean) < 0.01


@pytest.fixture
def ways() -> Iterator[list[Any]]:
    """Of torch to say how float32 matrices are multiplied."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch < 2.9 has one way")
    every = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [way.fp32_precision for way in every]
    yield every
    for way, precision in zip(every, before, strict=True):
        way.fp32_precision = precision


@pytest.mark.parametrize("said", ["tf32", "ieee"])
def test_a_trainers_tf32_is_no_obstacle_and_stays(said: str, ways: list[Any]) -> None:
    """transformers says it in the new way, after which torch refuses to be asked in the old one."""
    for way, precision in zip(ways, [said, "none", "none"], strict=True):
        way.fp32_precision = precision
    model = tiny_model("llama")
    assert is_low_precision(model, torch.device("cuda")) == (said == "tf32")
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    estimate(model)
    assert set(seen) == {"highest"}
    assert {way.fp32_precision for way in ways} == {said}
    assert is_low_precision(model, torch.device("cuda")) == (said == "tf32")


def test_tf32_needs_cuda() -> None:
    with pytest.raises(RPSAError, match="only CUDA has") as error:
        estimate(tiny_model("llama"), precision="tf32")
    assert "\n" not in str(error.value)


def test_a_callers_tf32_is_off_meanwhile_and_back_afterwards() -> None:
    model = tiny_model("llama")
    seen = set()
    model.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        estimate(model)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"highest"}


def test_a_precision_must_be_known() -> None:
    with pytest.raises(RPSAError, match="bf16"):
        FisherConfig(precision="fp16")  # type: ignore[arg-type]


def test_a_default_precision_leaves_the_identity_of_earlier_runs() -> None:
    assert "precision" not in _fisher_settings(Fisher())
    assert _fisher_settings(Fisher(precision="bf16"))["precision"] == "bf16"
