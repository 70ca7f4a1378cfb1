"""Launching: `rpsa run` starts a stage in several processes by `accelerate launch`, or finds itself in one of them."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rpsa.errors import RPSAError
from rpsa.models import free_memory
from rpsa.pipeline.termination import CODE, Terminated, handing_on
from rpsa.recipe.schema import Recipe
from rpsa.recipe.sections import Launch

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from rpsa.provenance import Stage

LAUNCHED_STAGES = ("fisher", "align")
MARK = "RPSA_LAUNCHED"
GIVEN = "given.json"
"""The recipe in the run's folder as it was given, overrides included, without defaults."""
_PR_SET_PDEATHSIG = 1


class RankKilled(RPSAError):
    """A rank was ended from outside; what the others say of it is what follows from that."""


def is_first() -> bool:
    """Whether this process is the one of several that says what all have to say, and keeps the run's folder."""
    return os.environ.get("RANK", "0") == "0"


def end_with_parent() -> None:
    """A process that is killed cannot end its workers: the kernel does, so that none goes on writing into the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def is_launched() -> bool:
    """Whether this process is one of several that were launched together."""
    return MARK in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def check(recipe: Recipe, stages: "list[Stage]") -> None:
    """Raise RPSAError for what cannot be launched, or cannot be done by what was launched."""
    from rpsa.sharding import refuse_engines

    others = [stage for stage in stages if stage not in LAUNCHED_STAGES]
    if is_launched():
        refuse_engines(os.environ)
        if others:
            raise RPSAError(
                "several processes do the stages fisher and align only: add --only fisher or --only align, "
                "and run the others with plain `rpsa run`"
            )
    elif recipe.launch is not None:
        refuse_engines(_environment(recipe.launch))
        if recipe.launch.machine_rank and others:
            raise RPSAError(
                f"machine {recipe.launch.machine_rank} does the stages fisher and align only: add --only fisher or "
                "--only align, as on machine 0 at the same time"
            )


def _environment(launch: Launch) -> dict[str, str]:
    """What a config file will have `accelerate launch` set up."""
    if launch.config is None:
        return {}
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config = load_config_from_file(launch.config)
    except Exception as error:  # accelerate lets through whatever its parsers raise
        raise RPSAError(
            f"{launch.config}: no accelerate config: {str(error).strip().splitlines()[0]}"
        ) from error
    kind = getattr(config.distributed_type, "value", config.distributed_type)
    fsdp = getattr(config, "fsdp_config", None) or {}
    parallel = getattr(config, "parallelism_config", None) or {}
    return {
        f"ACCELERATE_USE_{kind}": "true",
        "FSDP_VERSION": str(fsdp.get("fsdp_version", 1)),
        **{key.upper(): str(value) for key, value in parallel.items()},
    }


def launch(recipe: Recipe, stage: "Stage") -> None:
    """Run one stage in the processes of the recipe's `launch` section, and wait for them.

    Raises:
        RPSAError: one of them failed; the others have been stopped.
        KeyboardInterrupt: this process or one of them was told to stop, and all have stopped.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    assert recipe.launch is not None
    copy = str(recipe.folder / GIVEN)
    arguments = [*options(recipe.launch), "--module", "rpsa", "run", copy, "--only", stage]
    given = launch_command_parser().parse_args(arguments)
    # not SIGTERM, which PyTorch before 2.10 answers all the same: it hands it on, and kills after half a minute
    given.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    free_memory()
    with _marked(), handing_on() as terminated:
        try:
            launch_command(given)
        except ChildFailedError as error:
            if said := _stopped(error):
                raise Terminated(said) from None
            if not terminated.is_set():
                raise _reason(error) from None
        except SignalException:
            raise KeyboardInterrupt from None
        except (subprocess.CalledProcessError, SystemExit) as error:  # one process, which has said why
            if getattr(error, "returncode", None) == CODE:
                raise Terminated from None
            if not terminated.is_set():
                raise RPSAError("its process failed; see above") from None
    if terminated.is_set():
        raise Terminated


def options(launch: Launch) -> list[str]:
    """The section as options of `accelerate launch`."""
    given = launch.model_dump(exclude_none=True)
    config = given.pop("config", None)
    if given.get("num_machines", 1) == 1 and config is None:
        given = {"main_process_port": 0} | given
    result = ["--config_file", config] if config else ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if config is None:
        result += ["--num_machines", str(given.pop("num_machines", 1))]
        result += ["--multi_gpu"] if launch.num_processes and launch.num_processes > 1 else []
    for name, value in given.items():
        result += [f"--{name}", str(value)]
    return result


def _stopped(error: "ChildFailedError") -> str | None:
    """What ranks have said that ended because they were told to."""
    for failure in error.failures.values():
        if failure.exitcode == CODE and isinstance(failure.message, dict):
            return _said(failure.message)
    return None


def _said(message: Any) -> str:
    """A rank's own words, in one line."""
    return " ".join(str(message["message"]).removeprefix("RPSAError: ").split())


def _reason(error: "ChildFailedError") -> RPSAError:
    """What the first rank to fail has left. A rank that was killed comes first: the others fail because of it."""
    killed = [rank for rank, failure in error.failures.items() if failure.exitcode == -signal.SIGKILL]
    rank = killed[0] if killed else error.get_first_failure()[0]
    failure: Any = error.failures[rank]
    message = failure.message
    if isinstance(message, dict):  # from the process itself
        text = _said(message)
        if failure.exitcode in (1, 2) and "RPSAError" in str(message["message"]):
            return RPSAError(text)
        print(message["extraInfo"]["py_callstack"], file=sys.stderr)
        return RPSAError(f"rank {rank} failed, and the others were stopped: {text}")
    ended = (
        f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed with {failure.exitcode}"
    )
    kind = RankKilled if killed else RPSAError
    return kind(
        f"rank {rank} {ended}, and the others were stopped; "
        "the same command goes on from the last checkpoint, if there is one"
    )


@contextmanager
def _marked() -> Iterator[None]:
    """Launched processes know it from their environment; the launcher leaves the telling to us."""
    os.environ[MARK] = "1"
    loggers = [
        logging.getLogger(f"torch.distributed.elastic.{name}.api")
        for name in ("multiprocessing", "agent.server")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        del os.environ[MARK]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def joined(recipe: Recipe) -> Iterator[None]:
    """In a launched process: the process group and the device, before anything is loaded."""
    if MARK in os.environ:
        end_with_parent()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=bool(recipe.train.get("use_cpu", False)))
    yield
    state.destroy_process_group()
