"""`rpsa fisher-map` on the console: what lies where, and what is left to train."""

from collections.abc import Mapping, Sequence
from typing import Any

from rpsa.analysis.anatomy import Anatomy, Overlap
from rpsa.text import printable


def render_anatomy(title: str, at: Sequence[Anatomy], console: Any = None) -> None:
    """Print one Fisher's modules to a rich console (default: stdout), at one k or several."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    first = at[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Module", no_wrap=True)
    for header in ("elements", "mean F", "F = 0"):
        table.add_column(header, justify="right", no_wrap=True)
    for of in at:
        table.add_column(f"k={of.k:g}\nfrozen", justify="right", no_wrap=True)
        table.add_column("its\nshare", justify="right", no_wrap=True)
    sums = [of.by(lambda role: role.module) for of in at]
    for module, tally in sums[0].items():
        row = [printable(module), f"{tally.elements + tally.unscored:,}"]
        row += [f"{tally.mean:.1e}", f"{tally.zero_fraction:.0%}"] if tally.elements else ["–", "–"]
        for of, by in zip(at, sums, strict=True):
            row += [f"{by[module].frozen_fraction:.1%}", f"{of.trainable_share(by[module]):.1%}"]
        table.add_row(*map(Text, row))
    console.print(Text(f"\n{printable(title)}", style="bold"))
    console.print(table)
    console.print("mean F: over all elements; its share: of all that still train at this k.")
    if ratio := first.attention_over_mlp():
        console.print(
            f"Attention's mean F: {ratio['elements']:.2f} times the MLP's "
            f"({ratio['matrices']:.2f} if all matrices count the same)."
        )


def render_overlaps(overlaps: Mapping[tuple[str, str], Sequence[Overlap]], console: Any = None) -> None:
    """Print how much the frozen sets of several Fishers have in common."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Frozen sets")
    for header in ("k", "Jaccard", "by chance", "by chance, with each\nparameter's count"):
        table.add_column(header, justify="right")
    for (first, second), found in overlaps.items():
        for one in found:
            table.add_row(
                Text(printable(f"{first} and {second}")),
                f"{one.k:g}",
                *(f"{value:.3f}" for value in (one.jaccard, one.by_chance, one.by_chance_within)),
            )
    console.print()
    console.print(table)
