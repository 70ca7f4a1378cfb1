"""The ways to align that a recipe may name: what each sets, and what the two paradigms set for it."""

from typing import Any, Literal

from rpsa.recipe.problems import did_you_mean
from rpsa.recipe.sections import Align, Alternatives, Fisher, Safety, Section

Paradigm = Literal["none", "fft", "lora"]

TRAIN_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
PARADIGM_DEFAULTS: dict[str, dict[str, Any]] = {
    "fft": {"learning_rate": 1e-5, "num_train_epochs": 3},
    "lora": {"learning_rate": 1e-4, "num_train_epochs": 6},
}
LORA_DEFAULTS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
}
# What `align` says for each variant of RPSA that has a name: `fft+rpsa`, `lora+constant`, ... (section 4.4 and more)
_VARIANTS: dict[str, dict[str, Any]] = {
    "rpsa": {},
    "noise_k": {"frozen_ratio": "noise"},
    "gradient_only": {"gradient_only": True},
    "raw_moments": {"frozen_moments": "raw"},
    "sigma4": {"sigma_scale": 4.0},
    "constant": {"frozen_ratio": 0.6},
    "random": {"frozen_ratio": 0.6, "mask": "random"},
    "random_nonzero": {"frozen_ratio": 0.6, "mask": "random_nonzero"},
    "random_per_tensor": {"frozen_ratio": 0.6, "mask": "random_per_tensor"},
    "magnitude": {"frozen_ratio": 0.6, "mask": "magnitude"},
    "inverse": {"frozen_ratio": 0.6, "mask": "inverse"},
    "zero_frozen": {"frozen_ratio": 0.6, "zero_fisher": "frozen"},
    "per_sequence": {"frozen_ratio": 0.6},
}
# The alternatives to RPSA by their names, each as far as its authors or common use go; none is tuned
_ALTERNATIVES: dict[str, dict[str, Any]] = {
    "ewc": {"penalty": "fisher"},
    "l2sp": {"penalty": "uniform"},
    "rehearsal": {"rehearsal_share": 0.25},
    "agem": {"projection": "agem"},
    "sign_projection": {"projection": "signs"},
    "interpolation": {"interpolation": 0.5},
    "restored": {"restored_ratio": 0.6},
}
_ESTIMATORS: dict[str, dict[str, Any]] = {"per_sequence": {"fisher": {"estimator": "per_sequence"}}}
WELL_KNOWN: dict[str, dict[str, Any]] = {
    "original": {"paradigm": "none"},
    **{paradigm: {"paradigm": paradigm} for paradigm in ("fft", "lora")},
    **{
        f"{paradigm}+{name}": {"paradigm": paradigm, "align": align} | _ESTIMATORS.get(name, {})
        for paradigm in ("fft", "lora")
        for name, align in _VARIANTS.items()
    },
    **{
        f"{paradigm}+{name}": {"paradigm": paradigm, "alternatives": alternatives}
        for paradigm in ("fft", "lora")
        for name, alternatives in _ALTERNATIVES.items()
    },
}


class Settings(Section):
    """What a paradigm or a method sets for itself; the rest comes from the recipe's sections."""

    train: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    align: Align | None = None
    safety: Safety | None = None


class Method(Settings):
    """One way to align. Without `align` it is plain fine-tuning; `align: {}` is RPSA as section `align` says."""

    paradigm: Paradigm
    alternatives: Alternatives | None = None
    fisher: Fisher | None = None


class Paradigms(Section):
    fft: Settings = Settings()
    lora: Settings = Settings()


def named_methods(value: Any) -> Any:
    """Expand well-known names, alone in a list or with settings of their own in a mapping."""
    if isinstance(value, list):
        value = dict.fromkeys(value) if all(isinstance(name, str) for name in value) else value
    if not isinstance(value, dict):
        raise ValueError(f"expected a list of names or a mapping, not {value!r}")
    if not value:
        raise ValueError(f"empty; name at least one of {', '.join(WELL_KNOWN)}")
    return {name: _method(name, own) for name, own in value.items()}


def _method(name: str, own: Any) -> Any:
    if own is not None and not isinstance(own, dict):
        return own
    own = own or {}
    if name not in WELL_KNOWN:
        if "paradigm" not in own:
            raise ValueError(
                f"'{name}' is no well-known method and has no paradigm{did_you_mean(name, WELL_KNOWN)}"
            )
        return own
    merged = WELL_KNOWN[name] | own
    for section in ("align", "alternatives"):
        if section in own and isinstance(own[section], dict | None):
            merged[section] = WELL_KNOWN[name].get(section, {}) | (own[section] or {})
    return merged
