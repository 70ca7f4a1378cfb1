"""Stored safety data of the model's own: read, drawn, and as rows to train on with the very tokens that it sampled."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rpsa.artifacts import read_json, reading_records
from rpsa.chat import IGNORED_LABEL
from rpsa.errors import RPSAError
from rpsa.rows import read_rows
from rpsa.safety_data import SafetyExample, TokenCounts

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

EXAMPLES = "examples.jsonl"
REJECTED = "rejected.jsonl"
MANIFEST = "manifest.json"

Kind = Literal["harmful", "benign"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class SelfExample(SafetyExample):
    """A response that was kept; `prompt_ids` are without the steering, `response_ids` as sampled, EOS included."""

    kind: str
    prompt_ids: list[int]
    response_ids: list[int]


def load_self_data(folder: Path) -> list[SelfExample]:
    """What is kept in a folder that `make_self_data` filled. Raises RPSAError if it is missing or damaged."""
    path = folder / EXAMPLES
    with reading_records(path):
        return [
            SelfExample(**{name: row.fields[name] for name in SelfExample.__dataclass_fields__})
            for row in read_rows(path)
        ]


def drawn(
    examples: Sequence[SelfExample], n: int | None, benign_share: float, seed: int
) -> list[SelfExample]:
    """At most `n` of the examples (None: all), shuffled; with a `benign_share` above 0 as many as have that share.

    How many the filter leaves is not known beforehand: where there are fewer than `n`, that is said, and all are taken.

    Raises:
        RPSAError: a share is asked for, and no benign example is there.
    """
    shuffled = list(examples)
    rng = random.Random(seed)
    rng.shuffle(shuffled)
    if benign_share:
        harmful, benign = ([e for e in shuffled if (e.kind == "benign") == is_it] for is_it in (False, True))
        if not benign:
            raise RPSAError(
                "safety.benign_share: the data hold no benign example; name requests in safety.benign"
            )
        most = min(len(harmful) / (1 - benign_share), len(benign) / benign_share, n or len(shuffled))
        of_them = round(most * benign_share)
        shuffled = [*harmful[: round(most) - of_them], *benign[:of_them]]
        rng.shuffle(shuffled)
    if n is not None and len(shuffled) < n:
        log.warning("the model's own safety data are %d examples, and not the %d asked for", len(shuffled), n)
    return shuffled[:n]


def tokenized(examples: Sequence[SelfExample], max_length: int | None) -> tuple["Dataset", TokenCounts]:
    """Rows as `rpsa.safety_data.tokenize_safety_data` makes them, of the stored token ids.

    Raises:
        RPSAError: `max_length` leaves no response token of any.
    """
    from datasets import Dataset

    fitting = [e for e in examples if max_length is None or len(e.prompt_ids) < max_length]
    if not fitting:
        raise RPSAError(f"max_length {max_length} leaves nothing of {len(examples)} examples: raise it")
    ids = [[*e.prompt_ids, *e.response_ids][:max_length] for e in fitting]
    labels = [
        [IGNORED_LABEL] * len(e.prompt_ids) + row[len(e.prompt_ids) :]
        for e, row in zip(fitting, ids, strict=True)
    ]
    truncated = sum(
        len(row) < len(e.prompt_ids) + len(e.response_ids) for e, row in zip(fitting, ids, strict=True)
    )
    counts = TokenCounts(
        examples=len(fitting),
        truncated=truncated,
        dropped=len(examples) - len(fitting),
        tokens=sum(map(len, ids)),
        response_tokens=sum(len(row) - len(e.prompt_ids) for e, row in zip(fitting, ids, strict=True)),
    )
    if counts.truncated or counts.dropped:
        log.warning(
            "max_length %s truncates %d of %d safety examples and drops %d whose prompt alone fills it",
            max_length, counts.truncated, len(examples), counts.dropped,
        )  # fmt: skip
    return Dataset.from_dict({"input_ids": ids, "labels": labels}), counts


@dataclass(frozen=True)
class Made:
    """What became of the offers, for a report: `counts` as the manifest has them, and a few of each outcome.

    `shown` holds prompts and responses by kind and outcome, which is "kept" or the reason against.
    """

    name: str
    counts: Mapping[str, Mapping[str, Any]]
    shown: Mapping[tuple[str, str], Sequence[tuple[str, str]]]


def look_at(folder: Path, name: str, most: int = 3) -> Made:
    """Raises RPSAError if the folder holds no finished safety data."""
    counts = read_json(folder / MANIFEST)["counts"]
    shown: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for file in (EXAMPLES, REJECTED):
        path = folder / file
        rows = read_rows(path) if path.stat().st_size else []
        with reading_records(path):
            for row in rows:
                outcome = row.fields.get("reason", "kept")
                of_it = shown.setdefault((row.fields["kind"], outcome), [])
                if len(of_it) < most:
                    of_it.append((row.fields["prompt"], row.fields["response"]))
    return Made(name, counts, shown)
