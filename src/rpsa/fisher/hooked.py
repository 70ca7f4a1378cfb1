"""Hooks: per-sequence squared gradients of a whole batch in one backward pass.

Eq. 4 squares the gradient of each sequence by itself, and autograd only gives the sum over a batch: squared, that is
another quantity, and a backward pass for each sequence gives up what a batch gains. But a weight's gradient in one
sequence is a small function of the module's input x and of the gradient delta at its output; of a linear layer it is
delta^T x, summed over tokens. Both are there for every sequence when the backward pass comes by. So the parameters are
told not to require grad (autograd then never forms the gradients that nobody wants), each module's output goes through
an identity of ours (`_Tap`), and the identity's backward pass hands x and delta to a rule that knows the module's kind.

What no rule knows is `NotHookable`, and the whole model takes the loop (`rpsa.fisher.loop`).

Shapes: B rows of a batch, one a sequence; T positions of each (all dimensions between the batch's and the features'
together); I inputs and O outputs of a module, so that its weight is OI; D columns of an embedding; N the batch's B x T
tokens.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.fisher.squares import SquaredGradients
from rpsa.parameters import canonical_name
from rpsa.sharding import unsharded_type

Rule = Callable[[Tensor, Tensor], None]
"""Takes a module's input and the gradient at its output, and adds the squares."""

# Elements of a piece of a gradient: in a CPU's cache with the sums it is added to, elsewhere few kernels count more.
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 24
_CPU_STACK = 1 << 18


class NotHookable(Exception):
    """This model, or this use of a module, needs the loop; the message says why."""


class Hooks:
    """Knows how to square the gradients of `parameters` (by canonical name) of `model`, sequence by sequence.

    Raises:
        NotHookable: a parameter is shared by two modules, or belongs to a module of an unknown kind.
    """

    def __init__(self, model: nn.Module, parameters: Collection[str], squares: SquaredGradients) -> None:
        self._squares = squares
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._calls: Counter[str] = Counter()
        self._batch_size = 0
        self._is_forward = False
        self._problem: str | None = None
        self._autocast: dict[str, Any] = {}
        self._modules: dict[str, tuple[nn.Module, Rule]] = {}
        for prefix, (module, names) in _owners(model, parameters).items():
            self._modules[prefix] = (module, self._completed(self._rule(prefix, module, names), names))

    def __len__(self) -> int:
        return len(self._modules)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks on. No parameter should require grad meanwhile: autograd need not form their gradients."""
        handles = [
            module.register_forward_hook(self._tap(name, rule), prepend=True)
            for name, (module, rule) in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._scratch.clear()

    @contextmanager
    def forward_pass(self, batch_size: int, device_type: str) -> Iterator[None]:
        """The model's forward pass: each module may be called once in it, on tensors of `batch_size` rows.

        A checkpoint's recomputation in the backward pass runs the hooks again and is not counted.

        Raises:
            NotHookable: at the end, as a sharded model must not be left in the midst of a forward pass.
        """
        self._calls.clear()
        self._problem = None
        self._batch_size = batch_size
        self._is_forward = True
        self._autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }
        try:
            yield
        finally:
            self._is_forward = False
        if self._problem:
            raise NotHookable(self._problem)

    def _tap(self, name: str, rule: Rule) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if self._is_forward:
                self._calls[name] += 1
                self._problem = self._problem or self._problem_of(name, inputs, output)
            if self._problem:
                return output
            # what a forward hook returns takes the place of the module's output
            tapped: Tensor = _Tap.apply(output, inputs[0], self._anchor, rule)  # type: ignore[no-untyped-call]
            return tapped

        return hook

    def _problem_of(self, name: str, inputs: tuple[Any, ...], output: Any) -> str | None:
        if self._calls[name] > 1:
            return f"{name} is called twice in one forward pass"
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            return f"{name} does not map one tensor to one tensor"
        if inputs[0].shape[:1] != (self._batch_size,) or output.shape[:1] != (self._batch_size,):
            return f"{name} has inputs whose first dimension is not the batch"
        return None

    def _completed(self, rule: Rule, names: Mapping[str, str]) -> Rule:
        # A module is called once, so that after its rule nothing more of its parameters comes in this pass: the sums
        # of a sharded one are handed on now, and no rank ever holds those of two modules whole.
        def complete(x: Tensor, delta: Tensor) -> None:
            rule(x, delta)
            for name in names.values():
                self._squares.complete(name)

        return complete

    def _rule(self, prefix: str, module: nn.Module, names: Mapping[str, str]) -> Rule:
        # Exact types: a subclass may scale its output or use its weight in another way.
        kind = unsharded_type(module)
        if kind is nn.Linear:
            return self._linear(names)
        if (
            isinstance(module, nn.Embedding)
            and kind is nn.Embedding
            and not (module.max_norm or module.scale_grad_by_freq or module.sparse)
        ):
            return self._embedding(names["weight"], module.padding_idx)
        if kind.__name__.endswith(("RMSNorm", "LayerNorm")):
            return self._norm(module, names)
        raise NotHookable(f"{prefix} is a {kind.__name__}")

    def _groups(self, *names: str) -> Iterator[tuple[int, slice]]:
        """Each group of the batch and its rows; what is added of `names` meanwhile is counted in its half."""
        for group, rows in enumerate(self._squares.groups):
            yield group, rows
            for name in names:
                self._squares.look(name, group)

    def _linear(self, names: Mapping[str, str]) -> Rule:
        def rule(x: Tensor, delta: Tensor) -> None:
            # under autocast the module has cast its input itself, and delta says to what
            x_BTI = x.to(delta.dtype).reshape(len(x), -1, x.shape[-1])
            delta_BOT = delta.reshape(len(delta), -1, delta.shape[-1]).transpose(1, 2)
            if "weight" in names:
                self._weight(names["weight"], x_BTI, delta_BOT)
            if "bias" in names:
                self._stacks(names["bias"], delta_BOT.sum(dim=2))

        return rule

    def _weight(self, name: str, x_BTI: Tensor, delta_BOT: Tensor) -> None:
        """The squares of each row's `delta_OT @ x_TI`.

        Small ones are formed all at once. Of large ones B gradients would not fit, and even one of them leaves the
        cache between being written, squared and added: so a few of its O rows at a time go through one scratch buffer,
        for every sequence, while the sums that they are added to are still near.
        """
        (B, O, _), I = delta_BOT.shape, x_BTI.shape[-1]
        is_cpu = delta_BOT.device.type == "cpu"
        if (_CPU_STACK if is_cpu else _DEVICE_BLOCK) >= B * O * I:
            self._stacks(name, torch.bmm(delta_BOT, x_BTI))
            return
        height = max(1, (_CPU_BLOCK if is_cpu else _DEVICE_BLOCK) // I)
        for group, rows in self._groups(name):
            xs_TI = x_BTI[rows].unbind()
            for start in range(0, O, height):
                block = slice(start, min(start + height, O))
                gradient_OI = self._buffer(delta_BOT, block.stop - start, I)
                add = self._squares.into(name, group, block)
                for delta_OT, x_TI in zip(delta_BOT[rows, block].unbind(), xs_TI, strict=True):
                    add(torch.mm(delta_OT, x_TI, out=gradient_OI))

    def _stacks(self, name: str, gradients: Tensor) -> None:
        """The squares of all rows' gradients, (B, *shape of the parameter)."""
        for group, rows in self._groups(name):
            self._squares.add_stack(name, group, gradients[rows])

    def _embedding(self, name: str, padding_idx: int | None) -> Rule:
        def rule(x: Tensor, delta: Tensor) -> None:
            # x is token ids here, (B, T), and delta (B, T, D)
            if padding_idx is not None:  # autograd leaves that row without a gradient
                delta = delta.masked_fill((x == padding_idx).unsqueeze(-1), 0)
            for group, rows in self._groups(name):
                self._squares.add_rows(name, group, *_gradients_by_token(x[rows], delta[rows]))

        return rule

    def _norm(self, module: nn.Module, names: Mapping[str, str]) -> Rule:
        def rule(x: Tensor, delta: Tensor) -> None:
            # the module's own code runs once more: in the precision that it ran in, as the backward pass has another
            with torch.autocast(**self._autocast):
                by_name = _gradients_by_row(module, list(names), x, delta)
            for local, gradients in by_name.items():
                self._stacks(names[local], gradients)

        return rule

    def _buffer(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """A (rows, columns) piece of the one scratch buffer of this device and dtype."""
        key = (like.device, like.dtype)
        if key not in self._scratch or self._scratch[key].numel() < rows * columns:
            self._scratch[key] = like.new_empty(rows * columns)
        return self._scratch[key][: rows * columns].view(rows, columns)


class _Tap(torch.autograd.Function):
    """The identity on a module's output, whose backward pass also hands input and gradient to a rule.

    Not a module's full backward hook, which would keep the input by itself: saved through autograd, a non-reentrant
    checkpoint drops and recomputes it like any activation. The anchor makes the first module's output require grad,
    although neither token ids nor any parameter do; without it there would be no backward pass at all.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, rule: Rule) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rule = rule
        return output.detach()  # not a view: what follows may work in place

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.rule(x.detach(), delta)
        return delta, None, None, None


class _Forward(nn.Module):
    """A module's bare forward: its hooks, ours among them, stay out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module.forward(x)


def _gradients_by_token(ids: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """An embedding's gradient in each sequence: ids of tokens, (N,), and fp32 gradients of their rows, (N, D).

    A token that comes twice in a sequence has the sum of both deltas for its gradient, and it is the sum that is
    squared. So deltas are grouped by pairs of token and sequence: sorted, pairs that are equal stand side by side, and
    the running count of changes numbers them. The result has a row for each of the N tokens, so that nothing waits for
    the device to say how many pairs differ: those left over are zeros of token 0, which add nothing.
    """
    ids_BT = ids.reshape(len(ids), -1)
    row_B1 = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    pair_N, order_N = (ids_BT * len(ids) + row_B1).flatten().sort()
    is_next = pair_N.diff() != 0
    place_N = torch.cat([is_next.new_zeros(1), is_next]).cumsum(0)
    gradient_ND = torch.zeros(len(pair_N), delta.shape[-1], device=delta.device)
    gradient_ND.index_add_(0, place_N, delta.flatten(0, -2)[order_N].float())
    return torch.zeros_like(pair_N).scatter_(0, place_N, pair_N // len(ids)), gradient_ND


def _gradients_by_row(module: nn.Module, names: list[str], x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """The gradients of a norm's parameters for each row of a batch, from the module's own code.

    Every family writes its RMSNorm anew, some with weight + 1: there is no formula for all. torch's own two are known;
    others are asked by autograd, with a copy of the parameters for each row, so that each copy's gradient is one
    sequence's. Broadcasting takes copies in one call; what minds their shape is called row by row under vmap.
    """
    if unsharded_type(module) in (nn.LayerNorm, nn.RMSNorm):
        return _gradients_by_scaling(module, names, x, delta)
    gradients = _gradients_by_broadcasting(module, names, x, delta)
    return gradients if gradients is not None else _gradients_by_vmap(module, names, x, delta)


def _gradients_by_scaling(module: nn.Module, names: list[str], x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Of a norm that gives weight * normalised + bias: with weight 1 and bias 0 it says what normalised is."""
    neutral = {
        name: torch.full_like(parameter, float(name == "weight"), requires_grad=False)
        for name, parameter in module.named_parameters()
    }
    scaled = {"bias": delta}
    if "weight" in names:
        scaled["weight"] = delta * torch.func.functional_call(_Forward(module), _in_forward(neutral), (x,))
    return {name: _sum_to(scaled[name], len(module.get_parameter(name).shape)) for name in names}


def _sum_to(values: Tensor, dimensions: int) -> Tensor:
    """The sum over all but the first and the last `dimensions`."""
    between = range(1, values.ndim - dimensions)
    return values.sum(dim=list(between)) if between else values


def _gradients_by_broadcasting(
    module: nn.Module, names: list[str], x: Tensor, delta: Tensor
) -> dict[str, Tensor] | None:
    """With a parameter for each row; None where the module's code takes only its own shape."""
    with torch.enable_grad():
        weights = {}
        for name in names:
            weight = module.get_parameter(name).detach()
            wide = weight.view(*[1] * (x.ndim - weight.ndim), *weight.shape)
            weights[name] = wide.expand(len(x), *wide.shape[1:]).requires_grad_()
        try:
            output = torch.func.functional_call(_Forward(module), _in_forward(weights), (x,))
        except RuntimeError:
            return None
        if output.shape != delta.shape:
            return None
        gradients = torch.autograd.grad(output, list(weights.values()), delta.to(output.dtype))
    shapes = [(len(x), *module.get_parameter(name).shape) for name in names]
    return {n: g.reshape(shape) for n, g, shape in zip(names, gradients, shapes, strict=True)}


def _gradients_by_vmap(module: nn.Module, names: list[str], x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    bare = _Forward(module)

    def call(weights: dict[str, Tensor], row: Tensor) -> Any:
        return torch.func.functional_call(bare, _in_forward(weights), (row,))

    with torch.enable_grad():
        weights = {
            name: weight.detach().expand(len(x), *weight.shape).requires_grad_()
            for name in names
            for weight in [module.get_parameter(name)]
        }
        output = torch.func.vmap(call)(weights, x)
        gradients = torch.autograd.grad(output, list(weights.values()), delta.to(output.dtype))
    return dict(zip(names, gradients, strict=True))


def _in_forward(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": weight for name, weight in weights.items()}


def _owners(model: nn.Module, parameters: Collection[str]) -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """The modules that own `parameters`: by name, each with {local name: canonical parameter name}."""
    wanted = {
        id(p): canonical_name(n) for n, p in model.named_parameters() if canonical_name(n) in parameters
    }
    owner_of: dict[int, str] = {}
    owners: dict[str, tuple[nn.Module, dict[str, str]]] = {}
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in wanted:
                continue
            if id(parameter) in owner_of:
                raise NotHookable(f"{prefix} shares its {local} with {owner_of[id(parameter)]}")
            owner_of[id(parameter)] = prefix
            owners.setdefault(prefix, (module, {}))[1][local] = wanted[id(parameter)]
    return owners
