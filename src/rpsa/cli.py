"""The `rpsa` command. Each command imports what it needs when it runs, so that `rpsa --help` is quick."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rpsa.errors import RPSAError

app = typer.Typer(
    help="Safety-align reasoning models without paying for it in reasoning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tiny_app = typer.Typer(help="The tiny reasoning models that come with the package.", no_args_is_help=True)
app.add_typer(tiny_app, name="tiny")


def main() -> None:
    """The entry point of the `rpsa` command."""
    app()


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a user can do something about into one line on stderr and an exit code.

    2: a mistake in what was asked. 1: the machine refused (a full disk, a file that may not be read). 130: Ctrl-C.
    Anything else is our mistake and keeps its traceback.
    """
    try:
        yield
    except RPSAError as error:
        _stop(str(error), 2)
    except KeyboardInterrupt:
        _stop("interrupted; finished stages are kept, and the same command goes on from there", 130)
    except Exception as error:
        # safetensors and torch report a full disk through errors of their own.
        if not isinstance(error, OSError) and "No space left on device" not in str(error):
            if _tell_launcher(error):
                raise typer.Exit(1) from None
            raise
        _stop(_machine_error(error), 1)


def _machine_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        free = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}{free}"
    return " ".join(str(error).split())


def _stop(message: str, code: int) -> None:
    message = " ".join(message.split())
    if not _tell_launcher(RPSAError(message)):
        typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _tell_launcher(error: Exception) -> bool:
    """Leave an error to the launcher that started this process among others; False if it is to be printed here.

    All ranks make the same mistake at once, and fail when one of them does: it is said once.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from rpsa.pipeline.launch import MARK

    get_error_handler().record_exception(error)
    return MARK in os.environ or (isinstance(error, RPSAError) and os.environ.get("RANK") != "0")


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


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings: section.key=value ...", show_default=False)
    ] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.", metavar="STAGE")] = None,
) -> None:
    """Run a recipe: reference, Fisher, alignment, evaluation, report. Finished stages are not run again."""
    with readable_errors():
        from rpsa.recipe import load_recipe

        checked = load_recipe(recipe, overrides or [])
        from rpsa import pipeline

        pipeline.run(checked, only=only)


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.", show_default=False)],
    over: Annotated[
        list[str],
        typer.Option(
            help="A setting and its values: lora.r=1,2,4.", metavar="KEY=VALUES", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of every point: section.key=value ...", show_default=False),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Points at a time.")] = 1,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="What runs a point: 'sbatch --wait --gpus=1 --output {log} --wrap {command}'; {args} are the words "
            "after rpsa, {slot} a number below --parallel.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default=False)] = None,
) -> None:
    """Run a recipe at every point of a grid of its settings (Fig. 5 and 7). Finished points are not run again."""
    with readable_errors():
        from rpsa.pipeline.sweep import SweepConfig
        from rpsa.pipeline.sweep import sweep as run_sweep

        config = SweepConfig(recipe, over, overrides or [], out, parallel, launcher)
        failed = any(outcome.failure is not None for outcome in run_sweep(config))
    if failed:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings: section.key=value ...", show_default=False)
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="GiB of one GPU.")] = 80,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to plan for.")] = "1,2,4,8",
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds, as JSON.")] = False,
) -> None:
    """Say what a recipe needs before it runs: memory, steps, tokens, rough hours. Loads no weights."""
    with readable_errors():
        from rpsa.recipe import load_recipe

        checked = load_recipe(recipe, overrides or [])
        numbers = _whole_numbers(gpus)
        from rpsa.pipeline.quiet import quiet
        from rpsa.plan import make_plan
        from rpsa.plan.render import render, to_json

        quiet()
        made = make_plan(checked, gpu_memory, numbers)
        if as_json:
            typer.echo(to_json(made))
        else:
            render(made)


@app.command()
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
) -> None:
    """Measure one model: reasoning, attack success, over-refusal. What is stored in --out is not asked for again."""
    with readable_errors():
        from rpsa.pipeline.command import EvaluateCommand, evaluate_command

        evaluate_command(
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
            )
        )


@app.command("tasks-path")
def tasks_path() -> None:
    """Print the folder of tasks for lm_eval's --include_path."""
    from rpsa.evaluation import TASKS_PATH

    typer.echo(TASKS_PATH)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors and for reading."""
    with readable_errors():
        from rpsa.recipe import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def verify(run_dir: Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]) -> None:
    """Check a run's files against the hashes that its stages recorded."""
    with readable_errors():
        _require_folder(run_dir)
        from rpsa import pipeline

        pipeline.verify(run_dir)


@app.command()
def audit(
    model_dir: Annotated[
        Path, typer.Argument(help="A model's folder, with its rpsa_audit.json.", show_default=False)
    ],
) -> None:
    """Show what a training run recorded about its frozen elements: how many were checked, and how many moved."""
    with readable_errors():
        _require_folder(model_dir)
        from rpsa.report.audit import render_audit

        render_audit(_read_json(model_dir / "rpsa_audit.json"))


@app.command("fisher-map")
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
        from rpsa.pipeline.fisher_map import fisher_map as draw_map

        draw_map(fishers, _numbers("--k", k), out, model)


@app.command()
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
) -> None:
    """Scale the elements with the highest Fisher, or others, and measure what reasoning loses (Fig. 3).

    What is finished is kept: the same command goes on after an interruption, and with more factors, fractions,
    selections or draws it runs only what is new.
    """
    with readable_errors():
        from rpsa.pipeline.perturb import PerturbationConfig, evaluation_settings, run_perturbation

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
        run_perturbation(model, fisher, settings, config, out)


@tiny_app.command("train")
def tiny_train(
    seed: Annotated[
        int, typer.Option(help="The seed of the world, the data and the weights.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    steps: Annotated[int | None, typer.Option(help="Training steps, if not the usual number.")] = None,
) -> None:
    """Train a tiny base model from its seed, in minutes on a CPU."""
    with readable_errors():
        from rpsa.tiny.train import train_tiny

        settings: dict[str, Any] = {} if steps is None else {"steps": steps}
        train_tiny(seed=seed, out_dir=out, **settings)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RPSAError(f"{option}: {text!r} is not a list of numbers such as 0.6,0.9") from None


def _whole_numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RPSAError(f"--gpus: {text!r} is not a list of whole numbers such as 1,2,4,8") from None


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise RPSAError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RPSAError(
            f"{path}: no such file; only models that RPSATrainer saved with audit=True have one"
        ) from None
    except ValueError as error:
        raise RPSAError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise RPSAError(f"{path}: expected a mapping")
    return value


if __name__ == "__main__":
    main()
