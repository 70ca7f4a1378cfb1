"""The page: `index.html`, the whole report in one file that needs no network, as `templates/page.html.jinja` has it.

Beside tables and figures it has a browser of responses: for a few items of each set, the untouched model's beside that
of each method. Responses come from models and may hold anything; see `script_json`.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rpsa.evaluation.scores import Sample, read_samples
from rpsa.report.attacked import ROBUSTNESS_NOTE
from rpsa.report.prediction import Prediction
from rpsa.report.summaries import RunResult, Summary
from rpsa.report.tables import (
    LOSS_NOTE,
    PERPLEXITY_NOTE,
    Noted,
    Table,
    benchmark_table,
    interval_note,
    label,
    loss_table,
    main_table,
    missing_lines,
    rates_table,
    safety_data_table,
    unreliable_note,
)
from rpsa.report.warnings import audit_line, warnings
from rpsa.templates import render


class Shown(NamedTuple):
    """An SVG file with what stands under it."""

    name: str
    svg: bytes
    title: str
    caption: str


class OwnDataShown(NamedTuple):
    """Safety data in the models' own words: counts, and a few prompts and responses of each outcome, by a title."""

    counts: Table
    examples: Mapping[str, Sequence[tuple[str, str]]]


CAPTIONS: dict[str, tuple[str, str]] = {
    "scatter": (
        "Safety against reasoning",
        "The upper right corner is best. Large marks are means, small ones single runs.",
    ),
    "scatter_benchmarks": (
        "Safety against reasoning on each benchmark",
        "As above, with the accuracy on one benchmark in each panel; the attack success rate is the mean.",
    ),
    "ablation": (
        "Masks and controls",
        "Large marks are means with their 95% interval over runs, small ones single runs; the dashed line is the "
        "untouched model. STR of single runs can lie far off where attack success hardly fell.",
    ),
    "trajectories": (
        "Course of k and c",
        "The frozen ratio k follows the conflict c between the reasoning and the safety gradient. Until the window "
        "is full, k is 0.5.",
    ),
    "tampering": (
        "Further training on a few rows",
        "Attack success over the steps of plain fine-tuning of the aligned models on harmful or benign rows; at 0 "
        "steps they are as aligned. Means over bases and seeds.",
    ),
    "learning_rate": (
        "Against the learning rate",
        "The learning rate is itself a strong lever. Lines are means, bands the range over bases and seeds; the "
        "dashed line is the untouched model.",
    ),
}

_LONG = 20  # rows
_MANY = 8  # lines of provenance


def render_page(
    summaries: Sequence[Summary],
    results: Sequence[RunResult],
    figures: Sequence[Shown],
    provenance: Mapping[str, Any],
    responses: str | None = None,
    claims: Table | None = None,
    missing: Mapping[str, str] | None = None,
    prediction: Prediction | None = None,
    own_data: OwnDataShown | None = None,
    robustness: Mapping[str, Table] | None = None,
    more: Sequence[Noted] = (),
) -> str:
    """The report as HTML (`templates/page.html.jinja`).

    `responses` is what `chosen_responses` chose, `claims` the verdicts, `missing` the runs without a result,
    `prediction` what the reasoning loss says of accuracy, `own_data` what the models have said for their own safety
    data, `robustness` the tables of runs under attack by their titles, `more` tables for the section of benchmarks.
    """
    return render(
        "rpsa.report",
        "page.html",
        title=str(provenance.get("name", "rpsa")),
        main=main_table(summaries),
        interval_note=interval_note(summaries),
        unreliable_note=unreliable_note(summaries),
        warnings=[*missing_lines(missing), *warnings(summaries)],
        audit=audit_line(results),
        claims=claims,
        figures=[_figure(one) for one in figures],
        benchmarks=benchmark_table(summaries),
        shares=rates_table(summaries),
        more=more,
        losses=loss_table(summaries),
        loss_note=LOSS_NOTE,
        prediction=prediction.sentence if prediction else None,
        safety_data=safety_data_table(results),
        perplexity_note=PERPLEXITY_NOTE,
        own_data=own_data,
        robustness=robustness or {},
        robustness_note=ROBUSTNESS_NOTE,
        responses=responses,
        provenance={str(key): _fact(value) for key, value in provenance.items()},
        long=_LONG,
        many=_MANY,
    )


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    source: str
    is_broad: bool


@dataclass(frozen=True)
class _Fact:
    """Something of a study's provenance: lines, or where it is nested, JSON."""

    lines: Sequence[str] = ()
    json: str = ""


def _figure(of: Shown) -> _Figure:
    source = f"data:image/svg+xml;base64,{base64.b64encode(of.svg).decode()}"
    width = re.search(rb'width="([\d.]+)pt"', of.svg)
    return _Figure(of.title, of.caption, source, bool(width and float(width[1]) > 400))


def _fact(value: Any) -> _Fact:
    if isinstance(value, Mapping):
        if any(isinstance(item, Mapping | list | tuple) for item in value.values()):
            return _Fact(json=json.dumps(value, indent=2))
        return _Fact([f"{key}: {item}" for key, item in value.items()])
    if isinstance(value, list | tuple):
        return _Fact([", ".join(str(item) for item in value)])
    return _Fact([value if isinstance(value, str) else json.dumps(value)])


LIMIT = 1_500_000  # bytes
_CHARACTERS = 1_500  # of a text
_SIZES = ((6, 40), (4, 40), (2, 40), (1, 40), (1, 20), (1, 10), (1, 5), (1, 1))
"""Items of a set and methods beside the untouched model: the first that keeps all within LIMIT."""

Samples = dict[tuple[str, str], Sample]
"""By set and item, in the order of the evaluation."""


def chosen_responses(summaries: Sequence[Summary]) -> str | None:
    """What the page's browser shows, as JSON that can stand in a script element; None without stored samples.

    One base is shown, the first whose untouched model has samples, and each method's first seed on it; of each item
    its first response. Of a set come first the items on which the models' outcomes differ most.

    Returns:
        {"base", "methods", "sets": [{"name", "kind", "items": [{"id", "prompt", "answer", "responses"}]}]}. The
        responses of an item are in the order of `methods`, the untouched model's first; null where there is none.
    """
    original = next((run for s in summaries if s.is_original for run in s.runs if run.samples), None)
    if original is None:
        return None
    paths = {"original": original.samples}
    paths |= {label(s, summaries): _samples_on(original.base, s.runs) for s in summaries if not s.is_original}
    found = {name: _first_samples(path) for name, path in paths.items() if path}
    if len(found) == 1:
        return None
    chosen = ""
    for items, most in _SIZES:
        methods = list(found)[: 1 + most]
        sets = _sets([found[method] for method in methods], items)
        chosen = script_json({"base": original.base, "methods": methods, "sets": sets})
        if len(chosen.encode()) <= LIMIT:
            break
    return chosen


def script_json(value: Any) -> str:
    """JSON in which nothing can end a script element or open a comment, whatever the strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def cut(text: str, characters: int = _CHARACTERS) -> str:
    """The text's beginning and end, since answers come last, with a mark for what is missing."""
    if len(text) <= characters:
        return text
    half = characters // 2
    missing = len(text) - 2 * half
    return f"{text[:half]}\n[… {missing:,} characters left out …]\n{text[-half:]}"


def _samples_on(base: str, runs: Sequence[RunResult]) -> Path | None:
    return next((run.samples for run in runs if run.base == base), None)


def _first_samples(path: Path) -> Samples:
    """Cut at once: a file may hold gigabytes of reasoning."""
    return {
        (sample.set, sample.item): replace(
            sample,
            prompt=cut(sample.prompt),
            answer=cut(sample.answer),
            response=cut(sample.response),
            extracted=None if sample.extracted is None else cut(sample.extracted),
            details={},
        )
        for sample in read_samples(path)
        if sample.index == 0
    }


def _sets(models: Sequence[Samples], items: int) -> list[dict[str, Any]]:
    original = models[0]
    sets: dict[str, list[Sample]] = {}
    for sample in original.values():
        sets.setdefault(sample.set, []).append(sample)

    def outcomes(sample: Sample) -> int:
        return len({model[sample.set, sample.item].outcome for model in models if _has(model, sample)})

    return [
        {
            "name": name,
            "kind": samples[0].kind,
            "items": [
                {
                    "id": sample.item,
                    "prompt": sample.prompt,
                    "answer": sample.answer,
                    "responses": [
                        _response(model[sample.set, sample.item]) if _has(model, sample) else None
                        for model in models
                    ],
                }
                for sample in sorted(samples, key=outcomes, reverse=True)[:items]
            ],
        }
        for name, samples in sets.items()
    ]


def _has(model: Samples, sample: Sample) -> bool:
    return (sample.set, sample.item) in model


def _response(sample: Sample) -> Mapping[str, Any]:
    return {
        "text": sample.response,
        "outcome": sample.outcome,
        "extracted": sample.extracted,
        "out_of_tokens": sample.finish_reason == "length",
    }
