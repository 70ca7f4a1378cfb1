"""Rendering: a plan as values (bytes, seconds, counts), as tables for a terminal, and as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rpsa.plan.memory import Sharding, StageMemory
from rpsa.plan.time import GPUS, ResponseTokens, SafetyTokens, Steps
from rpsa.plan.totals import Study, Work, in_order
from rpsa.text import printable


@dataclass(frozen=True)
class Layout:
    """The align stage of a method on some GPUs."""

    gpus: int
    sharding: Sharding
    memory: StageMemory
    fits: bool
    steps: Steps | None
    """None where the number of training examples is unknown."""


@dataclass(frozen=True)
class SingleGpuStage:
    """A stage that one GPU does: generation of D_ref, the Fisher, generation for the evaluation."""

    stage: str
    memory: StageMemory
    fits: bool
    seconds: dict[str, float]
    """By GPU name; only where it fits in that GPU's memory."""
    work: Work
    scored: int = 0
    """Elements whose Fisher is stored."""


@dataclass(frozen=True)
class TrainingTime:
    """One run on the fewest GPUs of a kind that hold it."""

    gpus: int
    seconds: float


@dataclass(frozen=True)
class MethodPlan:
    """One method on one base. `measurement_cost`: what measuring c once costs, in steps; None if it never does."""

    base: str
    method: str
    parameters: int
    trainable: int
    dtype: str
    safety: SafetyTokens
    layouts: list[Layout]
    measurement_cost: float | None
    training: dict[str, TrainingTime]
    """By GPU name; only where one of the numbers of GPUs holds it."""
    runs: int
    """Cells of the matrix with this method and base: its seeds and the points of the grid."""
    saved_bytes: int
    """Of the model or adapter that a run leaves."""
    checkpoint_bytes: int
    checkpoints: int
    """That are there at once."""
    is_adapter: bool
    work: Work


@dataclass(frozen=True)
class Plan:
    name: str
    gpu_memory: float
    parameters: dict[str, int]
    thoughts: dict[str, str | None]
    """What sets the thoughts of each base apart; None where its chat template is not on this machine."""
    methods: list[MethodPlan]
    stages: dict[str, list[SingleGpuStage]]
    """By base."""
    reference: ResponseTokens | None
    evaluation: list[ResponseTokens]
    evaluated: int
    """Models that answer the evaluation."""
    study: Study
    warnings: list[str]

    @property
    def works(self) -> list[Work]:
        """All that is done, in the order of the stages."""
        of_stages = [stage.work for stages in self.stages.values() for stage in stages]
        return in_order([*of_stages, *(method.work for method in self.methods)])


_WIDTH = 122
_NOTES = (
    "All of this is estimates. Memory: what stays is exact; passes are dry runs with the longest sequences that the "
    "settings admit. A stage fits if 1 GiB and 5% are left. Times: 40% of the peak operations, 60% of the bandwidth, "
    "lengths of responses as assumed; good to a factor of two."
)


def to_json(plan: Plan) -> str:
    """Bytes and seconds; `total` beside each memory, sums beside the parts of the study."""
    content = asdict(plan)
    for method, planned in zip(content["methods"], plan.methods, strict=True):
        for layout, of in zip(method["layouts"], planned.layouts, strict=True):
            layout["memory"]["total"] = of.memory.total
    for base, stages in plan.stages.items():
        for stage, of_stage in zip(content["stages"][base], stages, strict=True):
            stage["memory"]["total"] = of_stage.memory.total
    study = content["study"]
    study |= {"disk_bytes": plan.study.disk_bytes, "download_bytes": plan.study.download_bytes}
    for total, of_total in zip(study["totals"], plan.study.totals, strict=True):
        total["gpu_hours"] = of_total.gpu_hours
    return json.dumps(content, indent=2)


def render(plan: Plan, console: Console | None = None, *, explain: bool = False) -> None:
    """`explain`: with the arithmetic of each part."""
    console = console or Console()
    console.width = max(console.width, _WIDTH)
    for base, parameters in plan.parameters.items():
        methods = [method for method in plan.methods if method.base == base]
        stages = plan.stages[base]
        unit = _unit(methods, stages)
        thought = plan.thoughts[base] or "as its chat template says, which is not here"
        console.print(
            f"\n[bold]{_literal(base)}[/bold], {_count(parameters)} parameters, {plan.gpu_memory:g} GiB GPUs"
        )
        console.print(f"Thoughts: {thought}", markup=False, highlight=False)
        if methods:
            console.print(f"\nAlign, {unit.name} of each GPU")
            console.print(_memory_table(methods, unit))
            console.print(
                "\nOptimizer steps (measurements of g_R; one costs as many steps as `each` says), time × GPUs of a kind"
            )
            console.print(_steps_table(methods))
        if stages:
            console.print(f"\nOn one GPU, {unit.name} and time, once")
            console.print(_stages_table(stages, unit))
    if plan.reference or plan.evaluation:
        console.print("\nTo generate")
        console.print(_tokens_table(plan))
    _render_study(plan, console)
    if explain:
        _explain(plan, console)
    console.print(f"\n[dim]{_NOTES}[/dim]")
    for warning in plan.warnings:
        console.print(f"[yellow]•[/yellow] {_literal(warning)}", highlight=False)


def _render_study(plan: Plan, console: Console) -> None:
    study = plan.study
    workers = "as many workers as `matrix.parallel` says"
    how = f"tasks in {workers}"
    if study.launched:
        how = f"training and Fisher by `accelerate launch` on all of them, one after the other; the rest in {workers}"
    console.print(f"\nThe study on {study.gpu}-{study.memory:g} GPUs: {how}", markup=False)
    table = _table("GPUs", "as written", "matrix.parallel as GPUs", "GPU hours", "USD")
    for total in study.totals:
        table.add_row(
            str(total.gpus),
            *("does not fit" if s is None else _duration(s) for s in (total.as_written, total.seconds)),
            "" if total.gpu_hours is None else _number(total.gpu_hours),
            "" if total.usd is None else f"{total.usd:,.0f}",
        )
    console.print(table)
    if plan.study.calls:
        table = _table("Judges behind an endpoint", "calls", "million tokens read", "written")
        for calls in study.calls:
            sizes = (f"{tokens / 1e6:.2f}" for tokens in (calls.tokens_in, calls.tokens_out))
            table.add_row(_literal(calls.judge), f"{calls.calls:,}", *sizes)
        console.print()
        console.print(table)
    console.print(f"\n[bold]{_literal(whole_study(study))}[/bold]", highlight=False)


def whole_study(study: Study) -> str:
    """The totals in one line."""
    stored = f"{_gigabytes(study.disk_bytes)} of disk, {_gigabytes(study.download_bytes)} to download"
    total = study.total
    if total is None or total.seconds is None or total.gpu_hours is None:
        return f"Whole study: fits on none of these numbers of {study.gpu}-{study.memory:g} GPUs; {stored}"
    paid = "" if total.usd is None else f"${total.usd:,.0f}, "
    return (
        f"Whole study on {total.gpus} × {study.gpu}-{study.memory:g}: {_duration(total.seconds)}, "
        f"{_number(total.gpu_hours)} GPU hours, {paid}{stored}"
    )


def _explain(plan: Plan, console: Console) -> None:
    """Each part's arithmetic in lines that can be checked by hand."""
    for work in plan.works:
        on = {number: _duration(seconds) for number, seconds in work.seconds.get(plan.study.gpu, {}).items()}
        said = ", ".join(f"{time} on {number}" for number, time in on.items()) or "does not fit"
        _say(console, f"\n{work.stage}, {work.name}, {work.times} ×: {said}")
        for line in work.arithmetic:
            _say(console, f"  {line}")
    for heading, stored in (("On disk", plan.study.disk), ("To download", plan.study.download)):
        _say(console, f"\n{heading}")
        for one in stored:
            _say(console, f"  {one.name}: {one.arithmetic} = {_gigabytes(one.size)}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _gigabytes(size: int) -> str:
    if size == 0:
        return "nothing"
    return (
        f"{size / 1e9:,.0f} GB"
        if size >= 1e10
        else f"{size / 1e9:.1f} GB"
        if size >= 1e8
        else f"{size / 1e6:.1f} MB"
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _literal(text: str) -> str:
    """A name of the user's: no markup, nothing that a terminal acts upon."""
    return escape(printable(text))


def _memory_table(methods: list[MethodPlan], unit: "_Unit") -> Table:
    """One row for each way of sharding that differs: more GPUs under DDP hold the same."""
    kept = list(dict.fromkeys(part for m in methods for layout in m.layouts for part in layout.memory.kept))
    table = _table("", "GPUs", *kept, "passes", "total", "fits")
    for method in methods:
        for layouts in _alike(method.layouts):
            memory = layouts[0].memory
            table.add_row(
                _literal(method.method) if layouts[0] is method.layouts[0] else "",
                f"{','.join(str(layout.gpus) for layout in layouts)} {_sharding(layouts[0])}".strip(),
                *(unit(memory.kept[part]) if part in memory.kept else "" for part in kept),
                unit(memory.work),
                unit(memory.total),
                "yes" if layouts[0].fits else "no",
            )
    return table


def _sharding(layout: Layout) -> str:
    return "" if layout.sharding == "one GPU" else layout.sharding


def _alike(layouts: list[Layout]) -> Iterable[list[Layout]]:
    groups: list[list[Layout]] = []
    for layout in layouts:
        if groups and (groups[-1][0].sharding, groups[-1][0].memory) == (layout.sharding, layout.memory):
            groups[-1].append(layout)
        else:
            groups.append([layout])
    return groups


def _steps_table(methods: list[MethodPlan]) -> Table:
    numbers = [layout.gpus for layout in methods[0].layouts]
    columns = [f"{n} GPU{'s' if n > 1 else ''}" for n in numbers]
    table = _table("", "trained", "tokens", *columns, "each", *(gpu.name for gpu in GPUS))
    for method in methods:
        examples, about = method.safety.examples, "" if method.safety.known else "~"
        cost = method.measurement_cost
        table.add_row(
            _literal(method.method) + (f" ×{method.runs}" if method.runs > 1 else ""),
            _count(method.trainable),
            f"{'?' if examples is None else f'{examples:,}'} × {about}{method.safety.mean:,}",
            *(_steps(layout) for layout in method.layouts),
            "" if cost is None else f"{cost:.2g}",
            *(_training_time(method, gpu.name) for gpu in GPUS),
        )
    return table


def _steps(layout: Layout) -> str:
    if layout.steps is None:
        return "?"
    measured = layout.steps.measurements
    return f"{layout.steps.steps:,}" + (f" ({measured})" if measured else "")


def _training_time(method: MethodPlan, gpu: str) -> str:
    time = method.training.get(gpu)
    if time is None:
        return "–"
    return _duration(time.seconds) + (f" × {time.gpus}" if time.gpus > 1 else "")


def _stages_table(stages: list[SingleGpuStage], unit: "_Unit") -> Table:
    kept = list(dict.fromkeys(part for stage in stages for part in stage.memory.kept))
    names = [gpu.name for gpu in GPUS]
    table = _table("", *kept, "passes", "total", "fits", *names)
    for stage in stages:
        memory = stage.memory
        table.add_row(
            _literal(stage.stage),
            *(unit(memory.kept[part]) if part in memory.kept else "" for part in kept),
            unit(memory.work),
            unit(memory.total),
            "yes" if stage.fits else "no",
            *(_duration(stage.seconds[name]) if name in stage.seconds else "–" for name in names),
        )
    return table


def _tokens_table(plan: Plan) -> Table:
    table = _table("", "responses", "tokens each", "million tokens", "at most")
    rows = ([(plan.reference, 1)] if plan.reference else []) + [(r, plan.evaluated) for r in plan.evaluation]
    for responses, times in rows:
        each = "" if times == 1 else f" × {times}"
        table.add_row(
            _literal(responses.name),
            f"{responses.count:,}{each}",
            f"~{responses.tokens:,}",
            f"~{responses.total * times / 1e6:,.2f}",
            f"{responses.count * responses.limit * times / 1e6:,.1f}",
        )
    return table


@dataclass(frozen=True)
class _Unit:
    name: str
    size: int

    def __call__(self, size: int) -> str:
        return f"{size / self.size:.1f}"


def _unit(methods: list[MethodPlan], stages: list[SingleGpuStage]) -> _Unit:
    """GiB, or MiB where nothing comes to one GiB."""
    totals = [layout.memory.total for method in methods for layout in method.layouts]
    totals += [stage.memory.total for stage in stages]
    return _Unit("GiB", 1 << 30) if max(totals, default=0) >= 1 << 30 else _Unit("MiB", 1 << 20)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 60:
        return f"{minutes:.0f} min" if minutes >= 1 else "<1 min"
    return f"{minutes / 60:.1f} h" if minutes < 600 else f"{minutes / 60:,.0f} h"
