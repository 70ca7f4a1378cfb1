"""Doctor: what a machine lacks, for rpsa or for a recipe, before hours of work find it out; see docs/around.md."""

from rpsa.doctor.finding import Finding
from rpsa.doctor.machine import machine_findings
from rpsa.doctor.needs import study_findings

__all__ = ["Finding", "machine_findings", "study_findings"]
