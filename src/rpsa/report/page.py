"""`index.html`: the whole report in one file that needs no network.

The STR of a single run: how sure one may be of it, over the problems that were asked.

An 8B model is aligned once for each method, so that there are no runs to take an interval over. The stored samples
still say what other problems of the same kinds would have given; another training seed they know nothing of.

The part of the page where responses can be read side by side: three selects and a few lines of script.

Responses come from models and may hold anything. They reach the page as JSON in a script element that they cannot
end, and are only ever set as text.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from rpsa.errors import RPSAError
from rpsa.evaluation.scores import read_samples
from rpsa.evaluation.statistics import Problems, safety_tax_difference, safety_tax_interval
from rpsa.report.benchmarks import benchmark_table, rates_table, unreliable_note
from rpsa.report.results import RunResult, Summary, no_comparison, plain_method
from rpsa.report.tables import Entry, Shown, Table, interval_note, main_table, missing_lines
from rpsa.report.warnings import audit_line, warnings

REPLICATES = 2_000

Scores = dict[tuple[str, str], dict[str, list[float]]]
"""By kind and set: the scores of each item's samples."""


def with_problem_intervals(summaries: Sequence[Summary]) -> list[Summary]:
    """The summaries; those of one run get their intervals from the samples of that run and of the untouched model.

    No interval, but a reason, where the safety gain may be chance, where no score of a problem changed (of which a
    bootstrap would make an interval of no width), and where a set has one problem.
    """
    single = [s for s in summaries if not s.is_original and len(s.runs) == 1]
    bases = {s.runs[0].base for s in single}
    originals = {run.base: run for s in summaries if s.is_original for run in s.runs if run.base in bases}
    runs = [*originals.values(), *(s.runs[0] for s in single)]
    scores: dict[Path | None, Scores] = {run.samples: _scores(run.samples) for run in runs if run.samples}

    def with_intervals(summary: Summary) -> Summary:
        if summary.is_original or len(summary.runs) > 1 or summary.runs[0].base not in originals:
            return summary
        run, plain = summary.runs[0], plain_method(summary, summaries)
        original = originals[run.base]
        if no_comparison(original, run):
            return summary
        before, after = scores.get(original.samples), scores.get(run.samples)
        if before is None or after is None:
            return summary
        is_beside = plain and plain.runs[0].base == run.base and not no_comparison(original, plain.runs[0])
        beside = scores.get(plain.runs[0].samples) if plain and is_beside else None
        try:
            interval, reason = _interval(before, after)
            difference = _difference(before, beside, after) if beside else None
        except RPSAError as error:
            return replace(summary, no_interval=str(error))
        return replace(
            summary,
            tax_interval=interval,
            no_interval=reason,
            difference=difference,
            interval_over="problems",
        )

    return [with_intervals(summary) for summary in summaries]


def _scores(path: Path) -> Scores:
    found: Scores = defaultdict(lambda: defaultdict(list))
    for sample in read_samples(path):
        if sample.score is not None:
            found[sample.kind, sample.set][sample.item].append(sample.score)
    return found


def _interval(before: Scores, after: Scores) -> tuple[tuple[float, float] | None, str | None]:
    reasoning, attack = _matched("reasoning", before, after), _matched("attack", before, after)
    if reasoning[0] == reasoning[1]:
        return None, "not one reasoning problem got another score"
    found = safety_tax_interval(
        reasoning_before=reasoning[0],
        reasoning_after=reasoning[1],
        attack_before=attack[0],
        attack_after=attack[1],
        replicates=REPLICATES,
    )
    return found.interval, found.reason


def _difference(before: Scores, plain: Scores, other: Scores) -> tuple[float, float] | None:
    reasoning, attack = _matched("reasoning", before, plain, other), _matched("attack", before, plain, other)
    return safety_tax_difference(
        reasoning_before=reasoning[0],
        reasoning_plain=reasoning[1],
        reasoning_other=reasoning[2],
        attack_before=attack[0],
        attack_plain=attack[1],
        attack_other=attack[2],
        replicates=REPLICATES,
    ).interval


def _matched(kind: str, *models: Scores) -> list[dict[str, Problems]]:
    """For each model its benchmarks, with the items that all models have a score for, in one order."""
    common = {
        key: [item for item in items if all(item in model.get(key, {}) for model in models)]
        for key, items in models[0].items()
        if key[0] == kind
    }
    return [
        {key[1]: [model[key][item] for item in items] for key, items in common.items()} for model in models
    ]


STYLE = """
.browser { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.browser > * { min-width: 0; }
.choose { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin: .5rem 0 1rem; }
.choose label { display: grid; font-size: .85rem; color: #505a64; min-width: 0; max-width: 100%; }
.choose select { font: inherit; font-size: 16px; max-width: 100%; padding: .25rem; }
.browser pre { background: #f5f6f8; padding: .6rem; overflow-wrap: anywhere; }
.browser h3 { font-size: 1rem; margin: .2rem 0; } .asked { grid-column: 1 / -1; }
@media print { .choose { display: none; } }
"""

_MARKUP = """<h2>Responses</h2>
<p class="note">A few items of each set on <span id="base"></span>, those first on which the models differ. Long texts
are cut in the middle. Responses to harmful requests stay closed until opened.</p>
<noscript><p>Choosing and showing responses needs JavaScript, which is off. All of them are in the run's folder:
evaluate/*/samples.jsonl.</p></noscript>
<div id="responses" hidden>
<div class="choose">
<label>Set <select id="set"></select></label>
<label>Item <select id="item"></select></label>
<label>Method <select id="method"></select></label>
</div>
<div class="browser">
<div class="asked"><h3>Prompt</h3><pre id="prompt"></pre>
<div id="gold"><h3>Right answer</h3><pre id="answer"></pre></div></div>
<div><h3>original</h3><p class="note" id="verdict-0"></p>
<details id="details-0"><summary>Response</summary><pre id="text-0"></pre></details></div>
<div><h3 id="name"></h3><p class="note" id="verdict-1"></p>
<details id="details-1"><summary>Response</summary><pre id="text-1"></pre></details></div>
</div>
</div>
<script type="application/json" id="chosen">{json}</script>
<script>{script}</script>"""

_SCRIPT = """
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const chosen = JSON.parse($("chosen").textContent);
  const fill = (id, names) => $(id).replaceChildren(...names.map((name, i) => new Option(name, i)));
  const set = () => chosen.sets[$("set").value];
  function show() {
    const item = set().items[$("item").value], method = +$("method").value + 1;
    $("prompt").textContent = item.prompt;
    $("gold").hidden = set().kind !== "reasoning";
    $("answer").textContent = item.answer;
    $("name").textContent = chosen.methods[method];
    [item.responses[0], item.responses[method]].forEach((response, side) => {
      $("verdict-" + side).textContent = !response ? "no response" : response.outcome
        + (set().kind === "reasoning" ? ", extracted: " + (response.extracted ?? "nothing") : "")
        + (response.out_of_tokens ? ", out of tokens" : "");
      $("text-" + side).textContent = response ? response.text : "";
      $("details-" + side).open = set().kind !== "attack";
    });
  }
  function choose() { fill("item", set().items.map(item => item.id)); show(); }
  $("base").textContent = chosen.base;
  fill("set", chosen.sets.map(one => one.name));
  fill("method", chosen.methods.slice(1));
  $("set").onchange = choose;
  $("item").onchange = $("method").onchange = show;
  $("responses").hidden = false;
  choose();
})();
"""


def render_browser(chosen: str) -> str:
    """`chosen` is the JSON of `rpsa.report.responses.chosen_responses`."""
    return _MARKUP.format(json=chosen, script=_SCRIPT)


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1d2329; background: #fff;
  max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; } ul { padding-left: 1.2rem; } summary { color: #505a64; font-size: .9rem; cursor: pointer; }
.note { color: #505a64; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #dfe3e7; vertical-align: top; }
th { border-bottom: 2px solid #98a2ac; vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td { white-space: nowrap; } td small { display: block; color: #505a64; }
.warnings { background: #fff7e6; border-left: 4px solid #d9860a; padding: .6rem 1rem; margin: 1rem 0; }
.warnings li { margin: .25rem 0; }
.audit { background: #eef6ee; border-left: 4px solid #2e8540; padding: .6rem 1rem; margin: 1rem 0; }
.audit.moved { background: #fdecea; border-color: #c62828; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 20rem; max-width: 34rem; min-width: 0; }
figure.broad { flex-basis: 100%; max-width: 54rem; order: -1; }
figure img { width: 100%; height: auto; } figcaption { font-size: .9rem; color: #505a64; }
figure.broad img { min-width: 36rem; }
dl { display: grid; grid-template-columns: fit-content(10rem) 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: #505a64; } dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; font-size: .85em; }
@media (max-width: 480px) {
  body { padding: .75rem; font-size: 15px; } table { font-size: .73rem; }
  th, td { padding: .25rem .22rem; } .minor { display: none; }
}
@media print {
  body { max-width: none; font-size: 10pt; } figure, table, .warnings { break-inside: avoid; }
  .wide { overflow: visible; } h2 { break-after: avoid; }
}
"""

_NO_NETWORK = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Nothing is ever fetched, whatever a response holds."""

_LONG = 20  # rows
_MANY = 8  # lines of provenance
_INTERVALS = "In percent, with the 95% interval: over problems for one run, over runs for three or more."
_SHARES = (
    "Shares of the responses to each set in percent, means over runs. A response out of tokens ended at the limit; "
    "where its thought is unfinished, there is no answer at all. Reasoning problems that were refused, and answers "
    "that were not found, count as wrong; what was not judged is left out."
)


def render_page(
    summaries: Sequence[Summary],
    results: Sequence[RunResult],
    figures: Sequence[Shown],
    provenance: Mapping[str, Any],
    responses: str | None = None,
    claims: Table | None = None,
    missing: Mapping[str, str] | None = None,
) -> str:
    """The report as HTML. `responses` is what `chosen_responses` chose, `claims` the verdicts, `missing` the runs
    without a result."""
    title = escape(str(provenance.get("name", "rpsa")))
    table, shown = _main_table(summaries), _figures(figures)
    parts = [
        f"<h1>{title}: the price of safety</h1>",
        "<p>Each method is a way to make the untouched model refuse harmful requests. The Safety Tax Rate (STR) is "
        "the mean drop in reasoning accuracy for each unit of mean reduction in attack success rate (ASR): lower is "
        "better.</p>",
        # A study's table is long: its figures say more at a glance.
        *([table] if len(summaries) <= _LONG else []),
        _warnings([*missing_lines(missing), *warnings(summaries)]),
        _audit(results),
        *([_claims(claims)] if claims else []),
        shown,
        *([table] if len(summaries) > _LONG else []),
        "<h2>Benchmarks</h2>",
        _details("Accuracy, attack success and refusals on each set", benchmark_table(summaries), _INTERVALS),
        *_rates(summaries),
        *([render_browser(responses)] if responses else []),
        "<h2>Where these numbers come from</h2>",
        _provenance(provenance),
    ]
    return _page(title, "\n".join(parts))


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_NO_NETWORK}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _main_table(summaries: Sequence[Summary]) -> str:
    return (
        "<h2>Results</h2>"
        + _table(main_table(summaries))
        + '<p class="note">Rates in percent, means over bases and seeds; reasoning problems that were refused are '
        f"counted as wrong. {interval_note(summaries)} Bold: best of its group.{unreliable_note(summaries)}</p>"
    )


def _claims(table: Table) -> str:
    note = (
        "The difference of STR, or of rates as fractions, over runs paired by base and seed, with its 95% interval. "
        "Undecided: the interval holds 0, or there are fewer than three pairs."
    )
    return f'<h2>What these runs say of the claims</h2>{_table(table)}<p class="note">{note}</p>'


def _figures(figures: Sequence[Shown]) -> str:
    shown = "".join(_figure(one.svg, one.title, one.caption) for one in figures)
    return f'<h2>Figures</h2><div class="figures">{shown}</div>'


def _rates(summaries: Sequence[Summary]) -> list[str]:
    table = rates_table(summaries)
    return [_details("What qualifies these figures", table, _SHARES)] if table.rows else []


def _details(title: str, table: Table, note: str) -> str:
    """Closed where the table is long."""
    state = "" if len(table.rows) > _LONG else " open"
    return f'<details{state}><summary>{title}</summary>{_table(table)}<p class="note">{note}</p></details>'


def _table(table: Table) -> str:
    minor = [' class="minor"' if name in table.minor else "" for name in table.header]
    head = "".join(f"<th{c}>{escape(name)}</th>" for name, c in zip(table.header, minor, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{c}>{_entry(e)}</td>" for e, c in zip(row, minor, strict=True)) + "</tr>\n"
        for row in table.rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'


def _entry(entry: Entry) -> str:
    text, note = escape(entry.text), f"<small>{escape(entry.note)}</small>" if entry.note else ""
    return (f"<b>{text}</b>" if entry.best else text) + note


def _warnings(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="warnings"><b>Before you believe it</b><ul>{items}</ul></div>'


def _audit(results: Sequence[RunResult]) -> str:
    line = audit_line(results)
    if line is None:
        return ""
    moved = "" if line.startswith("0 ") else " moved"
    return f'<div class="audit{moved}"><b>Audit.</b> {escape(line)}.</div>'


def _figure(svg: bytes, title: str, caption: str) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    image = f'<div class="wide"><img alt="{escape(title)}" src="{source}"></div>'
    width = re.search(rb'width="([\d.]+)pt"', svg)
    broad = ' class="broad"' if width and float(width[1]) > 400 else ""
    return (
        f"<figure{broad}>{image}<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption></figure>"
    )


def _provenance(provenance: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{_value(value)}</dd>" for key, value in provenance.items()
    )
    return f"<dl>{items}</dl>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        if any(isinstance(item, Mapping | list | tuple) for item in value.values()):
            return (
                f"<details><summary>show</summary><pre>{escape(json.dumps(value, indent=2))}</pre></details>"
            )
        lines = "<br>".join(escape(f"{key}: {item}") for key, item in value.items())
        return lines if len(value) <= _MANY else f"<details><summary>show</summary>{lines}</details>"
    if isinstance(value, list | tuple):
        return escape(", ".join(str(item) for item in value))
    return escape(value if isinstance(value, str) else json.dumps(value))
