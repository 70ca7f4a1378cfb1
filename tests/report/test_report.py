import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from helpers.chromium import CHROMIUM, chromium
from helpers.made_up_results import FAMILIES, LEVELS, demo_results, made_up, study_results, with_samples
from rpsa.evaluation.statistics import safety_tax_interval
from rpsa.report import RunResult, Shown, render_console, summarise, with_safety_tax, write_report
from rpsa.report.figures import trajectories
from rpsa.report.page import LIMIT, chosen_responses, cut, script_json
from rpsa.report.summaries import with_problem_intervals
from rpsa.report.tables import benchmark_table, latex_table, main_table, rates_table
from rpsa.report.warnings import audit_line, warnings
from rpsa.text import latex_text

PROVENANCE = {
    "name": "made-up <demo>",
    "versions": {"rpsa": "0"},
    "seeds": [0, 1],
    "seconds": 1.5,
    "recipe": {"a": {"b": 1}},
}

HOSTILE = """</script><script>document.title = "gone"</script><!-- <script>
<img src=http://example.org/x onerror=stop()></pre></details></body> & &lt; \u2028 \x00 \\ ' " ]]> url(http://example.org/y)"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(with_samples(demo_results(), tmp_path_factory.mktemp("samples")), out, PROVENANCE)
    return out


def _changed(method: str, **changes: Any) -> list[RunResult]:
    return [replace(r, **changes) if r.method == method else r for r in demo_results()]


def test_results_json(demo: Path) -> None:
    content = json.loads((demo / "results.json").read_text())
    assert set(content) == {"runs", "summary", "claims", "prediction", "missing", "thoughts"}
    assert len(content["runs"]) == 21
    for run in content["runs"]:
        assert {
            "method",
            "base",
            "seed",
            "lr",
            "reasoning",
            "refused",
            "asr",
            "over_refusal",
            "str",
            "reason",
        } <= set(run)
        assert set(run["reasoning"]) == {*FAMILIES, "mean"}
        assert set(run["asr"]) == {"direct", "wrapped", "mean"}
        assert set(run["over_refusal"]) == {"benign", "borderline"}
        rates = [
            *run["reasoning"].values(),
            *run["asr"].values(),
            *run["over_refusal"].values(),
            run["refused"],
        ]
        assert all(0 <= rate <= 1 for rate in rates)
        assert (run["lr"] is None) == (run["str"] is None) == (run["method"] == "original")
    assert [s["method"] for s in content["summary"]] == [r["method"] for r in content["runs"][:7]]


def test_summary_str_is_mean_drop_over_mean_gain(demo: Path) -> None:
    content = json.loads((demo / "results.json").read_text())
    originals = {run["base"]: run for run in content["runs"] if run["method"] == "original"}
    for summary in content["summary"]:
        runs = [run for run in content["runs"] if run["method"] == summary["method"]]
        assert summary["reasoning"]["mean"] == pytest.approx(sum(r["reasoning"]["mean"] for r in runs) / 3)
        if summary["method"] == "original":
            assert set(summary["str"].values()) == {None}
            continue
        drop = sum(originals[r["base"]]["reasoning"]["mean"] - r["reasoning"]["mean"] for r in runs)
        gain = sum(originals[r["base"]]["asr"]["mean"] - r["asr"]["mean"] for r in runs)
        assert summary["str"]["mean"] == pytest.approx(drop / gain)
        assert summary["str"]["ci95"][0] < drop / gain < summary["str"]["ci95"][1]


def test_an_undefined_str_is_null_with_its_reason() -> None:
    results = _changed("lora", asr={"direct": 0.9, "wrapped": 0.9, "mean": 0.9})
    runs = [run for run in with_safety_tax(results) if run.method == "lora"]
    assert all(run.to_json()["str"] is None and "did not fall" in run.to_json()["reason"] for run in runs)
    summary = next(s for s in summarise(results) if s.method == "lora")
    assert summary.to_json()["str"]["mean"] is None
    assert "did not fall" in summary.to_json()["str"]["reason"]
    without = [r for r in demo_results() if r.method != "original"]
    assert "was not evaluated" in with_safety_tax(without)[0].to_json()["reason"]
    assert all(s.tax is None and "was not evaluated" in str(s.tax_reason) for s in summarise(without))


def test_table_marks_the_best_of_each_group(demo: Path) -> None:
    lines = (demo / "table.md").read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert "**" not in rows["original"]
    best = max(
        (s for s in summarise(demo_results()) if s.paradigm == "fft"), key=lambda s: s.reasoning["mean"]
    )
    assert f"**{100 * best.reasoning['mean']:.1f}**" in "\n".join(lines)
    assert all(line.count("|") == lines[0].count("|") for line in lines[:9])


class _Page(HTMLParser):
    """Collects what a page would load, and what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert tag not in ("link", "iframe", "object", "embed", "base")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_self_contained_and_well_formed(demo: Path) -> None:
    page = _Page()
    page.feed((demo / "index.html").read_text())
    assert page.open == []
    assert len(page.sources) == 4
    for source in page.sources:
        assert source.startswith("data:image/svg+xml;base64,")
        assert b"</svg>" in base64.b64decode(source.partition(",")[2])
    text = " ".join(page.text)
    assert "made-up <demo>" in text
    assert "0 frozen elements moved in 208,800,000 element-steps checked" in text
    assert "fft+constant" in text
    assert "lookup" in text


def test_figures_are_drawn_as_far_as_there_is_something_to_show(demo: Path, tmp_path: Path) -> None:
    assert {p.name for p in demo.iterdir()} == {
        *("results.json", "table.md", "table.tex", "index.html"),
        *("scatter_benchmarks.png", "scatter_benchmarks.svg"),
        *("scatter.png", "scatter.svg", "trajectories.png", "trajectories.svg"),
        *("ablation.png", "ablation.svg"),
    }
    write_report([r for r in demo_results() if r.method in ("original", "fft")], tmp_path, PROVENANCE)
    assert not (tmp_path / "trajectories.png").exists()
    for figure in demo.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size > 20_000


def test_the_k_of_few_runs_are_lanes_that_do_not_touch_and_that_of_many_a_band() -> None:
    few = [r for r in demo_results() if r.method == "fft+rpsa"]
    figure = trajectories(few)
    assert figure is not None
    k, c = figure.axes
    lanes = [
        line.get_ydata() for line in k.lines if line.get_label() in {f"{r.base}, seed {r.seed}" for r in few}
    ]
    assert len(lanes) == len(few) == 3
    for lane, run, floor in zip(lanes, few, (2.5, 1.25, 0.0), strict=True):
        assert run.trajectory is not None
        assert list(lane - floor) == pytest.approx(run.trajectory["k"])
    assert len(c.lines) == len(few) + 1  # with the line at a half
    many = trajectories([replace(r, seed=seed) for r in few for seed in (0, 1)])
    assert many is not None
    assert "6 runs: median, 10-90%" in many.axes[0].get_title()
    assert len(many.axes[0].lines) == 2


NAME = "a|b $\\frac{1}{ $ [bold red]x[/] <b onclick=x> `c` *d* _e_ ~f~ & % # \\ \x1b[31m \u202e \n| g | --> ]]> [h](i)"


def renamed(results: list[RunResult]) -> list[RunResult]:
    """Every name that a user, a file or a model may have chosen is `NAME`."""

    def named(rates: Any) -> dict[str, Any]:
        return {name if name == "mean" else f"{name} {NAME}": value for name, value in rates.items()}

    return [
        replace(
            one,
            method=one.method.replace("+rpsa", f"+{NAME}"),
            base=f"{one.base} {NAME}",
            safety=one.safety and f"{one.safety} {NAME}",
            judge=NAME,
            **{part: named(getattr(one, part)) for part in ("reasoning", "asr", "over_refusal")},
            sets={kind: named(sets) for kind, sets in one.sets.items()},
        )
        for one in results
    ]


@pytest.mark.parametrize("study", [False, pytest.param(True, marks=pytest.mark.integration)])
def test_names_are_nothing_but_text(tmp_path: Path, study: bool) -> None:
    results = renamed(study_results(rates=(1e-4, 1e-3), seeds=(0,)) if study else demo_results())
    shown = [Shown(NAME, (b"<svg width='1pt'></svg>"), NAME, NAME)]
    provenance = PROVENANCE | {"name": NAME, NAME: NAME}
    summaries = write_report(results, tmp_path, provenance, shown, {NAME: NAME})
    page = _Page()
    page.feed((tmp_path / "index.html").read_text())
    assert page.open == []
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "onclick" in " ".join(page.text)  # as text, and so nowhere else
    assert (tmp_path / "index.html").read_text().count("<b onclick") == 0

    for path in tmp_path.glob("*.svg"):
        ElementTree.fromstring(path.read_bytes())
    markdown = (tmp_path / "table.md").read_text()
    assert markdown.isprintable() or set(filter(lambda c: not c.isprintable(), markdown)) == {"\n"}
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", re.sub(r"\\\\", "", line))) for line in tables]
    assert len(set(cells)) <= 2  # the main table, and that of the benchmarks
    assert "<b" not in re.sub(r"\\<", "", markdown)

    tex = (tmp_path / "table.tex").read_text()
    assert re.findall(r"(?<!\\)[&]", tex.replace("\\&", ""))
    assert "\\frac" not in tex
    bare = re.sub(r"\\[&%$#_{}]", "", tex)
    assert all(bare.count(mark) % 2 == 0 for mark in "$")
    assert bare.count("{") == bare.count("}")

    console = Console(file=io.StringIO(), width=400, force_terminal=False)
    render_console(summaries, console, {NAME: NAME})
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in said
    assert "[bold red]x[/]" in said


def test_equal_results_give_equal_files(demo: Path, tmp_path: Path) -> None:
    (samples := tmp_path / "samples").mkdir()
    write_report(with_samples(demo_results(), samples), tmp_path, PROVENANCE)
    for path in demo.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_a_study_is_drawn_against_the_learning_rate(tmp_path: Path) -> None:
    results = study_results(rates=(1e-4, 1e-3), seeds=(0,))
    write_report(results, tmp_path, PROVENANCE)
    assert (tmp_path / "learning_rate.png").is_file()
    summaries = summarise(results)
    assert len(summaries) == 1 + 6 * 2 * 2
    assert all(len(s.runs) == 3 for s in summaries)
    assert "Safety data" in (tmp_path / "table.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert page.index("<h2>Figures") < page.index("<h2>Results")
    svg = (tmp_path / "learning_rate.svg").read_text()
    assert len(re.findall(r'<g id="axes_\d+">', svg)) == 5 * 2  # two sets of over-refusal


@pytest.mark.parametrize(
    ("method", "changes", "detail", "sentence"),
    [
        ("lora", {"asr": {"direct": 0.5, "wrapped": 0.5, "mean": 0.5}}, "50%; untouched 62%", "many harmful"),
        (
            "lora",
            {"over_refusal": {"benign": 0.1, "borderline": 0.95}},
            "95% of borderline",
            "nearly every benign",
        ),
        ("lora", {"refusing": 0.98}, "98%", "nearly every training example is a refusal"),
        ("lora", {"truncated": 0.2}, "20%", "ran out of tokens"),
        ("lora", {"asr": {"direct": 0.9, "wrapped": 0.9, "mean": 0.9}}, "3 of 3 runs", "runs without an STR"),
        (
            "fft+rpsa",
            {"trajectory": {"step": [0, 2], "k": [0.5, 0.5], "c": [0.4, 0.4], "tau": [0.0, 0.0]}},
            "3 of 3 runs",
            "k never left 0.5",
        ),
        (
            "fft+rpsa",
            {
                "audit": {
                    "gradient_only": False,
                    "frozen_element_steps_checked": 9,
                    "frozen_elements_moved": 2,
                }
            },
            "6 moves",
            "Freezing failed",
        ),
        (
            "fft+rpsa",
            {"audit": {"gradient_only": True, "frozen_element_steps_checked": 9, "frozen_elements_moved": 2}},
            "6 moves",
            "only gradients were masked",
        ),
    ],
)
def test_warnings(method: str, changes: dict[str, Any], detail: str, sentence: str) -> None:
    def said(results: list[RunResult]) -> bool:
        return any(f"{method} ({detail})" in w and sentence in w for w in warnings(summarise(results)))

    assert said(_changed(method, **changes))
    assert not said(demo_results())


def test_half_of_refusals_is_no_concern() -> None:
    assert not any(
        "is a refusal" in warning for warning in warnings(summarise(_changed("lora", refusing=0.6)))
    )


def test_a_difference_within_noise_is_said() -> None:
    plain = {run.base: run for run in demo_results() if run.method == "lora"}
    nudge = dict(zip(sorted(plain), (-0.01, 0.0, 0.02), strict=True))

    def copied(run: RunResult, shift: float) -> RunResult:
        source = plain[run.base]
        rates = {name: rate + shift for name, rate in source.reasoning.items()}
        return replace(source, method=run.method, reasoning=rates)

    def said(shift: float) -> bool:
        results = [copied(r, shift + nudge[r.base]) if r.method == "lora+rpsa" else r for r in demo_results()]
        return any("lora+rpsa (difference" in line for line in warnings(summarise(results)))

    assert said(0.0)
    assert not said(0.3)


def test_fewer_than_three_runs_have_no_interval() -> None:
    results = [r for r in demo_results() if r.base == "tiny:0"]
    assert all(s.tax_interval is None for s in summarise(results))
    assert any("Fewer than three runs" in line for line in warnings(summarise(results)))


def test_audit_line_leaves_out_runs_that_mask_gradients_only() -> None:
    assert audit_line([r for r in demo_results() if r.audit is None]) is None
    gradient_only = {"gradient_only": True, "frozen_element_steps_checked": 5, "frozen_elements_moved": 5}
    assert "0 frozen elements moved in 156,600,000" in (
        audit_line(_changed("fft+rpsa", audit=gradient_only)) or ""
    )


def test_console_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    render_console(summarise(demo_results()), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert re.search(r"fft\+constant +\d+\.\d", shown)
    assert "Audit: 0 frozen elements moved" in shown


def test_each_benchmark_has_its_interval() -> None:
    one = summarise(_one_base())
    table = benchmark_table(one)
    assert table.header == [
        "Method",
        *(f"{family} ↑" for family in FAMILIES),
        *("ASR direct ↓", "ASR wrapped ↓", "Refused benign ↓", "Refused borderline ↓"),
    ]
    low, high = one[1].runs[0].sets["reasoning"]["sorting"].interval or (0, 0)
    assert table.rows[1][2].text == f"{100 * one[1].reasoning['sorting']:.1f}"
    assert table.rows[1][2].note == f"{100 * low:.1f} to {100 * high:.1f}"  # over problems
    several = summarise(demo_results())
    values = [run.reasoning["sorting"] for run in several[1].runs]
    found = benchmark_table(several).rows[1][2]
    mean = sum(values) / 3
    half = 4.302653 * (sum((value - mean) ** 2 for value in values) / 6) ** 0.5  # over runs
    assert found.text == f"{100 * mean:.1f}"
    assert found.note == f"{100 * max(0, mean - half):.1f} to {100 * min(1, mean + half):.1f}"


def test_the_rates_that_qualify_a_figure_are_shown() -> None:
    def changed(run: RunResult) -> RunResult:
        if run.method != "lora":
            return run
        return _with_rates(
            _with_rates(run, "reasoning", "parity", unparsed=0.5), "attack", "wrapped", unjudged=0.25
        )

    summaries = summarise([changed(run) for run in demo_results()])
    table = rates_table(summaries)
    rows = {(row[0].text, row[1].text): dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert len(rows) == 7 * 9
    assert rows["lora", "parity"]["No answer found"].text == "50.0"
    assert rows["fft", "parity"]["No answer found"].text == "0.0"
    assert rows["lora", "wrapped"]["Not judged"].text == "25.0"
    assert rows["lora", "parity"]["Not judged"].text == "–"
    said = warnings(summaries)
    assert any("lora (50% of parity)" in line and "in no form" in line for line in said)
    assert any("lora (25% of wrapped)" in line and "no verdict" in line for line in said)


def _with_rates(result: RunResult, kind: Any, name: str, **rates: float) -> RunResult:
    sets = {one: dict(found) for one, found in result.sets.items()}
    sets[kind][name] = replace(sets[kind][name], **rates)  # type: ignore[arg-type]
    return replace(result, sets=sets)


MOSTLY_UNANSWERED = [
    ("reasoning", "parity", {"truncated": 0.4, "empty": 0.2}),
    ("reasoning", "parity", {"unparsed": 0.8, "refused": 0.2}),
    ("attack", "wrapped", {"truncated": 1.0}),
    ("attack", "direct", {"unjudged": 0.6}),
]
MOSTLY_ANSWERED = [
    ("reasoning", "parity", {"truncated": 0.3, "empty": 0.2}),
    ("reasoning", "parity", {"unparsed": 0.9, "refused": 0.9}),  # refusals are answers
]


@pytest.mark.parametrize("whose", ["lora", "original"])
@pytest.mark.parametrize(
    ("kind", "name", "rates"),
    [
        pytest.param(*case, marks=[pytest.mark.integration] if number % 2 else [])
        for number, case in enumerate(MOSTLY_UNANSWERED)
    ],
)
def test_where_most_responses_have_no_answer_no_rate_stands_alone_and_there_is_no_str(
    whose: str, kind: Any, name: str, rates: dict[str, float], tmp_path: Path
) -> None:
    results = [
        _with_rates(run, kind, name, **rates) if (run.method, run.base) == (whose, "tiny:1") else run
        for run in demo_results()
    ]
    for run in with_safety_tax(results):
        if run.base == "tiny:1" and not run.is_original and whose in (run.method, "original"):
            assert run.tax is None
            assert f"{name}: " in (run.tax_reason or "")
            assert "of the responses have no answer that can be read" in (run.tax_reason or "")
        elif not run.is_original:
            assert run.tax is not None
    summaries = summarise(results)
    for summary in summaries:
        concerned = whose in (summary.method, "original") and not summary.is_original
        assert (summary.tax is None) == (concerned or summary.is_original)
        assert not concerned or "have no answer" in (summary.tax_reason or "")
        assert not concerned or summary.tax_interval is None
    # marked in the table, the warnings, the LaTeX table, the page and results.json
    column = {"reasoning": "Reasoning ↑", "attack": "ASR ↓"}[kind]
    table = main_table(summaries)
    for row in table.rows:
        entry = row[table.header.index(column)]
        assert entry.text.endswith(" (!)") == (row[0].text == whose)
        assert not (entry.best and entry.text.endswith(" (!)"))
    console = Console(file=io.StringIO(), width=100)
    render_console(summaries, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"^{whose} .*\d \(!\)", shown, re.MULTILINE)
    assert any(
        line.startswith(f"{whose} (") and "the rates marked (!)" in line for line in warnings(summaries)
    )
    assert not any("because attack success did not fall" in line for line in warnings(summaries))
    assert "$^!$" in latex_table(results)
    write_report(results, tmp_path, PROVENANCE)
    page = (tmp_path / "index.html").read_text()
    assert "(!)" in page
    assert "(!): most of the responses" in (tmp_path / "table.md").read_text()
    stored = json.loads((tmp_path / "results.json").read_text())
    marked = {one["method"] for one in stored["summary"] if name in one["unreliable"]}
    assert marked == {whose}
    assert [one["method"] for one in stored["runs"] if one["unreliable"]] == [whose]


@pytest.mark.parametrize(("kind", "name", "rates"), MOSTLY_ANSWERED)
def test_half_is_not_most_and_a_refusal_is_an_answer(kind: Any, name: str, rates: dict[str, float]) -> None:
    results = [
        _with_rates(run, kind, name, **rates) if run.method == "lora" else run for run in demo_results()
    ]
    assert all(run.tax is not None for run in with_safety_tax(results) if not run.is_original)
    assert not any(entry.text.endswith("(!)") for row in main_table(summarise(results)).rows for entry in row)


def test_an_over_refusal_that_does_not_stand_alone_is_marked_and_leaves_the_str() -> None:
    results = [
        _with_rates(run, "over_refusal", "benign", empty=0.9) if run.method == "lora" else run
        for run in demo_results()
    ]
    summaries = summarise(results)
    table = main_table(summaries)
    benign = [row[table.header.index("Refused benign ↓")].text for row in table.rows if row[0].text == "lora"]
    assert benign[0].endswith(" (!)")
    assert next(s for s in summaries if s.method == "lora").tax is not None


def test_a_single_run_that_does_not_stand_alone_gets_no_interval(tmp_path: Path) -> None:
    results = with_samples(_one_base(), tmp_path)
    results = [_with_rates(r, "attack", "direct", empty=0.9) if r.method == "fft" else r for r in results]
    summaries = {s.method: s for s in with_problem_intervals(summarise(results))}
    assert (summaries["fft"].tax, summaries["fft"].tax_interval) == (None, None)
    assert summaries["fft+rpsa"].tax is not None
    assert summaries["fft+rpsa"].difference is None  # to what?


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"judge": "refusal-matching"}, "judged by matching refusals"),
        ({"over_refusal": {}}, "Over-refusal was not measured"),
        ({"sandbox": "unsandboxed 3.11"}, "without a sandbox"),
    ],
)
def test_warnings_of_the_study(changes: dict[str, Any], sentence: str) -> None:
    results = [replace(run, **changes) for run in demo_results()]
    assert sum(sentence in line for line in warnings(summarise(results))) == 1
    assert not any(sentence in line for line in warnings(summarise(demo_results())))


def test_a_single_run_has_an_interval_over_problems(tmp_path: Path) -> None:
    results = with_samples(_one_base(), tmp_path)
    summaries = {s.method: s for s in with_problem_intervals(summarise(results))}
    assert summaries["original"].tax_interval is None
    original, fft = (_scores(run) for run in results[:2])
    expected = safety_tax_interval(
        reasoning_before=original["reasoning"],
        reasoning_after=fft["reasoning"],
        attack_before=original["attack"],
        attack_after=fft["attack"],
        replicates=2_000,
    )
    assert summaries["fft"].tax_interval == expected.interval
    assert summaries["fft"].interval_over == "problems"
    low, high = summaries["fft+rpsa"].difference or (0, 0)
    assert low < high < 0  # it costs less, surely
    assert summaries["fft"].difference is None
    assert "over problems" in (_written(results, tmp_path) / "table.md").read_text()
    assert any("seed may give" in line for line in warnings(list(summaries.values())))


def test_problems_are_matched_by_item_not_by_position(tmp_path: Path) -> None:
    results = with_samples(_one_base(), tmp_path)
    before = [s.tax_interval for s in with_problem_intervals(summarise(results))]
    for path in tmp_path.glob("[1-6].jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(reversed(lines)))
    assert [s.tax_interval for s in with_problem_intervals(summarise(results))] == before


def test_no_difference_is_within_noise_and_no_change_has_no_interval(tmp_path: Path) -> None:
    results = with_samples(_one_base(), tmp_path)
    stored = {run.method: run.samples for run in results}
    stored["lora+rpsa"] = stored["lora"]
    stored["fft+random"] = stored["original"]
    results = [replace(run, samples=stored[run.method]) for run in results]
    said = warnings(with_problem_intervals(summarise(results)))
    assert any("lora+rpsa (difference +0.00 to +0.00)" in line and "within noise" in line for line in said)
    assert any("fft+random (not one reasoning problem" in line and "no interval" in line for line in said)


def test_latex_has_the_layout_of_table_1() -> None:
    results = [replace(run, base=f"{run.base}_50%") for run in demo_results()]
    text = latex_table(results)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2 + 3 * 7
    assert len({_columns(row) for row in rows}) == 1
    assert r"\begin{tabular}{llrrrrrrrrrr}" in text  # 5 families, 2 attacks, 2 of over-refusal, STR
    assert _columns(rows[0]) == 12
    assert text.count(r"\midrule") == 3
    assert text.count(r"tiny:0\_50\% & Original") == 1
    fft = [s for s in summarise([r for r in results if r.base == "tiny:0_50%"]) if s.paradigm == "fft"]
    best = min(s.tax for s in fft if s.tax is not None)
    block = text.split(r"\midrule")[1].splitlines()
    assert [line for line in block if line.endswith(rf"\textbf{{{best:.2f}}} \\")]
    assert not [line for line in block if "Original" in line and "textbf" in line]


def _columns(row: str) -> int:
    spans = [
        int(found[1]) if (found := re.search(r"multicolumn\{(\d+)", cell)) else 1 for cell in row.split(" & ")
    ]
    return sum(spans)


@pytest.mark.parametrize("character", "&%$#_{}~^\\<>")
def test_latex_escapes(character: str) -> None:
    text = latex_text(f"a{character}b")
    assert re.fullmatch(r"a\\([&%$#_{}]|text[a-z]+\{\})b", text)
    assert latex_text("plain 1.0: x+y") == "plain 1.0: x+y"


def test_cells_of_a_sweep_are_in_results_json_and_its_figure_alone(tmp_path: Path) -> None:
    swept = replace(made_up("fft", "tiny:0", 0, 5e-4, "tiny:refusals"), sweep="rank", point={"lora.r": 2})
    folder = _written([*_one_base(), swept], tmp_path)
    content = json.loads((folder / "results.json").read_text())
    assert [run["point"] for run in content["runs"] if run["sweep"] == "rank"] == [{"lora.r": 2}]
    assert len(content["summary"]) == len(LEVELS)
    assert (folder / "sweep-rank.png").stat().st_size > 10_000
    assert "Sweep rank" in (folder / "index.html").read_text()
    assert "0.0005" not in (folder / "table.md").read_text() + (folder / "table.tex").read_text()


def test_items_on_which_methods_disagree_come_first(tmp_path: Path) -> None:
    results = with_samples(_one_base(), tmp_path, response="x" * 5_000)
    chosen = json.loads(chosen_responses(summarise(results)) or "")
    assert chosen["base"] == "tiny:0"
    assert chosen["methods"] == list(LEVELS)
    assert [one["name"] for one in chosen["sets"]] == [*FAMILIES, "direct", "wrapped", "benign", "borderline"]
    stored = [_scores(run)["reasoning"]["sorting"] for run in results]
    disagreed = sum(len({model[item][0] for model in stored}) > 1 for item in range(30))
    assert 6 <= disagreed < 30
    for one in chosen["sets"]:
        assert len(one["items"]) == 6
        varied = [len({response["outcome"] for response in item["responses"]}) for item in one["items"]]
        assert varied == sorted(varied, reverse=True)
        assert one["name"] != "sorting" or varied == [2] * 6
    text = chosen["sets"][0]["items"][0]["responses"][0]["text"]
    assert "3,500 characters left out" in text
    assert len(text) < 1_560
    assert chosen_responses(summarise(_one_base())) is None


def test_cut_keeps_both_ends() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("a" * 50 + "z" * 50, 10) == "aaaaa\n[… 90 characters left out …]\nzzzzz"


def test_hostile_responses_stay_text(tmp_path: Path) -> None:
    results = with_samples(_one_base(), tmp_path, response=HOSTILE)
    text = (_written(results, tmp_path) / "index.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert text.count("</script>") == 2
    assert "<!--" not in text
    style = re.search(r"<style>.*?</style>", text, re.S)
    assert style
    assert not re.search(r"url\(|@import", style[0])
    stored = re.search(r'id="chosen">(.*?)</script>', text, re.S)
    assert stored
    assert json.loads(stored[1])["sets"][0]["items"][0]["responses"][0]["text"] == HOSTILE


@given(st.text())
def test_json_in_a_script_element_cannot_end_it(text: str) -> None:
    written = script_json({"text": text})
    assert not set("<>&") & set(written)
    assert json.loads(written) == {"text": text}


@pytest.mark.integration
def test_a_report_of_200_runs_stays_small(tmp_path: Path) -> None:
    results = with_samples(study_results(seeds=(0, 1))[:200], tmp_path, items=6, response="<long>" * 1_000)
    folder = _written(results, tmp_path)
    assert (folder / "index.html").stat().st_size < 5_000_000
    assert len((chosen_responses(summarise(results)) or "").encode()) <= LIMIT


def test_a_run_without_a_learning_rate_is_not_the_untouched_model() -> None:
    """`train.learning_rate: null` is the trainer's own."""
    results = _changed("lora", lr=None)
    assert [run.method for run in with_safety_tax(results) if run.tax is None] == ["original"] * 3
    assert [summary.method for summary in summarise(results) if summary.is_original] == ["original"]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"needs {CHROMIUM}")
def test_in_a_browser(tmp_path: Path) -> None:
    results = with_samples(_one_base(), tmp_path, response=HOSTILE + "w" * 1_000)
    index = _written(results, tmp_path) / "index.html"
    with chromium(tmp_path / "profile") as page:
        for width in (390, 1440):
            page.open(index, width)
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value("document.title").startswith("made-up <demo>")
            assert page.value("document.getElementById('text-1').textContent").startswith(HOSTILE[:40])
            assert page.value("document.getElementById('details-1').open")
            page.value("(set => { set.value = 5; set.onchange(); })(document.getElementById('set'))")
            assert page.value("document.getElementById('prompt').textContent").startswith("what is direct of")
            assert not page.value("document.getElementById('details-1').open")  # a response to an attack
        assert page.complaints == []
        assert {request.split(":")[0] for request in page.requests} == {"file", "data"}
        assert {r for r in page.requests if r.startswith("file")} == {index.as_uri()}


def _one_base() -> list[RunResult]:
    return [run for run in demo_results() if run.base == "tiny:0"]


def _written(results: list[RunResult], folder: Path) -> Path:
    write_report(results, folder / "report", PROVENANCE)
    return folder / "report"


def _scores(run: RunResult) -> dict[str, dict[str, list[list[float]]]]:
    """By kind and set, in the order of the file."""
    assert run.samples is not None
    found: dict[str, dict[str, list[list[float]]]] = {"reasoning": {}, "attack": {}, "over_refusal": {}}
    for line in run.samples.read_text().splitlines():
        sample = json.loads(line)
        found[sample["kind"]].setdefault(sample["set"], []).append([sample["score"]])
    return found
