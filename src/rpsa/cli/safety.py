"""The command that makes safety data: `rpsa safety-data`."""

from pathlib import Path
from typing import Annotated

import typer

from rpsa.cli.parsing import ModelOrServer, ServedModel, ServersTokenizer, ThoughtWords, readable_errors


def safety_data(
    model: ModelOrServer,
    prompts: Annotated[
        str,
        typer.Option(
            help="Harmful requests: a file, a dataset on the hub, or tiny. Answers in it are ignored.",
            show_default=False,
        ),
    ],
    benign: Annotated[
        str | None,
        typer.Option(help="Harmless requests, to be complied with; likewise.", show_default=False),
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(
            help="What stands before a harmful request, or around {prompt}; '' for nothing. Default: to refuse kindly.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str, typer.Option("--filter", help="The judge of refusals: refusal, qwen3guard, rubric, ...")
    ] = "refusal",
    per_prompt: Annotated[int, typer.Option(help="Responses to each request.", min=1)] = 4,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder to fill, or a .jsonl file; default safety-data/MODEL.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of a recipe's section reference, or of the judge: temperature=1, "
            "filter_settings.model=...",
            metavar="KEY=VALUE",
        ),
    ] = None,
    served: ServedModel = None,
    tokenizer: ServersTokenizer = None,
    thought: ThoughtWords = "auto",
) -> None:
    """Make safety data in the model's own words: refusals of harmful requests, answers to harmless ones.

    rpsa safety-data Qwen/Qwen3-8B --prompts harmful.jsonl --benign benign.jsonl --filter llama-guard-3

    rpsa safety-data http://localhost:8000/v1 --served-model Qwen/Qwen3-8B --prompts harmful.jsonl --out own.jsonl

    rpsa safety-data tiny:0 --prompts tiny --benign tiny --steer '' --per-prompt 8 --set max_new_tokens=48

    Each line of the file has prompt, response and messages, and the token ids. The same command goes on after an
    interruption; with another filter it generates nothing again.
    """
    with readable_errors():
        from rpsa.report.self_made import render_self_made
        from rpsa.self_data.order import SafetyDataCommand, safety_data_command

        command = SafetyDataCommand(
            model,
            prompts,
            benign,
            steer,
            judge,
            per_prompt,
            out,
            settings or [],
            served,
            tokenizer,
            thought,
        )
        made, file = safety_data_command(command)
        render_self_made([made])
        print(f"\nWhat was kept: {file}")
