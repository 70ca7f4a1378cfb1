"""Config of a run: every field of TRL's `SFTConfig`, and the settings of sections 3.2 and 3.3.

What exact freezing does not support is refused here, before a model is loaded.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from rpsa import settings
from rpsa.errors import RPSAError, check_fields, refuse_text_for_numbers
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, FrozenRatio, NoiseRatio
from rpsa.sharding import refuse_engines
from rpsa.training.packing import refuse_wrapped


def refuse_order(cls: type, ours: type, theirs: type) -> None:
    """Raise RPSAError if a class has `ours` after `theirs` among its bases, where it would never be asked."""
    order = cls.__mro__
    if theirs in order and ours in order and order.index(theirs) < order.index(ours):
        first, second = (next(b for b in cls.__bases__ if issubclass(b, of)) for of in (ours, theirs))
        raise RPSAError(
            f"class {cls.__name__}: put {first.__name__} before {second.__name__} in the bases; after it, it does "
            "nothing"
        )


def declared(setting: settings.Setting[Any]) -> Any:
    """A dataclass's field with the default and the help of a setting."""
    return field(default=setting.default, metadata={"help": setting.help})


@dataclass
class AnchorArguments:
    """What goes together with freezing and with every alternative to it: an anchor to the original model."""

    kl: float = declared(settings.KL)
    der: float = declared(settings.DER)
    anchor: str = declared(settings.ANCHOR)
    anchor_top: int | None = declared(settings.ANCHOR_TOP)

    @property
    def has_anchor(self) -> bool:
        return self.kl > 0 or self.der > 0

    def check_anchor(self) -> None:
        """Raises RPSAError for what cannot be."""
        check_fields(self, of=AnchorArguments)
        for setting in settings.ANCHORING:
            settings.check(setting, getattr(self, setting.name))


@dataclass
class RPSAArguments(AnchorArguments):
    """What `RPSAMixin` reads; put it before any `TrainingArguments` subclass, as `RPSAConfig` does with SFT's.

    Raises:
        RPSAError: a value is impossible, or a setting is asked for that exact freezing does not support.
    """

    frozen_ratio: str = declared(settings.FROZEN_RATIO)
    window: int = declared(settings.WINDOW)
    every: int = declared(settings.EVERY)
    sigma_scale: float = declared(settings.SIGMA_SCALE)
    mask: str = declared(settings.MASK)
    gradient_only: bool = declared(settings.GRADIENT_ONLY)
    frozen_moments: str = declared(settings.FROZEN_MOMENTS)
    zero_fisher: str = declared(settings.ZERO_FISHER)
    reference_max_length: int | None = declared(settings.REFERENCE_MAX_LENGTH)
    compact: bool = declared(settings.COMPACT)
    audit: bool = declared(settings.AUDIT)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_order(cls, RPSAArguments, TrainingArguments)

    def __post_init__(self) -> None:
        if self.frozen_ratio not in settings.FROZEN_RATIO.choices:
            try:
                if isinstance(self.frozen_ratio, bool):
                    raise TypeError
                self.frozen_ratio = float(self.frozen_ratio)  # type: ignore[assignment]
            except (ValueError, TypeError):
                raise RPSAError(settings.FROZEN_RATIO.refused(self.frozen_ratio)) from None
        check_own_fields(self, RPSAArguments, but="frozen_ratio")
        self.check_anchor()
        self.ratio()
        for setting in settings.FREEZING:
            settings.check(setting, getattr(self, setting.name))
        if self.compact and (reason := why_not_compact(self)):
            raise RPSAError(f"compact{reason}")
        refuse_unsupported(self)
        refuse_engines(os.environ)
        super().__post_init__()  # type: ignore[misc]
        refuse_unsupported_ranks(self)

    def ratio(self) -> FrozenRatio:
        """A fresh `ConstantRatio`, `ConflictRatio` or `NoiseRatio`; the last draws by the run's seed."""
        if self.frozen_ratio == "dynamic":
            return ConflictRatio(self.window, self.every, self.sigma_scale)
        if self.frozen_ratio == "noise":
            seed: int = self.seed  # type: ignore[attr-defined]
            return NoiseRatio(self.window, self.every, self.sigma_scale, seed=seed)
        return ConstantRatio(float(self.frozen_ratio))


@dataclass
class RPSAConfig(RPSAArguments, SFTConfig):
    """`SFTConfig` and the settings of RPSA."""


def check_own_fields(args: Any, ours: type, but: str = "") -> None:
    """Raise RPSAError for what cannot be: a field of `ours` of another type, or text where TRL wants a number."""
    if not isinstance(args, TrainingArguments):
        raise RPSAError(f"{ours.__name__} goes before a config: class MyConfig({ours.__name__}, SFTConfig)")
    check_fields(args, of=ours, but=but)
    refuse_text_for_numbers(args)
    settings.check(settings.REFERENCE_MAX_LENGTH, args.reference_max_length)


_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")


def why_not_compact(args: Any) -> str:
    """What needs a frozen element's gradient or moment, which compact training does not keep; "" if nothing does."""
    if args.gradient_only:
        return " and gradient_only: in compact training frozen elements cannot move; choose one"
    if args.frozen_moments != "zero":
        return " and frozen_moments=raw: compact training keeps no moments of frozen elements; choose one"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in _ELEMENTWISE:
        return (
            f": optim {optimizer} does not treat each element by itself, or is untested; use one of "
            f"{', '.join(_ELEMENTWISE)}"
        )
    return ""


def refuse_unsupported_ranks(args: Any) -> None:
    """Raise RPSAError for what one process can do and several cannot."""
    if getattr(args, "enable_jit_checkpoint", False) and args.world_size > 1:
        raise RPSAError(
            "enable_jit_checkpoint is for one process: ranks learn of a signal at different steps, and one that saves "
            "alone would wait for the others; leave it off, and set save_steps"
        )


_EIGHT_BITS = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")
"""Of bitsandbytes, tested with exact freezing on a CPU (where nothing is paged)."""

_UNSUPPORTED_OPTIMIZERS = ("8bit", "4bit", "bnb", "galore", "apollo", "lomo", "grokadamw", "schedule_free")


def refuse_unsupported(args: Any) -> None:
    """Raise RPSAError for what steps, shards or stores in ways that frozen elements would not survive."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in _EIGHT_BITS and getattr(args, "frozen_moments", "zero") == "raw":
        raise RPSAError(
            f"frozen_moments: raw needs Adam's own moments, and {optimizer} has 8 bits of them; use zero"
        )
    if optimizer not in _EIGHT_BITS and any(part in optimizer for part in _UNSUPPORTED_OPTIMIZERS):
        raise RPSAError(
            f"optim: {optimizer} is not supported: it is untested with exact freezing; use adamw_torch_fused"
        )
    refuse_wrapped(args)
    if getattr(args, "deepspeed", None):
        raise RPSAError(
            "deepspeed is not supported: it steps inside backward and hides gradients; use DDP or FSDP2"
        )
    if getattr(args, "use_liger_kernel", False):
        raise RPSAError("use_liger_kernel is not supported: it is untested with exact freezing; leave it off")
    if getattr(args, "fp16", False):
        raise RPSAError(
            "fp16 is not supported: skipped steps and scaled gradients are untested; use bf16 or fp32"
        )
    if getattr(args, "restore_callback_states_from_checkpoint", False):
        raise RPSAError(
            "restore_callback_states_from_checkpoint is not supported: RPSA restores its own state; leave it off"
        )
    fsdp_version = (getattr(args, "fsdp_config", None) or {}) if getattr(args, "fsdp", None) else {}
    if (
        isinstance(fsdp_version, dict)
        and fsdp_version.get("fsdp_version", fsdp_version.get("version", 2)) == 1
    ):
        raise RPSAError("FSDP1 is not supported: it flattens parameters; set fsdp_version: 2")
