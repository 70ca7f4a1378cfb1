"""Compact training: the optimizer is given the trainable elements alone.

A frozen element needs no gradient, no moment and no master copy, and it cannot move, since nothing that could move it
exists. The trainable elements of each tensor are gathered into a 1-D master in fp32, which takes the tensor's place in
the optimizer; its gradient is gathered as soon as autograd has completed it, and the whole one is freed; after a step
the values are written back. The model may be in bf16: frozen elements keep the checkpoint's own bits.

    model's parameter  -- select, when attached -->  master in the optimizer
    parameter.grad     -- select, in a hook     -->  master.grad        parameter.grad = None
    parameter          <-- scatter, after a step --  master

A new k changes which elements a master holds. Master and moments are then spread over a tensor of the whole shape (of
the model's weights and of zeros), and gathered by the new mask: what trains on keeps its own, what thaws starts anew.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rpsa import settings
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.bits import NUMPY_ON, as_words, know_counts
from rpsa.freezing.exact import MARK, AttachedSteps, Mask
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import FrozenRatio
from rpsa.sharding import local, world_size

ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""These treat each element by itself (AdamW is an Adam): a part of a tensor trains as it would in the whole."""

_STATE = "rpsa"


class CompactFreezer(Freezer):
    """A `Freezer` whose optimizer holds trainable elements only; the loop is the same, but for clipping.

        freezer = CompactFreezer(model, fisher, ConstantRatio(0.6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        freezer.attach(optimizer)  # from here on it holds masters in place of the model's parameters
        for batch in batches:
            safety_loss(model, batch).backward()
            freezer.mask_gradients()
            freezer.clip_grad_norm_(1.0)  # the model's own parameters have no gradients any more
            optimizer.step()
            optimizer.zero_grad()  # model.zero_grad() would leave the masters' gradients

    It trains what a `Freezer` trains, bit for bit but for the order in which clipping sums the norm. Where k changes,
    what freezes gives up its moments, and what thaws starts with moments of 0. Steps that measure the conflict have
    whole gradients. So do all steps among several ranks that do not shard the model, as theirs are whole when they are
    reduced.

    Args: as `Freezer`.

    Raises:
        RPSAError: as `Freezer`.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: FisherDiagonal,
        ratio: FrozenRatio | None = None,
        *,
        ranking: FisherDiagonal | None = None,
        zero_fisher: settings.ZeroFisher = settings.ZERO_FISHER.default,
    ) -> None:
        super().__init__(model, fisher, ratio, ranking=ranking, zero_fisher=zero_fisher)
        self.masters: dict[str, nn.Parameter] = {}
        """By name the trainable elements of a parameter, 1-D, fp32 (or wider, if it is)."""
        self._spare: dict[str, Tensor] = {}
        self._gathers_early = world_size() == 1 or self.sharded

    # Gradients

    @property
    def _keeps_whole_gradients(self) -> bool:
        # the conflict (Eq. 6) counts frozen elements too, and DDP reduces whole gradients
        return not self._gathers_early or self.reference_due or self.reference_captured

    def on_gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not self._keeps_whole_gradients:
                self._gather(name)

        return hook

    @torch.no_grad()
    def _gather(self, name: str) -> None:
        parameter, master = self.parameters[name], self.masters[name]
        if parameter.grad is None:
            return  # gathered already, or the loss does not depend on it
        if parameter.grad.is_sparse:
            raise RPSAError(f"the gradient of {name!r} is sparse: build its module with sparse=False")
        gradient, bits = local(parameter.grad), self._mask[name]
        if master.grad is not None:  # of an earlier micro-batch
            master.grad.add_(bits.select(gradient, where=False))
        elif name in self._spare and gradient.dtype == master.dtype:
            master.grad = bits.select(gradient, where=False, out=self._spare.pop(name))
        else:
            master.grad = bits.select(gradient, where=False).to(master.dtype)
        parameter.grad = None

    def _free_gradient(self, name: str) -> None:
        """After a step. On a CPU the memory is kept for the next gradient: fresh pages cost more than filling them."""
        gradient = self.masters[name].grad
        self.masters[name].grad = None
        if gradient is not None and gradient.device.type in NUMPY_ON:
            self._spare[name] = gradient

    @torch.no_grad()
    def mask_gradients(self) -> None:
        self.check_attached()
        if self._reference is not None:
            gradients = self._gradients()
            self._watch.see(gradients, self.step)
            self._measure(gradients, self._reference)
            self._reference = None
            self._gather_all()
        else:
            self._gather_all()
            held = {name: self.masters.get(name, p) for name, p in self.parameters.items()}
            self._watch.see({name: p.grad for name, p in held.items()}, self.step)

    def _gather_all(self) -> None:
        for name in self.masters:
            self._gather(name)

    # The mask and the optimizers

    def _new_mask(self) -> Mask:
        mask = super()._new_mask()
        know_counts(mask.values())
        for bits in mask.values():
            bits.keep_indices(where=False)
        return mask

    def _hooked(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> AttachedSteps:
        return _CompactSteps(self, optimizer, parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompactFreezer":
        raise RPSAError("a CompactFreezer is not copied: copy model and optimizer state, and make a new one")


class _CompactSteps:
    """One optimizer that holds masters in place of the parameters that they are gathered from."""

    def __init__(
        self, freezer: CompactFreezer, optimizer: Optimizer, parameters: dict[str, nn.Parameter]
    ) -> None:
        if hasattr(optimizer, MARK):
            raise RPSAError("a Freezer is attached to this optimizer already; detach() it first")
        if not isinstance(optimizer, ELEMENTWISE):
            raise RPSAError(
                f"{type(optimizer).__name__} does not treat each element by itself, as compact training needs: use "
                "torch.optim.AdamW, or a Freezer (compact: false)"
            )
        self.optimizer: Optimizer = optimizer
        self.parameters: Mapping[str, nn.Parameter] = parameters
        self._freezer = freezer
        self._versions: dict[str, int] = {}
        self._masters: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if not self._stays(name):
                wide = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
                self._masters[name] = nn.Parameter(self._selected(name, parameter).to(wide))
        self._swap({id(parameters[name]): master for name, master in self._masters.items()})
        for name, master in self._masters.items():
            self._move_state(parameters[name], master, partial(self._selected, name))
            self._seen(name)
        freezer.masters |= self._masters
        self._handles = [
            *(
                parameters[name].register_post_accumulate_grad_hook(freezer.on_gradient(name))  # type: ignore[no-untyped-call]
                for name in self._masters
            ),
            optimizer.register_step_pre_hook(lambda *_: self._read_changes()),
            optimizer.register_step_post_hook(lambda *_: self._write_back()),
            optimizer.register_state_dict_post_hook(lambda _, state: state | {_STATE: self._state()}),
            optimizer.register_load_state_dict_pre_hook(lambda _, state: self._load_state(state)),
        ]
        setattr(optimizer, MARK, self)

    def detach(self) -> None:
        """The optimizer holds the model's parameters again, with moments of 0 where elements were frozen."""
        for handle in self._handles:
            handle.remove()
        self._swap({id(master): self.parameters[name] for name, master in self._masters.items()})
        for name, master in self._masters.items():
            self._move_state(master, self.parameters[name], partial(self._spread, name))
            del self._freezer.masters[name]
        delattr(self.optimizer, MARK)

    def _stays(self, name: str) -> bool:
        """Whether the parameter is its own master: it is wide enough, and nothing of it will ever be frozen."""
        is_constant = self._freezer.ratio.every is None
        return (
            is_constant
            and self.parameters[name].dtype.itemsize >= 4
            and self._freezer.mask[name].number() == 0
        )

    def _selected(self, name: str, whole: Tensor) -> Tensor:
        return self._freezer.mask[name].select(local(whole), where=False)

    def _spread(self, name: str, values: Tensor) -> Tensor:
        whole = torch.zeros_like(local(self.parameters[name].detach()), dtype=values.dtype)
        self._freezer.mask[name].scatter_(values, into=whole, where=False)
        return whole

    def _swap(self, places: Mapping[int, nn.Parameter]) -> None:
        for group in self.optimizer.param_groups:
            group["params"] = [places.get(id(p), p) for p in group["params"]]

    def _move_state(
        self, source: nn.Parameter, target: nn.Parameter, change: Callable[[Tensor], Tensor]
    ) -> None:
        """Give `target` the optimizer state of `source`, with what has an entry for each element changed."""
        if source in self.optimizer.state:
            self.optimizer.state[target] = {
                key: change(value) if isinstance(value, Tensor) and value.shape == source.shape else value
                for key, value in self.optimizer.state.pop(source).items()
            }

    # A step

    @torch.no_grad()
    def _read_changes(self) -> None:
        """Weights that somebody else has written since (a checkpoint, a hand) count, not their masters."""
        for name, master in self._masters.items():
            if local(self.parameters[name].detach())._version != self._versions[name]:
                weights = self._selected(name, self.parameters[name])
                # a master is finer than bf16 weights: where it still rounds to them, nobody has written there
                same = as_words(weights) == as_words(master.detach().to(weights.dtype))
                master.copy_(torch.where(same, master, weights.to(master.dtype)))

    @torch.no_grad()
    def _write_back(self) -> None:
        was_trained = False
        for group in self.optimizer.param_groups:
            was_trained |= any(p.grad is not None for p in group["params"])
        for name, master in self._masters.items():
            self._freezer.mask[name].scatter_(
                master.detach(), into=local(self.parameters[name].detach()), where=False
            )
            self._seen(name)
            self._freezer._free_gradient(name)
        if was_trained:  # else a subclass's own step, around its parent's that was written back already
            self._freezer._after_step(self.optimizer)

    def _seen(self, name: str) -> None:
        # autograd's counter of writes in place, so that a step needs not compare weights to know that none were
        self._versions[name] = local(self.parameters[name].detach())._version

    @torch.no_grad()
    def mask_changed(self, before: Mask, now: Mask) -> None:
        """Masters and states of what still trains are kept; what thaws has the model's weights and a state of 0."""
        for name, master in self._masters.items():
            source = local(self.parameters[name].detach())

            def remapped(values: Tensor, whole: Tensor, name: str = name) -> Tensor:
                before[name].scatter_(values, into=whole, where=False)
                return now[name].select(whole, where=False)

            for key, value in self.optimizer.state.get(master, {}).items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    zeros = torch.zeros_like(source, dtype=value.dtype)
                    self.optimizer.state[master][key] = remapped(value, zeros)
            master.data = remapped(master.detach(), source.to(master.dtype, copy=True))
            self._freezer._spare.clear()

    # Checkpoints

    def _state(self) -> dict[str, Any]:
        """What an optimizer's own state lacks: the k that its shapes belong to, and masters wider than the weights."""
        return {
            "frozen_ratio": self._freezer.frozen_ratio,
            "elements": {name: master.numel() for name, master in self._masters.items()},
            "masters": {
                name: master.detach()
                for name, master in self._masters.items()
                if master.dtype != self.parameters[name].dtype
            },
        }

    @torch.no_grad()
    def _load_state(self, state: dict[str, Any]) -> dict[str, Any]:
        if _STATE not in state:
            raise RPSAError(
                "this optimizer state was not saved by compact training: start anew, or set compact: false"
            )
        saved = state[_STATE]
        self._freezer._set_ratio(saved["frozen_ratio"])
        if saved["elements"] != {name: master.numel() for name, master in self._masters.items()}:
            raise RPSAError(
                "this optimizer state was saved with another mask: the Fisher or its ranking is another one"
            )
        for name, master in self._masters.items():
            if name in saved["masters"]:
                master.copy_(saved["masters"][name])
                self._freezer.mask[name].scatter_(
                    master.detach(), into=local(self.parameters[name].detach()), where=False
                )
            else:
                master.copy_(self._selected(name, self.parameters[name]))
            self._seen(name)
        return {key: value for key, value in state.items() if key != _STATE}
