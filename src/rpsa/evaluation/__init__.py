"""Evaluation: what alignment bought and what it cost, by benchmarks, judges, a sandbox and statistics."""

from pathlib import Path

TASKS_PATH = Path(__file__).parent / "tasks"
"""The folder of tasks for lm-evaluation-harness."""
