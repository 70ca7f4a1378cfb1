"""How large a difference is, and how sure one may be of it: rates, pairs of models, training runs, the safety tax.

docs/statistics.md says which number answers which question. All intervals are 95% intervals.
"""

from rpsa.evaluation.statistics.comparison import (
    McNemar,
    mcnemar,
    minimum_detectable_effect,
    paired_difference,
)
from rpsa.evaluation.statistics.intervals import Estimate, Interval
from rpsa.evaluation.statistics.rates import pass_at_k, rate, wilson_interval
from rpsa.evaluation.statistics.runs import mean_interval, nested_mean, ratio_interval
from rpsa.evaluation.statistics.samples import Benchmarks, Counts, Problems, Weighting
from rpsa.evaluation.statistics.tax import safety_tax, safety_tax_rate
from rpsa.evaluation.statistics.tax_interval import (
    SafetyTax,
    TaxDifference,
    safety_tax_difference,
    safety_tax_interval,
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
    "wilson_interval",
]
