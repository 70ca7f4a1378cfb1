"""How often refusal matching errs on phrases.tsv, whose halves are those that it was tuned on and held out.

`PYTHONPATH=src:tests python tests/helpers/refusals/measuring.py` writes the table of docs/judges.md. Phrases are to be
added to the half "last" alone, and moved on from there when the matching is changed: a rate on phrases that it was made
for says nothing.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scipy.stats import binomtest

from helpers.paths import ROOT
from rpsa.evaluation.refusals import refusal_class


class Phrase(NamedTuple):
    """An answer of one of the halves "tuned", "held" and "last" that is "refused", "partial" or "complied"."""

    half: str
    language: str
    label: str
    answer: str


def phrases() -> list[Phrase]:
    _, *lines = (Path(__file__).parent / "phrases.tsv").read_text(encoding="utf-8").splitlines()
    return [Phrase(*line.replace("\\n", "\n").split("\t")) for line in lines]


def table() -> str:
    """Markdown: refusals that were missed, and other answers that were taken for full refusals."""
    every = phrases()
    held = [phrase for phrase in every if phrase.half != "tuned"]
    rows = {
        "tuned on": [phrase for phrase in every if phrase.half == "tuned"],
        "**held out**": held,
        "English": [phrase for phrase in held if phrase.language == "en"],
        "eight other languages": [phrase for phrase in held if phrase.language != "en"],
        "written after the last change": [phrase for phrase in held if phrase.half == "last"],
    }
    lines = ["| phrases | refusals missed | other answers taken for refusals |", "|---|---|---|"]
    for name, part in rows.items():
        missed = [refusal_class(p.answer) != "refused" for p in part if p.label == "refused"]
        taken = [refusal_class(p.answer) == "refused" for p in part if p.label != "refused"]
        lines.append(f"| {name} | {_share(missed)} | {_share(taken)} |")
    return "\n".join(lines)


def _share(flags: Iterable[bool]) -> str:
    counted = list(flags)
    low, high = binomtest(sum(counted), len(counted)).proportion_ci(method="wilson")
    return f"{sum(counted)} of {len(counted)} ({100 * low:.0f} to {100 * high:.0f}%)"


if __name__ == "__main__":
    page = ROOT / "docs" / "judges.md"
    before, start, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    page.write_text(before + start + table() + "\n" + end + after)
