import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_results import FAMILIES, demo_results, study_results
from rich.console import Console

from rpsa.report import RunResult, render_console, summarise, with_safety_tax, write_report
from rpsa.report.warnings import audit_line, warnings

PROVENANCE = {
    "name": "made-up <demo>",
    "versions": {"rpsa": "0"},
    "seeds": [0, 1],
    "seconds": 1.5,
    "recipe": {"a": {"b": 1}},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write_report(demo_results(), out, PROVENANCE)
    return out


def _changed(method: str, **changes: Any) -> list[RunResult]:
    return [replace(r, **changes) if r.method == method else r for r in demo_results()]


def test_results_json(demo: Path) -> None:
    content = json.loads((demo / "results.json").read_text())
    assert set(content) == {"runs", "summary", "claims"}
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
            assert summary["str"] == {"mean": None, "ci95": None, "reason": None}
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
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_self_contained_and_well_formed(demo: Path) -> None:
    page = _Page()
    page.feed((demo / "index.html").read_text())
    assert page.open == []
    assert len(page.sources) == 2
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
        *("results.json", "table.md", "index.html"),
        *("scatter.png", "scatter.svg", "trajectories.png", "trajectories.svg"),
    }
    write_report([r for r in demo_results() if r.method in ("original", "fft")], tmp_path, PROVENANCE)
    assert not (tmp_path / "trajectories.png").exists()
    for figure in demo.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size > 20_000


def test_equal_results_give_equal_files(demo: Path, tmp_path: Path) -> None:
    write_report(demo_results(), tmp_path, PROVENANCE)
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
    assert len(re.findall(r'<g id="axes_\d+">', svg)) == 4 * 2


@pytest.mark.parametrize(
    ("method", "changes", "detail", "sentence"),
    [
        ("lora", {"asr": {"direct": 0.5, "wrapped": 0.5, "mean": 0.5}}, "50%; untouched 62%", "many harmful"),
        ("lora", {"over_refusal": {"benign": 0.95, "borderline": 1.0}}, "95%", "nearly every benign"),
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
    render_console(demo_results(), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert re.search(r"fft\+constant +\d+\.\d", shown)
    assert "Audit: 0 frozen elements moved" in shown
