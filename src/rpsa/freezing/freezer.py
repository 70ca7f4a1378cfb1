"""Sections 3.2 and 3.3 around any PyTorch optimizer: mask gradients, freeze exactly, follow the conflict."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rpsa.errors import RPSAError, check_type
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.quantile import count_nonzero, order_statistic, threshold_rank
from rpsa.freezing.conflict import conflict, signs
from rpsa.freezing.exact import ExactFreeze, clear_first_moments, exact_freeze_for
from rpsa.freezing.moments import RawSecondMoments
from rpsa.freezing.ratio import ConflictRatio, FrozenRatio
from rpsa.parameters import trainable_parameters
from rpsa.sharding import is_sharded, local, shard_like, sum_over_shards

_MARK = "_rpsa_freezer"


class Freezer:
    """Freezes the elements with the highest scores, while an optimizer trains the rest.

        freezer = Freezer(model, fisher, ConflictRatio(every=25))
        freezer.attach(optimizer)
        for batch in batches:
            if freezer.reference_due:
                reasoning_loss(model).backward()
                freezer.capture_reference()
            safety_loss(model, batch).backward()
            freezer.mask_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: its trainable parameters must be those of `fisher`.
        fisher: the scores; the conflict (Eq. 6) is measured where they are non-zero.
        ratio: `ConstantRatio` or `ConflictRatio`.
        ranking: what is frozen first, if not the highest Fisher (see `control_scores`).
        gradient_only: the paper's text taken literally: gradients are masked, nothing else, so that weight
            decay and momentum still move frozen elements.
        frozen_moments: what Adam's second moment sees at frozen elements: `zero`, the masked gradient; `raw`,
            the unmasked one (Adam and AdamW only).
        zero_fisher: what happens to elements with F = 0.

    Raises:
        RPSAError: the scores do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: FisherDiagonal,
        ratio: FrozenRatio | None = None,
        *,
        ranking: FisherDiagonal | None = None,
        gradient_only: bool = False,
        frozen_moments: Literal["zero", "raw"] = "zero",
        zero_fisher: Literal["trainable", "frozen"] = "trainable",
    ) -> None:
        check_type("model", model, nn.Module, "a torch module")
        check_type(
            "fisher", fisher, FisherDiagonal, "a FisherDiagonal, as FisherDiagonal.load(folder) returns it"
        )
        if ratio is not None and not hasattr(ratio, "initial"):
            raise RPSAError(f"ratio is {ratio!r}: give ConstantRatio(0.6), or ConflictRatio()")
        if ranking is not None:
            check_type("ranking", ranking, FisherDiagonal, "a FisherDiagonal, as control_scores returns it")
        for name, value, known in (
            ("frozen_moments", frozen_moments, ("zero", "raw")),
            ("zero_fisher", zero_fisher, ("trainable", "frozen")),
        ):
            if value not in known:
                raise RPSAError(f"{name} {value!r} is not one of {', '.join(known)}")
        fisher.check(model)
        parameters = trainable_parameters(model)
        self.parameters = {name: parameters[name] for name in fisher}
        self.sharded = is_sharded(self.parameters)
        self.ratio: FrozenRatio = ConflictRatio() if ratio is None else ratio
        self.gradient_only = gradient_only
        self.zero_fisher = zero_fisher
        self.step = 0
        self.conflict: float | None = None
        self._fisher = {name: shard_like(fisher.scores[name], p) for name, p in self.parameters.items()}
        self._scores = self._fisher
        if ranking is not None:
            self._scores = {name: shard_like(ranking.scores[name], p) for name, p in self.parameters.items()}
        self._fisher_nonzero = count_nonzero(self._fisher.values(), sharded=self.sharded)
        self._nonzero = count_nonzero(self._scores.values(), sharded=self.sharded)
        if self._nonzero == 0:
            raise RPSAError("every Fisher score is zero: nothing can be frozen; check the labels of D_ref")
        self._raw = RawSecondMoments(self.parameters, self.frozen) if frozen_moments == "raw" else None
        self._reference: dict[str, Tensor] | None = None
        self._captured_at = -1
        self._handles: list[RemovableHandle] = []
        self._optimizer: Optimizer | None = None
        self._set_ratio(self.ratio.initial())

    # What is frozen

    @property
    def frozen_ratio(self) -> float:
        """k."""
        return self._k

    @property
    def threshold(self) -> float:
        """tau_k."""
        return self._tau

    @property
    def nonzero(self) -> int:
        """Elements that could be frozen, over all ranks."""
        return self._nonzero

    def frozen(self, name: str) -> Tensor:
        """Bool, of this rank's shard of the parameter; True = frozen. Never stored: it is F > tau."""
        scores = self._scores[name]
        frozen = scores > self._tau
        return frozen | (scores == 0) if self.zero_fisher == "frozen" else frozen

    def frozen_counts(self) -> dict[str, int]:
        """Frozen elements of each parameter, over all ranks."""
        counts = torch.stack([self.frozen(name).sum().cpu() for name in self.parameters])
        return dict(zip(self.parameters, sum_over_shards(counts, sharded=self.sharded).tolist(), strict=True))

    def _set_ratio(self, k: float) -> None:
        self._k = k
        rank = threshold_rank(self._nonzero, k)
        self._tau = order_statistic(self._scores.values(), rank, sharded=self.sharded)
        self._mask_changed = True

    # Gradients

    @property
    def reference_due(self) -> bool:
        """Whether this step measures the conflict, and its reasoning gradient has not been captured yet."""
        every = self.ratio.every
        return every is not None and self.step % every == 0 and self._captured_at != self.step

    @property
    def reference_captured(self) -> bool:
        """Whether `mask_gradients` is about to measure the conflict and to change the mask."""
        return self._reference is not None

    @torch.no_grad()
    def capture_reference(self) -> None:
        """Keep the signs of the gradients that are there now (g_R, int8) and set the gradients to None."""
        self._reference = signs(self._gradients(), self._fisher)
        self._captured_at = self.step
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Measure c and update k, if g_R was captured for this step; then zero frozen elements' gradients.

        Call it once a step, on the complete gradient g_S, before clipping.
        """
        gradients = self._gradients()
        if self._reference is not None:
            self.conflict = conflict(self._reference, gradients, self._fisher_nonzero, sharded=self.sharded)
            self._reference = None
            self._set_ratio(self.ratio.update(self.conflict))
        if self._raw is not None:
            self._raw.keep(gradients)
        for name, gradient in gradients.items():
            if gradient is not None:
                # not a product: inf x 0 is NaN
                local(gradient).masked_fill_(self.frozen(name), 0)

    def _gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    # The optimizer

    def attach(self, optimizer: Any) -> None:
        """Hook into `optimizer.step` (wrappers such as accelerate's are looked through).

        Raises:
            RPSAError: another Freezer is attached, or `frozen_moments` is not for this optimizer.
        """
        while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if hasattr(optimizer, _MARK):
            raise RPSAError("a Freezer is attached to this optimizer already; detach() it first")
        if self._raw is not None:
            self._raw.check(optimizer)
        exact = None if self.gradient_only else exact_freeze_for(optimizer, self.parameters, self.frozen)
        self._handles = [
            optimizer.register_step_pre_hook(lambda opt, args, kwargs: self._before_step(opt, exact)),
            optimizer.register_step_post_hook(lambda opt, args, kwargs: self._after_step(opt, exact)),
        ]
        setattr(optimizer, _MARK, self)
        self._optimizer = optimizer
        self._mask_changed = True

    def detach(self) -> None:
        """Remove every trace from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._optimizer is not None:
            delattr(self._optimizer, _MARK)
            self._optimizer = None

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, exact: ExactFreeze | None) -> None:
        if self._raw is not None:
            self._raw.before_step()
        if exact is not None:
            if self._mask_changed:
                clear_first_moments(optimizer, self.parameters, self.frozen)
                self._mask_changed = False
            exact.before_step(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, exact: ExactFreeze | None) -> None:
        if exact is not None:
            exact.after_step(optimizer)
        if self._raw is not None:
            self._raw.after_step(optimizer)
        self.step += 1

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; between two optimizer steps."""
        return {
            "step": self.step,
            "frozen_ratio": self._k,
            "threshold": self._tau,
            "conflict": self.conflict,
            "ratio": self.ratio.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.conflict = state["conflict"]
        self.ratio.load_state_dict(state["ratio"])
        self._set_ratio(state["frozen_ratio"])
        self._reference, self._captured_at = None, -1
