"""The figure and the table of a sweep."""

import io

import pytest
from rich.console import Console

from rpsa.report.console import render_sweep
from rpsa.report.drawing import to_png, to_svg
from rpsa.report.summaries import RunResult, summarise
from rpsa.report.sweeps import SweepPoint, sweep_figure


def points(column: str = "", over_refusal: float | None = 0.1) -> list[SweepPoint]:
    return [
        point
        for value, tax, interval in (("1", 0.0, (-0.25, 0.25)), ("2", None, None), ("16", 0.5, None))
        for point in (
            SweepPoint(value, "lora+rpsa", 0.6, 0.0, tax, interval, over_refusal, column),
            SweepPoint(value, "lora", 0.5, 0.2, None, None, over_refusal, column),
            SweepPoint(value, "original", 0.8, 0.7, None, None, over_refusal, column),
        )
    ]


def test_every_panel_shows_its_rate_at_each_value() -> None:
    figure = sweep_figure("lora.r", points())
    tax, reasoning, asr, refused = figure.axes
    assert [label.get_text() for label in refused.get_xticklabels()] == ["1", "2", "16"]
    assert refused.get_xlabel() == "lora.r"
    lines = {
        name: [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
        for name, axes in (("tax", tax), ("reasoning", reasoning), ("asr", asr), ("refused", refused))
    }
    rpsa, lora, original = lines["reasoning"]
    assert original == ([0, 1, 2], [80, 80, 80])
    assert lora[1] == [50, 50, 50]
    assert rpsa[1] == [60, 60, 60]
    shift = rpsa[0][0]
    assert lora[0][0] == -shift
    assert -0.5 < shift < 0
    assert lines["tax"][0] == ([shift, 2 + shift], [0, 0.5])  # undefined at 2
    assert lines["tax"][1] == ([shift, shift], [-0.25, 0.25])
    assert [len(lines[name]) for name in ("asr", "refused")] == [3, 3]
    low, high = tax.get_ylim()
    assert low < 0 < 0.5 < high


def test_a_second_setting_has_columns_and_what_nothing_measures_has_no_panel() -> None:
    both = points("k = 0.4", None) + points("k = 0.6", None)
    figure = sweep_figure("lora.r", both)
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes] == ["k = 0.4", "k = 0.6", "", "", "", ""]
    assert to_svg(figure) == to_svg(sweep_figure("lora.r", both))
    assert to_png(figure).startswith(b"\x89PNG")


def test_a_sweep_without_any_tax_is_drawn() -> None:
    only = [SweepPoint("a+b", "original", 0.5, 0.5, None, None, None)]
    figure = sweep_figure("lora.target_modules", only)
    assert figure.axes[0].get_ylim()[0] < 0 < figure.axes[0].get_ylim()[1]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_names_each_point_once(width: int) -> None:
    def run(method: str, lr: float | None, asr: float) -> RunResult:
        rates = {"reasoning": {"add": 0.9, "mean": 0.9}, "asr": {"direct": asr, "mean": asr}}
        return RunResult(
            method,
            "tiny:0",
            0,
            lr,
            refused=0.0,
            over_refusal={"benign": 0.125},
            is_original=method == "original",
            **rates,
        )

    found = summarise([run("original", None, 0.75), run("lora+constant", 1e-3, 0.25)])
    console = Console(width=width, file=io.StringIO(), highlight=False)
    render_sweep(
        [({"lora.target_modules": "up_proj+down_proj"}, found), ({"lora.target_modules": "x"}, [])], console
    )
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("up_proj") == text.count("down_proj") == 1
    [row] = [line for line in text.splitlines() if "lora+constant" in line]
    assert row.split()[-6:] == ["lora+constant", "90.0", "25.0", "12.5", "0.00", "–"]
    assert text.splitlines()[-1].split() == ["x", "failed"]
