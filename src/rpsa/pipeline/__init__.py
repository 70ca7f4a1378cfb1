"""`rpsa run`: reference traces -> Fisher -> alignment -> evaluation -> report, each stage only where inputs changed."""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rpsa.artifacts import locked
from rpsa.errors import RPSAError
from rpsa.pipeline.verification import verify
from rpsa.provenance import Stage
from rpsa.recipe.schema import Recipe

if TYPE_CHECKING:
    from rpsa.pipeline.runner import Run

__all__ = ["run", "verify"]

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # here, too: workers do not come by the command line


def run(recipe: Recipe, *, only: str | None = None, keep_finished: bool = False) -> Path:
    """Bring a recipe's run up to date, or one stage of it; returns the run's folder.

    Args:
        keep_finished: leave results alone that other versions of packages or of this one have made.

    Raises:
        RPSAError: `only` is not a stage, what it stands on has not been run, another process is in the run's folder,
            or some tasks have failed; the others have been done then, and the report shows what is missing.
    """
    from rpsa.provenance import STAGES
    from rpsa.recipe.problems import did_you_mean

    if only is not None and only not in STAGES:
        raise RPSAError(f"--only: there is no stage {only!r}{did_you_mean(only, STAGES)}")
    stages = [stage for stage in STAGES if only in (None, stage)]
    prepare(recipe, stages)
    with _alone_in(recipe):
        work = do_stages(recipe, stages, keep_finished)
        missing = {}
        if "report" in stages:
            from rpsa.pipeline.watching import report

            missing = report(recipe, work.without_result)
    if work.failed:
        raise RPSAError(_summary(work.failed))
    if missing:
        name, why = next(iter(missing.items()))
        raise RPSAError(f"the report lacks {len(missing)} results; the first: {name}: {why}")
    return recipe.folder


def prepare(recipe: Recipe, stages: list[Stage]) -> None:
    """What a process that runs a recipe sets up for itself. Raises RPSAError if it cannot be launched as it says."""
    from rpsa.pipeline import launch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING if launch.is_first() else logging.ERROR, format="%(message)s")
    launch.check(recipe, stages)


def do_stages(recipe: Recipe, stages: list[Stage], keep_finished: bool) -> "Run":
    """Bring stages up to date, but for the report; says what failed, and what has no result for it."""
    from rpsa.pipeline import launch, termination
    from rpsa.pipeline.runner import Run

    work = Run(recipe, keep_finished)
    # a launched process that does not train ends at once: it may be waiting for others, and hear of nothing
    ending = contextlib.nullcontext() if launch.is_launched() else termination.interrupting()
    with ending, launch.joined(recipe):
        work.do([stage for stage in stages if stage != "report"])
    return work


@contextmanager
def _alone_in(recipe: Recipe) -> Iterator[None]:
    """One process holds the folder of a run for all that it has launched, on other machines, too."""
    from rpsa.pipeline import launch

    elsewhere = recipe.launch is not None and recipe.launch.machine_rank
    if launch.MARK in os.environ or elsewhere or not launch.is_first():
        yield
        return
    with locked(recipe.folder):
        yield


def _summary(failed: list[str]) -> str:
    if len(failed) == 1:
        return failed[0]
    return f"{len(failed)} tasks failed; the first: {failed[0]}"
