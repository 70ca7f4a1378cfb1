"""Running model-written code, and grading it by tests it cannot see (docs/sandbox.md)."""

from rpsa.evaluation.sandbox.limits import Finished, Limits
from rpsa.evaluation.sandbox.probing import best_sandbox, probe, tier_reports
from rpsa.evaluation.sandbox.tiers import Sandbox, Unsandboxed

__all__ = ["Finished", "Limits", "Sandbox", "Unsandboxed", "best_sandbox", "probe", "tier_reports"]
