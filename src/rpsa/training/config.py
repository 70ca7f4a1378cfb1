"""The settings of a run: every field of TRL's `SFTConfig`, and those of sections 3.2 and 3.3."""

import os
from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments
from trl import SFTConfig

from rpsa.errors import RPSAError, check_fields, refuse_text_for_numbers
from rpsa.freezing.masks import Mask
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, FrozenRatio, NoiseRatio
from rpsa.sharding import refuse_engines


def refuse_order(cls: type, ours: type, theirs: type) -> None:
    """Raise RPSAError if a class has `ours` after `theirs` among its bases, where it would never be asked."""
    order = cls.__mro__
    if theirs in order and ours in order and order.index(theirs) < order.index(ours):
        first, second = (next(b for b in cls.__bases__ if issubclass(b, of)) for of in (ours, theirs))
        raise RPSAError(
            f"class {cls.__name__}: put {first.__name__} before {second.__name__} in the bases; after it, it does "
            "nothing"
        )


@dataclass
class RPSAArguments:
    """What `RPSAMixin` reads; put it before any `TrainingArguments` subclass, as `RPSAConfig` does with SFT's.

    Raises:
        RPSAError: a value is impossible, or a setting is asked for that exact freezing does not support.
    """

    frozen_ratio: str = field(
        default="dynamic",
        metadata={
            "help": "k: 'dynamic' (Eq. 7), a number from 0 (nothing frozen) to 1, or 'noise' (a control: "
            "Eq. 7 without the conflict)."
        },
    )
    window: int = field(
        default=20, metadata={"help": "W of Eq. 7: measurements before k may leave 0.5, and its baseline."}
    )
    every: int = field(default=25, metadata={"help": "Optimizer steps between measurements of the conflict."})
    sigma_scale: float = field(
        default=2.0, metadata={"help": "Divisor of Eq. 7 in units of sigma; 4 is mu +- 2 sigma."}
    )
    mask: str = field(
        default="fisher",
        metadata={
            "help": "What is frozen first: fisher, or a control (random, random_nonzero, random_per_tensor, "
            "magnitude, inverse)."
        },
    )
    gradient_only: bool = field(
        default=False,
        metadata={"help": "Mask gradients only, as the paper's text says; elements still move."},
    )
    frozen_moments: str = field(
        default="zero", metadata={"help": "What Adam's second moment sees of frozen elements: zero or raw."}
    )
    zero_fisher: str = field(
        default="trainable", metadata={"help": "Elements with F = 0: trainable or frozen."}
    )
    reference_max_length: int | None = field(
        default=4096, metadata={"help": "Tokens of a reasoning trace that the reasoning gradient sees."}
    )
    compact: bool = field(
        default=False,
        metadata={
            "help": "Give the optimizer the trainable elements alone, as fp32 masters: frozen ones cost no gradient, "
            "no moment and no time, and the model may be in bf16. The model's parameters then have no .grad."
        },
    )
    audit: bool = field(
        default=True,
        metadata={"help": "Checksum the frozen set, and write rpsa_audit.json beside the model."},
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_order(cls, RPSAArguments, TrainingArguments)

    def __post_init__(self) -> None:
        if self.frozen_ratio not in ("dynamic", "noise"):
            try:
                if isinstance(self.frozen_ratio, bool):
                    raise TypeError
                self.frozen_ratio = float(self.frozen_ratio)  # type: ignore[assignment]
            except (ValueError, TypeError):
                raise RPSAError(
                    f"frozen_ratio {self.frozen_ratio!r} is neither 'dynamic', 'noise' nor a number from 0 to 1"
                ) from None
        check_own_fields(self, RPSAArguments, but="frozen_ratio")
        self.ratio()
        for name, choices in (
            ("mask", get_args(Mask)),
            ("frozen_moments", ("zero", "raw")),
            ("zero_fisher", ("trainable", "frozen")),
        ):
            if getattr(self, name) not in choices:
                raise RPSAError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")
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
    if args.reference_max_length is not None and args.reference_max_length < 1:
        raise RPSAError(f"reference_max_length is {args.reference_max_length}: give 1 or more, or None")


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


_UNSUPPORTED_OPTIMIZERS = ("8bit", "4bit", "bnb", "galore", "apollo", "lomo", "grokadamw", "schedule_free")


def refuse_unsupported(args: Any) -> None:
    """Raise RPSAError for what steps, shards or stores in ways that frozen elements would not survive."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(part in optimizer for part in _UNSUPPORTED_OPTIMIZERS):
        raise RPSAError(
            f"optim: {optimizer} is not supported: it is untested with exact freezing; use adamw_torch_fused"
        )
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
