"""Null space: weights move only in directions in which a layer's inputs on D_ref have no part, or little.

Projecting gradients, as one may under plain SGD (Saha et al., 2021), is not enough under Adam: its scaling, momentum
and weight decay turn the step back. Wang et al. (2021) project Adam's step; here it is the whole movement since the
start, after every step, so that weight decay and rounding count, too.

Shapes: a linear layer's weight W is (out, in); B sequences, T positions of each, N of them tokens and not padding;
r directions.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError
from rpsa.fisher.log_probs import evaluation_mode
from rpsa.fisher.samples import Samples, read_samples
from rpsa.parameters import canonical_name, trainable_parameters
from rpsa.settings import NULLSPACE_ENERGY, check
from rpsa.sharding import is_sharded


class NullSpace:
    """Takes out of W - W* what acts on the inputs that the layer had on D_ref at the start, so that its outputs stay.

    Of a linear layer, W <- W* + (W - W*) (I - U U^T), where the columns of U span these inputs: the fewest
    eigenvectors of their uncentred covariance, over all tokens, that hold a share `energy` of it. Of an embedding, the
    rows of D_ref's tokens are put back; what has one dimension (norms, biases) is put back as a whole. Where one weight
    is both embedding and output layer, both hold. At energy 1 the model's outputs on D_ref stay as they were, and a
    layer can move only if its inputs do not span all of its space; below, they nearly stay. However small the energy,
    one direction is held.

        null_space = NullSpace(model, starting_weights(model), batches)
        optimizer.register_step_post_hook(lambda *_: null_space.project())

    Make it while the model is at its start; evaluation mode and random state are left as they were. One pass over the
    batches; meanwhile the covariances, (in, in) of every linear layer in float64, are in the CPU's memory.

    Args:
        start: W*, as `starting_weights` has them; kept, not copied.
        batches: D_ref, as for `estimate_fisher`.
        energy: above 0, at most 1.

    Raises:
        RPSAError: the model has an adapter or is sharded, or trains what is neither of a linear layer nor of an
            embedding and has several dimensions; an input is not finite, or not one row a token; the energy is
            impossible.
    """

    def __init__(
        self,
        model: nn.Module,
        start: dict[str, Tensor],
        batches: Iterable[Mapping[str, Any]],
        energy: float = NULLSPACE_ENERGY.default,
    ) -> None:
        check(NULLSPACE_ENERGY, energy, "energy")
        self.parameters = trainable_parameters(model)
        _refuse(model, self.parameters)
        self._start = start
        layers, embeddings = _layers(model, self.parameters)
        samples = read_samples(batches)
        covariances = _covariances(model, layers, samples)
        self.bases: dict[str, Tensor] = {}
        """U of each linear layer's weight, (in, r) with orthonormal columns."""
        for name in list(covariances):
            parameter = self.parameters[name]
            basis = principal_directions(covariances.pop(name).to(parameter.device), energy)
            self.bases[name] = basis.to(torch.promote_types(parameter.dtype, torch.float32))
        tokens = torch.unique(torch.cat([one.input_ids[one.attention_mask.bool()] for one in samples]))
        self._rows = {name: tokens.to(self.parameters[name].device) for name in embeddings}

    @property
    def free_share(self) -> float:
        """Of the dimensions of the linear layers' weights, how many may move."""
        free = sum(len(self.parameters[n]) * (len(basis) - basis.shape[1]) for n, basis in self.bases.items())
        return free / max(1, sum(self.parameters[name].numel() for name in self.bases))

    @torch.no_grad()
    def project(self) -> None:
        """Take out of the weights what they must not have moved by, in place: after every step of the optimizer."""
        for name, parameter in self.parameters.items():
            start = self._start[name]
            if parameter.ndim < 2:
                parameter.copy_(start)
                continue
            moved = parameter.to(torch.promote_types(parameter.dtype, torch.float32)) - start
            if name in self.bases:
                basis = self.bases[name]
                moved.addmm_(moved @ basis, basis.T, alpha=-1)
            if name in self._rows:
                moved[self._rows[name]] = 0
            parameter.copy_(moved.add_(start))


def principal_directions(covariance: Tensor, energy: float) -> Tensor:
    """The fewest eigenvectors that hold a share `energy` of the trace, by falling eigenvalue: (in, r).

    What is rounding beside the largest eigenvalue counts as 0; r is 0 only where all of it is.

    Args:
        covariance: (in, in), symmetric and not negative, in float64.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    rounding = values[0] * len(values) * torch.finfo(values.dtype).eps
    values = torch.where(values > rounding, values, 0)
    held = values.cumsum(0)
    enough = int((held < energy * held[-1]).sum()) + 1
    directions: Tensor = vectors[:, : min(enough, int(values.count_nonzero()))]
    return directions.contiguous()


def _refuse(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    where = "projection 'nullspace' is for full fine-tuning"
    if hasattr(model, "peft_config"):
        raise RPSAError(f"{where}, and this model has an adapter: train all of it, or use another projection")
    if is_sharded(parameters):
        raise RPSAError(
            f"{where} of models that are not sharded: use DDP in place of FSDP2, or another projection"
        )


def _layers(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> tuple[list[tuple[nn.Linear, str]], set[str]]:
    """Each trained linear layer with its weight's name (layers may share one), and the names of embeddings."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    linear: list[tuple[nn.Linear, str]] = []
    embeddings: set[str] = set()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in names or parameter.ndim < 2:
                continue
            if isinstance(module, nn.Linear):
                linear.append((module, names[id(parameter)]))
            elif isinstance(module, nn.Embedding):
                embeddings.add(names[id(parameter)])
            else:
                raise RPSAError(
                    f"projection 'nullspace' knows the inputs of linear layers and embeddings, and "
                    f"{canonical_name(f'{path}.{own}')!r} is of a {type(module).__name__}: freeze it, or use another "
                    "projection"
                )
    return linear, embeddings


def _covariances(
    model: nn.Module, layers: list[tuple[nn.Linear, str]], data: list[Samples]
) -> dict[str, Tensor]:
    """X^T X of each weight's inputs X (N, in) on all data: float64, (in, in), on the CPU."""
    sums = {name: torch.zeros(2 * (layer.in_features,), dtype=torch.float64) for layer, name in layers}
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with (
        _collecting(layers, sums) as is_token,
        torch.random.fork_rng(devices),
        torch.no_grad(),
        evaluation_mode(model),
    ):
        for samples in data:
            mask = samples.attention_mask.to(device)
            is_token[:] = [mask.flatten().bool()]
            model(input_ids=samples.input_ids.to(device), attention_mask=mask, use_cache=False)
    for name, covariance in sums.items():
        if not bool(covariance.isfinite().all()):
            raise RPSAError(
                f"on D_ref the inputs of {name!r} are not finite: look at the model and its dtype"
            )
    return sums


@contextmanager
def _collecting(layers: list[tuple[nn.Linear, str]], sums: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """Within, every call of a layer adds to its sum; yields where to put which rows of the batch are tokens, (B T,)."""
    is_token: list[Tensor] = []

    def listening(name: str) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            [mask] = is_token
            rows = args[0].reshape(-1, args[0].shape[-1])
            if len(rows) != len(mask):
                raise RPSAError(
                    f"projection 'nullspace' needs one input a token, and {name!r} has {len(rows)} for {len(mask)}: "
                    "freeze it, or use another projection"
                )
            tokens_ND = rows[mask].double()
            sums[name] += (tokens_ND.T @ tokens_ND).cpu()

        return add

    handles = [layer.register_forward_pre_hook(listening(name)) for layer, name in layers]
    try:
        yield is_token
    finally:
        for handle in handles:
            handle.remove()
