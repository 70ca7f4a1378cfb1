"""The data of benchmarks: rows of a file in one folder (offline), or of a dataset of its owner on the Hugging Face hub.

Nothing is stored or redistributed; gated datasets load with the user's own access.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpsa.errors import RPSAError
from rpsa.rows import Row, read_rows

DATA_DIR = "RPSA_DATA_DIR"
"""The environment variable that names the folder of local files."""

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")


class Unreachable(RPSAError):
    """A dataset that is not in the folder of local files and does not load from the hub."""


@dataclass(frozen=True)
class Source:
    """A dataset: its hub id, and how a local file of it is called (the beginning of the name, without punctuation).

    Without a `split`, "test" is taken, or the only one.
    """

    hub: str
    file: str
    config: str | None = None
    split: str | None = None
    gated: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def load_rows(source: Source, data_dir: str | None = None) -> list[Row]:
    """All rows, from a file below `data_dir` (default: $RPSA_DATA_DIR) if one is there, else from the hub.

    Raises:
        Unreachable: there is no such file, and the dataset does not load: it says what to do.
        RPSAError: the folder is missing or holds two such files, or one that cannot be read.
    """
    folder = data_folder(data_dir)
    if folder and (path := local_file(source, folder)):
        return read_rows(path)
    return _hub_rows(source, folder)


def data_folder(data_dir: str | None) -> str | None:
    """Where local files are looked for: `data_dir`, else $RPSA_DATA_DIR."""
    return data_dir or os.environ.get(DATA_DIR)


def local_file(source: Source, data_dir: str) -> Path | None:
    """The dataset's file in `data_dir` or one folder below: `aime24.jsonl`, `aime24/AIME-24_test.jsonl`.

    Raises:
        RPSAError: the folder is missing, or holds two such files.
    """
    folder, name = Path(data_dir).expanduser(), source.file
    if not folder.is_dir():
        raise RPSAError(f"{folder}: no such folder; it should hold the benchmarks' files")
    files = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    found = [p for p in files if p.name.endswith(_SUFFIXES) and _bare(p.name).startswith(name)]
    if len(found) > 1:
        raise RPSAError(
            f"{folder} holds {len(found)} files for {name}: {', '.join(p.name for p in found)}; keep one"
        )
    return found[0] if found else None


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _hub_rows(source: Source, folder: str | None) -> list[Row]:
    from datasets import load_dataset

    try:
        splits = load_dataset(source.hub, source.config, **source.options)
    except Exception as error:  # datasets raises many kinds; all mean that there is nothing to read
        reason = str(error).strip().split("\n")[0]
        raise Unreachable(f"{_what_to_do(source, folder)} ({reason})") from error
    split = source.split or ("test" if "test" in splits else next(iter(splits)))
    if split not in splits:
        raise RPSAError(f"{source.hub} has no split {split!r}, only {', '.join(splits)}")
    loaded = splits[split]
    return [Row(f"{source.hub} row {n}", dict(fields)) for n, fields in enumerate(loaded, start=1)]


def _what_to_do(source: Source, folder: str | None) -> str:
    place = f"{folder} has no file called {source.file}..., and " if folder else ""
    access = (
        f"it is gated: accept its terms at https://huggingface.co/datasets/{source.hub} and run `hf auth login`"
        if source.gated
        else "check the connection"
    )
    offline = (
        f"put a file of it into the folder that {DATA_DIR} names" if not folder else "put its file there"
    )
    return f"{place}{source.hub} does not load: {access}, or {offline}"
