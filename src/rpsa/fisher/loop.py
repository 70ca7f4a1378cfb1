"""The loop: squared gradients of one sequence at a time, for any model, as autograd forms them.

Shapes: N response tokens of one sequence; C of them differentiated at once.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rpsa.fisher.squares import SquaredGradients
from rpsa.sharding import is_dtensor

logger = logging.getLogger(__name__)

_VJP_ELEMENTS = 1 << 23
_VJP_TOKENS = 32


class Loop:
    """Squares each parameter's gradient as soon as it is complete, and drops it.

    There is never a second full set of gradients, and the parts of a tied weight are summed before squaring.
    Of sharded parameters autograd only gives gradients averaged over ranks: all ranks take the same sequence.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], squares: SquaredGradients) -> None:
        self._parameters = dict(parameters)
        self._squares = squares
        self._can_batch = not squares.sharded  # what autograd sees of sharded parameters are others

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every `backward` inside adds the squares of the gradients of row 0."""
        handles = [
            parameter.register_post_accumulate_grad_hook(self._square(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _square(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad if is_dtensor(parameter.grad) else parameter.grad.to_dense()
            self._squares.add(name, 0, gradient)
            parameter.grad = None

        return hook

    def add_tokens(self, log_probs: Tensor) -> None:
        """Add 1/|y| of the squared gradient of each of one sequence's |y| log-probabilities.

        Several at once through batched vector-Jacobian products; one backward pass a token where an operation
        of the model has no batched derivative or the model is too large to hold several gradients.
        """
        seeds_NN = torch.eye(len(log_probs), dtype=log_probs.dtype, device=log_probs.device)
        seeds_NN = seeds_NN * len(log_probs) ** -0.5  # squared, the 1/|y|
        elements = sum(p.numel() for p in self._parameters.values())
        for seeds_CN in seeds_NN.split(min(_VJP_TOKENS, max(1, _VJP_ELEMENTS // elements))):
            batched = self._batched_gradients(log_probs, seeds_CN) if len(seeds_CN) > 1 else None
            if batched is None:
                for seed_N in seeds_CN:
                    torch.autograd.backward(log_probs, seed_N, retain_graph=True)
                continue
            for name, gradients in zip(self._parameters, batched, strict=True):
                for gradient in gradients if gradients is not None else ():
                    self._squares.add(name, 0, gradient)

    def _batched_gradients(self, log_probs: Tensor, seeds: Tensor) -> Sequence[Tensor | None] | None:
        if not self._can_batch:
            return None
        try:
            return torch.autograd.grad(
                log_probs,
                list(self._parameters.values()),
                seeds,
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            logger.info("one backward pass a token: no batched gradients here (%s)", error)
            self._can_batch = False
            return None


@contextmanager
def only_requiring_grad(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, exactly `parameters` require grad; afterwards flags and `.grad` of all are what they were."""
    everything = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in everything]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter in everything:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, (requires_grad, gradient) in zip(everything, before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
