"""Commands: the arguments that several of them have, and their errors: one line on stderr and an exit code."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rpsa.artifacts import DISK_MESSAGES
from rpsa.errors import RPSAError
from rpsa.text import hide_credentials, printable

RecipeFile = Annotated[
    Path, typer.Argument(help="A YAML file, or the name of a shipped recipe.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings: section.key=value ...", show_default=False)
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]
KeepFinished = Annotated[
    bool, typer.Option("--keep-finished", help="Keep what other versions of code and packages have made.")
]

ModelOrServer = Annotated[
    str,
    typer.Argument(
        help="A folder, a Hugging Face id, an adapter's folder, tiny:0, or a server's url (http://.../v1).",
        show_default=False,
    ),
]
ServedModel = Annotated[
    str | None, typer.Option("--served-model", help="With a server: the name that it gives the model.")
]
ServersTokenizer = Annotated[
    str | None, typer.Option(help="With a server: the model's tokenizer, if not its name.")
]
ThoughtWords = Annotated[str, typer.Option(help="As for `rpsa evaluate`: auto, none, or the words.")]

_FREE = "; free some space and run the same command again"


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a user can do something about into one line on stderr and an exit code.

    2: a mistake in what was asked. 1: the machine refused (a full disk, a file that may not be read). 130: Ctrl-C, or
    SIGTERM to `rpsa run` and its like.
    Anything else is our mistake and keeps its traceback.
    """
    try:
        yield
    except RPSAError as error:
        _stop(str(error), 2)
    except KeyboardInterrupt as error:
        said = str(error) or "interrupted; finished stages are kept, and the same command goes on from there"
        _stop(said, 130)
    except Exception as error:
        if not isinstance(error, OSError) and not any(said in str(error) for said in DISK_MESSAGES):
            if _tell_launcher(error):
                raise typer.Exit(1) from None
            raise
        _stop(_machine_error(error), 1)


def _machine_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return f"{error.strerror}{where}{_FREE if is_full else ''}"
    said = " ".join(str(error).split())
    if isinstance(error, OSError):
        return said
    said = str(error).strip().partition("\n")[0]
    return f"{said if said[:1].isalpha() else f'a file could not be written: {said}'}{_FREE}"


def _stop(message: str, code: int) -> None:
    message = hide_credentials(printable(message))
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
