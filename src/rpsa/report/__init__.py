"""The report of a run: results.json, tables, figures, and one page that shows them all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import atomic_write
from rpsa.report.console import render_console
from rpsa.report.page import Shown
from rpsa.report.summaries import RunResult, Summary, summarise, with_problem_intervals, with_safety_tax
from rpsa.self_data.stored import Made

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rpsa.report.attacked import Attacked

__all__ = ["RunResult", "Shown", "Summary", "render_console", "summarise", "with_safety_tax", "write_report"]


def write_report(
    results: Sequence[RunResult],
    out_dir: Path | str,
    provenance: Mapping[str, Any],
    analyses: Sequence[Shown] = (),
    missing: Mapping[str, str] | None = None,
    made: Sequence[Made] = (),
    attacked: "Sequence[Attacked]" = (),
) -> list[Summary]:
    """Write the report of all evaluated cells into `out_dir`, which is created if it is missing.

    `results.json`, `table.md`, `table.tex`, `scatter.png`, and as far as there is something to show
    `scatter_benchmarks.png`, `ablation.png`, `trajectories.png`, `learning_rate.png` and a `sweep-NAME.png` for each
    sweep, each figure as SVG too, and `index.html` with all of it. STR is computed here, against the untouched model
    of the same base. Cells of a sweep are in `results.json` and in its figure alone. `provenance` is JSON-able and
    shown as it is; its "name" is the title. `analyses` are figures that are there already (Fig. 1 to 3), `missing` the
    runs without a result, each with the reason, `made` the safety data in the bases' own words, `attacked` the runs
    under attack, which `robustness.md` and `tampering.png` show.

    Returns:
        The summaries that the tables show.
    """
    from rpsa.report import drawing, figures
    from rpsa.report.attacked import (
        robustness_json,
        robustness_markdown,
        robustness_tables,
        tampering_curves,
    )
    from rpsa.report.claims import claims_table, judge_claims
    from rpsa.report.figures import scatter, scatter_benchmarks
    from rpsa.report.page import CAPTIONS, chosen_responses, render_page
    from rpsa.report.paper_figures import ablation
    from rpsa.report.prediction import predict
    from rpsa.report.self_made import shown_data
    from rpsa.report.sweeps import sweep_figures
    from rpsa.report.tables import latex_table, table_markdown
    from rpsa.report.thoughts import noted_tables, thoughts_apart

    out = Path(out_dir)
    results = with_safety_tax(results)
    matrix = [result for result in results if result.sweep is None]
    summaries = with_problem_intervals(summarise(matrix))
    judged = judge_claims(matrix)
    prediction = predict(results)
    apart = thoughts_apart(summaries)
    more = noted_tables(summaries, apart)
    content = {
        "runs": [r.to_json() for r in results],
        "summary": [s.to_json() for s in summaries],
        "claims": [claim.to_json() for claim in judged],
        "thoughts": [one.to_json() for one in apart],
        "prediction": prediction.to_json() if prediction else None,
        "missing": dict(missing or {}),
        **({"robustness": robustness_json(attacked)} if attacked else {}),
    }
    if attacked:
        atomic_write(out / "robustness.md", robustness_markdown(attacked))
    atomic_write(out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    atomic_write(out / "table.md", table_markdown(summaries, missing, prediction, more))
    atomic_write(out / "table.tex", latex_table(matrix))
    drawn: dict[str, Figure | None] = {
        "scatter": scatter(summaries),
        "scatter_benchmarks": scatter_benchmarks(summaries),
        "ablation": ablation(summaries),
        "trajectories": figures.trajectories(matrix),
        "learning_rate": figures.learning_rates(summaries),
        "tampering": tampering_curves(attacked),
    }
    captions = dict(CAPTIONS)
    for name, swept in sweep_figures(results).items():
        drawn[f"sweep-{name}"] = swept
        captions[f"sweep-{name}"] = (
            f"Sweep {name}",
            "Means over bases and seeds, with the 95% interval of the STR.",
        )
    shown = []
    for name, figure in drawn.items():
        if figure is not None:
            svg = drawing.write_figure(figure, out, name)
            shown.append(Shown(name, svg, *captions[name]))
    claims = claims_table(judged)
    responses, own_data = chosen_responses(summaries), shown_data(made)
    page = render_page(
        summaries,
        matrix,
        [*shown, *analyses],
        provenance,
        responses,
        claims,
        missing,
        prediction,
        own_data,
        robustness_tables(attacked),
        more,
    )
    atomic_write(out / "index.html", page)
    return summaries
