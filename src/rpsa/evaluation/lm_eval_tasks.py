"""The functions behind `tasks/*.yaml`, for `lm_eval --include_path "$(rpsa tasks-path)" --tasks rpsa_aime24,...`.

Items, prompts and scores are those of `rpsa evaluate`; lm-evaluation-harness generates and averages. Give it
`--apply_chat_template`; RPSA_DATA_DIR, RPSA_REFERENCE and RPSA_JUDGE in the environment do what the options of
`rpsa evaluate` do.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any

from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.grading import Graders, Response, graded
from rpsa.evaluation.items import Item
from rpsa.evaluation.judges import make_judge
from rpsa.evaluation.loading import load_task
from rpsa.evaluation.samples import METRICS, set_rates
from rpsa.evaluation.sandbox import best_sandbox

if TYPE_CHECKING:
    from datasets import Dataset


def dataset(name: str, n: int | None = None, **_: Any) -> "dict[str, Dataset]":
    """The items of a task as the harness wants them: a row each, in a split `test`."""
    from datasets import Dataset

    rows = [
        {"prompt": item.prompt, "target": item.answer, "item": json.dumps(asdict(item))}
        for item in load_task(name, TaskOptions(n=n))
    ]
    return {"test": Dataset.from_list(rows)}


def process_results(doc: dict[str, str], results: Sequence[Any]) -> dict[str, float]:
    """The metrics of one item over its responses, which the filter `take_first_k` hands over as one list."""
    item = Item(**json.loads(doc["item"]))
    texts = results[0] if isinstance(results[0], list) else results
    # the harness does not say why a response ended
    responses = [Response(item, index, text, "") for index, text in enumerate(texts)]
    rates = set_rates(list(graded(responses, _graders(item.scorer == "code"))))
    return {name: rates[name] for name in METRICS[item.kind]}


def mean_of_known(values: Iterable[float]) -> float:
    """The mean over items; those of which nothing was judged (NaN) are left out."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@cache
def _graders(runs_code: bool) -> Graders:
    judge = make_judge(os.environ.get("RPSA_JUDGE", "refusal"))
    return Graders(judge, make_judge("refusal"), sandbox=best_sandbox() if runs_code else None)
