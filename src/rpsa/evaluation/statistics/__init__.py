"""Statistics: how large a difference is and how sure one may be of it, for rates, pairs of models, runs, the tax.

docs/statistics.md says which number answers which question. All intervals are 95% intervals.
"""

from rpsa.evaluation.statistics.bootstrap import (
    McNemar,
    mcnemar,
    minimum_detectable_effect,
    paired_difference,
)
from rpsa.evaluation.statistics.rates import (
    Benchmarks,
    Counts,
    Estimate,
    Interval,
    Problems,
    Weighting,
    mean_interval,
    mean_of_rates,
    nested_mean,
    pass_at_k,
    rate,
    ratio_interval,
)
from rpsa.evaluation.statistics.tax import (
    SafetyTax,
    TaxDifference,
    safety_tax,
    safety_tax_difference,
    safety_tax_interval,
    safety_tax_rate,
)

__all__ = [
    "Benchmarks",
    "Counts",
    "Estimate",
    "Interval",
    "McNemar",
    "Problems",
    "SafetyTax",
    "TaxDifference",
    "Weighting",
    "mcnemar",
    "mean_interval",
    "mean_of_rates",
    "minimum_detectable_effect",
    "nested_mean",
    "paired_difference",
    "pass_at_k",
    "rate",
    "ratio_interval",
    "safety_tax",
    "safety_tax_difference",
    "safety_tax_interval",
    "safety_tax_rate",
]
