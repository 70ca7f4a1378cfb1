"""Console tables: the report's, and what `rpsa evaluate`, `audit`, `sweep`, `fisher-map` and `perturb` print."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rpsa.analysis.anatomy import Anatomy, Overlap
from rpsa.analysis.perturbation import BoundedMean, Effect
from rpsa.evaluation.broken import BROKEN
from rpsa.evaluation.original import loss_interval
from rpsa.evaluation.quadrants import Share
from rpsa.evaluation.results import EvaluationResult, SetResult
from rpsa.evaluation.scores import METRICS
from rpsa.reasoning_loss import ReasoningLoss
from rpsa.report.summaries import LOSSES, Summary
from rpsa.report.tables import (
    NONE,
    PERPLEXITY_NOTE,
    UNRELIABLE,
    Entry,
    Table,
    loss_table,
    main_table,
    marked,
    missing_lines,
    nats,
    percent,
    safety_data_table,
)
from rpsa.report.thoughts import QUADRANT_HEADINGS, STR_BY, noted_tables, thoughts_apart
from rpsa.report.warnings import audit_line, warnings
from rpsa.text import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def _table() -> "RichTable":
    """Without rules: what prints here is read beside the log, and copied."""
    from rich.table import Table as RichTable

    return RichTable(box=None, pad_edge=False, header_style="bold")


def render_console(
    summaries: Sequence[Summary], console: Any = None, missing: Mapping[str, str] | None = None
) -> None:
    """Print the table, what it lacks, and the warnings to a rich console (default: stdout)."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    table = main_table(summaries)
    columns = [i for i, name in enumerate(table.header) if name == "95% interval" or name not in table.minor]
    shown = _table()
    for index in columns:
        name = (
            printable(table.header[index])
            .replace("Refused ", "Refused\n")
            .replace(" ↑", "\n↑")
            .replace(" ↓", "\n↓")
        )
        shown.add_column(Text(name), justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        cells = [row[index] for index in columns]
        shown.add_row(*(Text(printable(cell.text), style="bold" if cell.best else "") for cell in cells))
    console.print(shown)
    for noted in noted_tables(summaries, thoughts_apart(summaries)):
        print_table(_narrowed(noted.table), console)
    if losses := loss_table(summaries):
        print_table(losses, console)
    runs = [run for summary in summaries for run in summary.runs]
    if data := safety_data_table(runs):
        print_table(data, console)
        console.print(PERPLEXITY_NOTE, highlight=False, markup=False)
    if line := audit_line(runs):
        console.print(f"\nAudit: {line}.", highlight=False, markup=False)
    for line in (*missing_lines(missing), *warnings(summaries)):
        console.print(f"• {printable(line)}", highlight=False, markup=False)


def print_table(table: Table, console: Any = None) -> None:
    """Print a report's table to a rich console (default: stdout)."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    shown = _table()
    rows = [[printable(f"{e.text} ({e.note})" if e.note else e.text) for e in row] for row in table.rows]
    longest = [max(map(len, column)) for column in zip(table.header, *rows, strict=True)]
    is_narrow = sum(longest) + 2 * (len(longest) - 1) > console.width
    for index, name in enumerate(table.header):
        numeric = all(_is_number(row[index].text) for row in table.rows)
        # where there is no room for all, the headings of numbers make way before anything is broken within a word
        words = max(map(len, [*name.split(), *(row[index] for row in rows)]), default=1)
        shown.add_column(
            Text(printable(name)),
            justify="right" if numeric else "left",
            overflow="fold",
            max_width=words if is_narrow and numeric else None,
        )
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print()
    console.print(shown)


def _narrowed(table: Table) -> Table:
    """Without intervals and the STR by each verdict, which the page and `table.md` have: it is to fit 80 columns."""
    kept = [index for index, name in enumerate(table.header) if not name.startswith(STR_BY)]
    rows = [[Entry(row[index].text) for index in kept] for row in table.rows]
    return Table([table.header[index] for index in kept], rows)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removeprefix("<"))
    except ValueError:
        return text == NONE
    return True


def render_anatomy(title: str, at: Sequence[Anatomy], console: Any = None) -> None:
    """Print one Fisher's modules to a rich console (default: stdout), at one k or several."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    first = at[0]
    table = _table()
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
    from rich.text import Text

    console = console or Console(highlight=False)
    table = _table()
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


def render_effects(effects: Sequence[Effect], console: Any = None) -> None:
    """Print the means over the benchmarks, in percent, to a rich console (default: stdout)."""
    from rich.console import Console

    console = console or Console(highlight=False)
    table = _table()
    table.add_column("Scaled", no_wrap=True)
    for header in ("change", "accuracy", "above Fisher's"):
        table.add_column(header, justify="right", no_wrap=True)
    for effect in effects:
        untouched = not effect.where
        table.add_row(
            "nothing" if untouched else f"{100 * effect.fraction:g}% × {effect.factor:g}, {effect.selection}",
            "–" if untouched else f"{effect.change:.1%}",
            _percent_with_interval(effect.accuracy["mean"]),
            _percent_with_interval(effect.above_fisher["mean"]) if effect.above_fisher else "–",
        )
    console.print(table)
    console.print("In percent, with 95% intervals. change: its length over that of all parameters.")


def _percent_with_interval(of: BoundedMean) -> str:
    return f"{100 * of.value:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]"


def render_sweep(points: Sequence[tuple[Mapping[str, str], Sequence[Summary]]], console: Any = None) -> None:
    """Print settings and summaries of each point to a rich console (default: stdout); rates in percent.

    A point without summaries has failed.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    refused = list(dict.fromkeys(name for _, found in points for s in found for name in s.over_refusal))
    several = any(len({s.method for s in found}) < len(found) for _, found in points)
    settings = [key.rpartition(".")[2] for key in points[0][0]]
    columns = ["Method", *(["LR", "Safety data"] if several else []), "Reasoning ↑", "ASR ↓"]
    columns += [*(f"Refused\n{printable(name)} ↓" for name in refused), "STR ↓", "95% interval"]
    table = _table()
    for name in [*settings, *columns]:
        left = name in settings or name == "Method"
        table.add_column(Text(name), justify="left" if left else "right", no_wrap=left)
    for values, found in points:
        shown = [Text(printable(value).replace("+", "\n")) for value in values.values()]
        if not found:
            table.add_row(*shown, "failed")
        for summary in found:
            grid = [_number(summary.lr, "g"), printable(summary.safety or NONE)] if several else []
            table.add_row(
                *shown,
                *map(Text, [printable(summary.method), *grid]),
                marked(percent(summary.reasoning["mean"]), summary.unreliable("reasoning")),
                marked(percent(summary.asr["mean"]), summary.unreliable("attack")),
                *(
                    marked(percent(summary.over_refusal.get(name)), summary.unreliable("over_refusal", name))
                    for name in refused
                ),
                _number(summary.tax, ".2f"),
                f"{i[0]:.2f} to {i[1]:.2f}" if (i := summary.tax_interval) else NONE,
            )
            shown = [Text()] * len(shown)
    console.print(table)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


_TITLES = {"reasoning": "Reasoning ↑", "attack": "Attack success ↓", "over_refusal": "Over-refusal ↓"}
ADVICE = (
    "The rates say nothing of the model. If its thoughts have no end, raise max_new_tokens; if it has none, or others "
    "than its chat template says, say so: model.thought, or --thought."
)

_SHOWN = ("refused", "partial", "truncated", "unparsed", "empty", "unjudged")


def render_evaluation(result: EvaluationResult, console: Any = None) -> None:
    """Print each set's figure with its 95% interval, and the rates that qualify it, in percent."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for kind, sets in result.sets.items():
        if not sets:
            continue
        rates = [name for name in _SHOWN if name in METRICS[kind]]
        table = _table()
        table.add_column(_TITLES[kind], no_wrap=True)
        for name in ("n", "%", "95% interval", *rates):
            table.add_column(name, justify="right", no_wrap=True)
        for name, found in sets.items():
            table.add_row(
                Text(printable(name)),
                _count(found),
                *_figure(found),
                *(percent(found.rates[r]) for r in rates),
            )
        console.print(table)
        for name, found in sets.items():
            if found.unreliable:
                console.print(
                    f"{UNRELIABLE} {name}: {found.unreliable}. {ADVICE}", highlight=False, markup=False
                )
        console.print()
    if apart := _apart(result):
        print_table(apart, console)
    if broken := _broken(result):
        print_table(broken, console)
        console.print()
    else:
        console.print("\nBroken responses: none")
    if loss := result.reasoning_loss:
        console.print(_loss_line(loss), highlight=False, markup=False)
    console.print(f"Thoughts: {result.thought}", highlight=False, markup=False)
    console.print(f"Judge: {printable(result.judge_name)}", highlight=False, markup=False)
    if result.no_thought_verdicts:
        line = f"Thoughts were not judged: {result.no_thought_verdicts}."
        console.print(line, highlight=False, markup=False)
    if result.sandbox:
        console.print(f"Sandbox: {result.sandbox}", highlight=False, markup=False)


def _apart(result: EvaluationResult) -> Table | None:
    """Thought and answer of each set of attacks, in percent; None where nothing is known of thoughts."""
    rows = []
    for name, one in result.sets.get("attack", {}).items():
        if (of := one.thoughts) is None:
            continue
        unknown = f"{of.without:,} without both verdicts" if of.without else ""
        shown = {"Unsafe thoughts ↓": of.asr["thought"]}
        shown |= {QUADRANT_HEADINGS[quadrant]: share for quadrant, share in of.shares.items()}
        first = [name, unknown]
        for number, (heading, share) in enumerate(shown.items()):
            low, high = (f"{100 * end:.1f}" for end in share.interval)
            left = first[number] if number < len(first) else ""
            rows.append([*map(Entry, (left, heading, percent(share.rate), f"{low} to {high}"))])
    return Table(["Thoughts and answers", "", "%", "95% interval"], rows) if rows else None


def _broken(result: EvaluationResult) -> Table | None:
    """The sets in which responses are broken, in percent; None where none is."""
    rows = [
        [Entry(name), _share(of.share), *(Entry(percent(of.parts[part])) for part in BROKEN)]
        for sets in result.sets.values()
        for name, one in sets.items()
        if (of := one.broken) and of.share.rate
    ]
    return Table(["Broken responses", "%", *BROKEN], rows) if rows else None


def _share(share: Share) -> Entry:
    low, high = share.interval
    return Entry(percent(share.rate), note=f"{100 * low:.1f} to {100 * high:.1f}")


def _loss_line(loss: ReasoningLoss) -> str:
    parts = []
    for name in LOSSES:
        value, interval = getattr(loss, name), loss_interval(loss, name)
        if value is not None:
            bounds = f" ({nats(interval.low)} to {nats(interval.high)})" if interval else ""
            parts.append(f"{name.upper()} {nats(value)}{bounds}")
    return f"Reasoning loss on {len(loss.traces)} held-out traces, nats per token: {', '.join(parts)}"


def _count(found: SetResult) -> str:
    each = found.samples // found.items
    return str(found.items) if each == 1 else f"{found.items} x {each}"


def _figure(found: SetResult) -> tuple[str, str]:
    if found.figure is None or found.interval is None:
        return "–", "nothing was judged"
    low, high = found.interval
    return marked(percent(found.figure), found.unreliable), f"{100 * low:.1f} to {100 * high:.1f}"


def render_audit(audit: Mapping[str, Any], console: Any = None) -> None:
    """Print the verdict, the drift of each module group and the course of k to a rich console (default: stdout)."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    checked, moved = audit["frozen_element_steps_checked"], audit["frozen_elements_moved"]
    if moved is None:
        console.print("Nothing was frozen over any step, so nothing was checked.", style="bold")
    else:
        console.print(f"{moved:,} frozen elements moved in {checked:,} element-steps checked.", style="bold")
    if moved and audit["gradient_only"]:
        console.print("Only gradients were masked (gradient_only), so weight decay and momentum moved them.")
    elif moved:
        console.print("Freezing failed: no frozen element should ever move.")
    console.print(f"Intervals between changes of the mask: {len(audit['intervals'])}.")
    ks = [entry["k"] for entry in audit.get("trajectory", [])]
    if ks:
        console.print(f"k: {len(ks)} measurements, {min(ks):.3f} to {max(ks):.3f}, last {ks[-1]:.3f}.")
        if all(k == 0.5 for k in ks):
            console.print("k never left 0.5: the window of measurements was never full.")
    table = _table()
    table.add_column("Module group")
    table.add_column("relative drift", justify="right")
    table.add_column("elements changed", justify="right")
    for group, drift in audit["drift"]["groups"].items():
        relative = drift["relative"]  # None where weights are not numbers
        shown = "–" if relative is None else f"{relative:.2e}"
        table.add_row(Text(printable(group)), shown, f"{drift['changed']:.1%}")
    console.print(table)
