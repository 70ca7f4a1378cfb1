"""The commands `rpsa evaluate`, for one model, and `rpsa tasks-path`, for lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer

from rpsa.cli.parsing import readable_errors


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a Hugging Face id, an adapter's folder, tiny:0, or a server's url (http://.../v1).",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Benchmarks, groups or files, with commas between.")
    ] = "rpsa_reasoning,rpsa_safety",
    out: Annotated[Path | None, typer.Option(help="The folder to fill; default evaluations/MODEL.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: 20 items a set, one sample each, 4096 tokens.")
    ] = False,
    data_dir: Annotated[
        str | None, typer.Option(help="A folder with the benchmarks' files (offline).")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="Who judges attacks: refusal, llama-guard-3, rubric, ...")
    ] = "refusal",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting of a recipe's section evaluate: key=value.", metavar="KEY=VALUE"
        ),
    ] = None,
    served: Annotated[
        str | None, typer.Option("--served-model", help="With a server: the name that it gives the model.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With a server: the model's tokenizer, if not its name.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A D_ref whose problems rpsa_math500 leaves out.")
    ] = None,
    thought: Annotated[
        str,
        typer.Option(
            help="What sets thoughts apart: auto (the chat template), none, {open: ..., close: ...}."
        ),
    ] = "auto",
) -> None:
    """Measure one model: reasoning, attack success, over-refusal. What is stored in --out is not asked for again."""
    with readable_errors():
        from rpsa.evaluation.command import EvaluateCommand, evaluate_command
        from rpsa.report.console import render_evaluation

        result, folder = evaluate_command(
            EvaluateCommand(
                model,
                tasks.split(","),
                out,
                quick,
                data_dir,
                judge,
                settings or [],
                served,
                tokenizer,
                reference,
                thought,
            )
        )
        render_evaluation(result)
        print(f"\nEvery sample: {folder / 'samples.jsonl'}")


def tasks_path() -> None:
    """Print the folder of tasks for lm_eval's --include_path."""
    from rpsa.evaluation import TASKS_PATH

    typer.echo(TASKS_PATH)
