"""The table of neighbours is what `benchmarks/versions.py` has found with the bounds that stand in pyproject.toml."""

import json
import runpy

from helpers.paths import ROOT

VERSIONS = runpy.run_path(str(ROOT / "benchmarks" / "versions.py"))
KEPT = json.loads(VERSIONS["KEPT"].read_text())


def test_what_was_resolved_are_the_bounds_of_today() -> None:
    assert KEPT["bounds"] == VERSIONS["bounds"](), "run `python benchmarks/versions.py`"
    assert list(KEPT["neighbours"]) == list(VERSIONS["NEIGHBOURS"])


def test_the_page_shows_what_was_found() -> None:
    assert VERSIONS["PAGE"].read_text() == VERSIONS["page"](KEPT), "run `python benchmarks/versions.py write`"


def test_a_neighbour_fits_if_and_only_if_no_bound_is_in_its_way() -> None:
    for name, one in KEPT["neighbours"].items():
        reason = VERSIONS["why_not"](one["versions"], KEPT["bounds"])
        assert one["resolves"] == (reason == "no: it brings "), name
