"""Memory: bytes on each GPU in each stage, what stays, by the formulas below, and what comes and goes, by a dry run.

What stays in a training step with trainable parameters of b bytes each (4, as they are kept in fp32):

    weights b (and the frozen base's under LoRA) + gradients b + AdamW's moments 2 b
    + masks 1/4 (where F > 0, and what is frozen) + signs of g_R 1/4 (only from its measurement to the mask)

(the scores stay on the host). Compact training of a share s of the elements has weights of any dtype, and of its own

    masters 4 s + gradients 4 s + AdamW's moments 8 s + masks 1/8, or 1/4 if k changes

An alternative has a penalty's starting weights b and Fisher 4, or a projection's g_R b (until it is used).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from rpsa.fisher.quantile import DEVICE_BLOCK
from rpsa.fisher.squares import sums_bytes
from rpsa.freezing.audit import SAMPLED_ELEMENTS as AUDITED_ELEMENTS
from rpsa.parameters import trainable_parameters
from rpsa.plan.dry_run import (
    Precision,
    Shape,
    cache_bytes,
    decoding_peak,
    fisher_peak,
    reasoning_peak,
    sharded_peak,
    training_peak,
    warmup_peak,
)
from rpsa.plan.layers import Skeleton
from rpsa.plan.serving import activations

Sharding = Literal["one GPU", "DDP", "FSDP2"]

# Tensors of a parameter's size and dtype that an optimizer keeps (Adam's variants have two).
_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}
_GIB = 1 << 30
_CONTEXT_BYTES = _GIB
_FRAGMENTATION = 0.05
_COUNTED = 64
"""Tokens whose keys and values are looked at; all are alike."""


@dataclass(frozen=True)
class StageMemory:
    """`kept`: parts that stay, in bytes; `work`: what is there beside them at the worst moment."""

    kept: Mapping[str, int]
    work: int

    @property
    def total(self) -> int:
        return sum(self.kept.values()) + self.work

    def fits(self, gpu_memory: float) -> bool:
        """Whether it fits in so many GiB, with 1 GiB left for CUDA's context and 5% for fragmentation."""
        return self.total * (1 + _FRAGMENTATION) + _CONTEXT_BYTES <= gpu_memory * _GIB


@dataclass(frozen=True)
class Freezing:
    """What of RPSA costs memory."""

    dynamic: bool
    raw_moments: bool
    gradient_only: bool
    audit: bool
    compact: float | None = None
    """The share of the elements that is trained, if the optimizer holds no others."""
    compact_shards: bool = True
    """Whether that is so under FSDP2, too."""


@dataclass(frozen=True)
class Instead:
    """What of an alternative to freezing costs memory."""

    penalty: str | None
    projection: bool
    """Of gradients."""
    adapted: int = 0
    """Elements of the weights whose Fisher a penalty on LoRA's product keeps."""
    largest_adapted: int = 0
    directions: int = 0
    """Elements of the directions that a null space keeps, at most: where inputs fill all of a layer's space."""
    largest_directions: int = 0


@dataclass(frozen=True)
class Passes:
    """Bytes at the worst moment of a forward and backward pass beside the weights, by dry runs.

    `training` is that of the step, `reasoning` that of g_R (0 where none is measured). Both include the gradients,
    but under FSDP2, where they do not count, nor what it gathers, which is at most `gathered`.
    """

    training: int
    reasoning: int
    gathered: int = 0


@dataclass(frozen=True)
class AlignMemory:
    """One run of the align stage."""

    parameters: int
    trainable: int
    weights: int
    trainable_bytes: int
    largest: int
    """Elements of the largest trainable tensor."""
    optimizer: str
    passes: Passes
    freezing: Freezing | None
    instead: Instead | None = None
    anchored: bool = False
    """Whether each step has a pass of an anchor, which is like that of g_R."""
    reference: int = 0
    """Weights of DPO's reference model, where there is one beside the model."""

    def on(self, gpus: int, sharding: Sharding) -> StageMemory:
        """Memory of each of `gpus`. `passes` must be those of the sharding."""
        if (
            sharding == "FSDP2"
            and self.freezing
            and self.freezing.compact
            and not self.freezing.compact_shards
        ):
            return replace(self, freezing=replace(self.freezing, compact=None)).on(gpus, sharding)
        parts = gpus if sharding == "FSDP2" else 1
        kept = {
            "weights": self.weights // parts,
            "gradients": self._gradient_bytes() // parts,
            "optimizer": self._optimizer_bytes() // parts,
        }
        if self.reference:
            kept["reference model"] = self.reference // parts
        if self._masters is not None:
            kept["masters"] = self._masters // parts
        if sharding == "DDP":  # compact training gathers what is reduced, and so keeps it whole until then
            kept["buckets"] = self.trainable_bytes * (1 if self._masters is None else 2)
        signs = 0
        if self.instead and self.instead.penalty:
            kept["start"] = self.trainable_bytes // parts
            if self.instead.penalty == "fisher":
                kept["Fisher"] = 4 * self.trainable // parts
            if self.instead.penalty == "product":
                kept["Fisher"] = 4 * self.instead.adapted
        if self.instead and self.instead.directions:
            kept["start"] = self.trainable_bytes // parts
            kept["directions"] = 4 * self.instead.directions
        if self.instead and self.instead.projection:
            signs = self.trainable_bytes // parts
        if self.freezing:
            kept["masks"] = self.trainable // (4 if self.freezing.dynamic else 8) // parts
            kept["audit"] = self._audit_bytes(parts)
            signs = self.trainable // 4 // parts if self.freezing.dynamic else 0
        passes = max(
            self.passes.training + signs, self.passes.reasoning if self._measures_g_r or self.anchored else 0
        )
        passes += self.passes.gathered if sharding == "FSDP2" else -self._gradient_bytes()
        return StageMemory(kept, max(passes, signs + self._masking_bytes(), self._update_bytes(parts), 0))

    @property
    def _measures_g_r(self) -> bool:
        is_dynamic = self.freezing is not None and self.freezing.dynamic
        return is_dynamic or (self.instead is not None and self.instead.projection)

    def _optimizer_bytes(self) -> int:
        family = next((name for name in _STATES if name in self.optimizer), None)
        return self._gradient_bytes() * (2 if family is None else _STATES[family])

    @property
    def _masters(self) -> int | None:
        """fp32 masters of compact training; gradients and moments are as large."""
        share = self.freezing.compact if self.freezing else None
        return None if share is None else 4 * round(share * self.trainable)

    def _gradient_bytes(self) -> int:
        return self.trainable_bytes if self._masters is None else self._masters

    def _audit_bytes(self, parts: int) -> int:
        """The first values and the current interval's of a sample, and where it is; of a small model, all of it."""
        assert self.freezing
        if not self.freezing.audit:
            return 0
        if self.trainable // parts <= AUDITED_ELEMENTS:
            return 2 * self.trainable_bytes // parts
        return AUDITED_ELEMENTS * (2 * 4 + 8)

    def _masking_bytes(self) -> int:
        """The threshold's histogram of one block (values, bits, bins and counts in int64), or a checksum's.

        Of an alternative: products of the largest tensor in float64, with their factors where it is a projection.
        """
        if self.instead is not None and self.instead.penalty == "product":
            return self.instead.largest_adapted * (8 * 2 + 4)  # its value is taken in float64
        if self.instead is not None and self.instead.directions:
            return max(4 * 2 * self.largest, 8 * 3 * self.instead.largest_directions)
        if self.instead is not None:
            return self.largest * (8 * 3 if self.instead.projection else 8 * 2 if self.instead.penalty else 0)
        if self.freezing is None:
            return 0
        block = min(self.largest, DEVICE_BLOCK)
        threshold = block * (4 + 4 + 8 + 8) if self.freezing.dynamic else 0
        checksum = (
            block * (8 + 4 + 4 + 8) if self.freezing.audit else 0
        )  # weights, two of words, their product
        return max(threshold, checksum)

    def _update_bytes(self, parts: int) -> int:
        if self.freezing is None or self._masters is not None:
            return 0
        raw = self.trainable_bytes if self.freezing.raw_moments else 0
        copy = 0 if self.freezing.gradient_only else self.trainable_bytes
        return (raw + copy) // parts + min(self.largest, DEVICE_BLOCK) * (
            4 + 4 + 4
        )  # words of mask and change


def dry_passes(
    skeleton: Skeleton,
    shape: Shape | None,
    reference: Shape | None,
    precision: Precision,
    compact: float | None = None,
    *,
    accumulated: bool,
) -> Passes:
    """On one GPU or under DDP, of a step's batch and of g_R's (None: not asked for). The others as in `dry_run`."""

    def training(model: Any) -> int:
        assert shape
        return training_peak(model, shape, precision, compact, accumulated=accumulated)

    def reasoning(model: Any) -> int:
        assert reference
        return reasoning_peak(model, reference, precision, accumulated=accumulated)

    return Passes(skeleton.peak(training) if shape else 0, skeleton.peak(reasoning) if reference else 0)


def sharded_passes(
    lean: Skeleton, shape: Shape | None, reference: Shape | None, precision: Precision
) -> Passes:
    """Under FSDP2. `lean` is the model with its weights in the dtype that it computes in."""

    def training(model: Any) -> int:
        assert shape
        return sharded_peak(model, shape, precision, training_peak)

    def reasoning(model: Any) -> int:
        assert reference
        return sharded_peak(model, reference, precision, reasoning_peak)

    return Passes(
        lean.peak(training) if shape else 0, lean.peak(reasoning) if reference else 0, _gathered(lean.model)
    )


def align_memory(
    model: Any, passes: Passes, optimizer: str, freezing: Freezing | None, instead: Instead | None = None
) -> AlignMemory:
    trainable = list(trainable_parameters(model).values())
    return AlignMemory(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trainable),
        weights=_bytes(model),
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
        largest=max(p.numel() for p in trainable),
        optimizer=optimizer,
        passes=passes,
        freezing=freezing,
        instead=instead,
    )


def fisher_memory(skeleton: Skeleton, shape: Shape, probes: int, *, checkpointing: bool) -> StageMemory:
    """The Fisher stage, which one GPU does: the sums in fp32, and a sample of the elements for each half."""
    model = skeleton.model
    elements = sum(p.numel() for p in trainable_parameters(model).values())
    work = skeleton.peak(lambda one: fisher_peak(one, shape, probes, checkpointing=checkpointing))
    return StageMemory({"weights": _bytes(model), "Fisher sums": sums_bytes(elements)}, work)


def warmup_memory(skeleton: Skeleton, shape: Shape, *, checkpointing: bool) -> StageMemory:
    """The warm-up of a LoRA adapter, over before the Fisher's sums are there: AdamW's moments, and a step's pass."""
    model = skeleton.model
    moments = 2 * sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    work = skeleton.peak(lambda one: warmup_peak(one, shape, checkpointing=checkpointing))
    return StageMemory({"weights": _bytes(model), "optimizer": moments}, work)


def generation_memory(skeleton: Skeleton, shape: Shape, vocabulary: int) -> StageMemory:
    """Generation with `transformers` when all sequences are as long as they may become; sampling is in float64."""
    cache = skeleton.size(lambda model: cache_bytes(model, shape))
    step = skeleton.peak(lambda model: decoding_peak(model, shape)) - cache
    sampling = 4 * 8 * shape.sequences * vocabulary
    return StageMemory({"weights": _bytes(skeleton.model), "KV cache": cache}, max(step, sampling))


def server_memory(skeleton: Skeleton, tokens: int) -> StageMemory:
    """The least that vLLM needs: weights, and a cache for one sequence of `tokens`. It takes what there is."""
    cache = skeleton.size(lambda model: cache_bytes(model, Shape(1, _COUNTED))) * tokens // _COUNTED
    weights = _bytes(skeleton.model)
    return StageMemory({"weights": weights, "KV cache": cache}, activations(weights))


def weights_bytes(skeleton: Skeleton) -> int:
    return _bytes(skeleton.model)


def _bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gathered(lean: nn.Module) -> int:
    """Weights and gradients of all that is in no layer, and of two layers: the one at work and the next."""
    stacks = [m for m in lean.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    layers = [_bytes(layer) for layer in stacks[0]] if stacks else []
    return 2 * (_bytes(lean) - sum(layers) + 2 * max(layers, default=0))
