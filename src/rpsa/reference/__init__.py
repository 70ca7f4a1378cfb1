"""D_ref: problems and the model's own responses to them (section 3.1), and how problems are read.

The responses are a sample from the model itself, so that squared gradients on them estimate its Fisher
information; wrong and truncated ones belong to that sample and are kept, flagged. Exact token ids are
stored, because retokenised text may differ from what the model emitted.
"""

from rpsa.reference.building import ReferenceConfig, build_reference
from rpsa.reference.dataset import ReferenceDataset, Trace
from rpsa.reference.problems import Problem, load_problems

__all__ = [
    "Problem",
    "ReferenceConfig",
    "ReferenceDataset",
    "Trace",
    "build_reference",
    "load_problems",
]
