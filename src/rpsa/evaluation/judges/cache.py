"""Judgements kept on disk by content, so that an interrupted run resumes without paying twice.

A folder for each judge identity holds `identity.json` and JSON lines files. Every run of `judge` appends to a file
of its own, so that no lock is needed between processes or machines, and only the last line of a file can be torn;
readers pass over a torn line, and its judgement is made again. Neither prompts nor texts are stored, only their
hash.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpsa.artifacts import appending, atomic_write, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.evaluation.judges.judgement import Judge, Judgement


class CachedJudge:
    """A `Judge` that asks another one only what `folder` does not hold yet.

    A judgement is on disk before it is yielded. Unparseable ones are kept too: the judge did answer. Equal pairs
    are asked once. Two processes that judge the same pairs at the same time do not wait for each other: each pays
    for what the other had not stored when it began.
    """

    def __init__(self, judge: Judge, folder: Path | str) -> None:
        self.inner = judge
        self.identity: Mapping[str, Any] = judge.identity
        self.folder = Path(folder) / sha256_of(dict(judge.identity))[:16]

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
        """Yield what is stored first, then the rest as the inner judge finishes it."""
        stored = self._stored()
        waiting: dict[str, list[int]] = {}
        for index, pair in enumerate(pairs):
            key = _key(pair)
            if key in stored:
                yield index, stored[key]
            else:
                waiting.setdefault(key, []).append(index)
        if not waiting:
            return
        if not (self.folder / "identity.json").is_file():
            atomic_write(self.folder / "identity.json", stable_json(dict(self.identity)))
        keys = list(waiting)
        path = self.folder / f"{secrets.token_hex(8)}.jsonl"
        with appending(path) as append:
            for position, judgement in self.inner.judge([pairs[waiting[key][0]] for key in keys]):
                key = keys[position]
                append({"key": key, **vars(judgement)})
                for index in waiting[key]:
                    yield index, judgement

    def _stored(self) -> dict[str, Judgement]:
        found = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[
                :-1
            ]:  # what follows the last newline is torn, or not yet whole
                try:
                    record = json.loads(line)
                    key = record.pop("key")
                    found[key] = Judgement(**record)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise RPSAError(
                        f"{path} is damaged: delete it, and what it held is judged again"
                    ) from error
        return found


def _key(pair: tuple[str, str]) -> str:
    """The judge's identity is the folder; this is the rest of the content."""
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()
