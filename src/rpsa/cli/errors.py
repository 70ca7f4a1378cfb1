"""What goes wrong in a command, as one line on stderr and an exit code."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from rpsa.errors import RPSAError


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a user can do something about into one line on stderr and an exit code.

    2: a mistake in what was asked. 1: the machine refused (a full disk, a file that may not be read). 130: Ctrl-C, or
    SIGTERM while a model trains.
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
