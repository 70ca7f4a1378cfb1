"""The `rpsa` command. Each command imports what it needs when it runs, so that `rpsa --help` is quick."""

import logging
from collections.abc import Callable
from typing import Annotated

import typer

from rpsa.cli.around import chat, environment, fetch, publish, recipes_app
from rpsa.cli.inspection import audit, report, schema, status, tiny_app, verify
from rpsa.cli.measuring import attack, evaluate, fisher_map, perturb, tasks_path
from rpsa.cli.safety import safety_data
from rpsa.cli.study import bench, doctor, init, plan, run, sweep

__all__ = ["app", "main"]

app = typer.Typer(
    help="Safety-align reasoning models without paying for it in reasoning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point of the `rpsa` command."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which PEFT imports, wherever it is installed
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


# In the order of `rpsa --help`: the name, what it does, and the example that its own --help shows
_COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("init", init, "Qwen/Qwen3-8B --safety safety.jsonl --benign benign.jsonl --gpus 2"),
    ("run", run, "tiny/demo matrix.bases='[tiny:0]'"),
    ("sweep", sweep, "tiny/demo --over lora.r=1,4,16"),
    ("bench", bench, "tiny/bench --keep-finished"),
    ("status", status, "runs/tiny-demo --watch"),
    ("report", report, "runs/tiny-demo --watch"),
    ("plan", plan, "qwen3-8b/recommended --gpu-memory 80 --gpus 1,2"),
    ("doctor", doctor, "qwen3-8b/recommended"),
    ("evaluate", evaluate, "Qwen/Qwen3-0.6B --quick"),
    ("attack", attack, "tiny:0 --tasks tiny --attack prefill,prune"),
    ("tasks-path", tasks_path, ""),
    ("safety-data", safety_data, "Qwen/Qwen3-0.6B --prompts harmful.jsonl --benign benign.jsonl --out data"),
    ("schema", schema, ""),
    ("verify", verify, "runs/tiny-demo"),
    ("audit", audit, "runs/tiny-demo/align/fft+rpsa/tiny-0/seed0"),
    ("fisher-map", fisher_map, "runs/tiny-demo/fisher/tiny-0/full --out fisher-map"),
    ("perturb", perturb, "tiny:0 runs/tiny-demo/fisher/tiny-0/full --tasks tiny --out perturb"),
    ("chat", chat, "runs/tiny-demo/align/lora+rpsa/tiny-0/seed0 --prompt 'add 4 7 , 1 5'"),
    ("publish", publish, "runs/tiny-demo lora+rpsa/tiny-0/seed0 --out my-model --merge"),
    ("fetch", fetch, "smollm2"),
    ("env", environment, ""),
)
for _name, _does, _arguments in _COMMANDS:
    app.command(_name, epilog=f"Example: rpsa {_name} {_arguments}".rstrip())(_does)
app.add_typer(recipes_app, name="recipes")
app.add_typer(tiny_app, name="tiny")
