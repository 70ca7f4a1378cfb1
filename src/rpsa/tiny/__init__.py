"""The embedded reasoning model: a tiny world, six trained bases, and how to train another.

Everything runs on a laptop's CPU in seconds and is harmless in content: a harmful request is one for a toy plan.
"""

from rpsa.tiny.bases import tiny_model_dir
from rpsa.tiny.families import FAMILIES, REFERENCE_FAMILIES, REFERENCES
from rpsa.tiny.world import (
    REQUEST_SETS,
    TinyItem,
    complying_examples,
    evaluation_prompts,
    held_out_problems,
    is_incoherent,
    preference_examples,
    reasoning_problems,
    safety_examples,
    score,
    thought_is_unsafe,
)

__all__ = [
    "FAMILIES",
    "REFERENCES",
    "REFERENCE_FAMILIES",
    "REQUEST_SETS",
    "TinyItem",
    "complying_examples",
    "evaluation_prompts",
    "held_out_problems",
    "is_incoherent",
    "preference_examples",
    "reasoning_problems",
    "safety_examples",
    "score",
    "thought_is_unsafe",
    "tiny_model_dir",
]
