"""Sandbox: running model-written code, and grading it by tests that it cannot see; see docs/sandbox.md."""

from rpsa.evaluation.sandbox.evalplus import (
    CodeProblem,
    code_problem,
    load_code_problems,
    shown_assertion,
    with_time_limits,
)
from rpsa.evaluation.sandbox.process import Finished, Limits
from rpsa.evaluation.sandbox.running import Program, Verdict, grade_programs
from rpsa.evaluation.sandbox.tiers import Sandbox, TierReport, Unsandboxed, best_sandbox, probe, tier_reports

__all__ = [
    "CodeProblem",
    "Finished",
    "Limits",
    "Program",
    "Sandbox",
    "TierReport",
    "Unsandboxed",
    "Verdict",
    "best_sandbox",
    "code_problem",
    "grade_programs",
    "load_code_problems",
    "probe",
    "shown_assertion",
    "tier_reports",
    "with_time_limits",
]
