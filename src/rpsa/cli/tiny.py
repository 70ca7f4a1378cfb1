"""The commands `rpsa tiny ...`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rpsa.cli.errors import readable_errors

tiny_app = typer.Typer(help="The tiny reasoning models that come with the package.", no_args_is_help=True)


@tiny_app.command("train")
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
