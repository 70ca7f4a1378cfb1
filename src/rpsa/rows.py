"""Rows of data files and Hugging Face datasets, each with the place to name when something is wrong with it."""

import csv
import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rpsa.errors import RPSAError
from rpsa.text import json_problem

_FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".gz"}
_LONGEST_FIELD = (1 << 31) - 1  # characters; the csv module's own limit is 128 Ki


T = TypeVar("T")


class Row(NamedTuple):
    """One record of a data source and where it stands, for messages (`data.jsonl line 3`)."""

    where: str
    fields: dict[str, Any]


def read_rows(source: str | Path, preferred_split: str = "train") -> list[Row]:
    """Rows of a JSONL, JSON (a list), CSV or TSV file, gzipped or not, or of a Hugging Face dataset.

    A dataset is named `id` or `id:split`; without a split the only one is taken, else `preferred_split`.

    Raises RPSAError for a missing, empty or broken file, naming the line, and if a dataset does not load.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise RPSAError(f"{source}: {error}") from error
    if path.is_file():
        rows = _read_file(path)
    elif path.exists() and not path.is_dir():
        raise RPSAError(f"{source} is neither a file nor a folder")
    elif isinstance(source, Path) or (path.suffix in _FILE_SUFFIXES and not path.is_dir()):
        raise RPSAError(f"{source}: no such file")
    else:
        rows = _read_dataset(str(source), preferred_split)
    if not rows:
        raise RPSAError(f"{source} is empty: it holds no rows")
    return rows


def hub_dataset(source: str) -> str | None:
    """The id of the dataset on the Hugging Face hub that `read_rows` would load; None for a file or a folder."""
    path = Path(source)
    return None if path.exists() or path.suffix in _FILE_SUFFIXES else source.partition(":")[0]


def text_field(row: Row, names: Sequence[str]) -> str:
    """The first of `names` that the row has, as text. Raises RPSAError naming the row and its fields."""
    for name in names:
        value = row.fields.get(name)
        if value is not None and not isinstance(value, dict | list):
            return str(value)
    found = ", ".join(sorted(map(str, row.fields))) or "none"
    raise RPSAError(f"{row.where} has no text field {' or '.join(map(repr, names))} (fields: {found})")


def draw(rows: Sequence[T], n: int, seed: int) -> list[T]:
    """`n` of `rows` without replacement, in the order drawn; the same `seed` gives the same draw everywhere."""
    return random.Random(seed).sample(list(rows), n)


def _read_file(path: Path) -> list[Row]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RPSAError(f"{path} cannot be read: {error}") from error
    suffix = Path(path.name.removesuffix(".gz")).suffix
    records: Iterable[tuple[str, Any]]
    if suffix in (".csv", ".tsv"):
        records = _table(text, "," if suffix == ".csv" else "\t", path)
    elif text.lstrip().startswith("["):
        records = ((f"row {n}", item) for n, item in enumerate(_json(text, str(path)), start=1))
    else:
        # only \n ends a record: JSON text may hold other line separators
        lines = enumerate(text.split("\n"), start=1)
        records = ((f"line {n}", _json(line, f"{path} line {n}")) for n, line in lines if line.strip())
    rows = []
    for where, record in records:
        if not isinstance(record, dict):
            raise RPSAError(f"{path} {where} is {type(record).__name__}, not an object with named fields")
        rows.append(Row(f"{path} {where}", record))
    return rows


def _table(text: str, delimiter: str, path: Path) -> list[tuple[str, dict[str, str]]]:
    """Records of a CSV or TSV file, however long their fields; one that does not fit the header is refused."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise RPSAError(f"{path} is not a readable table: {error}") from error
    finally:
        csv.field_size_limit(limit)
    header, *rest = [row for row in rows if row] or [[]]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise RPSAError(f"{path} has two columns called {twice!r}")
    for number, row in enumerate(rest, start=1):
        if len(row) != len(header):
            raise RPSAError(
                f"{path} row {number} has {len(row)} fields, the header {len(header)}: is a text with a "
                "comma, a tab or a line break without quotes around it?"
            )
    return [(f"row {n}", dict(zip(header, row, strict=True))) for n, row in enumerate(rest, start=1)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits among them
        raise RPSAError(f"{where} is not valid JSON: {json_problem(error)}") from error


def _read_dataset(source: str, preferred_split: str) -> list[Row]:
    from datasets import DatasetDict, load_dataset

    name, _, split = source.partition(":")
    try:
        loaded = load_dataset(name, split=split or None)
    except Exception as error:  # datasets raises many kinds; all mean that there is nothing to read
        reason = str(error).strip().split("\n")[0]
        raise RPSAError(f"{source} is neither a file nor a dataset that loads: {reason}") from error
    if isinstance(loaded, DatasetDict):
        if len(loaded) > 1 and preferred_split not in loaded:
            raise RPSAError(f"{source} has the splits {', '.join(loaded)}: name one as {name}:SPLIT")
        split = preferred_split if preferred_split in loaded else next(iter(loaded))
        loaded = loaded[split]
    return [Row(f"{name}:{split} row {n}", dict(fields)) for n, fields in enumerate(loaded, start=1)]
