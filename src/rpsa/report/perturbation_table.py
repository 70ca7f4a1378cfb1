"""`rpsa perturb` on the console: the mean accuracy of each perturbation, and its distance to the Fisher's."""

from collections.abc import Sequence
from typing import Any

from rpsa.analysis.perturbation_summary import Effect, Estimate


def render_effects(effects: Sequence[Effect], console: Any = None) -> None:
    """Print the means over the benchmarks, in percent, to a rich console (default: stdout)."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Scaled", no_wrap=True)
    for header in ("change", "accuracy", "above Fisher's"):
        table.add_column(header, justify="right", no_wrap=True)
    for effect in effects:
        untouched = not effect.where
        table.add_row(
            "nothing" if untouched else f"{100 * effect.fraction:g}% × {effect.factor:g}, {effect.selection}",
            "–" if untouched else f"{effect.change:.1%}",
            _percent(effect.accuracy["mean"]),
            _percent(effect.above_fisher["mean"]) if effect.above_fisher else "–",
        )
    console.print(table)
    console.print("In percent, with 95% intervals. change: its length over that of all parameters.")


def _percent(of: Estimate) -> str:
    return f"{100 * of.value:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]"
