"""Robustness in a report: what the models of a matrix say and do under each attack, beside what they do without one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpsa.evaluation.benchmarks import Kind
from rpsa.evaluation.original import loss_interval
from rpsa.evaluation.results import EvaluationResult, SetResult
from rpsa.evaluation.statistics import mean_interval, mean_of_rates
from rpsa.report.tables import NONE, Entry, Table, markdown, nats, percent
from rpsa.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNATTACKED = "none"
ROBUSTNESS_NOTE = (
    "Under each attack, and without one. Rates are means over the sets of requests, in percent: how many answers to "
    "harmful requests comply, how many thoughts before them hold the harm, how many harmless requests are refused, and "
    "how many responses to harmful ones are broken (they loop, have no end or no sense). The reasoning loss is "
    "the negative log-likelihood of the untouched model's held-out reasoning in nats per token; attacks by the prompt "
    "leave it as it is. With 95% intervals: over runs for three or more, over requests or responses for one."
)


@dataclass(frozen=True)
class Attacked:
    """One run under one attack.

    Attributes:
        attack: its name; `UNATTACKED`: none.
        curve, steps: of further training, what it was, and how far it went.
        result: of the same sets of requests with and without an attack.
    """

    method: str
    base: str
    seed: int
    attack: str
    result: EvaluationResult
    curve: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Bounded:
    """A value with its 95% interval where there is one; `runs` is what it is the mean of."""

    mean: float
    interval: tuple[float, float] | None
    runs: int = 1

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "ci95": list(self.interval) if self.interval else None, "runs": self.runs}


@dataclass(frozen=True)
class Measure:
    """A figure of an evaluation: how it is read there, None where it was not measured, and how it is shown."""

    name: str
    title: str
    read: Callable[[EvaluationResult], Bounded | None]
    form: Callable[[float], str]


Rate = tuple[float, tuple[float, float] | None]
"""With its 95% interval."""


def _figure(found: SetResult) -> Rate | None:
    return None if found.figure is None else (found.figure, found.interval)


def _of_thoughts(found: SetResult) -> Rate | None:
    share = found.thoughts.asr["thought"] if found.thoughts else None
    return (share.rate, share.interval) if share else None


def _broken(found: SetResult) -> Rate | None:
    return (found.broken.share.rate, found.broken.share.interval) if found.broken else None


def _over_sets(
    kind: Kind, rate: Callable[[SetResult], Rate | None] = _figure
) -> Callable[[EvaluationResult], Bounded | None]:
    """The mean over a kind's sets; without an interval where one of them has none."""

    def read(result: EvaluationResult) -> Bounded | None:
        rates = [found for one in result.sets.get(kind, {}).values() if (found := rate(one)) is not None]
        if not rates:
            return None
        known = [(figure, interval) for figure, interval in rates if interval is not None]
        if len(known) < len(rates):
            return Bounded(sum(figure for figure, _ in rates) / len(rates), None)
        return Bounded(*mean_of_rates(known))

    return read


def _loss(result: EvaluationResult) -> Bounded | None:
    loss = result.reasoning_loss
    return Bounded(loss.nll, loss_interval(loss, "nll")) if loss else None


MEASURES = (
    Measure("attack_success_rate", "Attack success ↓", _over_sets("attack"), percent),
    Measure("unsafe_thoughts", "Unsafe thoughts ↓", _over_sets("attack", _of_thoughts), percent),
    Measure("over_refusal", "Over-refusal ↓", _over_sets("over_refusal"), percent),
    Measure("broken", "Broken ↓", _over_sets("attack", _broken), percent),
    Measure("reasoning_nll", "Reasoning loss ↓", _loss, nats),
)

Found = Mapping[str, Mapping[str, Mapping[str, Bounded]]]
"""By measure, attack and method."""


def summarised(attacked: Sequence[Attacked]) -> Found:
    """Means over bases and seeds, in the order of the attacks."""
    groups: dict[tuple[str, str], list[EvaluationResult]] = {}
    for one in attacked:
        groups.setdefault((one.attack, one.method), []).append(one.result)
    found: dict[str, dict[str, dict[str, Bounded]]] = {}
    for measure in MEASURES:
        for (attack, method), results in groups.items():
            values = [value for result in results if (value := measure.read(result)) is not None]
            if values:
                by_method = found.setdefault(measure.name, {}).setdefault(attack, {})
                by_method[method] = _over_runs(values, is_rate=measure.form is percent)
    return found


def _over_runs(values: Sequence[Bounded], *, is_rate: bool) -> Bounded:
    """Over runs, with the interval over them; of a single run its own."""
    means = [value.mean for value in values]
    interval = mean_interval(means) if len(values) > 1 else values[0].interval
    if interval is not None:
        interval = (max(0.0, interval[0]), min(1.0, interval[1]) if is_rate else interval[1])
    return Bounded(sum(means) / len(means), interval, len(values))


def robustness_tables(attacked: Sequence[Attacked]) -> dict[str, Table]:
    """By title, a table of each measure: a row an attack, a column a method."""
    methods = list(dict.fromkeys(one.method for one in attacked))
    found = summarised(attacked)
    return {
        measure.title: Table(
            ["Attack", *methods],
            [
                [Entry(attack), *(_entry(by_method.get(method), measure) for method in methods)]
                for attack, by_method in found[measure.name].items()
            ],
        )
        for measure in MEASURES
        if measure.name in found
    }


def _entry(found: Bounded | None, measure: Measure) -> Entry:
    if found is None:
        return Entry(NONE)
    low, high = found.interval or (None, None)
    note = "" if low is None or high is None else f"{measure.form(low)} to {measure.form(high)}"
    return Entry(measure.form(found.mean), note=note)


def robustness_markdown(attacked: Sequence[Attacked]) -> str:
    """All tables, as `robustness.md` has them."""
    tables = (f"**{title}**\n\n{markdown(table)}" for title, table in robustness_tables(attacked).items())
    return "\n".join([*tables, f"{ROBUSTNESS_NOTE}\n"])


def robustness_json(attacked: Sequence[Attacked]) -> dict[str, Any]:
    """For `results.json`: by measure, attack and method."""
    return {
        measure: {
            attack: {method: one.to_json() for method, one in by_method.items()}
            for attack, by_method in by_attack.items()
        }
        for measure, by_attack in summarised(attacked).items()
    }


def render_robustness(attacked: Sequence[Attacked], console: Any = None) -> None:
    """Print the tables without their intervals to a rich console (default: stdout); a single model's with them."""
    from rpsa.report.console import print_table

    for title, table in robustness_tables(attacked).items():
        several = len(table.header) > 2
        rows = [[Entry(cell.text, note="" if several else cell.note) for cell in row] for row in table.rows]
        print(f"\n{printable(title)}")
        print_table(Table(table.header, rows), console)


def tampering_curves(attacked: Iterable[Attacked]) -> "Figure | None":
    """Attack success over the steps of further training, a panel for each kind of it; None without any."""
    from rpsa.report.drawing import add_legend, marker_of, new_panels, set_title, style_of

    attacked = list(attacked)
    curves = list(dict.fromkeys(one.curve for one in attacked if one.curve is not None))
    if not curves:
        return None
    found = summarised(attacked)["attack_success_rate"]
    methods = list(dict.fromkeys(one.method for one in attacked))
    columns = min(2, len(curves))
    figure, panels = new_panels(-(-len(curves) // columns), columns, 2.4, sharey=True)
    places = [axes for row in panels for axes in row]
    for axes, curve in zip(places, curves, strict=False):
        steps = {one.attack: one.steps or 0 for one in attacked if one.curve == curve}
        marks = {UNATTACKED: 0} | steps
        for method in methods:
            known = {attack: step for attack, step in marks.items() if method in found.get(attack, {})}
            means = [found[attack][method] for attack in known]
            style = style_of(method)
            axes.plot(
                list(known.values()),
                [100 * one.mean for one in means],
                color=style.colour,
                linestyle=style.line,
                linewidth=1.3,
                **marker_of(style, 0.6),
            )
        set_title(axes, curve)
        axes.set_ylim(-4, 104)
        axes.set_xlabel("Optimizer steps")
    for row in panels:
        row[0].set_ylabel("Attack success (%)")
    for axes in places[len(curves) :]:
        axes.set_visible(False)
    add_legend(figure, methods, lines=False)
    return figure
