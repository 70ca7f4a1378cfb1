"""Settings: of the Fisher, of freezing and of what else one could do, each declared once.

A setting has a name, a default, what it may be, and what it means. Recipes (`recipe/sections.py`), the arguments of
trainers (`training`) and the library's own classes (`fisher`, `freezing`, `alternatives`) take their defaults from
here and check values by it; a type annotation says which Python type belongs there. It imports nothing heavy: a typo
in a recipe is reported before torch is there.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Generic, Literal, TypeVar, get_args

from rpsa.errors import RPSAError

Estimator = Literal["token_signs", "per_token", "per_sequence"]
OnNonfinite = Literal["skip", "stop"]
MatrixPrecision = Literal["fp32", "tf32", "bf16"]
MovingRatio = Literal["dynamic", "noise"]
MaskKind = Literal["fisher", "random", "random_nonzero", "random_per_tensor", "magnitude", "inverse"]
FrozenMoments = Literal["zero", "raw"]
ZeroFisher = Literal["trainable", "frozen"]
PenaltyKind = Literal["fisher", "uniform", "product"]
AnchorRows = Literal["reference", "benign", "both"]
GradientProjection = Literal["agem", "signs"]
ProjectionKind = Literal[GradientProjection, "nullspace"]

T = TypeVar("T")


@dataclass(frozen=True)
class Setting(Generic[T]):
    """What one setting is. It admits its `choices`, numbers within its bounds, and None where that is the default.

    A setting with neither choices nor bounds admits anything of its type.
    """

    name: str
    default: T
    help: str
    choices: tuple[str, ...] = ()
    above: int | None = None
    at_least: int | None = None
    at_most: int | None = None
    below: int | None = None
    optional: bool = False
    """Whether it may be None."""
    refusal: str = "{name} {value!r} is not one of {choices}"

    @property
    def bounds(self) -> dict[str, Any]:
        """As pydantic's `Field` takes them."""
        named = {"gt": self.above, "ge": self.at_least, "le": self.at_most, "lt": self.below}
        return {name: bound for name, bound in named.items() if bound is not None}

    def admits(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, str) or not self.bounds:
            return value in self.choices or not (self.choices or self.bounds)
        number = float(value) if isinstance(value, Real) else math.nan
        return (
            math.isfinite(number)
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def refused(self, value: Any, called: str = "") -> str:
        """What there is to say about a value that it does not admit."""
        return self.refusal.format(name=called or self.name, value=value, choices=", ".join(self.choices))


def check(setting: Setting[Any], value: Any, called: str = "") -> None:
    """Raise RPSAError unless the setting may have this value.

    Args:
        called: its name where it is set, if that is another one.
    """
    if not setting.admits(value):
        raise RPSAError(setting.refused(value, called))


# Eq. 4 (section 3.1)

ESTIMATOR: Setting[Estimator] = Setting(
    "estimator",
    "token_signs",
    "How squared gradients are estimated.",
    choices=get_args(Estimator),
)
PROBES = Setting(
    "probes",
    4,
    "Backward passes a batch of token_signs: more of them, less noise. The others have no use for it.",
    above=0,
    refusal="{name} is {value}: use 1 or more",
)
SEED = Setting("seed", 42, "Of all random numbers that are drawn for it.")
SCOPE: Setting[str | None] = Setting(
    "scope",
    None,
    "A regular expression searched for in parameters' names; None: all that are trained.",
    optional=True,
)
ON_NONFINITE: Setting[OnNonfinite] = Setting(
    "on_nonfinite",
    "skip",
    "What to do about a sample whose log-probabilities or gradients are not finite.",
    choices=get_args(OnNonfinite),
)
PRECISION: Setting[MatrixPrecision] = Setting(
    "precision", "fp32", "How products of matrices are taken.", choices=get_args(MatrixPrecision)
)
REFERENCE_MAX_LENGTH = Setting(
    "reference_max_length",
    4096,
    "Tokens of a reasoning trace that the reasoning gradient sees.",
    above=0,
    optional=True,
    refusal="{name} is {value}: give 1 or more, or None",
)

# Freezing (section 3.2) and its ratio k (section 3.3)

FROZEN_RATIO: Setting[float | MovingRatio] = Setting(
    "frozen_ratio",
    "dynamic",
    "k: 'dynamic' (Eq. 7), a number from 0 (nothing frozen) to 1, or 'noise' (a control: Eq. 7 without the conflict).",
    choices=get_args(MovingRatio),
    at_least=0,
    at_most=1,
    refusal="{name} {value!r} is neither 'dynamic', 'noise' nor a number from 0 to 1",
)
CONSTANT_RATIO = Setting(
    "frozen_ratio",
    0.6,
    "k where it is constant; section 4.3 uses 0.6.",
    at_least=0,
    at_most=1,
    refusal="{name} {value!r} is not a number from 0 to 1",
)
WINDOW = Setting(
    "window",
    20,
    "W of Eq. 7: measurements before k may leave 0.5, and its baseline.",
    above=0,
    refusal="{name} must be a number greater than 0, not {value!r}",
)
EVERY = Setting(
    "every",
    25,
    "Optimizer steps between measurements of the conflict.",
    above=0,
    refusal="{name} must be a number greater than 0, not {value!r}",
)
SIGMA_SCALE = Setting(
    "sigma_scale",
    2.0,
    "Divisor of Eq. 7 in units of sigma; 4 is mu +- 2 sigma.",
    above=0,
    refusal="{name} must be a number greater than 0, not {value!r}",
)
MASK: Setting[MaskKind] = Setting(
    "mask",
    "fisher",
    "What is frozen first: fisher, or a control (random, random_nonzero, random_per_tensor, magnitude, inverse).",
    choices=get_args(MaskKind),
)
GRADIENT_ONLY = Setting(
    "gradient_only", False, "Mask gradients only, as the paper's text says; elements still move."
)
FROZEN_MOMENTS: Setting[FrozenMoments] = Setting(
    "frozen_moments",
    "zero",
    "What Adam's second moment sees of frozen elements: zero or raw.",
    choices=get_args(FrozenMoments),
)
ZERO_FISHER: Setting[ZeroFisher] = Setting(
    "zero_fisher", "trainable", "Elements with F = 0: trainable or frozen.", choices=get_args(ZeroFisher)
)
COMPACT = Setting(
    "compact",
    False,
    "Give the optimizer the trainable elements alone, as fp32 masters: frozen ones cost no gradient, "
    "no moment and no time, and the model may be in bf16. The model's parameters then have no .grad.",
)
AUDIT = Setting("audit", True, "Checksum the frozen set, and write rpsa_audit.json beside the model.")

# Alternatives

PENALTY: Setting[PenaltyKind | None] = Setting(
    "penalty",
    None,
    "fisher (EWC), uniform (L2-SP) or product (EWC on a LoRA adapter's B A): what moves away from the start costs.",
    choices=get_args(PenaltyKind),
    optional=True,
)
PENALTY_STRENGTH = Setting(
    "penalty_strength",
    1.0,
    "Strength of the penalty, whose weights have the mean 1.",
    at_least=0,
    refusal="{name} {value!r} is negative, or no number",
)
PROJECTION: Setting[ProjectionKind | None] = Setting(
    "projection",
    None,
    "agem or signs: what is taken out of g_S where it opposes g_R; nullspace: out of what has moved, where the "
    "inputs of layers on D_ref lie. At every step.",
    choices=get_args(ProjectionKind),
    optional=True,
)
NULLSPACE_ENERGY = Setting(
    "nullspace_energy",
    0.95,
    "Of the energy of each layer's inputs on D_ref, the share in whose directions nullspace lets no weight move.",
    above=0,
    at_most=1,
    refusal="{name} {value!r} is not above 0 and at most 1",
)
REHEARSAL_SHARE = Setting(
    "rehearsal_share",
    0.0,
    "Of the rows that are trained on, how many are D_ref's.",
    at_least=0,
    below=1,
    refusal="{name} is {value}: give at least 0 and less than 1",
)
INTERPOLATION = Setting(
    "interpolation",
    1.0,
    "After training: 1 keeps the trained weights, 0 goes back to the start.",
    at_least=0,
    at_most=1,
    refusal="{name} {value!r} is not between 0 and 1",
)
RESTORED_RATIO = Setting(
    "restored_ratio",
    0.0,
    "After training: the share k of elements, by Fisher, that goes back to the start.",
    at_least=0,
    at_most=1,
    refusal="{name} {value!r} is not between 0 and 1",
)
KL = Setting(
    "kl",
    0.0,
    "Strength of an anchor: forward KL to the original model, a nat a token counting as much as one of the loss.",
    at_least=0,
    refusal="{name} {value!r} is negative, or no number",
)
DER = Setting(
    "der",
    0.0,
    "Strength of an anchor: mean squared distance to the original model's logits.",
    at_least=0,
    refusal="{name} {value!r} is negative, or no number",
)
ANCHOR: Setting[AnchorRows] = Setting(
    "anchor",
    "reference",
    "What kl and der are measured on: reference (D_ref), benign (rows to be complied with), or both.",
    choices=get_args(AnchorRows),
)
ANCHOR_TOP: Setting[int | None] = Setting(
    "anchor_top",
    64,
    "Of each distribution of the original, how many tokens are stored; None: all. LoRA stores nothing.",
    above=0,
    optional=True,
    refusal="{name} is {value}: give 1 or more, or None",
)

FISHER: tuple[Setting[Any], ...] = (ESTIMATOR, PROBES, SEED, SCOPE, ON_NONFINITE, PRECISION)
FREEZING: tuple[Setting[Any], ...] = (
    FROZEN_RATIO, WINDOW, EVERY, SIGMA_SCALE, MASK, GRADIENT_ONLY, FROZEN_MOMENTS, ZERO_FISHER, COMPACT, AUDIT,
)  # fmt: skip
ANCHORING: tuple[Setting[Any], ...] = (KL, DER, ANCHOR, ANCHOR_TOP)
"""Goes together with freezing."""
ALTERNATIVES: tuple[Setting[Any], ...] = (
    PENALTY, PENALTY_STRENGTH, PROJECTION, NULLSPACE_ENERGY, REHEARSAL_SHARE, INTERPOLATION, RESTORED_RATIO,
    *ANCHORING,
)  # fmt: skip
