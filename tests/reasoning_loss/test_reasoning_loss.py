"""Reasoning loss: against a slow reference, with adapters, over ranks; nothing of the model or of chance is changed."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.devices import DEVICE
from helpers.fisher_models import tiny_model, with_lora
from helpers.rank_runs import reference
from helpers.ranks import run_ranks
from helpers.sharded import shard
from rpsa.errors import RPSAError
from rpsa.reasoning_loss import RecordedOriginal, reasoning_loss, record_original
from rpsa.reference import ReferenceDataset, Trace

pytestmark = pytest.mark.gpu

TRACES = reference()


def moved(model: nn.Module, by: float = 0.1) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))
    return other


def slow_losses(
    model: Any, before: Any, trace: Trace, max_length: int | None, top: int | None
) -> tuple[float, float]:
    """Token means of NLL and KL in float64; what is not among the original's `top` tokens counts as one."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.response_ids][:max_length]], device=DEVICE)
    q, p = (
        m.double().eval()(ids).logits[0, len(trace.prompt_ids) - 1 : -1].softmax(-1) for m in (model, before)
    )
    nll = -q.gather(1, ids[0, len(trace.prompt_ids) :, None]).log().mean()
    if top is not None:
        kept = p.topk(top).indices
        p, q = (torch.cat([m.gather(1, kept), 1 - m.gather(1, kept).sum(1, keepdim=True)], 1) for m in (p, q))
    return float(nll), float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("top", "max_length"), [(None, None), (5, None), (None, 8)])
def test_nll_and_kl_are_those_of_a_slow_reference(kind: str, top: int | None, max_length: int | None) -> None:
    before = tiny_model(kind)
    model = moved(before)
    original = record_original(before, TRACES, max_length, top)
    found = reasoning_loss(model, TRACES, max_length, original)
    by_id = {trace.problem_id: trace for trace in TRACES.traces}
    slow = (copy.deepcopy(model), copy.deepcopy(before))
    expected = [slow_losses(*slow, by_id[one.problem_id], max_length, top) for one in found.traces]
    for one, (nll, kl) in zip(found.traces, expected, strict=True):
        assert one.nll == pytest.approx(nll, abs=1e-6)
        assert one.kl == pytest.approx(kl, abs=1e-6)
        assert kl > 1e-3
    tokens = [min(len(t.response_ids), (max_length or 99) - len(t.prompt_ids)) for t in TRACES.traces]
    assert found.tokens == sum(tokens) == sum(one.tokens for one in found.traces)
    # the mean is over tokens, not over traces
    weights = [one.tokens / found.tokens for one in found.traces]
    assert found.nll == pytest.approx(
        sum(w * nll for w, (nll, _) in zip(weights, expected, strict=True)), abs=1e-6
    )
    assert found.kl == pytest.approx(
        sum(w * kl for w, (_, kl) in zip(weights, expected, strict=True)), abs=1e-6
    )


def test_the_original_is_0_away_from_itself_and_has_no_kl_unless_it_was_recorded() -> None:
    model = tiny_model("qwen2")
    assert reasoning_loss(model, TRACES, None, record_original(model, TRACES, None, 4)).kl == 0
    assert reasoning_loss(model, TRACES, None).kl is None


def test_a_recorded_original_is_read_back_for_its_own_traces_alone(tmp_path: Path) -> None:
    model = moved(tiny_model("llama"))
    original = record_original(tiny_model("llama"), TRACES, None)
    path = tmp_path / "original.safetensors"
    original.save(path)
    read = RecordedOriginal.load(path, TRACES, None)
    assert read is not None
    assert reasoning_loss(model, TRACES, None, read) == reasoning_loss(model, TRACES, None, original)
    assert RecordedOriginal.load(path, TRACES, 8) is None
    fewer = ReferenceDataset(TRACES.traces[:-1])
    assert RecordedOriginal.load(path, fewer, None) is None
    assert RecordedOriginal.load(tmp_path / "none", TRACES, None) is None
    path.write_bytes(path.read_bytes()[:100])
    assert RecordedOriginal.load(path, TRACES, None) is None
    with pytest.raises(RPSAError, match="recorded on other traces"):
        reasoning_loss(model, fewer, None, original)
    with pytest.raises(RPSAError, match="vocabulary of 23 tokens, and the model one of 30"):
        reasoning_loss(tiny_model("llama", vocab_size=30), TRACES, None, original)
    with pytest.raises(RPSAError, match="the model embeds 9"):
        reasoning_loss(tiny_model("llama", vocab_size=9), TRACES, None)


def test_an_adapter_is_no_part_of_the_original_and_keeps_its_gradients() -> None:
    base = tiny_model("llama")
    model = with_lora(copy.deepcopy(base))  # B is not 0: as after a warm-up
    model.train()
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    chance = torch.get_rng_state()
    original = record_original(model, TRACES, None, None)
    found = reasoning_loss(model, TRACES, None, original)
    assert torch.equal(torch.get_rng_state(), chance)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())
    assert torch.equal(original.logits.logits_NK, record_original(base, TRACES, None, None).logits.logits_NK)
    assert found.kl is not None
    assert found.kl > 1e-3


def sharded_losses(kind: str) -> Any:
    """On each rank; one process has the whole model."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    base = tiny_model(kind.partition("+")[0]).double()
    model: Any = with_lora(base).double() if "+" in kind else base
    if torch.distributed.is_initialized():
        model = shard(model)
    original = record_original(model, TRACES, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = reasoning_loss(model, TRACES, None, original)
    # a step afterwards: gathered weights are given up, and gradients come as if nothing had been
    ids = torch.arange(2, 12)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    has_gradient = sorted(name for name, p in model.named_parameters() if p.grad is not None)
    return found, has_gradient


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama+lora"])
def test_two_ranks_with_a_sharded_model_agree_with_one(kind: str, tmp_path: Path) -> None:
    [(alone, gradients)] = run_ranks(1, sharded_losses, tmp_path / "one", kind)
    first, second = run_ranks(2, sharded_losses, tmp_path / "two", kind)
    assert first == second
    assert first[1] == gradients
    assert gradients
    assert first[0].nll == pytest.approx(alone.nll, abs=1e-6)
    assert first[0].kl == pytest.approx(alone.kl, abs=1e-6)
    assert alone.kl > 1e-4
