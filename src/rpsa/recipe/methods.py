"""Methods: one record for each way to align that a recipe may name, and what the two paradigms set for all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rpsa.recipe.problems import did_you_mean
from rpsa.recipe.sections import Align, Alternatives, Fisher, Safety, Section

Paradigm = Literal["none", "fft", "lora"]
Trainer = Literal["sft", "dpo"]
"""What trains on safety data: TRL's SFT trainer, or its DPO trainer, on pairs."""

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
TRAINER_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {"fft": {"learning_rate": 1e-6}, "lora": {"learning_rate": 1e-5}},  # as TRL has them
}
LORA_DEFAULTS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
}

Marker = str | tuple[int, int, int]
"""One of matplotlib's, or points, kind (0 polygon, 1 star) and angle."""

OTHER_MARKER: Marker = (8, 1, 0)
"""Of methods that have none of their own."""


@dataclass(frozen=True)
class Variant:
    """A method that recipes know by name, behind `fft+` or `lora+`; alone among the methods of a figure its marker.

    Attributes:
        says: what it does.
        settings: what the method sets, by section: a recipe's own settings for it win.
        latex: its name in `table.tex`, if not the one that recipes know.
        paradigms: where it makes sense.
    """

    says: str
    marker: Marker
    settings: Mapping[str, Mapping[str, Any]]
    latex: str | None = None
    paradigms: tuple[Paradigm, ...] = ("fft", "lora")


def _rpsa(says: str, marker: Marker, **align: Any) -> Variant:
    return Variant(says, marker, {"align": align})


def _control(mask: str, marker: Marker, says: str) -> Variant:
    return _rpsa(says, marker, frozen_ratio=0.6, mask=mask)


def _instead(says: str, marker: Marker, **alternatives: Any) -> Variant:
    return Variant(says, marker, {"alternatives": alternatives})


PLAIN = Variant("plain fine-tuning", "^", {})
VARIANTS: dict[str, Variant] = {
    # RPSA, the choices that it leaves open made the other way, and controls (section 4.4 and more)
    "rpsa": Variant("as the section align says", "*", {"align": {}}, latex="RPSA"),
    "constant": _rpsa("k = 0.6", "D", frozen_ratio=0.6),
    "noise_k": _rpsa("k from noise in place of the conflict", "v", frozen_ratio="noise"),
    "gradient_only": _rpsa("gradients are masked, weights may move", "p", gradient_only=True),
    "raw_moments": _rpsa("Adam sees frozen elements' gradients", "h", frozen_moments="raw"),
    "sigma4": _rpsa("k saturates at 2 sigma", "d", sigma_scale=4.0),
    "random": _control("random", "X", "as many elements at random"),
    "random_nonzero": _control("random_nonzero", OTHER_MARKER, "as many at random where F > 0"),
    "random_per_tensor": _control("random_per_tensor", "P", "as many of each tensor at random"),
    "magnitude": _control("magnitude", "<", "as many of the largest weights"),
    "inverse": _control("inverse", ">", "as many with the lowest Fisher"),
    "zero_frozen": _rpsa("k = 0.6, F = 0 frozen", OTHER_MARKER, frozen_ratio=0.6, zero_fisher="frozen"),
    "per_sequence": Variant(
        "k = 0.6, on the Fisher of squared mean gradients",
        OTHER_MARKER,
        {"align": {"frozen_ratio": 0.6}, "fisher": {"estimator": "per_sequence"}},
    ),
    # what one could do instead, each as far as its authors or common use go; none is tuned
    "ewc": _instead("a penalty by the Fisher", "s", penalty="fisher"),
    "ewc_product": Variant(
        "a penalty by the base's Fisher on B A",
        (5, 1, 0),
        {"alternatives": {"penalty": "product"}},
        paradigms=("lora",),
    ),
    "l2sp": _instead("a uniform penalty", "8", penalty="uniform"),
    "rehearsal": _instead("D_ref among the safety data", "H", rehearsal_share=0.25),
    "agem": _instead("g_S without what opposes g_R", (4, 1, 0), projection="agem"),
    "sign_projection": _instead(
        "g_S without elements whose sign opposes g_R", (4, 1, 45), projection="signs"
    ),
    "kl": _instead("an anchor: forward KL to the original on D_ref", (3, 1, 0), kl=1.0),
    "der": _instead("an anchor: the original's logits on D_ref", (3, 1, 180), der=0.1),
    "nullspace": Variant(
        "no weight moves where layers' inputs on D_ref lie",
        (7, 1, 0),
        {"alternatives": {"projection": "nullspace"}},
        paradigms=("fft",),
    ),
    "constant_kl": Variant(
        "k = 0.6, and an anchor on D_ref and on the rows that comply",
        (5, 0, 0),
        {"align": {"frozen_ratio": 0.6}, "alternatives": {"kl": 1.0, "anchor": "both"}},
    ),
    "interpolation": _instead("half of the way back", (6, 1, 0), interpolation=0.5),
    "restored": _instead("after training, 60% of the elements put back", (5, 0, 36), restored_ratio=0.6),
}
"""Adding a method is one record here, the code of what is new about it, and a row in docs/recipes.md."""

RECOMMENDED = "constant_kl"
"""What came out best in docs/bench.md, on safety data of both kinds."""

WELL_KNOWN: dict[str, dict[str, Any]] = {
    "original": {"paradigm": "none"},
    **{paradigm: {"paradigm": paradigm} for paradigm in ("fft", "lora")},
    **{
        f"{paradigm}+{name}": {"paradigm": paradigm, **variant.settings}
        for paradigm in ("fft", "lora")
        for name, variant in VARIANTS.items()
        if paradigm in variant.paradigms
    },
}


def recommended() -> dict[str, Any]:
    """Settings of the method that docs/bench.md recommends, for `RPSAConfig`: the Fisher's mask and an anchor.

        args = RPSAConfig(output_dir="aligned", **recommended())

    The trainer takes D_ref (`reference_dataset`) and, as `benign_dataset`, the rows that comply of the safety data,
    which must have both kinds. It is not the paper's method, whose k follows the conflict and which has no anchor.
    """
    return {
        name: value for section in VARIANTS[RECOMMENDED].settings.values() for name, value in section.items()
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
                f"'{name}' is not a well-known method and has no paradigm{did_you_mean(name, WELL_KNOWN)}"
            )
        return own
    merged = WELL_KNOWN[name] | own
    for section in ("align", "alternatives"):
        if section in own and isinstance(own[section], dict | None):
            merged[section] = WELL_KNOWN[name].get(section, {}) | (own[section] or {})
    return merged
