"""Exact freezing, the conflict and the dynamic ratio, each against something slow and obvious."""

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.devices import DEVICE
from helpers.examples import examples
from helpers.freezing_models import GrowingRatio, make_fisher, make_model
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.bits import BitMask
from rpsa.freezing.conflict import opposed, signs
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.masks import control_scores
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, NoiseRatio
from rpsa.parameters import trainable_parameters

pytestmark = pytest.mark.gpu


class Lion(torch.optim.Optimizer):
    """Steps by signs, as research code has it: written on `.data`, momentum of its own, a decay that is no product."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (0.9 * momentum + 0.1 * p.grad).sign() + group["weight_decay"] * p.data
                p.data.add_(update, alpha=-group["lr"])
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    # lr x weight decay = 5e-3: with the paper's 1e-9 nothing moves in fp32 and a broken freeze looks right
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adam_l2": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, weight_decay=0.1, momentum=0.9),
    "lion": lambda p: Lion(p, lr=0.05, weight_decay=0.1),
}


def loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (6, 3), generator=generator).to(DEVICE)
    target = torch.randn(6, 3, 4, generator=generator).to(DEVICE)
    return (model(ids) - target.to(model[1].weight.dtype)).square().mean()


def train(
    model: nn.Module, freezer: Freezer, optimizer: torch.optim.Optimizer, steps: int, accumulation: int = 1
) -> Iterator[str]:
    """The loop of Freezer's docstring; yields before and after each optimizer step."""
    start = freezer.step
    for step in range(start, start + steps):
        if freezer.reference_due:
            loss(model, 1000 + step).backward()
            freezer.capture_reference()
        for micro in range(accumulation):
            (loss(model, 10 * step + micro) / accumulation).backward()
        freezer.mask_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield "before"
        optimizer.step()
        yield "after"
        optimizer.zero_grad()


def frozen_elements_moved(
    optimizer: str, dtype: torch.dtype, accumulation: int = 1, **settings: Any
) -> tuple[int, int]:
    """(moved, checked) over 8 steps of a growing mask, comparing bits."""
    model = make_model(dtype)
    freezer = Freezer(model, make_fisher(model), GrowingRatio(), **settings)
    opt = OPTIMIZERS[optimizer](model.parameters())
    freezer.attach(opt)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    before: dict[str, Tensor] = {}
    moved = checked = 0
    for moment in train(model, freezer, opt, 8, accumulation):
        if moment == "before":
            before = {n: p.detach().clone() for n, p in freezer.parameters.items()}
            continue
        for name, parameter in freezer.parameters.items():
            frozen = freezer.frozen(name)
            changed = parameter.detach().view(bits) != before[name].view(bits)
            moved += int((changed & frozen).sum())
            checked += int(frozen.sum())
            assert (changed & ~frozen).any(), f"{name} does not train"
    return moved, checked


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_frozen_element_moves(optimizer: str, dtype: torch.dtype, accumulation: int) -> None:
    moved, checked = frozen_elements_moved(optimizer, dtype, accumulation)
    assert checked > 1000
    assert moved == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masking_gradients_alone_lets_them_move(optimizer: str) -> None:
    moved, _ = frozen_elements_moved(optimizer, torch.float32, gradient_only=True)
    assert moved > 100


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_foreach", "sgd_nesterov", "rmsprop"])
def test_nothing_frozen_is_the_plain_optimizer(optimizer: str) -> None:
    frozen_model, plain_model = make_model(), make_model()
    freezer = Freezer(frozen_model, make_fisher(frozen_model), ConstantRatio(0.0))
    opt = OPTIMIZERS[optimizer](frozen_model.parameters())
    freezer.attach(opt)
    plain = OPTIMIZERS[optimizer](plain_model.parameters())
    for step in range(5):
        loss(frozen_model, step).backward()
        freezer.mask_gradients()
        opt.step()
        opt.zero_grad()
        loss(plain_model, step).backward()
        plain.step()
        plain.zero_grad()
    for a, b in zip(frozen_model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_without_scores_keep_their_weight_decay() -> None:
    model = make_model()
    scores = make_fisher(model)
    scoped = FisherDiagonal({"1.weight": scores["1.weight"]}, {"estimation": {"scope": "1.weight"}})
    freezer = Freezer(model, scoped, ConstantRatio(0.5))
    opt = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, foreach=False)
    freezer.attach(opt)
    before = model[3].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    opt.step()
    assert torch.equal(model[3].weight, before * (1 - 0.05 * 0.1))
    assert opt.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("k", [0.0, 0.01, 0.5, 0.7, 1.0])
def test_the_mask_is_the_fishers(k: float) -> None:
    model = make_model()
    fisher = make_fisher(model)
    freezer = Freezer(model, fisher, ConstantRatio(k))
    assert freezer.threshold == fisher.threshold(k)
    for name, trainable in fisher.mask(k).items():
        assert torch.equal(freezer.frozen(name), ~trainable.to(DEVICE))
    assert freezer.frozen_counts() == {n: int((~m).sum()) for n, m in fisher.mask(k).items()}


def test_zero_fisher_can_be_frozen_too() -> None:
    model = make_model()
    fisher = make_fisher(model)
    freezer = Freezer(model, fisher, ConstantRatio(0.0), zero_fisher="frozen")
    assert all(torch.equal(freezer.frozen(name), (fisher[name] == 0).to(DEVICE)) for name in fisher)


def test_an_infinite_gradient_is_masked_to_zero_not_to_nan() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(1.0))
    freezer.attach(OPTIMIZERS["adamw"](model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    freezer.mask_gradients()
    for name, parameter in freezer.parameters.items():
        assert parameter.grad is not None
        assert (parameter.grad[freezer.frozen(name)] == 0).all()


# Eq. 6


def naive_conflict(reasoning: Tensor, safety: Tensor, fisher: Tensor) -> float:
    support = fisher > 0
    opposed = (reasoning.double() * safety.double() < 0) & support
    return opposed.sum().item() / support.sum().item()


@examples(40)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 1e-20, 1e-30]))
def test_conflict_is_equation_6(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(50, generator=generator) * scale for _ in range(2)]
    reasoning, safety = (g * (torch.rand(50, generator=generator) < 0.9) for g in draw)
    fisher = torch.rand(50, generator=generator) * (torch.rand(50, generator=generator) < 0.8)
    kept = signs({"w": reasoning.to(DEVICE)}, {"w": BitMask.pack((fisher > 0).to(DEVICE))})
    c = int(opposed(kept, {"w": safety.to(DEVICE)})) / int((fisher > 0).sum())
    assert c == naive_conflict(reasoning, safety, fisher)


def test_a_parameter_without_a_gradient_does_not_conflict() -> None:
    ones = torch.ones(4, device=DEVICE)
    everywhere = BitMask.pack(ones.bool())
    kept = signs({"a": ones, "b": None}, {"a": everywhere, "b": everywhere})
    assert int(opposed(kept, {"a": -ones, "b": -ones})) == 4
    assert int(opposed(kept, {"a": None, "b": -ones})) == 0


def test_a_reasoning_loss_that_depends_on_no_weight_conflicts_with_nothing() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConflictRatio(window=1, every=1))
    freezer.attach(OPTIMIZERS["adamw"](model.parameters()))
    freezer.capture_reference()
    loss(model, 1).backward()
    freezer.mask_gradients()
    assert freezer.conflict == 0


# Eq. 7


def equation_7(history: list[float], window: int, scale: float) -> list[float]:
    ks = []
    for i, c in enumerate(history):
        if i < window:
            ks.append(0.5)
            continue
        past = history[i - window : i]
        sigma = statistics.pstdev(past)
        k = 0.5 if sigma < 1e-12 else (c - statistics.fmean(past)) / (scale * sigma) + 0.5
        ks.append(min(1.0, max(0.0, k)))
    return ks


@examples(100)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.integers(1, 10),
    st.sampled_from([2.0, 4.0]),
)
def test_dynamic_ratio_is_equation_7(history: list[float], window: int, scale: float) -> None:
    ratio = ConflictRatio(window=window, every=1, sigma_scale=scale)
    assert [ratio.update(c) for c in history] == pytest.approx(equation_7(history, window, scale), abs=1e-6)


def test_a_flat_history_gives_one_half() -> None:
    ratio = ConflictRatio(window=3, every=1)
    assert [ratio.update(0.3) for _ in range(4)] + [ratio.update(0.9)] == [0.5] * 5


def test_first_dynamic_step_is_where_k_first_leaves_one_half() -> None:
    ratio = ConflictRatio(window=4, every=3)
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ratio)
    opt = OPTIMIZERS["adamw"](model.parameters())
    freezer.attach(opt)
    ks = [freezer.frozen_ratio for moment in train(model, freezer, opt, 16) if moment == "before"]
    assert ks[: ratio.first_dynamic_step] == [0.5] * 12
    assert ks[ratio.first_dynamic_step] != 0.5
    assert len(ratio.history) == 6  # steps 0, 3, 6, 9, 12, 15


@examples(30)
@given(st.integers(0, 1000), st.integers(1, 10), st.sampled_from([2.0, 4.0]))
def test_noise_ratio_is_equation_7_of_noise_whatever_the_conflict(
    seed: int, window: int, scale: float
) -> None:
    ratio, other = (NoiseRatio(window, 1, scale, seed=seed) for _ in range(2))
    ks = [ratio.update(c / 40) for c in range(40)]
    assert ks == [other.update(0.5) for _ in range(40)]
    assert ks == pytest.approx(equation_7(ratio.history, window, scale), abs=1e-6)
    assert ks[:window] == [0.5] * window


def test_noise_ratio_draws_white_normal_noise_by_its_seed() -> None:
    ratio, other = NoiseRatio(every=1, seed=1), NoiseRatio(every=1, seed=2)
    for _ in range(4000):
        ratio.update(0.5)
        other.update(0.5)
    normal = statistics.NormalDist()
    for x in (-2.0, -1.0, 0.0, 1.0, 2.0):
        share = sum(draw < x for draw in ratio.history) / 4000
        assert share == pytest.approx(normal.cdf(x), abs=0.03)
    pairs = (ratio.history[1:], ratio.history[:-1]), (ratio.history, other.history)
    assert all(abs(statistics.correlation(*pair)) < 0.05 for pair in pairs)


@pytest.mark.parametrize("field", ["window", "every", "sigma_scale"])
def test_impossible_ratios_are_refused(field: str) -> None:
    with pytest.raises(RPSAError, match=f"{field} must be a .*number greater than 0"):
        ConflictRatio(**{field: 0})
    with pytest.raises(RPSAError, match="not a number from 0 to 1"):
        ConstantRatio(1.5)


# frozen_moments: raw


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_raw_second_moments_are_those_of_an_unmasked_adam(max_norm: float | None) -> None:
    model = make_model()
    reference = make_model()
    freezer = Freezer(model, make_fisher(model), GrowingRatio(), frozen_moments="raw")
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    freezer.attach(opt)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    for step in range(6):
        if freezer.reference_due:
            loss(model, step).backward()
            freezer.capture_reference()
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(DEVICE)
            b.grad = a.grad.clone()
        freezer.mask_gradients()
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for b in reference.parameters():  # the clipping that the trained elements saw
                b.grad.mul_(max_norm / (norm + 1e-6))
        opt.step()
        plain.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(opt.state[a]["exp_avg_sq"], plain.state[b]["exp_avg_sq"])
    for name, parameter in freezer.parameters.items():
        assert (opt.state[parameter]["exp_avg"][freezer.frozen(name)] == 0).all()


def test_raw_second_moments_still_freeze_exactly() -> None:
    moved, checked = frozen_elements_moved("adamw", torch.float32, frozen_moments="raw")
    assert (moved, checked > 1000) == (0, True)


def test_raw_second_moments_need_adam() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5), frozen_moments="raw")
    with pytest.raises(RPSAError, match="needs Adam or AdamW, not SGD"):
        freezer.attach(torch.optim.SGD(model.parameters(), lr=0.1))


# Controls


@pytest.mark.parametrize("mask", ["random", "random_nonzero", "random_per_tensor", "magnitude", "inverse"])
def test_controls_freeze_as_many_and_nest(mask: Any) -> None:
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    fisher = FisherDiagonal(
        {n: torch.rand(p.shape, generator=generator).to(p) for n, p in trainable_parameters(model).items()}
    )
    fisher.scores["0.weight"][3:] = 0
    control = control_scores(mask, fisher, trainable_parameters(model))
    assert control.nonzero == fisher.nonzero
    previous: dict[str, Tensor] | None = None
    for k in (0.1, 0.5, 0.9):
        frozen = {n: ~m for n, m in control.mask(k).items()}
        count = sum(int(f.sum()) for f in frozen.values())
        assert count == sum(int((~m).sum()) for m in fisher.mask(k).values())
        if previous is not None:
            assert all(bool((frozen[n] | ~previous[n]).all()) for n in frozen)
        if mask == "random_per_tensor":
            assert all(frozen[n].sum() == (~m).sum() for n, m in fisher.mask(k).items())
        if mask in ("random_nonzero", "inverse"):
            assert not any((frozen[n] & (fisher[n] == 0).to(frozen[n].device)).any() for n in frozen)
        previous = frozen


def test_a_random_mask_is_uniform_over_all_parameters() -> None:
    fisher = FisherDiagonal({"a": torch.zeros(20_000), "b": torch.rand(20_000) + 0.1})
    control = control_scores("random", fisher, {}, seed=5)
    in_a = int((~control.mask(0.5)["a"]).sum())
    assert abs(in_a - 5000) < 4 * math.sqrt(10_000 / 4)


def test_of_equal_magnitudes_only_as_many_as_the_fisher_has_can_be_frozen() -> None:
    fisher = FisherDiagonal({"a": torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0])})
    control = control_scores("magnitude", fisher, {"a": torch.tensor([1.0, 1.0, -1.0, 1.0, 2.0])})
    assert control["a"].tolist() == [1, 1, 0, 0, 2]


def test_inverse_freezes_the_least_important() -> None:
    fisher = FisherDiagonal({"a": torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])})
    assert control_scores("inverse", fisher, {}).mask(0.5)["a"].tolist() == [True, False, False, True, True]


def test_an_unknown_control_is_named() -> None:
    model = make_model()
    with pytest.raises(RPSAError, match="mask 'fischer' is not one of fisher, random"):
        control_scores("fischer", make_fisher(model), {})  # type: ignore[arg-type]


def test_the_conflict_is_measured_on_the_fisher_even_if_a_control_ranks() -> None:
    model = make_model()
    fisher = make_fisher(model)
    control = control_scores("random", fisher, trainable_parameters(model))
    results = []
    for ranking in (None, control):
        freezer = Freezer(model, fisher, ConflictRatio(every=1, window=2), ranking=ranking)
        freezer.attach(OPTIMIZERS["adamw"](model.parameters()))
        loss(model, 1).backward()
        freezer.capture_reference()
        loss(model, 2).backward()
        freezer.mask_gradients()
        results.append(freezer.conflict)
        freezer.detach()
        model.zero_grad()
    assert results[0] == results[1]


# Attaching, detaching, resuming


def test_detach_removes_every_trace() -> None:
    model = make_model()
    opt = OPTIMIZERS["adamw"](model.parameters())
    keys = set(vars(opt))
    first = Freezer(model, make_fisher(model), ConstantRatio(0.9))
    first.attach(opt)
    second = Freezer(model, make_fisher(model, seed=2), ConstantRatio(0.1))
    with pytest.raises(RPSAError, match="attached to this optimizer already"):
        second.attach(opt)
    first.detach()
    assert set(vars(opt)) == keys
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks
    second.attach(opt)


def test_a_wrapped_optimizer_is_found() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model = make_model()
    opt = OPTIMIZERS["adamw"](model.parameters())
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5))
    freezer.attach(Wrapper(Wrapper(opt)))
    assert len(opt._optimizer_step_pre_hooks) == 1


@pytest.mark.parametrize("ratio", [ConflictRatio, NoiseRatio])
@pytest.mark.parametrize("moments", ["zero", "raw"])
def test_resuming_continues_bit_for_bit(moments: Any, ratio: Any) -> None:
    def start() -> tuple[nn.Module, Freezer, torch.optim.Optimizer]:
        model = make_model()
        freezer = Freezer(model, make_fisher(model), ratio(window=2, every=2), frozen_moments=moments)
        opt = OPTIMIZERS["adamw"](model.parameters())
        freezer.attach(opt)
        return model, freezer, opt

    def run(model: nn.Module, freezer: Freezer, opt: torch.optim.Optimizer, steps: int) -> list[Any]:
        return [(m, freezer.frozen_ratio, freezer.threshold) for m in train(model, freezer, opt, steps)]

    model, freezer, opt = start()
    whole = run(model, freezer, opt, 14)
    other, other_freezer, other_opt = start()
    first_half = run(other, other_freezer, other_opt, 7)
    saved = copy.deepcopy((other.state_dict(), other_opt.state_dict(), other_freezer.state_dict()))
    resumed, resumed_freezer, resumed_opt = start()
    resumed.load_state_dict(saved[0])
    resumed_opt.load_state_dict(saved[1])
    resumed_freezer.load_state_dict(saved[2])
    assert first_half + run(resumed, resumed_freezer, resumed_opt, 7) == whole
    assert resumed_freezer.state_dict() == freezer.state_dict()
    for a, b in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
