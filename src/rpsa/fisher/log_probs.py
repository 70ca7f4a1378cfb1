"""log p of the response tokens: where a model's logits meet the labels, and nothing is silently out of step.

The softmax is taken in chunks of tokens: a full-size one in float32 would be 17 GB for 32k tokens and a vocabulary of
128k. Dropout is off, and gradient checkpointing stays on.

Shapes: B rows of a batch, T positions of each, V words; R = B x T rows of flattened logits, of which N predict response
tokens, C of them in one chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError
from rpsa.fisher.precision import takes_tf32
from rpsa.fisher.samples import Responses, Samples
from rpsa.parameters import keep_four_bits
from rpsa.sharding import reshard, without_ddp

_CHUNK_ELEMENTS = 1 << 24
_CHECKED_LENGTH = 64
_CAUSAL_ONLY = "only a causal language model has the log-probabilities that Eq. 4 and Eq. 6 are about"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval, and put back every module's own `training` flag at the end, exceptions included.

    Hugging Face's checkpointing layers recompute only while their own `training` flag is set. Where
    checkpointing is switched on, that one flag stays set outside of the checkpointed call and is cleared
    inside of it, in the first run and in the recomputation, so that dropout is off everywhere. Run the
    backward pass inside the context too.

    Models that checkpoint in another way run without checkpointing here: same numbers, more memory.
    """
    keep_four_bits(model)
    flags = [(module, module.training) for module in model.modules()]
    layers = [module for module in model.modules() if is_checkpointed(module)]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    try:
        model.eval()
        for layer, function in zip(layers, functions, strict=True):
            layer.training = True
            layer._gradient_checkpointing_func = _clearing_flag(layer, function)  # type: ignore[arg-type, assignment]
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = function
        for module, training in flags:
            module.training = training


def is_checkpointed(module: nn.Module) -> bool:
    """Whether `module` is a Hugging Face checkpointing layer that is switched on."""
    is_layer = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    return is_layer and bool(module.gradient_checkpointing)


def _clearing_flag(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def without_flag(*inner_args: Any, **inner_kwargs: Any) -> Any:
            training, layer.training = layer.training, False
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                layer.training = training

        return checkpoint(without_flag, *args, **kwargs)

    return run


def response_logits(
    model: nn.Module,
    samples: Samples,
    responses: Responses,
    device: torch.device,
    during_forward: AbstractContextManager[None] | None = None,
) -> tuple[Tensor, Tensor]:
    """A batch's logits, (R, V), and which of their rows predict the N response tokens, (N,) int64 on the CPU.

    The virtual tokens that PEFT puts in front of the ids (prompt tuning, P-tuning) are left out.

    Args:
        model: called as `model(input_ids=..., attention_mask=..., use_cache=False)`; its result has `.logits`,
            (B, T, V) for ids of (B, T).
        during_forward: entered around that call, and around nothing else.

    Raises:
        RPSAError: the logits are not those of the ids, token by token.
    """
    with during_forward or nullcontext():
        logits, offset = _logits(model, samples, device)
    if responses.largest >= logits.shape[2]:
        raise RPSAError(
            f"the model's logits are for {logits.shape[2]} tokens, and a response has token {responses.largest}: "
            "the ids are another tokenizer's, or the model is not a causal language model"
        )
    return logits.flatten(0, 1), responses.rows * logits.shape[1] + offset + responses.positions - 1


def response_log_probs(model: nn.Module, samples: Samples, device: torch.device) -> Tensor:
    """log p of all response tokens of a batch, (N,) as `label_log_probs` has them; see `response_logits`."""
    responses = samples.responses()
    logits, rows = response_logits(model, samples, responses, device)
    return label_log_probs(logits, rows.to(logits.device), responses.labels.to(logits.device))


@torch.no_grad()
def check_causal(model: nn.Module, samples: Samples, device: torch.device) -> None:
    """Raise RPSAError unless logits depend on no later token, as those of masked and prefix language models do.

    Seen on the first sample's first tokens: the second half is changed, and what follows the first must not be.
    """
    ids = samples.input_ids[:1, : min(_CHECKED_LENGTH, int(samples.attention_mask[0].sum()))]
    half = ids.shape[1] // 2
    values = torch.unique(ids)
    # each id by another one of the sample: ids that mean something else than text are not made up
    later = values[(torch.searchsorted(values, ids[:, half:]) + 1) % len(values)]
    found = []
    for tokens in (ids, torch.cat([ids[:, :half], later], dim=1)):
        mask = torch.ones_like(tokens)
        one = Samples(tokens, mask, tokens, samples.ids[:1], samples.places[:1])
        logits, offset = _logits(model, one, device)
        found.append(logits[0, offset + half - 1].double())
        reshard(model)
    first, second = found
    # other tokens may change how a token is rounded (experts take them together), and no more than that
    tolerance = 0.05 if is_low_precision(model, device) else 1e-4
    if bool((first - second).norm() > tolerance * (first - first.mean()).norm()):
        raise RPSAError(f"the model's logits depend on later tokens: {_CAUSAL_ONLY}")


def is_low_precision(model: nn.Module, device: torch.device) -> bool:
    is_low = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    has_tf32 = device.type == "cuda" and takes_tf32()
    return is_low or has_tf32 or torch.is_autocast_enabled(device.type)


def _logits(model: nn.Module, samples: Samples, device: torch.device) -> tuple[Tensor, int]:
    """(B, T', V), and how many of the T' positions come before those of the ids."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RPSAError(f"the model is an encoder-decoder: {_CAUSAL_ONLY}")
    ids = samples.input_ids.to(device)
    try:
        output = model(input_ids=ids, attention_mask=samples.attention_mask.to(device), use_cache=False)
    except (TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RPSAError(f"the model does not take input_ids and attention_mask alone: {reason}") from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise RPSAError(f"the model's result has no logits: {_CAUSAL_ONLY}")
    virtual = _virtual_tokens(model)
    offset = logits.shape[1] - ids.shape[1] if logits.ndim == 3 else -1
    if offset not in (0, virtual) or len(logits) != len(ids):
        raise RPSAError(
            f"the model's logits are {tuple(logits.shape)} for ids of {tuple(ids.shape)}, not one row a token: "
            f"{_CAUSAL_ONLY}"
        )
    return logits, offset


def _virtual_tokens(model: nn.Module) -> int:
    """How many PEFT puts in front; with prefix tuning they have no logits."""
    config: Any = getattr(without_ddp(model), "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def label_log_probs(logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Natural-log probabilities of `labels` under `logits[rows]`, differentiable once.

    `logits` is (R, V) of any float dtype, `rows` and `labels` are (N,) int64 with distinct rows; the result
    is (N,), float32 (float64 for float64 logits). The logits are kept as they are, without a copy; the
    softmax is recomputed in the backward pass, a chunk at a time.
    """
    result: Tensor = _LabelLogProbs.apply(logits, rows, labels)  # type: ignore[no-untyped-call]
    return result


def _chunks(rows: Tensor, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _LabelLogProbs(torch.autograd.Function):
    """d log p(label) / d logits = onehot(label) - softmax, so that the backward pass needs the normalisers alone."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, rows_N: Tensor, labels_N: Tensor) -> Tensor:
        log_probs = []
        normalizers = []
        for chunk in _chunks(rows_N, logits_RV.shape[1]):
            logits_CV = _widened(logits_RV.index_select(0, rows_N[chunk]))
            normalizer_C = logits_CV.logsumexp(dim=1)
            log_probs.append(logits_CV.gather(1, labels_N[chunk, None])[:, 0] - normalizer_C)
            normalizers.append(normalizer_C)
        ctx.save_for_backward(logits_RV, rows_N, labels_N, torch.cat(normalizers))
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None]:
        logits_RV, rows_N, labels_N, normalizers_N = ctx.saved_tensors
        # made from the gradient, not from the logits: under `is_grads_batched` it has a hidden dimension more
        result_RV = gradient_N.new_zeros(logits_RV.shape, dtype=logits_RV.dtype)
        for chunk in _chunks(rows_N, logits_RV.shape[1]):
            weights_C1 = gradient_N[chunk, None]
            logits_CV = _widened(logits_RV.index_select(0, rows_N[chunk]))
            softmax_CV = logits_CV.sub_(normalizers_N[chunk, None]).exp_()
            delta_CV = (softmax_CV * -weights_C1).scatter_add_(1, labels_N[chunk, None], weights_C1)
            result_RV.index_copy_(0, rows_N[chunk], delta_CV.to(result_RV.dtype))
        return result_RV, None, None
