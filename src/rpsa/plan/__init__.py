"""Plan: what a recipe needs, from configs alone: memory by part, steps, tokens, rough hours. No weights."""

from rpsa.plan.planning import make_plan
from rpsa.plan.render import Plan

__all__ = ["Plan", "make_plan"]
