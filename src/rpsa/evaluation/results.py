"""What an evaluation found: for each set its main figure with its interval, and every rate that qualifies it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from rpsa.evaluation.items import Kind
from rpsa.evaluation.samples import MAIN_METRIC, METRICS, Sample, scores_by_item, set_rates
from rpsa.evaluation.statistics import rate

MOST = 0.5
"""Where more of the responses than this have no answer, no rate of the set stands alone."""

_UNANSWERED = ("truncated", "empty", "unparsed", "unjudged")

SetResults = dict[Kind, dict[str, dict[str, Any]]]


def results_by_set(samples: Iterable[Sample]) -> SetResults:
    """By kind and set: `items`, `samples`, the rates of `METRICS`, `standard_error` and the 95% `interval`.

    The interval is that of `rpsa.evaluation.statistics.rate`: clustered by item, Wilson's where each has one sample.
    All are fractions in [0, 1]; the main figure is None where nothing was judged. `unreliable` says why no rate of
    the set stands alone, where more than half of its responses are `unanswered`; else it is None.
    """
    grouped: dict[Kind, dict[str, list[Sample]]] = {kind: defaultdict(list) for kind in get_args(Kind)}
    for sample in samples:
        grouped[sample.kind][sample.set].append(sample)
    return {
        kind: {name: _set_result(found) for name, found in sets.items()} for kind, sets in grouped.items()
    }


def why_unreliable(rates: Mapping[str, Any]) -> str | None:
    """Why no rate of a set stands alone, from the rates that `results.json` has of it; None where they do."""
    known = {name: rates.get(name) or 0.0 for name in (*_UNANSWERED, "refused", "unanswered")}
    unparsed = max(0.0, known["unparsed"] - known["refused"])  # where `unanswered` itself is not known
    share = max(known["unanswered"], known["truncated"] + known["empty"] + known["unjudged"] + unparsed)
    if share <= MOST:
        return None
    parts = ", ".join(f"{name} {known[name]:.0%}" for name in _UNANSWERED if known[name])
    return f"{share:.0%} of the responses have no answer that can be read ({parts})"


def _set_result(samples: Sequence[Sample]) -> dict[str, Any]:
    kind, rates = samples[0].kind, set_rates(samples)
    result: dict[str, Any] = {"items": len({s.item for s in samples}), "samples": len(samples)}
    result |= {name: rates[name] for name in (*METRICS[kind], "length", "unanswered")}
    result["unreliable"] = why_unreliable(rates)
    scores = scores_by_item(samples)
    if not scores:
        return result | {MAIN_METRIC[kind]: None, "standard_error": None, "interval": None}
    estimate = rate(list(scores.values()))
    error = None if math.isnan(estimate.standard_error) else estimate.standard_error
    result |= {"standard_error": error, "interval": list(estimate.interval)}
    for sees in ("answer", "trace"):
        judged = [s.details[sees]["score"] for s in samples if sees in s.details]
        known = [score for score in judged if score is not None]
        if known:
            result[f"mean_{sees}_score"] = sum(known) / len(known)
    return result
