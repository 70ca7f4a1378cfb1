"""Compact training is exact freezing with less: same weights, nothing that could move a frozen element."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from helpers.devices import DEVICE
from helpers.freezing_models import GrowingRatio, audited, forward_backward, make_fisher, make_model
from helpers.waits import Waits
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.bits import BitMask, know_counts
from rpsa.freezing.compact import CompactFreezer
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio
from rpsa.parameters import trainable_parameters

pytestmark = pytest.mark.gpu

LARGE: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, **LARGE, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, **LARGE, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, **LARGE, fused=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, **LARGE, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, **LARGE),
    "sgd": lambda p: torch.optim.SGD(p, **LARGE),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, **LARGE, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, **LARGE, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, **LARGE),
    "nadam": lambda p: torch.optim.NAdam(p, **LARGE),
}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases without decay, as trainers have them."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def run(
    kind: type[Freezer],
    optimizer: str,
    *,
    steps: int = 7,
    max_norm: float | None = None,
    accumulation: int = 1,
    dtype: torch.dtype = torch.float32,
    ratio: Any = None,
) -> tuple[dict[str, Tensor], Freezer, Optimizer]:
    model = make_model(dtype)
    freezer = kind(model, make_fisher(model), ratio or ConstantRatio(0.6))
    opt = OPTIMIZERS[optimizer](groups(model))
    freezer.attach(opt)
    for step in range(steps):
        if freezer.reference_due:
            forward_backward(model, 1000 + step)
            freezer.capture_reference()
        for micro in range(accumulation):
            forward_backward(model, 10 * step + micro, 1 / accumulation)
        freezer.mask_gradients()
        if max_norm is not None:
            freezer.clip_grad_norm_(max_norm)
        opt.step()
        opt.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, freezer, opt


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_trains_what_exact_freezing_trains_bit_for_bit(optimizer: str, accumulation: int) -> None:
    exact, *_ = run(Freezer, optimizer, accumulation=accumulation)
    compact, freezer, _ = run(CompactFreezer, optimizer, accumulation=accumulation)
    assert freezer.step == 7
    for name in exact:
        # torch's fused loop for CPUs rounds a tensor's last elements, those short of a full vector, in another way
        close = 1e-6 if optimizer == "adamw_fused" else 0.0
        torch.testing.assert_close(compact[name], exact[name], rtol=close, atol=close)


@pytest.mark.parametrize("optimizer", ["adamw_foreach", "sgd_nesterov"])
def test_with_clipping_it_differs_by_the_order_of_a_sum(optimizer: str) -> None:
    exact, *_ = run(Freezer, optimizer, max_norm=0.1)
    compact, *_ = run(CompactFreezer, optimizer, max_norm=0.1)
    for name in exact:
        torch.testing.assert_close(exact[name], compact[name], rtol=1e-6, atol=1e-6)


def test_its_optimizer_holds_the_trainable_elements_alone() -> None:
    _, freezer, opt = run(CompactFreezer, "adamw")
    held = [p for group in opt.param_groups for p in group["params"]]
    trainable = sum(int((~freezer.frozen(name)).sum()) for name in freezer.parameters)
    assert sum(p.numel() for p in held) == trainable
    assert sum(opt.state[p]["exp_avg"].numel() for p in held) == trainable
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert all(p.grad is None for p in freezer.parameters.values())


def test_a_gradient_is_freed_as_soon_as_it_is_complete() -> None:
    model = make_model()
    freezer = CompactFreezer(model, make_fisher(model), ConstantRatio(0.6))
    freezer.attach(torch.optim.AdamW(model.parameters()))
    seen = []
    last = model[3].weight
    first = model[0].weight
    first.register_post_accumulate_grad_hook(lambda _: seen.append(last.grad))
    forward_backward(model, 1)
    assert seen == [None]
    assert freezer.masters["3.weight"].grad is not None


def test_bf16_weights_have_masters_in_fp32() -> None:
    """Frozen elements keep their bits; the rest is an fp32 training's, rounded."""
    start = {n: p.detach().clone() for n, p in make_model(torch.bfloat16).named_parameters()}
    weights, freezer, _ = run(CompactFreezer, "adamw", dtype=torch.bfloat16, steps=1)
    assert isinstance(freezer, CompactFreezer)
    for name, weight in weights.items():
        frozen = freezer.frozen(name)
        assert torch.equal(weight[frozen], start[name][frozen])
        master = freezer.masters[name].detach()
        assert master.dtype == torch.float32
        assert torch.equal(weight[~frozen], master.bfloat16())
    assert any(not torch.equal(m.detach().bfloat16().float(), m) for m in freezer.masters.values())


def test_small_updates_add_up_in_the_masters_of_bf16_weights() -> None:
    model = make_model(torch.bfloat16)
    freezer = CompactFreezer(model, make_fisher(model), ConstantRatio(0.5))
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    freezer.attach(opt)
    before = model[1].weight.detach().clone()
    for _ in range(1000):  # each of them less than half a unit in the last place
        model[1].weight.grad = torch.full_like(model[1].weight, 1e-5)
        freezer.mask_gradients()
        opt.step()
    moved = (before.float() - model[1].weight.float())[~freezer.frozen("1.weight")]
    assert moved.mean().item() == pytest.approx(1e-2, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_frozen_element_moves_where_k_changes(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    freezer = CompactFreezer(model, make_fisher(model), GrowingRatio())
    opt = OPTIMIZERS["adamw"](model.parameters())
    freezer.attach(opt)
    report, ks = audited(model, freezer, opt)
    assert len(set(ks)) == 3
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 400


def test_what_thaws_starts_with_moments_of_zero_and_what_stays_keeps_them() -> None:
    model = make_model()
    fisher = make_fisher(model)
    freezer = CompactFreezer(model, fisher, ConflictRatio(window=9, every=3))
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    freezer.attach(opt)
    for step in range(2):
        forward_backward(model, step)
        freezer.mask_gradients()
        opt.step()
        opt.zero_grad()
    before = freezer.frozen("1.weight")
    old = {"exp_avg": torch.zeros(before.shape, device=DEVICE), "master": model[1].weight.detach().clone()}
    old["exp_avg"][~before] = opt.state[freezer.masters["1.weight"]]["exp_avg"]
    old["master"][~before] = freezer.masters["1.weight"].detach()
    for k in (0.8, 0.2):
        freezer._set_ratio(k)
    now = freezer.frozen("1.weight")
    state = opt.state[freezer.masters["1.weight"]]
    stayed = ~before & ~freezer_mask(fisher, 0.8)["1.weight"]
    expected = torch.where(stayed, old["exp_avg"], 0.0)[~now]
    assert torch.equal(state["exp_avg"], expected)
    assert torch.equal(freezer.masters["1.weight"].detach(), old["master"][~now])
    assert int(state["step"]) == 2


def freezer_mask(fisher: FisherDiagonal, k: float) -> dict[str, Tensor]:
    return {name: ~trainable.to(DEVICE) for name, trainable in fisher.mask(k).items()}


@pytest.mark.parametrize("ratio", ["constant", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_continues_bit_for_bit(dtype: torch.dtype, ratio: str) -> None:
    def start() -> tuple[nn.Module, CompactFreezer, Optimizer]:
        model = make_model(dtype)
        rule: Any = ConstantRatio(0.6) if ratio == "constant" else ConflictRatio(window=1, every=2)
        freezer = CompactFreezer(model, make_fisher(model), rule)
        opt = OPTIMIZERS["adamw_foreach"](groups(model))
        freezer.attach(opt)
        return model, freezer, opt

    def steps(parts: tuple[nn.Module, CompactFreezer, Optimizer], count: int) -> None:
        model, freezer, opt = parts
        for _ in range(count):
            step = freezer.step
            if freezer.reference_due:
                forward_backward(model, 1000 + step)
                freezer.capture_reference()
            forward_backward(model, step)
            freezer.mask_gradients()
            opt.step()
            opt.zero_grad()

    whole, first = start(), start()
    steps(whole, 9)
    steps(first, 5)
    saved = copy.deepcopy((first[0].state_dict(), first[2].state_dict(), first[1].state_dict()))
    resumed = start()
    resumed[0].load_state_dict(saved[0])
    resumed[2].load_state_dict(saved[1])
    resumed[1].load_state_dict(saved[2])
    steps(resumed, 4)
    assert resumed[1].frozen_ratio == whole[1].frozen_ratio
    for a, b in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(a, b)
    for name, master in whole[1].masters.items():
        assert torch.equal(master, resumed[1].masters[name])


def test_weights_that_are_loaded_in_mid_run_count() -> None:
    model = make_model()
    freezer = CompactFreezer(model, make_fisher(model), ConstantRatio(0.6))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer.attach(opt)
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    forward_backward(model, 1)
    model.zero_grad()
    opt.zero_grad()
    model.load_state_dict(other)
    forward_backward(model, 2)
    freezer.mask_gradients()
    gradient = freezer.masters["1.weight"].grad
    assert gradient is not None
    expected = other["1.weight"].clone()
    expected[~freezer.frozen("1.weight")] -= 0.1 * gradient
    opt.step()
    torch.testing.assert_close(model[1].weight.detach(), expected, rtol=0, atol=2e-7)


def test_detaching_gives_the_optimizer_back() -> None:
    weights, freezer, opt = run(CompactFreezer, "adamw")
    _, exact, exact_opt = run(Freezer, "adamw")
    fresh = OPTIMIZERS["adamw"](groups(make_model()))
    for each in (freezer, exact):
        each.detach()
    assert set(vars(opt)) == set(vars(fresh))
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks
    for name, parameter in freezer.parameters.items():
        assert any(parameter is p for group in opt.param_groups for p in group["params"])
        ours, theirs = opt.state[parameter], exact_opt.state[exact.parameters[name]]
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
    loss_before = {n: p.detach().clone() for n, p in freezer.parameters.items()}
    assert all(torch.equal(loss_before[n], weights[n]) for n in weights)


def test_a_tensor_of_which_nothing_can_be_frozen_has_no_copy() -> None:
    """Half of a LoRA adapter, for one: F of A is 0."""
    model = make_model()
    scores = make_fisher(model).scores | {"3.weight": torch.zeros_like(model[3].weight)}
    freezer = CompactFreezer(model, FisherDiagonal(scores), ConstantRatio(0.6))
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    freezer.attach(opt)
    assert "3.weight" not in freezer.masters
    assert any(model[3].weight is p for p in opt.param_groups[0]["params"])
    before = model[3].weight.detach().clone()
    forward_backward(model, 1)
    freezer.mask_gradients()
    freezer.clip_grad_norm_(1.0)
    opt.step()
    opt.zero_grad()
    assert not torch.equal(before, model[3].weight)
    assert freezer.step == 1


def test_a_part_of_the_model_may_be_scored() -> None:
    model = make_model()
    scores = make_fisher(model)
    scoped = FisherDiagonal({"1.weight": scores["1.weight"]}, {"estimation": {"scope": "1.weight"}})
    freezer = CompactFreezer(model, scoped, ConstantRatio(0.5))
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    freezer.attach(opt)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    forward_backward(model, 1)
    freezer.mask_gradients()
    opt.step()
    assert list(freezer.masters) == ["1.weight"]
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda m: torch.optim.Adafactor(m.parameters()),
        lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]),
        lambda m: torch.optim.LBFGS(m.parameters()),
    ],
)
def test_optimizers_that_mix_elements_are_refused(optimizer: Any) -> None:
    model = make_model()
    freezer = CompactFreezer(model, make_fisher(model), ConstantRatio(0.5))
    opt = optimizer(model)
    before = [list(group["params"]) for group in opt.param_groups]
    with pytest.raises(RPSAError, match=r"does not treat each element by itself.*compact: false"):
        freezer.attach(opt)
    assert all(
        a is b
        for group, old in zip(opt.param_groups, before, strict=True)
        for a, b in zip(group["params"], old, strict=True)
    )


def test_another_kind_of_optimizer_state_is_refused() -> None:
    _, _, compact = run(CompactFreezer, "adamw")
    _, _, exact = run(Freezer, "adamw")
    with pytest.raises(RPSAError, match="was not saved by compact training"):
        compact.load_state_dict(exact.state_dict())
    model = make_model()
    freezer = CompactFreezer(model, make_fisher(model, seed=7), ConstantRatio(0.6))
    other = OPTIMIZERS["adamw"](groups(model))
    freezer.attach(other)
    with pytest.raises(RPSAError, match="was saved with another mask"):
        other.load_state_dict(compact.state_dict())


def test_two_optimizers_and_a_gradient_scaler() -> None:
    model = make_model()
    freezer = CompactFreezer(model, make_fisher(model), ConstantRatio(0.6))
    opts = [
        torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.1, fused=True),
    ]
    freezer.attach(*opts)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    for step in range(4):
        forward_backward(model, step, scaler.scale(torch.ones((), device=DEVICE)))
        if step == 2:
            freezer.masters["1.bias"].grad.fill_(float("inf"))  # type: ignore[union-attr]
            freezer.masters["1.weight"].grad.fill_(float("inf"))  # type: ignore[union-attr]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        freezer.mask_gradients()
        for opt in opts:
            scaler.step(opt)
        scaler.update()
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert bool(changed) == (step != 2)
        for opt in opts:
            opt.zero_grad()


@pytest.mark.parametrize("n", [0, 1, 9, 65535, 65537, 140000])
@pytest.mark.parametrize("way", ["numpy", "kept", "torch"])
def test_selecting_and_scattering_are_boolean_indexing(
    n: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr("rpsa.freezing.bits.NUMPY_ON", ())
    generator = torch.Generator().manual_seed(n)
    mask = torch.rand(n, generator=generator).to(DEVICE) < 0.4
    values = torch.randn(n, generator=generator).to(DEVICE)
    bits = BitMask.pack(mask)
    know_counts([bits])
    for where in (True, False):
        chosen = mask if where else ~mask
        if way == "kept":
            bits.keep_indices(where=where)
        assert bits.number(where) == int(chosen.sum())
        assert torch.equal(bits.select(values, where=where), values[chosen])
        into = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
        bits.scatter_(values[chosen] + 1, into=into, where=where)
        expected = torch.zeros_like(into)
        expected[chosen] = (values[chosen] + 1).bfloat16()
        assert torch.equal(into, expected)


def test_selecting_from_tensors_that_are_not_contiguous() -> None:
    mask = torch.rand(5, 7, device=DEVICE) < 0.5
    tensor = torch.randn(7, 5, device=DEVICE).T
    bits = BitMask.pack(mask)
    know_counts([bits])
    assert torch.equal(bits.select(tensor), tensor[mask])
    expected = tensor.clone()
    expected[mask] = 3.0
    bits.scatter_(torch.full((int(mask.sum()),), 3.0, device=DEVICE), into=tensor)
    assert torch.equal(tensor, expected)


def test_it_is_not_copied() -> None:
    _, freezer, opt = run(CompactFreezer, "adamw", steps=1)
    with pytest.raises(RPSAError, match="is not copied"):
        copy.deepcopy((freezer, opt))
    assert trainable_parameters(make_model()).keys() == freezer.parameters.keys()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_compact_step_does_not_wait_for_the_device(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsa.freezing.bits.NUMPY_ON", ())
    model, plain = make_model(), make_model()
    freezer = CompactFreezer(model, make_fisher(model), ConstantRatio(0.6))
    ours_optimizer, plain_optimizer = (
        OPTIMIZERS[optimizer](groups(model)),
        OPTIMIZERS[optimizer](groups(plain)),
    )
    freezer.attach(ours_optimizer)
    for step in range(3):
        with Waits() as ours:
            forward_backward(model, step)
            freezer.mask_gradients()
            freezer.clip_grad_norm_(1.0)
            ours_optimizer.step()
        with Waits() as theirs:
            forward_backward(plain, step)
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            plain_optimizer.step()
        assert ours.count == theirs.count
