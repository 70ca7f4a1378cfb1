"""rpsa: safety-align open reasoning models without paying for it in reasoning.

    from rpsa import FisherDiagonal, Freezer, estimate_fisher    # any PyTorch loop
    from rpsa import RPSAConfig, RPSATrainer                     # in place of TRL's SFTConfig, SFTTrainer

Names are imported when they are first used: `import rpsa` itself needs torch at most.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rpsa.errors import RPSAError
    from rpsa.evaluation.statistics import safety_tax_interval, safety_tax_rate
    from rpsa.fisher.diagonal import FisherDiagonal
    from rpsa.fisher.estimators import FisherConfig, estimate_fisher
    from rpsa.freezing.compact import CompactFreezer
    from rpsa.freezing.freezer import Freezer
    from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, NoiseRatio
    from rpsa.reference import ReferenceDataset
    from rpsa.training.config import RPSAArguments, RPSAConfig
    from rpsa.training.trainer import RPSAMixin, RPSATrainer

_HOMES = {
    "CompactFreezer": "rpsa.freezing.compact",
    "ConflictRatio": "rpsa.freezing.ratio",
    "ConstantRatio": "rpsa.freezing.ratio",
    "FisherConfig": "rpsa.fisher.estimators",
    "FisherDiagonal": "rpsa.fisher.diagonal",
    "Freezer": "rpsa.freezing.freezer",
    "NoiseRatio": "rpsa.freezing.ratio",
    "RPSAArguments": "rpsa.training.config",
    "RPSAConfig": "rpsa.training.config",
    "RPSAError": "rpsa.errors",
    "RPSAMixin": "rpsa.training.trainer",
    "RPSATrainer": "rpsa.training.trainer",
    "ReferenceDataset": "rpsa.reference",
    "estimate_fisher": "rpsa.fisher.estimators",
    "recommended": "rpsa.recipe.methods",
    "safety_tax_interval": "rpsa.evaluation.statistics",
    "safety_tax_rate": "rpsa.evaluation.statistics",
}

__all__ = [
    "CompactFreezer",
    "ConflictRatio",
    "ConstantRatio",
    "FisherConfig",
    "FisherDiagonal",
    "Freezer",
    "NoiseRatio",
    "RPSAArguments",
    "RPSAConfig",
    "RPSAError",
    "RPSAMixin",
    "RPSATrainer",
    "ReferenceDataset",
    "estimate_fisher",
    "recommended",
    "safety_tax_interval",
    "safety_tax_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rpsa' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
