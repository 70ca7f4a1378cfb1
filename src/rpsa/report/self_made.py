"""Safety data in the models' own words, as a report shows them: what was offered, what was taken, and examples."""

from collections.abc import Sequence
from typing import Any

from rpsa.report.console import print_table
from rpsa.report.page import OwnDataShown, cut
from rpsa.report.tables import NONE, Entry, Table
from rpsa.self_data.stored import KINDS, Made

_REASONS = {
    "truncated": "ran out of tokens",
    "thought_not_closed": "thought not closed",
    "several_thoughts": "more than one thought",
    "empty": "no answer",
    "not_a_refusal": "not a refusal",
    "judged_unsafe": "judged unsafe",
    "no_verdict": "no verdict",
    "refused": "refused",
}


def self_made_table(made: Sequence[Made]) -> Table:
    """A row for each base and kind of request: how many responses were offered, accepted and kept, and why not."""
    several = len(made) > 1
    header = [*(["Data"] if several else []), "Requests", "Asked", "Offered", "Accepted", "Kept", "Rejected"]
    rows = [
        [
            *([Entry(one.name)] if several else []),
            Entry(kind),
            *(Entry(f"{found[name]:,}") for name in ("prompts", "offered", "accepted", "kept")),
            Entry(_why(found["rejected"])),
        ]
        for one in made
        for kind in KINDS
        if (found := one.counts.get(kind))
    ]
    return Table(header, rows)


def _why(rejected: Any) -> str:
    return ", ".join(f"{count:,} {_REASONS.get(why, why)}" for why, count in rejected.items()) or NONE


def shown_data(made: Sequence[Made]) -> OwnDataShown | None:
    """For the page, long texts cut in the middle; None where no data were made."""
    if not made:
        return None
    examples = {
        f"{one.name}, {kind}: {_REASONS.get(outcome, outcome)}": [(cut(p), cut(r)) for p, r in texts]
        for one in made
        for (kind, outcome), texts in one.shown.items()
    }
    return OwnDataShown(self_made_table(made), examples)


def render_self_made(made: Sequence[Made], console: Any = None) -> None:
    """Print the table to a rich console (default: stdout)."""
    if made:
        print_table(self_made_table(made), console)
