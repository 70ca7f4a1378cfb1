"""Measuring what alignment bought and what it cost: benchmarks, extraction, judges, sandbox, statistics."""

from pathlib import Path

TASKS_PATH = Path(__file__).parent / "tasks"
"""The folder of tasks for lm-evaluation-harness."""
