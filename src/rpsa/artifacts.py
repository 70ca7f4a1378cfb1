"""Artifacts: paths, locks, files that appear whole or not at all, hashes, lines that survive a crash."""

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rpsa.errors import RPSAError
from rpsa.text import json_problem, printable

logger = logging.getLogger(__name__)

METADATA = "rpsa_metadata.json"
"""In a model's folder: the facts of its card."""
AUDIT_FILE = "rpsa_audit.json"
"""What the trainer leaves beside a model about its frozen elements; here, where reading it needs no torch."""
LOG_FILE = "log.json"
"""What the stage align leaves beside a model about its training."""
PACKAGES = ("rpsa", "torch", "transformers", "trl", "peft")
DISK_MESSAGES = (
    *("No space left on device", "File too large", "Disk quota exceeded"),
    *("PytorchStreamWriter failed", "unexpected pos"),
)
"""How safetensors and torch say of a full disk what no OSError of theirs says."""
_CHUNK = 1 << 20
_SYNCED = 64
_LONGEST_NAME = 100
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
_HASHED = re.compile(r"-[0-9a-f]{8}$")


def folder_name(text: str) -> str:
    """The name of the folder of something that a user has named: safe in any path, and no other text has it.

    Plain names are what they are, `org/model` becomes `org--model`, and `tiny:0` `tiny-0`. All else is spelt in plain
    characters, with a hash of the text behind it.
    """
    name = re.sub("^tiny:", "tiny-", text.replace("/", "--"))
    stands_for = re.sub("^tiny-", "tiny:", name.replace("--", "/"))
    # of all texts with this name only the one that it stands for has it
    if (
        stands_for == text
        and _PLAIN.fullmatch(name)
        and not _HASHED.search(name)
        and len(name) <= _LONGEST_NAME
    ):
        return name
    spelt = re.sub(r"[^A-Za-z0-9+._]+", "-", text)[:_LONGEST_NAME].strip("-.")
    return f"{spelt or 'name'}-{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()[:8]}"


LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of `folder` while the block runs; a process that dies lets go of it.

    Raises:
        RPSAError: another one is in it; says which.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RPSAError(
            f"{folder} is in use by {_holder(path)}: wait for it, or give another folder"
        ) from None
    try:
        if not isinstance(lock, SoftFileLock):  # which has written the same, where there is no flock
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def _holder(lock: Path) -> str:
    try:
        process, host = lock.read_text(errors="replace").split()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {printable(process)} on {printable(host)}"


@contextmanager
def atomic_directory(path: Path | str, mark: str) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; it becomes `path` when the block ends, and goes if the block raises.

    A folder that was at `path` stays until the new one is complete, and is then replaced. Leftovers of processes
    of this machine that died are removed on entry.

    Args:
        mark: a file that every such folder has. One without it is not ours to replace.

    Raises:
        RPSAError: at `path` is a file, or a folder of somebody else's.
    """
    target = Path(path).resolve()
    refuse_foreign(target, mark)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        replace_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_foreign(folder: Path, mark: str) -> None:
    """Raise RPSAError if something is at `folder` that is neither empty nor has the file `mark`."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RPSAError(
            f"{folder} is a file, where a folder is to be written: move it away, or name another folder"
        )
    if not (folder / mark).is_file() and any(folder.iterdir()):
        raise RPSAError(
            f"{folder} holds files that were not written by this ({mark} is missing): name another folder"
        )


def replace_directory(new: Path, target: Path) -> None:
    """Move a complete folder to where an older one may be, which goes once the new one is in its place."""
    previous = _sibling(target)
    with suppress(FileNotFoundError):
        target.rename(previous)
    try:
        new.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def atomic_write(path: Path | str, content: str | bytes) -> None:
    """Write a whole file (text as UTF-8) or none of it; an older file at `path` is replaced in one step."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = _sibling(target)
    try:
        with temporary.open("xb") as file:
            # half a surrogate pair, which JSON may hold, stays what it is in JSON: an escape
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def reading(called: str, failed: str = "cannot be loaded") -> Iterator[None]:
    """Within, whatever a library raises over a file is an RPSAError: in one line, `called` first, what `failed` next.

    A file can be broken in any way, and parsers raise whatever they like.
    """
    try:
        yield
    except RPSAError:
        raise
    except Exception as error:
        text = " ".join(str(error).strip().partition("\n")[0].split()) or "nothing is said why"
        kind = type(error).__name__
        if kind == "SafetensorError":
            text = f"a file of weights is damaged or cut off ({text})"
        elif not isinstance(error, OSError | ValueError | RuntimeError):
            text = f"{kind}: {text}"
        raise RPSAError(f"{called}: {failed}: {text}") from error


def stable_json(value: Any) -> str:
    """JSON with sorted keys and a final newline: equal values give equal text. NaN raises ValueError."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """A JSON-able value with None for NaN and infinities, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return value


def read_json(path: Path, what: str = "JSON") -> Any:
    """The value in a file.

    Raises:
        RPSAError: there is no such file, or it does not hold JSON: `what` it should be is in the message.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RPSAError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RPSAError(f"{path}: not readable as {what} ({json_problem(error)})") from error


def sha256_of(value: Any) -> str:
    """Hex SHA-256 of a file's bytes, of a folder's relative names and bytes, or of a JSON-able value."""
    if not isinstance(value, Path):
        return hashlib.sha256(stable_json(value).encode(errors="backslashreplace")).hexdigest()
    if value.is_dir():
        return sha256_of({name: sha256_of(value / name) for name in files_below(value)})
    digest = hashlib.sha256()
    with value.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The installed versions; "absent" where there is none."""
    return {name: _installed(name) for name in packages}


@cache
def _installed(name: str) -> str:
    """Looked up once: every task of a run asks for a dozen, again and again."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def files_below(directory: Path) -> list[str]:
    """Relative paths of all files in a folder and its folders, in a fixed order."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _sibling(target: Path) -> Path:
    # Host and process in the name tell the next run whether its owner still lives.
    return target.with_name(
        f".{target.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    )


def _remove_leftovers(target: Path) -> None:
    prefix = f".{target.name}.{socket.gethostname()}."
    for path in target.parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(".partial"):
            owner = path.name.removeprefix(prefix).split(".")[0]
            if owner.isdigit() and not _is_alive(int(owner)):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def reading_records(path: Path) -> Iterator[None]:
    """Raises RPSAError where what was read from `path` is JSON and yet not what a caller has once written there."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise RPSAError(
            f"{path} is damaged or of another version ({type(error).__name__}: {error}): delete it and start again"
        ) from error


def recover_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that `appending` wrote to; a last line that a crash cut off is removed from it.

    Raises:
        RPSAError: another line is damaged, or is not a record.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        logger.warning("%s: the last line was torn; what it held is made again", path)
        os.truncate(path, len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RPSAError(
                f"{path} line {number} is damaged ({json_problem(error)}): delete the file and start again"
            ) from error
        if not isinstance(record, dict):
            raise RPSAError(f"{path} line {number} is not a record: delete the file and start again")
        records.append(record)
    return records


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what writes one more record, a line of JSON, to the end of a file.

    The system has it when that returns, so that no end of this process loses it; the disk has it 64 records later, or
    when the block ends, as waiting for each would take longer than making it.
    """
    # half a surrogate pair becomes its JSON escape
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        written = 0

        def append(record: Mapping[str, Any]) -> None:
            nonlocal written
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            written += 1
            if written % _SYNCED == 0:
                os.fsync(file.fileno())

        try:
            yield append
        finally:
            os.fsync(file.fileno())
