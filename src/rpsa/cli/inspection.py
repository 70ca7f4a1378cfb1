"""The commands that look at what there is: a recipe's schema, a run's files, a model's audit; and `rpsa tiny`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rpsa.artifacts import AUDIT_FILE, read_json, reading_records
from rpsa.cli.parsing import RunFolder, readable_errors
from rpsa.errors import RPSAError


def schema() -> None:
    """Print the JSON schema of a recipe, for editors and for reading."""
    with readable_errors():
        from rpsa.recipe import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=2))


def verify(run_dir: RunFolder) -> None:
    """Check a run's files against the hashes that its stages recorded."""
    with readable_errors():
        _require_folder(run_dir)
        from rpsa import pipeline

        pipeline.verify(run_dir)


def status(
    run_dir: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every two seconds, until it has ended.")
    ] = False,
) -> None:
    """Show what of a run is done, what runs now, what failed, and how long the rest may take."""
    with readable_errors():
        _require_folder(run_dir)
        from rpsa.pipeline.status import run_status

        if watch:
            _watch(run_dir)
        else:
            typer.echo("\n".join(run_status(run_dir).lines()))


def report(
    run_dir: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again whenever there is another result, until the run has ended.")
    ] = False,
) -> None:
    """Write the report of a run as far as it is, while it is on or afterwards."""
    with readable_errors():
        _require_folder(run_dir)
        from rpsa.models import quiet
        from rpsa.pipeline.watching import report_again, watch_report

        quiet()
        (watch_report if watch else report_again)(run_dir)


def _watch(run_dir: Path) -> None:
    from rich.live import Live
    from rich.text import Text

    from rpsa.pipeline.status import run_status

    with Live(refresh_per_second=1) as live:
        while True:
            found = run_status(run_dir)
            live.update(Text("\n".join(found.lines())), refresh=True)
            if not found.is_running:
                return
            time.sleep(2)


def audit(
    model_dir: Annotated[
        Path, typer.Argument(help=f"A model's folder, with its {AUDIT_FILE}.", show_default=False)
    ],
) -> None:
    """Show what a training run recorded about its frozen elements: how many were checked, and how many moved."""
    with readable_errors():
        _require_folder(model_dir)
        from rpsa.report.console import render_audit

        audit = _read_json(model_dir / AUDIT_FILE)
        with reading_records(model_dir / AUDIT_FILE):
            render_audit(audit)


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise RPSAError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise RPSAError(f"{path}: no such file; only models that RPSATrainer saved with audit=True have one")
    value = read_json(path)
    if not isinstance(value, dict):
        raise RPSAError(f"{path}: expected a mapping")
    return value


tiny_app = typer.Typer(help="The tiny reasoning models that come with the package.", no_args_is_help=True)


@tiny_app.command("train", epilog="Example: rpsa tiny train --seed 7 --out my-base")
def tiny_train(
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, help="The seed of the world, the data and the weights.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, if not the usual number.")] = None,
) -> None:
    """Train a tiny base model from its seed, in minutes on a CPU."""
    with readable_errors():
        from rpsa.tiny.train import train_tiny

        settings: dict[str, Any] = {} if steps is None else {"steps": steps}
        train_tiny(seed=seed, out_dir=out, **settings)
