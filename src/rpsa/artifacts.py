"""What a run leaves on disk: files and folders that appear whole or not at all, and a manifest for a stage.

A stage is a folder with a `stage.json`: what went in, the versions of the packages that matter, one hash over
both, and the size and hash of every file that came out. A stage whose hash still fits is not run again.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from rpsa.errors import RPSAError

logger = logging.getLogger(__name__)

MANIFEST = "stage.json"
AUDIT_FILE = "rpsa_audit.json"
"""What the trainer leaves beside a model about its frozen elements; here, where reading it needs no torch."""
PACKAGES = ("rpsa", "torch", "transformers", "trl", "peft")
_CHUNK = 1 << 20


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; it becomes `path` when the block ends, and goes if the block raises.

    A folder that was at `path` stays until the new one is complete, and is then replaced. Leftovers of processes
    of this machine that died are removed on entry.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            previous = _sibling(target)
            target.rename(previous)
            temporary.rename(target)
            shutil.rmtree(previous)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
def reading(called: str) -> Iterator[None]:
    """Within, whatever a library raises over a file is an RPSAError: in one line, `called` first.

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
        raise RPSAError(f"{called}: cannot be loaded: {text}") from error


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


def sha256_of(value: Any) -> str:
    """Hex SHA-256 of a file's bytes, of a folder's relative names and bytes, or of a JSON-able value."""
    if not isinstance(value, Path):
        return hashlib.sha256(stable_json(value).encode(errors="backslashreplace")).hexdigest()
    if value.is_dir():
        return sha256_of({name: sha256_of(value / name) for name in _files_below(value)})
    digest = hashlib.sha256()
    with value.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages whose change makes a finished stage out of date."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def write_manifest(directory: Path, stage: str, inputs: Mapping[str, Any]) -> None:
    """Write `stage.json` into a finished stage folder. `inputs` is JSON-able: all that decides the result."""
    versions = package_versions()
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
        for name in _files_below(directory)
        if name != MANIFEST
    }
    manifest = {
        "stage": stage,
        "inputs": dict(inputs),
        "versions": versions,
        "inputs_sha256": _inputs_hash(stage, inputs, versions),
        "files": files,
    }
    atomic_write(directory / MANIFEST, stable_json(manifest))


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The stage's manifest; None where there is none that can be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def is_current(directory: Path, stage: str, inputs: Mapping[str, Any]) -> bool:
    """Whether `directory` holds this stage's result for these inputs and versions, with no file missing."""
    manifest = read_manifest(directory)
    if manifest is None or manifest.get("inputs_sha256") != _inputs_hash(stage, inputs, package_versions()):
        return False
    return not any(_size(directory / name) != file["bytes"] for name, file in manifest["files"].items())


def altered_files(directory: Path) -> list[str]:
    """One line for each file that is missing or no longer has the bytes that the stage wrote."""
    manifest = read_manifest(directory)
    if manifest is None:
        return [f"{directory / MANIFEST}: missing or unreadable"]
    problems = []
    for name, file in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif sha256_of(path) != file["sha256"]:
            problems.append(f"{path}: changed since the stage {manifest['stage']} wrote it")
    return problems


def _inputs_hash(stage: str, inputs: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    return sha256_of({"stage": stage, "inputs": dict(inputs), "versions": dict(versions)})


def _files_below(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


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


def recover_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that `append_line` wrote to; a last line that a crash cut off is removed from it.

    Raises:
        RPSAError: another line is damaged.
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
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RPSAError(
                f"{path} line {number} is damaged ({error}): delete the file and start again"
            ) from error
    return records


def append_line(file: TextIO, record: Mapping[str, Any]) -> None:
    """Write one record as a line of JSON that is on disk when this returns."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
