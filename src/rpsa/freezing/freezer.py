"""Freezer (sections 3.2 and 3.3): mask gradients, freeze exactly, follow the conflict, around any PyTorch optimizer.

`Freezer` has the mask of the present k (what is frozen, F > tau_k) on the device; the scores stay where they are, as
only a change of k reads them. `GradientWatch` sees every complete gradient before it is masked: its norm, and the steps
at which it was not finite, without waiting for the device.
"""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rpsa import settings
from rpsa.errors import RPSAError, check_type
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.quantile import Ranking, threshold_rank
from rpsa.freezing.bits import BitMask
from rpsa.freezing.conflict import Signs, opposed, signs
from rpsa.freezing.exact import AttachedSteps, ExactSteps, Mask, RawSecondMoments
from rpsa.freezing.ratio import ConflictRatio, FrozenRatio
from rpsa.parameters import trainable_parameters
from rpsa.sharding import is_sharded, local, shard_like, sum_over_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NonFinite:
    """How many steps had a NaN or an infinity in their gradient; the first of them, and a parameter that had it."""

    steps: int
    first_step: int
    parameter: str


class GradientWatch:
    """Sees each complete gradient before it is masked.

    Args:
        names: of the parameters.
        device: of their gradients.
        sharded: whether gradients are shards, so that norms are summed over ranks.
    """

    def __init__(self, names: Sequence[str], device: torch.device, *, sharded: bool = False) -> None:
        self._names, self._sharded = list(names), sharded
        self.norm = torch.zeros((), device=device)
        """L2 norm of the last gradient, over all ranks; a scalar on the device."""
        self._found = torch.tensor([0, -1, -1], device=device)  # steps, the first one, its parameter's place
        self._host = torch.tensor([0, -1, -1], pin_memory=device.type == "cuda")
        self._said = 0

    def see(self, gradients: Mapping[str, Tensor | None], step: int) -> None:
        """Call it at every step; what it finds on a GPU is logged one step later."""
        zero = torch.zeros_like(self.norm)
        present = {name: local(g) for name in self._names if (g := gradients[name]) is not None}
        norms = dict(
            zip(present, torch._foreach_norm(list(present.values())) if present else [], strict=True)
        )
        squares = torch.stack([norms.get(name, zero).to(zero) for name in self._names]).square()
        squares = sum_over_shards(squares, sharded=self._sharded).to(zero)
        self.norm = squares.sum().sqrt()
        bad = ~squares.isfinite()
        is_first = bad.any() & (self._found[1] < 0)
        self._found[0] += bad.any()
        self._found[1] = torch.where(is_first, step, self._found[1])
        self._found[2] = torch.where(is_first, bad.int().argmax(), self._found[2])
        self._host.copy_(self._found, non_blocking=True)
        self._say()

    def _say(self) -> None:
        steps, first, place = self._host.tolist()
        if steps > self._said == 0:
            log.warning(
                "the gradient of %r is not finite at step %d: look at the batch, the learning rate and the dtype; "
                "such steps are counted",
                self._names[place],
                first,
            )
        self._said = steps

    @property
    def non_finite(self) -> NonFinite | None:
        """What was found so far; on a GPU it may lack the last step."""
        steps, first, place = self._host.tolist()
        return NonFinite(steps, first, self._names[place]) if steps else None

    def load(self, found: NonFinite | None) -> None:
        """Go on from there."""
        if found is None:
            self._host.copy_(torch.tensor([0, -1, -1]))
        else:
            self._host.copy_(
                torch.tensor([found.steps, found.first_step, self._names.index(found.parameter)])
            )
        self._found.copy_(self._host)
        self._said = int(self._host[0])


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
        RPSAError: the scores do not fit the model, the ranking does not fit them, or a parameter's gradient would be
            sparse.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: FisherDiagonal,
        ratio: FrozenRatio | None = None,
        *,
        ranking: FisherDiagonal | None = None,
        gradient_only: bool = settings.GRADIENT_ONLY.default,
        frozen_moments: settings.FrozenMoments = settings.FROZEN_MOMENTS.default,
        zero_fisher: settings.ZeroFisher = settings.ZERO_FISHER.default,
    ) -> None:
        check_type("model", model, nn.Module, "a torch module")
        check_type(
            "fisher", fisher, FisherDiagonal, "a FisherDiagonal, as FisherDiagonal.load(folder) returns it"
        )
        if ratio is not None and not hasattr(ratio, "initial"):
            raise RPSAError(f"ratio is {ratio!r}: give ConstantRatio(0.6), or ConflictRatio()")
        if ranking is not None:
            check_type("ranking", ranking, FisherDiagonal, "a FisherDiagonal, as control_scores returns it")
        settings.check(settings.FROZEN_MOMENTS, frozen_moments)
        settings.check(settings.ZERO_FISHER, zero_fisher)
        fisher.check(model)
        if ranking is not None:
            check_ranking(ranking, fisher)
        _refuse_sparse_gradients(model)
        self._trainable = trainable_parameters(model)
        self.parameters = {name: self._trainable[name] for name in fisher}
        self.sharded = is_sharded(self.parameters)
        self.ratio: FrozenRatio = ConflictRatio() if ratio is None else ratio
        self.gradient_only = gradient_only
        self.zero_fisher = zero_fisher
        self.step = 0
        self.conflict: float | None = None
        """c of the last measurement; None before the first, and where a gradient was not finite."""
        device = next(iter(self.parameters.values())).device
        scores = self._shards(fisher)
        self._fisher_scores = scores
        self._support: Mask = {}
        self._scores = scores if ranking is None else self._shards(ranking)
        self._ranking = Ranking(self._scores.values(), sharded=self.sharded, device=device)
        self._fisher_nonzero = (
            self._ranking if ranking is None else Ranking(scores.values(), sharded=self.sharded)
        ).nonzero
        if self._ranking.nonzero == 0:
            raise RPSAError("every Fisher score is zero: nothing can be frozen; check the labels of D_ref")
        self._raw = RawSecondMoments(self.parameters) if frozen_moments == "raw" else None
        self._watch = GradientWatch(list(self.parameters), device, sharded=self.sharded)
        self._reference: dict[str, Signs] | None = None
        self._captured_at = -1
        self._attached: list[AttachedSteps] = []
        self._stepped: set[Optimizer] = set()
        self._k = math.nan
        self._mask: Mask = {}
        self._set_ratio(self.ratio.initial())

    def _shards(self, scores: FisherDiagonal) -> dict[str, Tensor]:
        """This rank's part of the scores, where they are: only a change of k reads them."""
        return {name: shard_like(scores.scores[name], p) for name, p in self.parameters.items()}

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
        return self._ranking.nonzero

    @property
    def mask(self) -> Mask:
        """What is frozen, by parameter, of this rank's shard: F > tau, one bit an element. A new one for each k."""
        return self._mask

    def frozen(self, name: str) -> Tensor:
        """Bool, of this rank's shard of the parameter; True = frozen."""
        return self._mask[name].unpack()

    def frozen_counts(self) -> dict[str, int]:
        """Frozen elements of each parameter, over all ranks."""
        device = self._watch.norm.device
        counts = torch.stack([bits.counts().sum().to(device) for bits in self._mask.values()])
        return dict(zip(self._mask, sum_over_shards(counts, sharded=self.sharded).tolist(), strict=True))

    def _set_ratio(self, k: float) -> None:
        if k == self._k:
            return
        self._k = k
        self._tau = self._ranking.value(threshold_rank(self.nonzero, k))
        before, self._mask = self._mask, self._new_mask()
        for steps in self._attached:
            steps.mask_changed(before, self._mask)

    def _new_mask(self) -> Mask:
        mask = {}
        for name, score in self._scores.items():
            score = score.to(self.parameters[name].device)
            mask[name] = BitMask.compare(score, "greater", self._tau)
            if self.zero_fisher == "frozen":
                mask[name] |= BitMask.pack(score == 0)
        return mask

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
        """Keep the signs of the gradients that are there now (g_R), and set all of the model's gradients to None.

        Parameters without scores are among them: nothing is to be trained on D_ref.
        """
        if not self._support:
            self._support = {
                name: BitMask.compare(score.to(self.parameters[name].device), "greater", 0.0)
                for name, score in self._fisher_scores.items()
            }
        gradients = self._gradients()
        self._reference = signs(gradients, self._support)
        self._reference_norm = _norm(gradients).to(self._watch.norm.device)
        self._captured_at = self.step
        for parameter in self._trainable.values():
            parameter.grad = None

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Measure c and update k, if g_R was captured for this step; then zero frozen elements' gradients.

        Call it once a step, on the complete gradient g_S, before clipping. A gradient that is not finite is logged
        and counted (`non_finite`), and c is not measured on it.

        Raises:
            RPSAError: no optimizer is attached, or a gradient is sparse.
        """
        self.check_attached()
        gradients = self._gradients()
        self._watch.see(gradients, self.step)
        if self._reference is not None:
            self._measure(gradients, self._reference)
            self._reference = None
        if self._raw is not None:
            self._raw.keep(gradients, self._mask)
        else:
            for name, gradient in gradients.items():
                if gradient is not None:
                    self._mask[name].clear_(local(gradient))  # not a product: inf x 0 is NaN

    def _measure(self, gradients: Mapping[str, Tensor | None], reference: Mapping[str, Signs]) -> None:
        broken = torch.stack([~self._reference_norm.isfinite(), ~self._watch.norm.isfinite()])
        opposing = opposed(reference, gradients).to(broken.device)
        counts = torch.cat([opposing.reshape(1), broken.to(torch.int64)])
        count, *broken_here = sum_over_shards(counts, sharded=self.sharded).tolist()
        if any(broken_here):
            self.conflict = None
            which = " and ".join(n for n, b in zip(("reasoning", "safety"), broken_here, strict=True) if b)
            log.warning(
                "step %d: the %s gradient is not finite: c is not measured, k stays %g",
                self.step,
                which,
                self._k,
            )
            return
        self.conflict = count / self._fisher_nonzero
        self._set_ratio(self.ratio.update(self.conflict))

    def _gradients(self) -> dict[str, Tensor | None]:
        gradients = {name: parameter.grad for name, parameter in self.parameters.items()}
        for name, gradient in gradients.items():
            if gradient is not None and gradient.is_sparse:
                raise RPSAError(f"the gradient of {name!r} is sparse: build its module with sparse=False")
        return gradients

    @property
    def gradient_norm(self) -> Tensor:
        """L2 norm of the last complete gradient before it was masked: a scalar, on its device."""
        return self._watch.norm

    @property
    def non_finite(self) -> NonFinite | None:
        """The steps whose gradient held a NaN or an infinity; None if there was none."""
        return self._watch.non_finite

    # Optimizers

    def attach(self, *optimizers: Any) -> None:
        """Hook into each optimizer's `step`: all that train this model, which together make one iteration.

        Wrappers (accelerate's, Lightning's) and containers of optimizers are looked through.

        Raises:
            RPSAError: a Freezer is attached already; the optimizer has no parameter of the model, or moves weights
                outside of `step`; or `frozen_moments` is not for it.
        """
        inner = [found for optimizer in optimizers for found in _unwrapped(optimizer)]
        for optimizer in inner:
            self._check(optimizer)
        for optimizer in inner:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            ours = {name: p for name, p in self.parameters.items() if id(p) in held}
            self._attached.append(self._hooked(optimizer, ours))

    def _hooked(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> AttachedSteps:
        return ExactSteps(
            optimizer, parameters, lambda: None if self.gradient_only else self._mask, self._after_step
        )

    def _check(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self._trainable.values()):
            raise RPSAError(
                f"this {type(optimizer).__name__} trains no parameter of the freezer's model: build it from "
                "model.parameters() of the same model, after the model was wrapped or moved"
            )
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise RPSAError(
                f"{type(optimizer).__name__} swaps the weights outside of step(), in train() and eval(), where "
                "frozen elements would move: use one that does not, such as torch.optim.AdamW"
            )
        if self._raw is not None:
            self._raw.check(optimizer)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of all that the attached optimizers train to a joint norm of at most `max_norm`.

        Returns:
            The norm before, over all ranks: a scalar on the gradients' device.
        """
        parameters = [
            p for steps in self._attached for group in steps.optimizer.param_groups for p in group["params"]
        ]
        norms = nn.utils.get_total_norm([local(p.grad) for p in parameters if p.grad is not None])
        norm = sum_over_shards(norms.square(), sharded=self.sharded).sqrt().to(norms.device)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def detach(self) -> None:
        """Remove every trace from the optimizers."""
        for steps in self._attached:
            steps.detach()
        self._attached = []

    def check_attached(self) -> None:
        """Raise RPSAError unless optimizers are attached that hold every parameter that has a gradient."""
        if not self._attached:
            raise RPSAError(
                "no optimizer is attached, so that weight decay and momentum would move frozen elements: call "
                "freezer.attach(optimizer) first"
            )
        held = {name for steps in self._attached for name in steps.parameters}
        for name, parameter in self.parameters.items():
            if name not in held and parameter.grad is not None:
                raise RPSAError(
                    f"{name!r} has a gradient and is in none of the attached optimizers: give attach() all of "
                    "them, or set requires_grad to False where nothing is to be trained"
                )

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._raw is not None:
            with torch.no_grad():
                self._raw.add(optimizer)
        # several optimizers step once each in an iteration: it is a new one when the first of them steps again
        if not self._stepped or optimizer in self._stepped:
            self.step += 1
            self._stepped = set()
        self._stepped.add(optimizer)

    # Checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; between two optimizer steps."""
        found = self.non_finite
        return {
            "step": self.step,
            "frozen_ratio": self._k,
            "threshold": self._tau,
            "conflict": self.conflict,
            "ratio": self.ratio.state_dict(),
            "non_finite": asdict(found) if found else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.conflict = state["conflict"]
        self.ratio.load_state_dict(state["ratio"])
        found = state.get("non_finite")
        self._watch.load(NonFinite(**found) if found else None)
        self._set_ratio(state["frozen_ratio"])
        self._reference, self._captured_at, self._stepped = None, -1, set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Freezer":
        """A Freezer of the copied model, attached to the copied optimizers: copy all three at once."""
        copied = object.__new__(Freezer)
        memo[id(self)] = copied
        attributes = {
            name: value for name, value in vars(self).items() if name not in ("_attached", "_stepped")
        }
        vars(copied).update(copy.deepcopy(attributes, memo), _attached=[], _stepped=set())
        copied.attach(*(copy.deepcopy(steps.optimizer, memo) for steps in self._attached))
        return copied

    def __getstate__(self) -> Any:
        raise RPSAError("a Freezer is not pickled: save its state_dict(), and make a new one")


def check_ranking(ranking: FisherDiagonal, fisher: FisherDiagonal) -> None:
    """Raise RPSAError unless `ranking` scores what `fisher` does, by name and shape."""
    for first, second, lack in ((fisher, ranking, "has no scores of"), (ranking, fisher, "scores")):
        for name in first:
            if name not in second.scores:
                raise RPSAError(
                    f"ranking: it {lack} {name!r}, which the Fisher {'scores' if first is fisher else 'does not'}; "
                    "give a tensor for each parameter that the Fisher scores"
                )
    for name, score in ranking.scores.items():
        if score.shape != fisher.scores[name].shape:
            raise RPSAError(
                f"ranking: {name!r} has scores of shape {tuple(score.shape)}, the parameter is "
                f"{tuple(fisher.scores[name].shape)}"
            )


def _unwrapped(optimizer: Any) -> list[Optimizer]:
    """What steps by itself: torch optimizers with hooks, inside of wrappers and containers."""
    if inner := getattr(optimizer, "optimizers", None):
        return [found for part in inner for found in _unwrapped(part)]
    if isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer):
        return [optimizer]
    if hasattr(optimizer, "optimizer"):
        return _unwrapped(optimizer.optimizer)
    raise RPSAError(
        f"{type(optimizer).__name__} is not a torch.optim.Optimizer, and wraps none: attach() needs one"
    )


def _refuse_sparse_gradients(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.sparse
            and module.weight.requires_grad
        ):
            raise RPSAError(f"the gradient of {name!r} would be sparse: build it with sparse=False")


def _norm(gradients: Mapping[str, Tensor | None]) -> Tensor:
    """Of this rank's shards, to see whether they are finite: a scalar on their device."""
    present = [local(g) for g in gradients.values() if g is not None]
    if not present:  # of which _foreach_norm takes no list
        return torch.zeros(())
    norms = [norm.float().to(present[0].device) for norm in torch._foreach_norm(present)]
    whole: Tensor = torch.stack(norms).norm()
    return whole
