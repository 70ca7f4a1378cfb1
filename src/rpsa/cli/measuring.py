"""The commands that measure: `rpsa evaluate`, `rpsa tasks-path`; `rpsa fisher-map` and `rpsa perturb` (Fig. 1 to 3)."""

from pathlib import Path
from typing import Annotated

import typer

from rpsa.cli.parsing import ModelOrServer, ServedModel, ServersTokenizer, ThoughtWords, readable_errors
from rpsa.errors import RPSAError


def evaluate(
    model: ModelOrServer,
    tasks: Annotated[
        str, typer.Option(help="Benchmarks, groups or files, with commas between.")
    ] = "rpsa_reasoning,rpsa_safety",
    out: Annotated[Path | None, typer.Option(help="The folder to fill; default evaluations/MODEL.")] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look: 20 items a set, one sample each, 4096 tokens; sets that cannot be had are skipped.",
        ),
    ] = False,
    data_dir: Annotated[
        str | None, typer.Option(help="A folder with the benchmarks' files (offline).")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="Who judges attacks: refusal, qwen3guard, rubric, ...")
    ] = "refusal",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting of a recipe's section evaluate: key=value.", metavar="KEY=VALUE"
        ),
    ] = None,
    served: ServedModel = None,
    tokenizer: ServersTokenizer = None,
    reference: Annotated[
        Path | None, typer.Option(help="A D_ref whose problems rpsa_math500 leaves out.")
    ] = None,
    thought: Annotated[
        str,
        typer.Option(
            help="What sets thoughts apart: auto (the chat template), none, {open: ..., close: ...}."
        ),
    ] = "auto",
    held_out: Annotated[
        Path | None,
        typer.Option(help="Reasoning traces to measure the reasoning loss on (a run's held-out/)."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(help="The model before training, whose traces those are; of an adapter, its base."),
    ] = None,
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
                held_out,
                original,
            )
        )
        render_evaluation(result)
        print(f"\nEvery sample: {folder / 'samples.jsonl'}")


def attack(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a Hugging Face id, an adapter's folder, or tiny:0.", show_default=False
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Benchmarks, groups or files with harmful requests, with commas between.")
    ] = "rpsa_safety",
    attacks: Annotated[
        str | None,
        typer.Option(
            "--attack",
            help="prefill, many_shot, templates, finetune, direction, prune, quantise, merge; default: all it can.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="What merging goes back to; of an adapter, its base.")
    ] = None,
    harmful: Annotated[
        str | None,
        typer.Option(
            help="Harmful requests with answers that comply: for many_shot, finetune and direction.",
            show_default=False,
        ),
    ] = None,
    benign: Annotated[
        str | None, typer.Option(help="Harmless requests with answers: for finetune and direction.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to fill; default attacks/MODEL.")] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="A folder with the benchmarks' files (offline).")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="Who judges attacks: refusal, llama-guard-3, rubric, ...")
    ] = "refusal",
    held_out: Annotated[
        Path | None,
        typer.Option(help="Reasoning traces to measure the reasoning loss on (a run's held-out/)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of a recipe's section robustness, or evaluate.key: prune.ratios=[0.2].",
            metavar="KEY=VALUE",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the harmful requests for HarmBench and AdversariaLLM (CSV), and stop."),
    ] = None,
    responses: Annotated[
        Path | None,
        typer.Option(
            help="HarmBench's test cases or completions, or AdversariaLLM's run.json, in place of attacks."
        ),
    ] = None,
    thought: ThoughtWords = "auto",
) -> None:
    """Attack one model, by the prompt and on its weights: attack success, over-refusal, reasoning loss of each.

    rpsa attack Qwen/Qwen3-8B --attack prefill,prune,quantise

    rpsa attack runs/x/align/lora/seed42 --harmful harmful.jsonl --benign benign.jsonl --judge llama-guard-3

    rpsa attack tiny:0 --tasks tiny

    rpsa attack MODEL --export behaviours.csv, and later --responses completions.json
    """
    with readable_errors():
        from rpsa.pipeline.attacking import AttackCommand, attack_command
        from rpsa.report.attacked import render_robustness

        found, place = attack_command(
            AttackCommand(
                model,
                tasks.split(","),
                attacks.split(",") if attacks else (),
                base,
                out,
                harmful,
                benign,
                data_dir,
                judge,
                held_out,
                settings or [],
                export,
                responses,
                thought,
            )
        )
        if found:
            render_robustness(found)
        print(f"\n{'Every sample' if found else 'Written'}: {place}")


def tasks_path() -> None:
    """Print the folder of tasks for lm_eval's --include_path."""
    from rpsa.evaluation import TASKS_PATH

    typer.echo(TASKS_PATH)


def fisher_map(
    fishers: Annotated[
        list[Path],
        typer.Argument(help="Folders of saved Fishers.", metavar="FISHER_DIR...", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    k: Annotated[str, typer.Option(help="Frozen ratios to look at, with commas between.")] = "0.6,0.9",
    model: Annotated[
        str | None,
        typer.Option(help="The model, where a Fisher's names do not tell all.", show_default=False),
    ] = None,
) -> None:
    """Show where a Fisher lies by layer and module, what is frozen at k, and what still trains (Fig. 1 and 2)."""
    with readable_errors():
        from rpsa.pipeline.analyses import fisher_map as draw_map

        draw_map(fishers, _numbers("--k", k), out, model)


def perturb(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder, or tiny:0.", show_default=False)],
    fisher: Annotated[Path, typer.Argument(help="The folder of its Fisher.", show_default=False)],
    tasks: Annotated[str, typer.Option(help="Reasoning tasks, with commas between.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    fractions: Annotated[str, typer.Option(help="Shares of all elements to scale.")] = "0.01",
    factors: Annotated[str, typer.Option(help="What to scale them by.")] = "0.9",
    selections: Annotated[
        str, typer.Option(help="Which elements; random_nonzero and inverse, too.")
    ] = "fisher,random,random_per_tensor,magnitude",
    draws: Annotated[int, typer.Option(help="Draws of each random selection.")] = 5,
    seed: Annotated[
        int, typer.Option(help="The seed of the draws, of the problems and of the sampling.")
    ] = 42,
    n: Annotated[int | None, typer.Option(help="Problems of a set, if not all.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(help="The longest response.")] = 32768,
    batch_size: Annotated[int, typer.Option(help="Responses at a time.")] = 16,
    any_weights: Annotated[
        bool,
        typer.Option(
            "--any-weights", help="Perturb another model than the one that the Fisher was measured on."
        ),
    ] = False,
    thought: ThoughtWords = "auto",
) -> None:
    """Scale the elements with the highest Fisher, or others, and measure what reasoning loses (Fig. 3).

    What is finished is kept: the same command goes on after an interruption, and with more factors, fractions,
    selections or draws it runs only what is new.
    """
    with readable_errors():
        from rpsa.artifacts import locked
        from rpsa.models import said_model
        from rpsa.pipeline.analyses import PerturbationConfig, evaluation_settings, run_perturbation

        settings = evaluation_settings(
            tasks=tasks.split(","),
            n=n,
            seed=seed,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        config = PerturbationConfig(
            fractions=_numbers("--fractions", fractions),
            factors=_numbers("--factors", factors),
            selections=tuple(selections.split(",")),
            draws=draws,
            seed=seed,
        )
        described = said_model(thought)
        with locked(out):
            run_perturbation(
                model, fisher, settings, config, out, described=described, any_weights=any_weights
            )


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RPSAError(f"{option}: {text!r} is not a list of numbers such as 0.6,0.9") from None
