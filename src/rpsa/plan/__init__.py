"""Plan: what a recipe needs, from configs alone: memory by part, steps, hours, disk, money. No weights."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rpsa.plan.planning import make_plan as make_plan
    from rpsa.plan.render import Plan as Plan

__all__ = ["Plan", "make_plan"]


def __getattr__(name: str) -> Any:
    """Without the seconds that these take to import, a config can be missed (`rpsa.plan.configs`)."""
    if name == "make_plan":
        from rpsa.plan.planning import make_plan

        return make_plan
    if name == "Plan":
        from rpsa.plan.render import Plan

        return Plan
    raise AttributeError(f"module 'rpsa.plan' has no attribute {name!r}")
