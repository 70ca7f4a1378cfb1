"""D_ref as it is read: traces, and the batches that the Fisher and g_R see of them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpsa.artifacts import read_json, reading
from rpsa.chat import IGNORED_LABEL
from rpsa.errors import RPSAError, check_type
from rpsa.rows import Row, read_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """One problem's prompt and the model's response, as token ids; `correct` is None without a gold answer.

    `finish_reason` is "stop" (EOS, which `response_ids` include) or "length" (truncated).
    """

    problem_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    text: str
    finish_reason: str
    correct: bool | None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def labelled(self, max_length: int | None) -> tuple[list[int], list[int]]:
        """Its first `max_length` token ids (None: all), and their labels: the response's, -100 on the prompt."""
        ids = [*self.prompt_ids, *self.response_ids][:max_length]
        return ids, [IGNORED_LABEL] * len(self.prompt_ids) + ids[len(self.prompt_ids) :]


class ReferenceDataset:
    """D_ref: `traces` in the order of the problems, and a `manifest` of how they came about."""

    def __init__(self, traces: Sequence[Trace], manifest: Mapping[str, Any] | None = None) -> None:
        for number, trace in enumerate(traces):
            check_type(f"trace {number}", trace, Trace, "a Trace")
        if not traces:
            raise RPSAError("D_ref has no traces: every response was empty or filtered out")
        self.traces = list(traces)
        self.manifest = dict(manifest or {})
        self._reported: set[int] = set()

    @classmethod
    def load(cls, path_dir: str | Path) -> "ReferenceDataset":
        """Read what `build_reference` wrote. Raises RPSAError if it is missing or unfinished."""
        check_type("path_dir", path_dir, str | Path, "the folder of a D_ref")
        folder = Path(path_dir)
        if not (folder / "manifest.json").is_file() or not (folder / "traces.jsonl").is_file():
            raise RPSAError(f"{folder} holds no finished D_ref (traces.jsonl, manifest.json): build it first")
        traces = [trace_of(row) for row in read_rows(folder / "traces.jsonl")]
        with reading(f"D_ref {folder}"):
            return cls(traces, read_json(folder / "manifest.json"))

    def batches(self, batch_size: int, max_length: int | None) -> Iterator[dict[str, Any]]:
        """Every trace once, sorted by length, for `rpsa.fisher.estimators.estimate_fisher`.

        `max_length` (tokens, prompt included) keeps the beginning; what it cuts is logged, and a trace whose
        prompt fills it is left out. Each batch holds `input_ids`, `attention_mask` and `labels` (B, T) int64,
        right-padded, labels unshifted with -100 on prompt and padding, and `sample_ids`, the problem ids.
        """
        check_type("batch_size", batch_size, int, "a whole number")
        if batch_size < 1:
            raise RPSAError(f"batch_size is {batch_size}: give 1 or more")
        traces = sorted(
            self._usable(max_length), key=lambda trace: min(trace.length, max_length or trace.length)
        )
        for start in range(0, len(traces), batch_size):
            yield self._collate(traces[start : start + batch_size], max_length)

    def rotating_batch(self, step: int, size: int, max_length: int | None) -> dict[str, Any]:
        """The batch of g_R at measurement `step` (0, 1, 2, ...): the next `size` traces, wrapping round.

        A function of its arguments alone, so that a resumed run and every rank see the same batch. Form as in
        `batches`. Count measurements, not optimizer steps: with multiples of 25 some traces may never come.
        """
        traces = self._usable(max_length)
        window = [traces[(step * size + i) % len(traces)] for i in range(size)]
        return self._collate(window, max_length)

    def _usable(self, max_length: int | None) -> list[Trace]:
        """Traces with a response token left under `max_length`; logs once what that cuts."""
        if max_length is None:
            return self.traces
        check_type("max_length", max_length, int, "a whole number of tokens, or None")
        usable = [trace for trace in self.traces if len(trace.prompt_ids) < max_length]
        if max_length not in self._reported:
            self._reported.add(max_length)
            self._report_cut(max_length, len(self.traces) - len(usable))
        if not usable:
            raise RPSAError(
                f"reference max_length {max_length} leaves no response token of any trace: raise it"
            )
        return usable

    def _report_cut(self, max_length: int, dropped: int) -> None:
        cut = [trace.length - max_length for trace in self.traces if trace.length > max_length]
        if cut:
            log.warning(
                "reference max_length %d cuts %d of %d traces (%d of %d tokens); %d traces left out",
                max_length, len(cut), len(self.traces), sum(cut), sum(t.length for t in self.traces), dropped,
            )  # fmt: skip

    def _collate(self, traces: list[Trace], max_length: int | None) -> dict[str, Any]:
        ids, labels = zip(*(trace.labelled(max_length) for trace in traces), strict=True)
        return {
            "input_ids": _right_padded(ids, self.manifest.get("pad_token_id") or 0),
            "attention_mask": _right_padded([[1] * len(row) for row in ids], 0),
            "labels": _right_padded(labels, IGNORED_LABEL),
            "sample_ids": [trace.problem_id for trace in traces],
        }


def trace_of(row: Row) -> Trace:
    """A stored trace. Raises RPSAError, naming the row, if it is none."""
    try:
        trace = Trace(**row.fields)
    except TypeError as error:
        raise RPSAError(
            f"{row.where} is not a trace ({error}): delete the file and build D_ref again"
        ) from error
    for name in ("prompt_ids", "response_ids"):
        ids = getattr(trace, name)
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise RPSAError(f"{row.where} is not a trace: its {name} are not token ids; build D_ref again")
    return trace


def _right_padded(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
