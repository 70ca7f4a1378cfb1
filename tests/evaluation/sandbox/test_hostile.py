"""Hostile programs: none gets out of a sandbox, none passes, and the harness stays up (docs/sandbox.md)."""

import os
import re
from functools import cache

import pytest

from helpers.hostile.measuring import ATTACKS, CHEATS, TIERS, measure
from helpers.paths import ROOT
from rpsa.evaluation.sandbox import Program, Unsandboxed, grade_programs, probe
from rpsa.evaluation.sandbox.tiers import Sandbox

PAGE = (ROOT / "docs" / "sandbox.md").read_text()
ISOLATING = [sandbox for sandbox in TIERS if sandbox.isolates]

measured = cache(measure)


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/sandbox.md: cell by tier by program."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    start = next(i for i, row in enumerate(rows) if row[0] == "program")
    tiers = rows[start][1:]
    return {row[0]: dict(zip(tiers, row[1:], strict=True)) for row in rows[start + 1 :]}


def test_there_are_many_and_each_has_its_own_name() -> None:
    names = [program.name for program in ATTACKS + CHEATS]
    assert len(set(names)) == len(names) >= 90
    assert not any("|" in name for name in names)


@pytest.mark.integration
@pytest.mark.parametrize("sandbox", ISOLATING, ids=lambda sandbox: sandbox.name)
def test_nothing_gets_through_a_sandbox(sandbox: Sandbox) -> None:
    if problem := probe(sandbox):
        pytest.skip(f"{sandbox.name}: {problem}")
    results = measured(sandbox)
    assert set(results) == {program.name for program in ATTACKS + CHEATS}
    assert {name: how for name, how in results.items() if how != "stopped"} == {}
    [verdict] = grade_programs(
        [Program("good", "def add(a, b): return a + b", "assert add(1, 2) == 3", "add")], sandbox
    )
    assert verdict.passed


@pytest.mark.integration
def test_the_page_tells_of_every_program_what_was_measured() -> None:
    table = documented()
    assert list(table) == [program.name for program in ATTACKS + CHEATS]
    for sandbox in ISOLATING:
        cells = {row[sandbox.name] for row in table.values()}
        assert cells in ({"stopped"}, {"not run"})
        if probe(sandbox) is None:
            assert {name: row[sandbox.name] for name, row in table.items()} == measured(sandbox)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the page's last column was measured as root")
def test_the_page_tells_what_gets_through_without_a_sandbox() -> None:
    results = measured(Unsandboxed())
    for name, row in documented().items():
        result = results.get(name, "not run")
        expected = result if result in ("stopped", "not run") else "**gets through**"
        assert row["unsandboxed"] == expected, name


def test_the_page_names_what_exists() -> None:
    import rpsa.evaluation.sandbox as room

    [imported] = re.findall(r"from rpsa\.evaluation\.sandbox import (.+)", PAGE)
    assert set(imported.split(", ")) <= set(room.__all__)
