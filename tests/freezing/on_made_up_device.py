"""A second device without a GPU: fake tensors say that they are there, and refuse to meet those of the host.

Nothing is computed, so that this goes as far as no value is asked for; `make gpu` does the rest. The device is one that
torch lets a program make up: of CUDA itself a torch without CUDA cannot even fake an index. It is made up for the whole
process, and other libraries would take it for a GPU, so that `test_made_up_device.py` runs this file in one of its own.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.fisher_models import random_model
from rpsa.divergence import OriginalLogits, forward_kl
from rpsa.fisher.footprint import dry_passes
from rpsa.fisher.quantile import Ranking
from rpsa.freezing.audit import checksums
from rpsa.freezing.bits import BitMask
from rpsa.freezing.conflict import opposed, signs
from rpsa.freezing.exact import ExactSteps, RawSecondMoments
from rpsa.freezing.freezer import GradientWatch
from rpsa.parameters import trainable_parameters

backends = pytest.importorskip("torch.utils.backend_registration")
if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch knows no made-up device", allow_module_level=True)
backends._setup_privateuseone_for_python_backend("made_up")
torch.made_up.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
torch.made_up.is_available = lambda: False  # type: ignore[attr-defined]  # else fake tensors try to be there
GPU = torch.device("made_up:0")
OPTIMIZERS: dict[str, Any] = {
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a fake tensor is not exchanged for another, as Module.to does
    try:
        with torch.device(GPU):
            model = random_model(kind)
    finally:
        torch.set_default_dtype(before)
    assert {p.device for p in model.parameters()} == {GPU}
    return model


def with_gradients(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    parameters = trainable_parameters(on_gpu("llama", dtype))
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    return parameters


def masks(parameters: dict[str, nn.Parameter]) -> dict[str, BitMask]:
    return {name: BitMask.compare(p.detach(), "greater", 0.0) for name, p in parameters.items()}


def test_the_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=GPU) + torch.ones(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_fisher_by_loop_and_by_hooks(kind: str, dtype: torch.dtype) -> None:
    model = on_gpu(kind, dtype)
    ways = []
    for dry_pass in dry_passes(model, sequences=3, tokens=9, probes=2):
        dry_pass.run()
        ways.append(dry_pass.path)
        assert {total.device for total in dry_pass.held} == {GPU}
    assert ways == (["loop", "hooked"] if kind == "llama" else ["loop"]), "tied weights take the loop"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_step(name: str, dtype: torch.dtype) -> None:
    parameters = with_gradients(dtype)
    frozen = masks(parameters)
    optimizer = OPTIMIZERS[name](parameters.values())
    steps = ExactSteps(optimizer, parameters, lambda: frozen, lambda _: None)
    for _ in range(2):
        optimizer.step()
        steps.mask_changed({}, frozen)
    assert {bits.packed.device for bits in frozen.values()} == {GPU}


def test_masked_gradients_conflict_audit_and_raw_moments() -> None:
    parameters = with_gradients()
    gradients: dict[str, Tensor | None] = {name: p.grad for name, p in parameters.items()}
    frozen = masks(parameters)
    assert opposed(signs(gradients, frozen), gradients).device == GPU
    for name, parameter in parameters.items():
        frozen[name].clear_(parameter.grad)  # type: ignore[arg-type]
        assert checksums(parameter.detach(), frozen[name], frozen[name]).device == GPU
        assert frozen[name].unpack().device == GPU
    raw = RawSecondMoments(parameters)
    optimizer = torch.optim.AdamW(parameters.values())
    raw.keep(gradients, frozen)
    optimizer.step()
    raw.add(optimizer)
    assert raw.norm.device == GPU


def test_norms_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientWatch, "_say", lambda self: None)  # which reads values
    parameters = with_gradients(torch.bfloat16)
    watch = GradientWatch(list(parameters), GPU)
    watch.see({name: p.grad for name, p in parameters.items()}, step=1)
    assert watch.norm.device == GPU
    assert watch._host.device.type == "cpu"


def test_histograms_of_scores_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsa.fisher.quantile._count_nonzero", lambda blocks: len(list(blocks)))
    ranking = Ranking([torch.rand(100), torch.rand(7).bfloat16()], device=GPU)
    assert ranking._histogram(lambda bits: bits >> 16).device == GPU


def test_divergence_from_a_record_of_the_host() -> None:
    rows = torch.arange(3, device=GPU)
    record = OriginalLogits.of(torch.randn(5, 11, device=GPU), rows, 4).to("cpu")
    logits = torch.randn(5, 11, device=GPU, requires_grad=True)
    forward_kl(record.to(GPU), logits, rows).sum().backward()
    assert logits.grad is not None
    assert logits.grad.device == GPU
