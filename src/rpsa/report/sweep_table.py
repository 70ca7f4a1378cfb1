"""`rpsa sweep` on the console: a row for each method at each point."""

from collections.abc import Mapping, Sequence
from typing import Any

from rpsa.report.results import Summary
from rpsa.report.table import marked
from rpsa.text import printable

_NONE = "–"


def render_sweep(points: Sequence[tuple[Mapping[str, str], Sequence[Summary]]], console: Any = None) -> None:
    """Print settings and summaries of each point to a rich console (default: stdout); rates in percent.

    A point without summaries has failed.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    refused = list(dict.fromkeys(name for _, found in points for s in found for name in s.over_refusal))
    several = any(len({s.method for s in found}) < len(found) for _, found in points)
    settings = [key.rpartition(".")[2] for key in points[0][0]]
    columns = ["Method", *(["LR", "Safety data"] if several else []), "Reasoning ↑", "ASR ↓"]
    columns += [*(f"Refused\n{printable(name)} ↓" for name in refused), "STR ↓", "95% interval"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in [*settings, *columns]:
        left = name in settings or name == "Method"
        table.add_column(Text(name), justify="left" if left else "right", no_wrap=left)
    for values, found in points:
        shown = [Text(printable(value).replace("+", "\n")) for value in values.values()]
        if not found:
            table.add_row(*shown, "failed")
        for summary in found:
            grid = [_number(summary.lr, "g"), printable(summary.safety or _NONE)] if several else []
            table.add_row(
                *shown,
                *map(Text, [printable(summary.method), *grid]),
                marked(_percent(summary.reasoning["mean"]), summary.unreliable("reasoning")),
                marked(_percent(summary.asr["mean"]), summary.unreliable("attack")),
                *(
                    marked(_percent(summary.over_refusal.get(name)), summary.unreliable("over_refusal", name))
                    for name in refused
                ),
                _number(summary.tax, ".2f"),
                f"{i[0]:.2f} to {i[1]:.2f}" if (i := summary.tax_interval) else _NONE,
            )
            shown = [Text()] * len(shown)
    console.print(table)


def _percent(rate: float | None) -> str:
    return _number(None if rate is None else 100 * rate, ".1f")


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)
