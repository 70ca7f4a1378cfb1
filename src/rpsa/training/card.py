"""The model card: `README.md` in every saved model, `rpsa_metadata.json` beside it with the same facts.

The card is rendered from the metadata alone. Its section "Results" says that nothing was measured until
`card_with_results` or `add_results` fills it; the rest of the card, edited by hand or not, stays as it is then.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpsa.artifacts import atomic_write, stable_json
from rpsa.errors import RPSAError
from rpsa.text import markdown_code, markdown_text
from rpsa.training.card_text import METADATA, render_card

CARD = "README.md"

_RATES = {
    "reasoning": ("reasoning", "Reasoning, correct ↑"),
    "asr": ("attack success", "Attack success ↓"),
    "over_refusal": ("over-refusal", "Benign requests, refused ↓"),
}
_SHARES = {"refused": "Reasoning, refused ↓", "truncated": "Responses, truncated ↓"}


def write_card(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write card and metadata into a model's folder, each whole or not at all.

    Results that were added to the folder stay if they are those of the same weights.
    """
    metadata = {**metadata, "model_name": metadata["model_name"] or folder.resolve().name}
    card = render_card(metadata)
    if results := _results_of_these_weights(folder, metadata):
        metadata["results"] = results
        card = _with_results(card, results)
    atomic_write(folder / METADATA, stable_json(metadata))
    atomic_write(folder / CARD, card)


def card_with_results(
    model_dir: Path | str, results: Mapping[str, Any], original: Mapping[str, Any] | None = None
) -> str:
    """The card of a saved model with these results in place of what "Results" said; nothing is written.

    Args:
        results: rates in [0, 1]: `reasoning`, `asr` and `over_refusal` by set, `refused` and `truncated`, and
            if known `str`, `judge` and the number of `samples`: what the stage evaluate writes to results.json.
        original: the same of the untouched model, for comparison.

    Raises:
        RPSAError: there is no card in `model_dir`.
    """
    path = Path(model_dir) / CARD
    if not path.is_file():
        raise RPSAError(
            f"{path}: no such file; only models that were saved with a card can get results in it"
        )
    return _with_results(path.read_text(encoding="utf-8"), {"model": results, "original": original})


def add_results(
    model_dir: Path | str, results: Mapping[str, Any], original: Mapping[str, Any] | None = None
) -> None:
    """Put `card_with_results` into the model's folder, and the results into its metadata.

    Not for a folder inside a run: its manifest vouches for the files that the stage wrote.

    Raises:
        RPSAError: there is no card, or no metadata, in `model_dir`.
    """
    folder = Path(model_dir)
    card = card_with_results(folder, results, original)
    metadata = _read(folder)
    if metadata is None:
        raise RPSAError(f"{folder / METADATA}: missing or unreadable; save the model again")
    atomic_write(
        folder / METADATA, stable_json(metadata | {"results": {"model": results, "original": original}})
    )
    atomic_write(folder / CARD, card)


def _results_of_these_weights(folder: Path, metadata: Mapping[str, Any]) -> Mapping[str, Any] | None:
    previous = _read(folder) or {}
    weights = metadata["weights_fingerprint"]
    if weights is None or previous.get("weights_fingerprint") != weights:
        return None
    results: Mapping[str, Any] | None = previous.get("results")
    return results


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _with_results(card: str, results: Mapping[str, Any]) -> str:
    section = f"## Results\n\n{_results_section(results)}\n"
    # up to the next heading of the same level, or the end
    replaced, count = re.subn(
        r"^## Results\n.*?(?=^## |\Z)", lambda _: section + "\n", card, count=1, flags=re.M | re.S
    )
    return (replaced if count else f"{card.rstrip()}\n\n{section}").rstrip() + "\n"


def _results_section(results: Mapping[str, Any]) -> str:
    model, original = results["model"], results["original"]
    header = ["In percent", "This model", *(["Untouched"] if original else [])]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    before = _rates(original or {})
    for label, rate in _rates(model).items():
        values = [rate, *([before.get(label)] if original else [])]
        shown = ["–" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| {markdown_text(label)} | " + " | ".join(shown) + " |")
    missing = [name for key, (name, _) in _RATES.items() if not model.get(key)]
    tax = model.get("str")
    notes = [
        f"Safety Tax Rate (drop in reasoning per drop in attack success, lower is better): {tax:.2f}."
        if tax is not None
        else None,
        f"No rate stands alone: {model['unreliable']}." if model.get("unreliable") else None,
        f"Judge: {markdown_code(model['judge'])}." if model.get("judge") else "The judge is not recorded.",
        f"{model['samples']:,} responses." if model.get("samples") else None,
        f"Not measured: {', '.join(missing)}." if missing else None,
    ]
    return "\n".join([*lines, "", " ".join(note for note in notes if note)])


def _rates(results: Mapping[str, Any]) -> dict[str, float]:
    rates = {
        f"{label}: {name}": rate
        for key, (_, label) in _RATES.items()
        for name, rate in sorted((results.get(key) or {}).items(), key=lambda item: item[0] == "mean")
    }
    return rates | {label: results[key] for key, label in _SHARES.items() if key in results}
