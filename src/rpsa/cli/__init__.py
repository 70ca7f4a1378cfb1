"""The `rpsa` command. Each command imports what it needs when it runs, so that `rpsa --help` is quick."""

from typing import Annotated

import typer

from rpsa.cli.around import chat, environment, fetch, publish, recipes_app
from rpsa.cli.inspection import audit, schema, tiny_app, verify
from rpsa.cli.measuring import evaluate, fisher_map, perturb, tasks_path
from rpsa.cli.safety import safety_data
from rpsa.cli.study import bench, plan, run, sweep

__all__ = ["app", "main"]

app = typer.Typer(
    help="Safety-align reasoning models without paying for it in reasoning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point of the `rpsa` command."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rpsa {version('rpsa')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# In the order of `rpsa --help`
app.command()(run)
app.command()(sweep)
app.command()(bench)
app.command()(plan)
app.command()(evaluate)
app.command("tasks-path")(tasks_path)
app.command("safety-data")(safety_data)
app.command()(schema)
app.command()(verify)
app.command()(audit)
app.command("fisher-map")(fisher_map)
app.command()(perturb)
app.command()(chat)
app.command()(publish)
app.add_typer(recipes_app, name="recipes")
app.command()(fetch)
app.command("env")(environment)
app.add_typer(tiny_app, name="tiny")
