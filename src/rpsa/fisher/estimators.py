"""Eq. 4: the diagonal of the empirical Fisher information on a model's own responses (section 3.1).

F_i = 1/N sum over samples of 1/|y| sum over t of (d log p(y_t | x, y_<t) / d theta_i)^2

Three estimators:

- `token_signs`: one backward pass of sum_t e_t log p_t with random signs e_t = +-1, squared. The cross terms
  vanish in expectation, so it is unbiased. With m probes the response tokens are dealt to m groups in turn,
  each group has its own backward pass over the same graph, and the squares are summed; exact if m >= |y|.
- `per_token`: Eq. 4 as it stands, with |y| gradients a sample.
- `per_sequence`: |y| times the squared mean gradient, which up to that factor is what many implementations call
  the Fisher. All signs are +1: right in expectation on text that the model sampled itself, up to |y| times too
  large elsewhere.

The first and the last take whole batches where the model's modules are known (`hooked`), and one sequence at
a time elsewhere (`loop`); both give the same numbers.
"""

import logging
import re
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from rpsa.errors import RPSAError, check_type
from rpsa.evaluation_mode import evaluation_mode, is_checkpointed
from rpsa.fisher.config import FisherConfig
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimation import Estimation
from rpsa.fisher.origin import sampled_weights
from rpsa.fisher.overlap import split_half_overlap
from rpsa.fisher.samples import Samples, data_fingerprint, read_samples, refuse_foreign_ids
from rpsa.parameters import canonical_name, fingerprint, trainable_parameters
from rpsa.sharding import gather_objects, without_ddp

__all__ = ["FisherConfig", "estimate_fisher"]

logger = logging.getLogger(__name__)


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: FisherConfig = FisherConfig(),  # noqa: B008  (frozen)
) -> FisherDiagonal:
    """Estimate Eq. 4 on the response tokens of `batches`.

    Among several ranks (`torch.distributed`) all of them call it with the same batches and share the work. The
    model may be wrapped in DDP or sharded by `fully_shard`; the scores then have the parameters' own shards.

    Args:
        model: called as `model(input_ids=..., attention_mask=..., use_cache=False)`, its result read from
            `.logits`, (B, T, V), with dropout off; the virtual tokens of PEFT's prompt tuning and P-tuning are left
            out. Parameters, gradients and flags are the same afterwards.
        batches: dicts of `input_ids`, `attention_mask` and `labels`, (B, T) integer tensors, right-padded;
            labels are unshifted and -100 where a token is not part of the response. |y| counts labels at
            positions >= 1. Optional `sample_ids`, B strings; the default is the running index. All batches
            are kept in memory.
        config: the estimator and its settings.

    Returns:
        float32 scores of every parameter in scope; up to rounding, neither batching nor padding changes them.
        The manifest's "estimation" tells samples and tokens used, samples skipped, and `split_half`: for
        several k the overlap between the top k of even-numbered and of odd-numbered samples (chance: k). Where the
        precision is not fp32, `overlap_with_fp32` is that of both precisions on the start of the first sample.

    Raises:
        RPSAError: an argument has not the form above; the model's logits are not those of the ids, token by
            token, and of nothing later; no parameter is in scope, a sample has no response token, gradient
            checkpointing is reentrant, TF32 is asked for without CUDA, a sample is not finite and `on_nonfinite` is
            "stop", or ranks have different samples.
    """
    started = time.perf_counter()
    check_type("model", model, nn.Module, "a loaded model")
    check_type("config", config, FisherConfig, "a FisherConfig")
    model = without_ddp(model)
    parameters = _in_scope(model, config.scope)
    _refuse_reentrant_checkpointing(model)
    data = read_samples(batches)
    _refuse_different_data(data)
    refuse_foreign_ids(model, "the samples", max(int(samples.input_ids.max()) for samples in data))
    _refuse_tf32_without_cuda(model, config)
    estimation = Estimation(model, parameters, data, config)
    with evaluation_mode(model), torch.enable_grad():
        estimation.run()
    summary = {
        "estimator": config.estimator,
        "probes": config.probes,
        "seed": config.seed,
        "scope": config.scope,
        "precision": config.precision,
        **_counts(data, estimation.excluded),
        "split_half": split_half_overlap(*estimation.squares.sampled_halves()),
        **({"overlap_with_fp32": estimation.overlap_with_fp32} if config.precision != "fp32" else {}),
        "path": estimation.path,
        "seconds": round(time.perf_counter() - started, 3),
    }
    logger.info("Fisher estimation: %s", summary)
    weights = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    manifest = {
        "estimation": summary,
        "fingerprint": fingerprint(weights),
        "weights": sampled_weights(weights),
        "adapter_fingerprint": _adapter_fingerprint(model),
        "data_fingerprint": data_fingerprint(data),
        "versions": {"torch": torch.__version__, "rpsa": version("rpsa")},
    }
    return FisherDiagonal(estimation.squares.means(summary["samples"]), manifest=manifest)


def _in_scope(model: nn.Module, scope: str | None) -> dict[str, nn.Parameter]:
    trainable = trainable_parameters(model)
    if not trainable:
        raise RPSAError("the model has no trainable parameter: set requires_grad where it will be trained")
    chosen = {name: p for name, p in trainable.items() if scope is None or re.search(scope, name)}
    if not chosen:
        example = next(iter(trainable))
        raise RPSAError(f"fisher.scope {scope!r} matches no trainable parameter (there is {example!r}, ...)")
    return chosen


def _refuse_different_data(data: list[Samples]) -> None:
    """A rank that has other samples, or as many in other batches, would leave its part out or wait for ever."""
    ours = (data_fingerprint(data), [samples.ids for samples in data])
    if any(theirs != ours for theirs in gather_objects(ours)):
        raise RPSAError(
            "the ranks have different samples: give estimate_fisher the same batches on all of them"
        )


def _refuse_tf32_without_cuda(model: nn.Module, config: FisherConfig) -> None:
    device = next(model.parameters()).device.type
    if config.precision == "tf32" and device != "cuda":
        raise RPSAError(
            f"fisher.precision is tf32, which only CUDA has, and the model is on {device}: use fp32"
        )


def _refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """A reentrant checkpoint has its own backward pass: a weight shared across two would be squared twice."""
    for module in model.modules():
        if is_checkpointed(module):
            keywords = getattr(module._gradient_checkpointing_func, "keywords", {})
            if keywords.get("use_reentrant", True):
                raise RPSAError(
                    "reentrant gradient checkpointing squares shared weights wrongly: call "
                    'gradient_checkpointing_enable({"use_reentrant": False})'
                )


def _counts(data: list[Samples], excluded: Mapping[int, str]) -> dict[str, Any]:
    lengths = {
        place: length
        for samples in data
        for place, length in zip(samples.places, samples.response_lengths.tolist(), strict=True)
        if place not in excluded
    }
    skipped = [excluded[place] for place in sorted(excluded)]
    return {"samples": len(lengths), "tokens": sum(lengths.values()), "skipped": skipped}


def _adapter_fingerprint(model: nn.Module) -> str | None:
    return fingerprint(trainable_parameters(model)) if hasattr(model, "peft_config") else None
