"""Frozen elements do not move, whatever an iteration does: several optimizers, closures, NaN, failures, scalers."""

import copy
import json
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from helpers.devices import DEVICE
from helpers.freezing_models import GrowingRatio, forward_backward, make_fisher, make_model
from helpers.waits import Waits
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.audit import Audit
from rpsa.freezing.bits import BitMask
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, NoiseRatio

pytestmark = pytest.mark.gpu

LARGE: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
"""With the paper's 1e-9 nothing moves in fp32, and a broken freeze looks right."""


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, **LARGE), torch.optim.AdamW(rest, **LARGE)]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "adamw": lambda m: [torch.optim.AdamW(m.parameters(), **LARGE)],
    "adamw_fused": lambda m: [torch.optim.AdamW(m.parameters(), **LARGE, fused=True)],
    "adam": lambda m: [torch.optim.Adam(m.parameters(), **LARGE)],
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), **LARGE, momentum=0.9)],
    "muon_and_adamw": muon_and_adamw,
}


@dataclass
class Watched:
    """A model, its freezer and optimizers; `check` compares the bits of frozen elements with those seen before."""

    model: nn.Module
    freezer: Freezer
    optimizers: list[Optimizer]
    before: dict[str, Tensor] = field(default_factory=dict)
    moved: int = 0
    checked: int = 0

    def look(self) -> None:
        self.before = {n: p.detach().clone() for n, p in self.freezer.parameters.items()}

    def check(self) -> None:
        for name, parameter in self.freezer.parameters.items():
            frozen = self.freezer.frozen(name)
            changed = parameter.detach().view(torch.int32) != self.before[name].view(torch.int32)
            self.moved += int((changed & frozen).sum())
            self.checked += int(frozen.sum())

    def reference(self, step: int) -> None:
        if self.freezer.reference_due:
            forward_backward(self.model, 1000 + step)
            self.freezer.capture_reference()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def zero_grad(self) -> None:
        self.model.zero_grad()


def plain(w: Watched, step: int) -> None:
    forward_backward(w.model, step)
    w.freezer.mask_gradients()
    w.clip()
    w.look()
    for optimizer in w.optimizers:
        optimizer.step()
    w.check()


def accumulated(w: Watched, step: int) -> None:
    for micro in range(4):
        forward_backward(w.model, 10 * step + micro, 0.25)
    w.freezer.mask_gradients()
    w.clip()
    w.look()
    for optimizer in w.optimizers:
        optimizer.step()
    w.check()


def closure(w: Watched, step: int) -> None:
    """As Lightning does it: all that precedes a step happens inside of the first one."""
    w.look()
    done = False

    def run() -> Tensor:
        nonlocal done
        if not done:
            forward_backward(w.model, step)
            w.freezer.mask_gradients()
            w.clip()
            done = True
        return torch.zeros(())

    for optimizer in w.optimizers:
        optimizer.step(run)  # type: ignore[arg-type]
    w.check()


def closure_as_keyword(w: Watched, step: int) -> None:
    w.look()

    def run() -> Tensor:
        forward_backward(w.model, step)
        w.freezer.mask_gradients()
        return torch.zeros(())

    first, *others = w.optimizers
    first.step(closure=run)  # type: ignore[arg-type]
    for optimizer in others:
        optimizer.step()
    w.check()


def not_finite(value: float) -> Callable[[Watched, int], None]:
    """Some gradients have one element that is not finite; clipping spreads it to all, 0 x NaN."""

    def run(w: Watched, step: int) -> None:
        forward_backward(w.model, step)
        if step in (5, 7):
            w.model[1].weight.grad[0, 0] = value  # type: ignore[index, union-attr]
        w.freezer.mask_gradients()
        w.clip()
        w.look()
        for optimizer in w.optimizers:
            optimizer.step()
        w.check()

    return run


def raising(w: Watched, step: int) -> None:
    """Every other step ends half done."""
    forward_backward(w.model, step)
    w.freezer.mask_gradients()
    w.clip()
    w.look()
    for optimizer in w.optimizers:
        if step % 2:
            with broken_half_way(optimizer), suppress(KeyboardInterrupt):
                optimizer.step()
                raise AssertionError("the step did not raise")
            w.check()
        else:
            optimizer.step()
    w.check()


class broken_half_way:
    """The optimizer's step raises after it has moved its first group."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __enter__(self) -> None:
        class Broken(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                yield from super().__iter__()
                raise KeyboardInterrupt

        self.groups = self.optimizer.param_groups
        self.optimizer.param_groups = Broken(self.groups)

    def __exit__(self, *_: Any) -> None:
        self.optimizer.param_groups = self.groups


def scaled(w: Watched, step: int) -> None:
    """A gradient scaler that finds an infinity in every third step and skips it."""
    if not hasattr(w, "scaler"):
        w.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)  # type: ignore[attr-defined]
    scaler = w.scaler  # type: ignore[attr-defined]
    forward_backward(w.model, step, scaler.scale(torch.ones((), device=DEVICE)))
    w.freezer.mask_gradients()
    if step % 3 == 2:
        free = ~w.freezer.frozen("1.weight")
        w.model[1].weight.grad[free] = math.inf  # type: ignore[index, union-attr]
    w.look()
    for optimizer in w.optimizers:
        scaler.step(optimizer)
    if step % 3 == 2:
        for name, parameter in w.freezer.parameters.items():
            unscaled_by_muon = any(isinstance(o, torch.optim.Muon) for o in w.optimizers)
            assert unscaled_by_muon or torch.equal(parameter, w.before[name]), "a skipped step moved weights"
    w.check()
    scaler.update()


ITERATIONS = {
    "plain": plain,
    "accumulated": accumulated,
    "closure": closure,
    "closure_as_keyword": closure_as_keyword,
    "nan": not_finite(math.nan),
    "inf": not_finite(math.inf),
    "raising": raising,
    "scaled": scaled,
}


def start(optimizer: str, ratio: Any = None, **settings: Any) -> Watched:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ratio or GrowingRatio(), **settings)
    optimizers = OPTIMIZERS[optimizer](model)
    freezer.attach(*optimizers)
    return Watched(model, freezer, optimizers)


@pytest.mark.parametrize("iteration", ITERATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_frozen_element_moves(optimizer: str, iteration: str) -> None:
    w = start(optimizer)
    steps = 8
    for step in range(steps):
        w.reference(step)
        ITERATIONS[iteration](w, step)
        w.zero_grad()
    assert w.checked > 400
    assert w.moved == 0
    assert all(group["weight_decay"] == 0.1 for o in w.optimizers for group in o.param_groups)
    if iteration not in ("raising", "scaled"):
        assert w.freezer.step == steps, "an iteration is counted once"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon_and_adamw"])
def test_a_closure_trains_what_a_loop_trains(optimizer: str) -> None:
    weights = []
    for iteration in (plain, closure):
        w = start(optimizer)
        for step in range(6):
            w.reference(step)
            iteration(w, step)
            w.zero_grad()
        weights.append([p.detach().clone() for p in w.model.parameters()])
    if optimizer != "muon_and_adamw":  # Muon mixes elements: it saw the momentum of what froze in its step
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert all(torch.isfinite(a).all() for a in weights[1])


def test_the_momentum_of_every_optimizer_is_cleared_where_elements_freeze() -> None:
    w = start("muon_and_adamw")
    for step in range(7):
        w.reference(step)
        plain(w, step)
        w.zero_grad()
    for name, parameter in w.freezer.parameters.items():
        [state] = [o.state[parameter] for o in w.optimizers if parameter in o.state]
        momentum = state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"]
        assert (momentum[w.freezer.frozen(name)] == 0).all()
        assert momentum.any()


def test_all_optimizers_are_let_go() -> None:
    w = start("muon_and_adamw")
    fresh = OPTIMIZERS["muon_and_adamw"](make_model())
    w.freezer.detach()
    for optimizer, other in zip(w.optimizers, fresh, strict=True):
        assert set(vars(optimizer)) == set(vars(other))
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_scheduler_may_come_before_or_after(scheduler_first: bool) -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.9))
    [optimizer] = OPTIMIZERS["adamw"](model)
    if scheduler_first:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        freezer.attach(optimizer)
    else:
        freezer.attach(optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    w = Watched(model, freezer, [optimizer])
    for step in range(3):
        plain(w, step)
        scheduler.step()
        w.zero_grad()
    assert (w.moved, w.checked > 200, freezer.step) == (0, True, 3)
    assert optimizer.param_groups[0]["lr"] == 0.05 / 8
    freezer.detach()
    forward_backward(model, 4)
    w.look()
    optimizer.step()
    w.check()
    assert w.moved > 100, "still frozen after detach"


class TwiceHooked(torch.optim.AdamW):
    """Its step is wrapped by torch, and so is the one that it calls: hooks run twice."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.99)
        return result


def test_a_subclass_that_calls_its_parents_step_is_one_step() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), GrowingRatio())
    optimizer = TwiceHooked(model.parameters(), lr=0.05)
    freezer.attach(optimizer)
    w = Watched(model, freezer, [optimizer])
    for step in range(4):
        w.reference(step)
        plain(w, step)
        w.zero_grad()
    assert (w.moved, w.checked > 200, freezer.step) == (0, True, 4)


class Holder:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def test_containers_are_looked_through() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), GrowingRatio())
    optimizers = muon_and_adamw(model)
    freezer.attach(Holder(optimizers=[Holder(optimizer=optimizers[0]), optimizers[1]]))
    w = Watched(model, freezer, optimizers)
    for step in range(4):
        w.reference(step)
        plain(w, step)
        w.zero_grad()
    assert (w.moved, w.checked > 200, freezer.step) == (0, True, 4)


# What is refused


def test_nothing_attached_is_refused() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5))
    forward_backward(model, 1)
    with pytest.raises(RPSAError, match=r"no optimizer is attached.*call freezer.attach\(optimizer\)"):
        freezer.mask_gradients()
    with pytest.raises(RPSAError, match="no optimizer is attached"):
        Audit(freezer).open()


def test_an_optimizer_that_is_left_out_is_named() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5))
    muon, adamw = muon_and_adamw(model)
    freezer.attach(muon)
    forward_backward(model, 1)
    with pytest.raises(RPSAError, match=r"'1.bias' has a gradient and is in none of the attached optimizers"):
        freezer.mask_gradients()
    freezer.attach(adamw)
    freezer.mask_gradients()


@pytest.mark.parametrize("other", [make_model, lambda: copy.deepcopy(nn.Linear(2, 2))])
def test_another_models_optimizer_is_refused(other: Any) -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5))
    with pytest.raises(RPSAError, match="trains no parameter of the freezer's model"):
        freezer.attach(torch.optim.AdamW(other().parameters()))


def test_an_optimizer_that_swaps_weights_outside_of_step_is_refused() -> None:
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5))
    with pytest.raises(RPSAError, match=r"ScheduleFree swaps the weights outside of step\(\)"):
        freezer.attach(ScheduleFree(model.parameters(), lr=0.1))
    assert not freezer._attached


@pytest.mark.parametrize("what", [None, "adamw", Holder(optimizer=None)])
def test_what_is_no_optimizer_is_refused(what: Any) -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5))
    with pytest.raises(RPSAError, match=r"is not a torch.optim.Optimizer"):
        freezer.attach(what)


def test_sparse_gradients_are_refused_before_training() -> None:
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Linear(4, 4))
    with pytest.raises(RPSAError, match="gradient of '0' would be sparse"):
        Freezer(model, make_fisher(model), ConstantRatio(0.5))
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.5))
    freezer.attach(*OPTIMIZERS["adamw"](model))
    model[0].weight.grad = torch.eye(11, device=DEVICE)[:, :8].to_sparse()
    with pytest.raises(RPSAError, match=r"gradient of '0.weight' is sparse"):
        freezer.mask_gradients()


@pytest.mark.parametrize("name", ["window", "every", "sigma_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 0, "20", None, True])
@pytest.mark.parametrize("kind", [ConflictRatio, NoiseRatio])
def test_impossible_ratios_are_refused(kind: Any, name: str, value: Any) -> None:
    refused = f"{name} (must be a number greater than 0, not {value!r}|is {value!r}: give a .*number)"
    with pytest.raises(RPSAError, match=refused):
        kind(**{name: value})


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.1, "0.5", None, True])
def test_impossible_constants_are_refused(value: Any) -> None:
    with pytest.raises(RPSAError, match=r"(is not a number from 0 to 1|: give a number)"):
        ConstantRatio(value)


# Gradients that are not finite


def test_a_gradient_that_is_not_finite_is_named_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    w = start("adamw", ConstantRatio(0.5))
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            forward_backward(w.model, step)
            if step in (1, 3):
                w.model[3].bias.grad[0] = math.nan  # type: ignore[index, union-attr]
            w.freezer.mask_gradients()
            w.optimizers[0].step()
            w.zero_grad()
            for parameter in w.model.parameters():
                parameter.data.nan_to_num_()
    found = w.freezer.non_finite
    assert found is not None
    assert (found.steps, found.first_step, found.parameter) == (2, 1, "3.bias")
    assert [r.message for r in caplog.records] == [
        "the gradient of '3.bias' is not finite at step 1: look at the batch, the learning rate and the dtype; such "
        "steps are counted"
    ]
    other = start("adamw", ConstantRatio(0.5)).freezer
    other.load_state_dict(json.loads(json.dumps(w.freezer.state_dict())))
    assert other.non_finite == found


@pytest.mark.parametrize("which", ["reasoning", "safety"])
def test_a_conflict_of_what_is_not_finite_is_not_measured(
    which: str, caplog: pytest.LogCaptureFixture
) -> None:
    w = start("adamw", ConflictRatio(window=1, every=1))
    for step in range(3):
        forward_backward(w.model, 1000 + step)
        if which == "reasoning" and step == 1:
            w.model[1].weight.grad[0, 0] = math.nan  # type: ignore[index, union-attr]
        w.freezer.capture_reference()
        forward_backward(w.model, step)
        if which == "safety" and step == 1:
            w.model[1].weight.grad[0, 0] = math.inf  # type: ignore[index, union-attr]
        before = w.freezer.frozen_ratio
        with caplog.at_level(logging.WARNING):
            w.freezer.mask_gradients()
        if step == 1:
            assert w.freezer.conflict is None
            assert w.freezer.frozen_ratio == before
            assert f"step 1: the {which} gradient is not finite: c is not measured" in caplog.text
        else:
            assert w.freezer.conflict is not None
        w.zero_grad()
        w.optimizers[0].step()
    assert len(w.freezer.ratio.history) == 2  # type: ignore[attr-defined]


# A Fisher of a part of the model


def test_what_has_no_scores_is_not_trained_on_the_reasoning_data() -> None:
    """A run that measures the conflict and keeps k equals one that measures nothing, bit for bit."""
    weights = []
    for measures in (True, False):
        model = make_model()
        scores = make_fisher(model)
        scoped = FisherDiagonal({"1.weight": scores["1.weight"]}, {"estimation": {"scope": "1.weight"}})
        # a window that is never full keeps k at 0.5
        ratio = ConflictRatio(window=99, every=1) if measures else ConstantRatio(0.5)
        freezer = Freezer(model, scoped, ratio)
        [optimizer] = OPTIMIZERS["adamw"](model)
        freezer.attach(optimizer)
        for step in range(4):
            if freezer.reference_due:
                forward_backward(model, 1000 + step)
                freezer.capture_reference()
                assert all(p.grad is None for p in model.parameters())
            forward_backward(model, step)
            freezer.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# Copies


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_copy_of_model_optimizer_and_freezer_freezes_too(order: tuple[int, ...]) -> None:
    w = start("adamw")
    for step in range(2):
        w.reference(step)
        plain(w, step)
        w.zero_grad()
    parts = (w.model, w.optimizers, w.freezer)
    copied = copy.deepcopy(tuple(parts[i] for i in order))
    model, optimizers, freezer = (copied[order.index(i)] for i in range(3))
    other = Watched(model, freezer, optimizers)
    for step in range(2, 6):
        for each in (w, other):
            each.reference(step)
            plain(each, step)
            each.zero_grad()
    assert (other.moved, other.checked > 200, freezer.step) == (0, True, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), w.model.parameters(), strict=True))


def test_a_freezer_is_not_pickled() -> None:
    with pytest.raises(RPSAError, match=r"save its state_dict\(\)"):
        pickle.dumps(start("adamw").freezer)


# The audit


def test_an_audit_that_checked_nothing_proves_nothing() -> None:
    w = start("adamw", ConstantRatio(0.0))
    audit = Audit(w.freezer)
    audit.open()
    plain(w, 0)
    audit.close()
    report = audit.report()
    assert (report["frozen_element_steps_checked"], report["frozen_elements_moved"]) == (0, None)
    assert Audit(w.freezer).report()["frozen_elements_moved"] is None


def test_an_audit_says_what_was_not_finite() -> None:
    w = start("adamw", ConstantRatio(0.5))
    audit = Audit(w.freezer)
    audit.open()
    for step in (4, 5):
        not_finite(math.nan)(w, step)
    audit.close()
    report = json.loads(json.dumps(audit.report(), allow_nan=True))
    assert report["non_finite_gradients"] == {"steps": 1, "first_step": 1, "parameter": "1.weight"}
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 100


def test_closing_and_opening_at_once_is_closing_and_opening() -> None:
    reports = []
    for at_once in (True, False):
        w = start("adamw")
        audit = Audit(w.freezer)
        audit.open()
        for step in range(7):
            w.reference(step)
            forward_backward(w.model, step)
            measuring = w.freezer.reference_captured
            if measuring and not at_once:
                audit.close()
            w.freezer.mask_gradients()
            if measuring and not at_once:
                audit.open()
            if measuring and at_once:
                audit.next_interval()
            w.optimizers[0].step()
            if step in (2, 3):  # under two masks
                frozen = w.freezer.frozen("1.weight").nonzero()[:2]
                w.model[1].weight.data[tuple(frozen.T)] += 1.0  # type: ignore[operator, union-attr]
            w.zero_grad()
        audit.close()
        reports.append(audit.report())
    together, apart = reports
    assert together["frozen_elements_moved"] == apart["frozen_elements_moved"] == 2
    assert together["frozen_element_steps_checked"] == apart["frozen_element_steps_checked"]


# Masks as bits, and what waits for the device


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 65535, 65536, 65537, 131080])
@pytest.mark.parametrize("way", ["numpy", "torch"])
def test_bits_are_the_mask(n: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "torch":
        monkeypatch.setattr("rpsa.freezing.bits.NUMPY_ON", ())
    generator = torch.Generator().manual_seed(n)
    mask = torch.rand(n, generator=generator).to(DEVICE) < 0.4
    bits = BitMask.pack(mask)
    assert bits.packed.numel() == math.ceil(n / 8)
    assert torch.equal(bits.unpack(), mask)
    assert int(bits.counts().sum()) == int(mask.sum())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values, source = (torch.randn(n, generator=generator).to(DEVICE, dtype) for _ in range(2))
        values[: n // 3], source[n // 2 :] = math.nan, math.inf
        compared = BitMask.compare(values, "greater", 0.25)
        assert torch.equal(compared.unpack(), values > 0.25)
        assert torch.equal(BitMask.compare(values, "less", 0.0).unpack(), values < 0)
        positive, negative = BitMask.signs(values)
        assert torch.equal(positive.unpack(), values > 0)
        assert torch.equal(negative.unpack(), values < 0)
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
        cleared, copied = values.clone(), values.clone()
        bits.clear_(cleared)
        bits.copy_(source, into=copied)
        assert torch.equal(cleared.view(words), torch.where(mask, 0, values).to(dtype).view(words))
        assert torch.equal(copied.view(words), torch.where(mask, source, values).view(words))


def test_bits_mask_tensors_that_are_not_contiguous() -> None:
    mask = torch.rand(5, 7, device=DEVICE) < 0.5
    tensor, source = torch.randn(7, 5, device=DEVICE).T, torch.randn(5, 7, device=DEVICE)
    expected = torch.where(mask, source, tensor), torch.where(mask, 0, tensor)
    copied, cleared = tensor.clone(memory_format=torch.preserve_format), tensor
    BitMask.pack(mask).copy_(source, into=copied)
    BitMask.pack(mask).clear_(cleared)
    assert torch.equal(copied, expected[0])
    assert torch.equal(cleared, expected[1])


@pytest.mark.parametrize("moments", ["zero", "raw"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "sgd"])
def test_a_step_does_not_wait_for_the_device(
    optimizer: str, moments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpsa.freezing.bits.NUMPY_ON", ())
    if (optimizer, moments) == ("sgd", "raw"):
        pytest.skip("raw moments are Adam's")
    w = start(optimizer, frozen_moments=moments)
    counts = []
    for step in range(8):
        due = w.freezer.reference_due
        if due:
            forward_backward(w.model, 1000 + step)
        with Waits() as reference:
            if due:
                w.freezer.capture_reference()
        forward_backward(w.model, step)
        plain_model = make_model()
        [plain_optimizer] = OPTIMIZERS[optimizer](plain_model)
        forward_backward(plain_model, step)
        with Waits() as ours:
            w.freezer.mask_gradients()
            w.optimizers[0].step()
        with Waits() as theirs:
            plain_optimizer.step()
        counts.append((due, reference.count + ours.count - theirs.count))
        w.zero_grad()
    assert all(count <= (2 if due else 0) for due, count in counts), counts
