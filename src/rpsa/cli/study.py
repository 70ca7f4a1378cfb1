"""The commands that take a recipe: `rpsa run`, `sweep`, `bench`, `plan`, `doctor`; and one that writes one."""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rpsa.cli.parsing import KeepFinished, Overrides, RecipeFile, readable_errors
from rpsa.errors import RPSAError
from rpsa.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpsa.recipe import Recipe

_SAFETY = "UCSC-VLAA/STAR-1"


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.", metavar="STAGE")] = None,
    keep_finished: KeepFinished = False,
) -> None:
    """Run a recipe: reference, Fisher, alignment, evaluation, report. Finished stages are not run again."""
    with readable_errors():
        checked = _loaded(recipe, overrides)
        from rpsa import pipeline

        pipeline.run(checked, only=only, keep_finished=keep_finished)


def sweep(
    recipe: RecipeFile,
    over: Annotated[
        list[str],
        typer.Option(
            help="A setting and its values: lora.r=1,2,4.", metavar="KEY=VALUES", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the recipe: section.key=value ...", show_default=False),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Tasks at a time, each on a GPU of its own.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; default: sweeps/RECIPE/KEYS.", show_default=False)
    ] = None,
    keep_finished: KeepFinished = False,
) -> None:
    """Vary settings of a recipe (Figures 5 and 7): writes a recipe with that sweep, and runs it.

    The recipe is sweep.yaml in the run's folder; `rpsa run` takes it as any other.
    """
    with readable_errors():
        from rpsa.recipe.loading import load_sweep, write_recipe
        from rpsa.recipe.shipped import named_recipe

        settings = [*(overrides or []), *([f"matrix.parallel={parallel}"] if parallel else [])]
        swept = load_sweep(named_recipe(recipe), over, settings, out)
        written = swept.folder / "sweep.yaml"
        write_recipe(swept, written)
        typer.echo(f"Recipe: {written}")
        from rpsa import pipeline

        pipeline.run(swept, keep_finished=keep_finished)


def bench(
    recipe: RecipeFile,
    overrides: Overrides = None,
    keep_finished: KeepFinished = False,
) -> None:
    """Compare many methods: settings are chosen on some bases, and measured on others (a recipe's section bench).

    Stopped at any point, the same command goes on. The leaderboard is bench/bench.html in the run's folder.
    """
    with readable_errors():
        checked = _loaded(recipe, overrides)
        from rpsa.pipeline.bench import run_bench

        run_bench(checked, keep_finished=keep_finished)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu_memory: Annotated[float, typer.Option(help="GiB of one GPU.")] = 80,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to plan for.")] = "1,2,4,8",
    usd_per_hour: Annotated[
        float | None, typer.Option(help="The price of one GPU for an hour.", show_default=False)
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic of each part.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds, as JSON.")] = False,
) -> None:
    """Say what a recipe needs before it runs: memory, steps, tokens, hours, disk, money. Loads no weights."""
    with readable_errors():
        numbers = _whole_numbers(gpus)
        from rpsa.plan.configs import check_configs

        checked = _loaded(recipe, overrides, check_configs)
        from rpsa.models import quiet
        from rpsa.plan import make_plan
        from rpsa.plan.render import render, to_json

        quiet()
        made = make_plan(checked, gpu_memory, numbers, usd_per_hour)
        if as_json:
            typer.echo(to_json(made))
        else:
            render(made, explain=explain)


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file, or the name of a shipped recipe; without one the machine alone is looked at.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Say what a machine lacks for a recipe: GPUs, access to models and data, memory, disk, judges, sandbox.

    Ends with 1 if something is missing without which the run would fail.
    """
    with readable_errors():
        from rpsa.doctor import machine_findings, study_findings
        from rpsa.models import quiet

        quiet()
        checked = _loaded(recipe, overrides) if recipe else None
        missing = 0
        for finding in chain(machine_findings(), study_findings(checked) if checked else ()):
            typer.echo(f"{finding.state:<8}{printable(finding.about)}: {printable(finding.said)}")
            missing += finding.state == "missing"
    if missing:
        raise typer.Exit(1)


def init(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder, or tiny:0.", show_default=False)],
    safety: Annotated[
        str, typer.Option(help="Harmful requests with refusals: a file or a dataset.")
    ] = _SAFETY,
    benign: Annotated[
        str | None,
        typer.Option(
            help="Harmless requests with answers; default: STAR-1's own, with STAR-1.", show_default=False
        ),
    ] = None,
    problems: Annotated[
        str, typer.Option(help="Reasoning problems: a file or a dataset.")
    ] = "HuggingFaceH4/MATH-500",
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs there are.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, help="GiB of each.")] = 80,
    cpu: Annotated[bool, typer.Option("--cpu", help="There is no GPU.")] = False,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe for a model, fitted to the GPUs that there are."""
    with readable_errors():
        from rpsa.plan.starting import Start, write_start

        if benign is None and safety == _SAFETY:
            benign = "UCSC-VLAA/STAR-benign-915"
        start = Start(model, safety, benign, problems, gpus, None if cpu else gpu_memory)
        typer.echo(f"Recipe: {out} ({write_start(start, out)})")


def _loaded(
    recipe: Path, overrides: list[str] | None, first: "Callable[[Recipe], None] | None" = None
) -> "Recipe":
    from rpsa.recipe import load_recipe
    from rpsa.recipe.shipped import named_recipe

    return load_recipe(named_recipe(recipe), overrides or [], first)


def _whole_numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RPSAError(f"--gpus: {text!r} is not a list of whole numbers such as 1,2,4,8") from None
