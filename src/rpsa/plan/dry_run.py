"""Dry runs: what a forward and backward pass keeps alive, found by running the model's own code on fake tensors.

A model is built from its config alone, of tensors that have a size and no storage. The passes are those of training
(TRL's loss without logits), of the reasoning gradient g_R, of an adapter's warm-up, of the Fisher estimate (with
logits; `rpsa.fisher.footprint` has them) and of generation. A dry run of an 8B model takes seconds, and knows its
attention, its checkpointing and the bf16 copies of weights that autocast keeps, without a formula for any of them.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rpsa.errors import RPSAError
from rpsa.fisher import hooked
from rpsa.fisher.footprint import dry_passes
from rpsa.fisher.log_probs import evaluation_mode, label_log_probs
from rpsa.models import location
from rpsa.parameters import trainable_parameters
from rpsa.plan.configs import missing
from rpsa.recipe.sections import Model


def load_config(name: str, model: Model) -> Any:
    """The `transformers` config of a model in a recipe.

    Raises:
        RPSAError: it is neither here nor available, or is broken.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            location(name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if Path(location(name)).is_dir():
            said = str(error).strip().partition("\n")[0]
            raise RPSAError(f"model {name}: its config cannot be loaded: {said}") from error
        raise missing(name) from error


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within, every operation gives a result of the right shape and dtype, and computes nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def build_model(config: Any, dtype: str, lora: Mapping[str, Any] | None = None) -> Any:
    """A causal language model, under a LoRA adapter if `lora` has LoraConfig fields. Call it in `fake_tensors`.

    `dtype` is a torch dtype's name, or "auto" for the checkpoint's own.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(config, dtype))
        if lora:
            from peft import LoraConfig, get_peft_model

            try:
                model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
            except ValueError as error:
                raise RPSAError(f"lora: {str(error).strip().splitlines()[0]}") from error
    _leave_meta(model)
    return model


def torch_dtype(config: Any, dtype: str) -> torch.dtype:
    if dtype == "auto":
        return config.dtype or torch.float32
    result: torch.dtype = getattr(torch, dtype)
    return result


def _leave_meta(model: nn.Module) -> None:
    """Put CPU tensors in the place of meta ones, which autocast does not know; what was shared stays shared."""
    moved: dict[int, Tensor] = {}
    originals = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    originals.append(tensor)  # an id is unique while its tensor lives
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = moved[id(tensor)]  # type: ignore[assignment]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations inside create, until they are freed; views count once.

    torch's own `torch.distributed._tools.mem_tracker.MemTracker` sorts them by module, and so refuses a model's second
    pass ("multiple iterative calls"), which accumulation, several probes, generation and a real trainer's steps make.
    It also is private, and this is all that is wanted of it.

        with LiveBytes(model.parameters()) as live:
            loss(model).backward()
        live.peak

    Args:
        known: tensors whose storages are there already and do not count.
    """

    watched: "ClassVar[list[LiveBytes] | None]" = None
    """Where all that are entered are put, for `rpsa.plan.layers`."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.segments: dict[tuple[str, int, int], int] = {}
        """The most between two marks: by the mark at its end, its layer, and how often that mark came before."""
        self._segment = 0
        self._sizes: dict[int, int] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # kept alive, so that no key is reused
        self._sizes |= {storage._cdata: 0 for storage in self._known}

    def __enter__(self) -> "LiveBytes":
        super().__enter__()  # type: ignore[no-untyped-call]
        if LiveBytes.watched is not None:
            LiveBytes.watched.append(self)
        return self

    def mark(self, kind: str, layer: int) -> None:
        """End a segment."""
        times = 0
        while (kind, layer, times) in self.segments:
            times += 1
        self.segments[kind, layer, times] = self._segment
        self._segment = self.now

    def forget(self) -> None:
        """Begin again with what is there now."""
        self.peak = self._segment = self.now
        self.segments = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        self._segment = max(self._segment, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Shape:
    """`sequences` of `tokens` each in one forward pass."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class Precision:
    """`bf16`: under autocast; `checkpointing`: activations are recomputed in the backward pass."""

    bf16: bool
    checkpointing: bool


def training_peak(
    model: Any,
    shape: Shape,
    precision: Precision,
    compact: float | None = None,
    *,
    accumulated: bool = False,
) -> int:
    """Bytes beside the weights at the worst moment of TRL's forward and backward pass, gradients included.

    `compact`: this share of each gradient is gathered in fp32 and the whole one freed, as compact training does.
    `accumulated`: gradients of an earlier micro-batch are there already.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    plain = base.forward
    is_fused = _fuse_head(base)

    def loss() -> Tensor:
        with _autocast(precision):
            if not is_fused:
                whole: Tensor = model(**_inputs(shape), labels=_tokens(shape)).loss
                return whole
            output = model(**_inputs(shape), labels=_tokens(shape), fused_lm_head=True)
        log_probs: Tensor = output.log_probs
        return -log_probs.sum()

    gathered = nullcontext() if compact is None else _gathering(trainable_parameters(model).values(), compact)
    try:
        with gathered:
            return _peak(model, loss, precision, runs=2 if accumulated else 1)
    finally:
        base.forward = plain


def _fuse_head(model: Any) -> bool:
    """Let the model's head do as TRL has it from 1.16 on, without whole logits; False before."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return False
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return True


def reasoning_peak(model: Any, shape: Shape, precision: Precision, *, accumulated: bool = False) -> int:
    """The same for g_R (`rpsa.training.reasoning`), whose logits accelerate casts to fp32."""
    runs = 2 if accumulated else 1
    return _peak(model, lambda: _reasoning_loss(model, shape, precision), precision, runs)


def warmup_peak(model: Any, shape: Shape, *, checkpointing: bool) -> int:
    """The same for a step of an adapter's warm-up (`rpsa.training.reasoning`), without autocast and dropout."""
    precision = Precision(bf16=False, checkpointing=checkpointing)
    with _checkpointing(model, checkpointing), evaluation_mode(model), LiveBytes(_tensors(model)) as live:
        _reasoning_loss(model, shape, precision).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None
    return live.peak


def _reasoning_loss(model: Any, shape: Shape, precision: Precision) -> Tensor:
    with _autocast(precision):
        logits = model(**_inputs(shape), use_cache=False).logits
    if precision.bf16:
        logits = logits.float()
    return -label_log_probs(logits.flatten(0, 1), *_labels(shape)).sum()


def sharded_peak(model: Any, shape: Shape, precision: Precision, peak: Callable[..., int]) -> int:
    """`training_peak` or `reasoning_peak` under FSDP2, which reduces each gradient as soon as it is there.

    `model` has its weights in the dtype that it computes in: FSDP2 gathers them so. What it gathers is not counted.
    """
    lean = Precision(bf16=False, checkpointing=precision.checkpointing)
    with _dropping_gradients(trainable_parameters(model).values()):
        return peak(model, shape, lean)


def fisher_peak(model: Any, shape: Shape, probes: int, *, checkpointing: bool) -> int:
    """Bytes beside weights and sums of the Fisher estimate of one batch."""
    peaks = []
    with _checkpointing(model, checkpointing), _blocks_of_a_gpu():
        for dry_pass in dry_passes(model, shape.sequences, shape.tokens, probes):
            with LiveBytes([*_tensors(model), *dry_pass.held]) as live:
                dry_pass.run()
            peaks.append(live.peak)
    return max(peaks)


@contextmanager
def _blocks_of_a_gpu() -> Iterator[None]:
    """Within, gradients are squared in pieces as large as on a GPU, and as few: fake tensors say they are a CPU's."""
    before = hooked._CPU_STACK, hooked._CPU_BLOCK
    hooked._CPU_STACK = hooked._CPU_BLOCK = hooked._DEVICE_BLOCK
    try:
        yield
    finally:
        hooked._CPU_STACK, hooked._CPU_BLOCK = before


def decoding_peak(model: Any, shape: Shape) -> int:
    """Bytes beside the weights when the last token of `shape` is generated: the cache, and what that step needs."""
    model.eval()
    prompt = Shape(shape.sequences, shape.tokens - 1)
    with LiveBytes(_tensors(model)) as live, torch.no_grad():
        cache = model(**_inputs(prompt), use_cache=True, logits_to_keep=1).past_key_values
        live.forget()
        model(
            input_ids=_tokens(Shape(shape.sequences, 1)),
            attention_mask=_tokens(shape),
            past_key_values=cache,
            use_cache=True,
        )
    return live.peak


def cache_bytes(model: Any, shape: Shape) -> int:
    """The cache of keys and values of `shape`."""
    model.eval()
    with torch.no_grad():
        cache = model(**_inputs(shape), use_cache=True, logits_to_keep=1).past_key_values
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


def _peak(model: Any, loss: Callable[[], Tensor], precision: Precision, runs: int) -> int:
    model.train()
    with _checkpointing(model, precision.checkpointing), LiveBytes(_tensors(model)) as live:
        for _ in range(runs):
            value = loss()
            live.mark("loss", 0)  # autocast's copies of the weights are gone
            value.backward()  # type: ignore[no-untyped-call]
            del value
    for parameter in model.parameters():
        parameter.grad = None
    return live.peak


@contextmanager
def _checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    yield
    model.gradient_checkpointing_disable()


@contextmanager
def _dropping_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in parameters]  # type: ignore[no-untyped-call]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _gathering(parameters: Iterable[nn.Parameter], share: float) -> Iterator[None]:
    held: dict[int, Tensor] = {}

    def gather(parameter: Tensor) -> None:
        assert parameter.grad is not None
        part = parameter.grad.new_empty(round(share * parameter.numel())).float()
        held[id(parameter)] = held[id(parameter)].add_(part) if id(parameter) in held else part
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(gather) for p in parameters]  # type: ignore[no-untyped-call]
    yield
    for handle in handles:
        handle.remove()


def _autocast(precision: Precision) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision.bf16 else nullcontext()


def _inputs(shape: Shape) -> dict[str, Tensor]:
    return {"input_ids": _tokens(shape), "attention_mask": _tokens(shape)}


def _tokens(shape: Shape) -> Tensor:
    return torch.ones(shape.sequences, shape.tokens, dtype=torch.long)


def _labels(shape: Shape) -> tuple[Tensor, Tensor]:
    """Every token is part of the response: rows of the flattened logits, and the label of each."""
    count = shape.sequences * (shape.tokens - 1)
    return torch.arange(count), torch.ones(count, dtype=torch.long)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
