"""`index.html`: the whole report in one file that needs no network."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rpsa.report import browser
from rpsa.report.benchmarks import benchmark_table, rates_table, unreliable_note
from rpsa.report.results import RunResult, Summary
from rpsa.report.shown import Shown
from rpsa.report.table import Entry, Table, interval_note, main_table, missing_lines
from rpsa.report.warnings import audit_line, warnings

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
        *([browser.render_browser(responses)] if responses else []),
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
<style>{_STYLE}{browser.STYLE}</style>
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
