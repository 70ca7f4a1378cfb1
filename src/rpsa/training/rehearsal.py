"""Rehearsal: the model's own reasoning among the safety data, so that training goes on practising it."""

import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpsa.errors import RPSAError
from rpsa.reference import ReferenceDataset

if TYPE_CHECKING:
    from datasets import Dataset


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rehearsal:
    """`dataset` is what to train on; `rehearsed` of its rows are D_ref's, and `truncated` of these are cut."""

    dataset: "Dataset"
    rehearsed: int
    truncated: int


def rehearse(
    dataset: "Dataset", reference: ReferenceDataset, share: float, max_length: int | None, seed: int = 42
) -> Rehearsal:
    """All rows of `dataset` and as many traces of D_ref as make up `share` of the whole, shuffled together.

    Traces come in a seeded order, and again where there are too few, with their exact token ids; labels are on
    the response. `max_length` (tokens, prompt included) keeps their beginning; one whose prompt fills it is out. What
    it cuts is logged.

    Args:
        dataset: with the columns `input_ids` and `labels`.

    Raises:
        RPSAError: `share` is not in [0, 1), or no trace fits.
    """
    from datasets import Dataset, concatenate_datasets

    if not 0 <= share < 1:
        raise RPSAError(f"rehearsal share is {share}: give at least 0 and less than 1")
    traces = [t for t in reference.traces if max_length is None or len(t.prompt_ids) < max_length]
    if not traces:
        raise RPSAError(f"max_length {max_length} leaves no response token of any trace: raise it")
    random.Random(seed).shuffle(traces)
    count = round(len(dataset) * share / (1 - share))
    chosen = [traces[i % len(traces)] for i in range(count)]
    rows = [trace.labelled(max_length) for trace in chosen]
    columns = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    added = Dataset.from_dict(columns, features=dataset.features)
    truncated = sum(max_length is not None and trace.length > max_length for trace in chosen)
    if truncated:
        log.warning("max_length %s cuts %d of %d rehearsed traces", max_length, truncated, count)
    return Rehearsal(concatenate_datasets([dataset, added]).shuffle(seed=seed), count, truncated)
