"""Exact freezing: frozen elements are bit-identical after an optimizer's step, whatever it does.

A zero gradient does not do it: weight decay and stale momentum still move a parameter, clipping can turn the zero
into NaN, and some optimizers mix elements. What each of them does could be undone one by one, for the optimizers that
one knows. Instead the weights are copied before a step and the frozen ones are put back after it, also where the step
raised: right for any optimizer, at the price of one copy of the weights while it steps.

`RawSecondMoments` is the option `frozen_moments: raw`, for Adam. With a masked gradient `exp_avg_sq` decays while an
element is frozen, and an element that thaws after 500 steps jumps at up to four times the learning rate.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rpsa.errors import RPSAError
from rpsa.freezing.bits import BitMask
from rpsa.sharding import is_sharded, local, sum_over_shards

Mask = Mapping[str, BitMask]
"""By parameter name, of the local shard; set = frozen."""

KEPT_ON = ("cpu",)
"""Where the memory of the copy is kept between steps: fresh pages cost more than the copy there."""

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1")
"""The last is bitsandbytes' name, in 8 bits as codes of `qmap1`."""
MARK = "_rpsa_freezer"
"""The attribute of an optimizer that says that a Freezer is attached."""


class AttachedSteps(Protocol):
    """What a Freezer asks of the hooks around one optimizer's steps."""

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Those of the model that it trains and that may be frozen, by name."""

    def mask_changed(self, before: Mask, now: Mask) -> None: ...

    def detach(self) -> None: ...


class ExactSteps:
    """One optimizer's steps, between which frozen elements do not change.

    Args:
        parameters: those of the optimizer that may be frozen, by name.
        mask: the present one; None = nothing is put back.
        finished: called after each step that did not raise.

    Raises:
        RPSAError: another Freezer is attached to the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        mask: Callable[[], Mask | None],
        finished: Callable[[Optimizer], None],
    ) -> None:
        if hasattr(optimizer, MARK):
            raise RPSAError("a Freezer is attached to this optimizer already; detach() it first")
        self.optimizer, self.parameters = optimizer, parameters
        self._mask, self._finished = mask, finished
        self._guarding, self._depth = False, 0
        self._is_new = True
        self._saved: dict[str, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        self._unguarded = vars(optimizer).get("step")
        self._guarded = self._guard(optimizer.step)
        optimizer.step = self._guarded  # type: ignore[method-assign]
        setattr(optimizer, MARK, self)

    def detach(self) -> None:
        """Remove every trace from the optimizer."""
        for handle in self._handles:
            handle.remove()
        if (
            vars(self.optimizer).get("step") is self._guarded
        ):  # else a scheduler holds it, and it does nothing
            del self.optimizer.step
            if self._unguarded is not None:
                self.optimizer.step = self._unguarded  # type: ignore[method-assign]
        delattr(self.optimizer, MARK)

    @torch.no_grad()
    def mask_changed(self, before: Mask, now: Mask) -> None:
        """Momentum gathered before an element was frozen must neither move it nor wait for the day it thaws."""
        if self._mask() is None:
            return
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            for key in _FIRST_MOMENTS:
                if isinstance(state.get(key), Tensor) and state[key].shape == parameter.shape:
                    _clear(state, key, now[name])

    def _guard(self, step: Any) -> Any:
        """`step`, after which frozen elements are put back if it raises: torch has no hook for that."""

        @wraps(step)
        def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._guarding, self._depth = True, 0
            try:
                return step(*args, **kwargs)
            except BaseException:
                if self._depth:
                    self._put_back()
                raise
            finally:
                self._guarding, self._depth = False, 0

        return MethodType(guarded, self.optimizer)  # schedulers look for a method's function

    def _before(self) -> None:
        # A subclass that calls super().step() runs its hooks twice: the outer pair counts. Who kept the unguarded
        # step (accelerate does, for a gradient scaler) and saw it raise left a depth that means nothing.
        self._depth = self._depth + 1 if self._guarding else 1
        if self._depth == 1:
            if self._is_new:
                # not when it was attached: a freezer that goes on from a checkpoint learns its mask later
                self.mask_changed({}, self._mask() or {})
                self._is_new = False
            self._save()

    def _after(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._put_back()
            self._finished(self.optimizer)

    @torch.no_grad()
    def _save(self) -> None:
        if self._mask() is None:
            return
        for name, parameter in self.parameters.items():
            weights = local(parameter.detach())
            if name in self._saved:
                self._saved[name].copy_(weights)
            else:
                self._saved[name] = weights.clone()

    @torch.no_grad()
    def _put_back(self) -> None:
        mask = self._mask()  # as it is now: a closure may have changed it since the step began
        if mask is None:
            return
        for name, saved in self._saved.items():
            mask[name].copy_(saved, into=local(self.parameters[name].detach()))
        self._saved = {name: saved for name, saved in self._saved.items() if saved.device.type in KEPT_ON}


def _clear(state: Mapping[str, Any], key: str, frozen: BitMask) -> None:
    """Set the frozen elements of a moment to 0; of 8 bits, to the code that stands for 0."""
    moment = local(state[key])
    if moment.dtype != torch.uint8:
        frozen.clear_(moment)
        return
    codes = state[key.replace("state", "qmap")]
    moment.masked_fill_(frozen.unpack(), int(codes.abs().argmin()))


class RawSecondMoments:
    """Adds to Adam's `exp_avg_sq` what the masked gradients would have added.

    Adam squares the gradient that it is given, which is 0 where it was masked. So what was masked is kept (`keep`), and
    (1 - beta2) of its square is added after the step (`add`): exp_avg_sq is then what it would be without a mask.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.sharded = is_sharded(parameters)
        self.raw: dict[str, Tensor] = {}
        self.masked: list[Tensor] = []
        self.norm = torch.zeros(())

    def check(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Adam):
            raise RPSAError(
                f"frozen_moments: raw needs Adam or AdamW, not {type(optimizer).__name__}; use zero"
            )

    def keep(self, gradients: Mapping[str, Tensor | None], mask: Mask) -> None:
        """Mask the gradients in place, and remember what was masked; what is not finite counts as 0."""
        self.masked = []
        for name, gradient in gradients.items():
            if gradient is not None:
                raw = local(gradient).clone()
                mask[name].clear_(local(gradient))
                # the gradient less what is left of it: where it was masked all of it, elsewhere exactly 0
                self.raw[name] = raw.sub_(local(gradient)).nan_to_num_(0.0, 0.0, 0.0)
                self.masked.append(local(gradient))
        self.norm = self._norm()

    def add(self, optimizer: Optimizer) -> None:
        """After the step: what exp_avg_sq would have seen, had the frozen gradients been clipped like the rest."""
        clipped = self._norm()
        # a step that a gradient scaler skipped has a norm that is not finite, and adds nothing
        factor = torch.where((self.norm > 0) & clipped.isfinite(), clipped / self.norm, 0.0)
        for group in optimizer.param_groups:
            for name, parameter in self.parameters.items():
                if name in self.raw and any(parameter is p for p in group["params"]):
                    second = local(optimizer.state[parameter]["exp_avg_sq"])
                    raw = self.raw.pop(name).mul_(factor).to(second.dtype)
                    second.addcmul_(raw, raw, value=1 - group["betas"][1])
        if not self.raw:
            self.masked = []

    def _norm(self) -> Tensor:
        """Of the masked gradients, as clipping or a gradient scaler has changed them by now."""
        squares = sum((gradient.float().square().sum() for gradient in self.masked), torch.zeros(()))
        return sum_over_shards(squares, sharded=self.sharded).sqrt()
