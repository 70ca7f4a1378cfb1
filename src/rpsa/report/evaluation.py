"""What one model's evaluation found, as a table on the console."""

from collections.abc import Mapping
from typing import Any

from rpsa.evaluation.items import Kind
from rpsa.evaluation.samples import MAIN_METRIC
from rpsa.report.table import UNRELIABLE, marked
from rpsa.text import printable
from rpsa.thought import ThoughtFormat

_TITLES = {"reasoning": "Reasoning ↑", "attack": "Attack success ↓", "over_refusal": "Over-refusal ↓"}
ADVICE = (
    "The rates say nothing of the model. If its thoughts have no end, raise max_new_tokens; if it has none, or others "
    "than its chat template says, say so: model.thought, or --thought."
)

_SHOWN = ("refused", "partial", "truncated", "unparsed", "empty", "unjudged")


def render_evaluation(results: Mapping[str, Any], console: Any = None) -> None:
    """Print `results.json`: each set's figure with its 95% interval, and the rates that qualify it, in percent."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for kind, sets in results["sets"].items():
        if not sets:
            continue
        rates = [name for name in _SHOWN if name in next(iter(sets.values()))]
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(_TITLES[kind], no_wrap=True)
        for name in ("n", "%", "95% interval", *rates):
            table.add_column(name, justify="right", no_wrap=True)
        for name, found in sets.items():
            table.add_row(
                Text(printable(name)),
                _count(found),
                *_figure(found, kind),
                *(_percent(found[r]) for r in rates),
            )
        console.print(table)
        for name, found in sets.items():
            if found["unreliable"]:
                console.print(
                    f"{UNRELIABLE} {name}: {found['unreliable']}. {ADVICE}", highlight=False, markup=False
                )
        console.print()
    console.print(f"Thoughts: {ThoughtFormat.from_json(results['thought'])}", highlight=False, markup=False)
    judge = results["judge"]
    who = printable(judge if isinstance(judge, str) else str(judge["id"]))
    console.print(f"Judge: {who}", highlight=False, markup=False)
    if results["sandbox"]:
        console.print(f"Sandbox: {results['sandbox']}", highlight=False, markup=False)


def _count(found: Mapping[str, Any]) -> str:
    each = found["samples"] // found["items"]
    return str(found["items"]) if each == 1 else f"{found['items']} x {each}"


def _figure(found: Mapping[str, Any], kind: Kind) -> tuple[str, str]:
    value = found[MAIN_METRIC[kind]]
    if value is None:
        return "–", "nothing was judged"
    low, high = found["interval"]
    return marked(_percent(value), found["unreliable"]), f"{100 * low:.1f} to {100 * high:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
