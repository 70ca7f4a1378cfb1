"""The model card: `README.md` in every saved model, `rpsa_metadata.json` beside it with the same facts.

The card is rendered from the metadata alone (`rpsa.training.metadata`); its text is `templates/card.md.jinja`. Its
section "Results" says that nothing was measured until `card_with_results` or `add_results` fills it; the rest of the
card, edited by hand or not, stays as it is then.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rpsa.artifacts import METADATA, atomic_write, stable_json
from rpsa.errors import RPSAError
from rpsa.safety_data import ALL_REFUSE, WHAT_REFUSALS_DO
from rpsa.templates import render

CARD = "README.md"


@dataclass(frozen=True)
class Measured:
    """What a card says of an evaluation.

    Attributes:
        reasoning, asr, over_refusal: rates in [0, 1] by set, and their "mean".
        refused, truncated: shares in [0, 1] of the reasoning problems, and of all responses.
        thought_asr: the attack success rate in thoughts, as `asr`; None where it is not known.
        broken: the share of all responses that are broken ("mean", "ci95"), and of each class of those ("parts").
        tax: STR.
        reasoning_nll, reasoning_kl: in nats per token, on held-out responses of the untouched model.
        unreliable: why a rate does not stand alone.
        samples: how many responses there were.
    """

    reasoning: Mapping[str, float] = field(default_factory=dict)
    asr: Mapping[str, float] = field(default_factory=dict)
    over_refusal: Mapping[str, float] = field(default_factory=dict)
    refused: float | None = None
    truncated: float | None = None
    thought_asr: Mapping[str, float] | None = None
    broken: Mapping[str, Any] | None = None
    tax: float | None = None
    reasoning_nll: float | None = None
    reasoning_kl: float | None = None
    unreliable: str | None = None
    judge: str | None = None
    samples: int | None = None

    @property
    def rates(self) -> dict[str, float]:
        """By the card's label, in its order."""
        parts = {
            "Reasoning, correct ↑": self.reasoning,
            "Attack success ↓": self.asr,
            "Attack success, in thoughts ↓": self.thought_asr or {},
            "Benign requests, refused ↓": self.over_refusal,
        }
        shares = {
            "Reasoning, refused ↓": self.refused,
            "Responses, truncated ↓": self.truncated,
            "Responses, broken ↓": self.broken["mean"] if self.broken else None,
        }
        return {
            f"{label}: {name}": rate
            for label, rates in parts.items()
            for name, rate in sorted(rates.items(), key=lambda item: item[0] == "mean")
        } | {label: share for label, share in shares.items() if share is not None}

    @property
    def missing(self) -> list[str]:
        kinds = {"reasoning": self.reasoning, "attack success": self.asr, "over-refusal": self.over_refusal}
        return [name for name, rates in kinds.items() if not rates]

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        values = {("str" if one.name == "tax" else one.name): getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Measured":
        """What `to_json` made; what it does not know is left out."""
        names = {("str" if one.name == "tax" else one.name): one.name for one in fields(cls)}
        return cls(
            **{names[key]: value for key, value in found.items() if key in names and value is not None}
        )


def render_card(metadata: Mapping[str, Any]) -> str:
    """The whole card, YAML front matter included, without results."""
    from huggingface_hub import ModelCardData

    base, dataset = metadata["base_model"], metadata["safety_data"]["hub_id"]
    derived = {
        "model_name": metadata["model_name"],
        "base_model": base["hub_id"],
        "library_name": "peft" if metadata["adapter"] and not _is_merged(metadata) else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": [dataset] if dataset else None,
        **base["license"],
        "tags": _tags(metadata),
    }
    front_matter = ModelCardData(**(derived | metadata["front_matter"])).to_yaml(line_break="\n")
    text = render("rpsa.training", "card.md", **metadata, **_derived(metadata), metadata_file=METADATA)
    return f"---\n{front_matter}\n---\n\n{_one_line_each(text)}"


def _tags(metadata: Mapping[str, Any]) -> list[str]:
    tags = [*metadata["tags"], "safety-alignment"]
    if metadata["freezing"]:
        tags.append("rpsa")
    if adapter := metadata["adapter"]:
        tags.append(adapter["type"].lower())
        if base := metadata["base_model"]["hub_id"]:
            tags.append(f"base_model:{'finetune' if _is_merged(metadata) else 'adapter'}:{base}")
    return sorted(set(tags))


def _is_merged(metadata: Mapping[str, Any]) -> bool:
    """Whether an adapter has become a part of its base's weights since it was trained."""
    return bool(metadata.get("merged"))


def _derived(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the template says and would be lost in working out."""
    audit, freezing, fisher = metadata["audit"], metadata["freezing"], metadata["fisher"] or {}
    reference, training, done = metadata["reference"] or {}, metadata["training"], metadata["alternatives"]
    refusing = metadata["safety_data"].get("refusing") or 0.0
    frozen_steps = 0.0
    if audit and audit["steps"] and freezing and freezing["elements"]:
        frozen_steps = audit["frozen_element_steps_checked"] / (audit["steps"] * freezing["elements"])
    halves = (fisher.get("split_half") or {}).items()
    prints = {
        "scores": fisher.get("fingerprint"),
        "samples": fisher.get("data_fingerprint"),
        "measured on the weights": fisher.get("weights_fingerprint"),
    }
    sampling = {
        "temperature {:g}": reference.get("temperature"),
        "top-p {:g}": reference.get("top_p"),
        "at most {:,} tokens": reference.get("max_new_tokens"),
    }
    losses = {"training": training["loss"], "evaluation": training["eval_loss"]}
    return {
        "perplexity": metadata["safety_data"].get("perplexity"),
        "refusals_alone": refusing if refusing >= ALL_REFUSE else None,
        "what_refusals_do": WHAT_REFUSALS_DO,
        "is_merged": _is_merged(metadata),
        "mean_frozen": frozen_steps,
        "overlap": ", ".join(f"{v:.3f} for the top {float(k):.0%}" for k, v in halves if v is not None),
        "fingerprints": ", ".join(f"{of} `{found}`" for of, found in prints.items() if found),
        "sampling": [form.format(value) for form, value in sampling.items() if value is not None],
        "changed_afterwards": bool(done and (done["interpolation"] < 1 or done["restored_ratio"])),
        "losses": [f"{name} {float(loss):.4f}" for name, loss in losses.items() if loss is not None],
    }


def write_card(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write card and metadata into a model's folder, each whole or not at all.

    Results that were added to the folder stay if they are those of the same weights.
    """
    metadata = {**metadata, "model_name": metadata["model_name"] or folder.resolve().name}
    card = render_card(metadata)
    if results := _results_of_these_weights(folder, metadata):
        metadata["results"] = results
        model, original = results["model"], results["original"]
        card = _with_results(
            card, Measured.from_json(model), Measured.from_json(original) if original else None
        )
    atomic_write(folder / METADATA, stable_json(metadata))
    atomic_write(folder / CARD, card)


def card_with_results(model_dir: Path | str, model: Measured, original: Measured | None = None) -> str:
    """The card of a saved model with these results in place of what "Results" said; nothing is written.

    `original` is the same of the untouched model, for comparison.

    Raises:
        RPSAError: there is no card in `model_dir`.
    """
    path = Path(model_dir) / CARD
    if not path.is_file():
        raise RPSAError(
            f"{path}: no such file; only models that were saved with a card can get results in it"
        )
    return _with_results(path.read_text(encoding="utf-8"), model, original)


def add_results(model_dir: Path | str, model: Measured, original: Measured | None = None) -> None:
    """Put `card_with_results` into the model's folder, and the results into its metadata.

    Not for a folder inside a run: its manifest vouches for the files that the stage wrote.

    Raises:
        RPSAError: there is no card, or no metadata, in `model_dir`.
    """
    folder = Path(model_dir)
    card = card_with_results(folder, model, original)
    metadata = _read(folder)
    if metadata is None:
        raise RPSAError(f"{folder / METADATA}: missing or unreadable; save the model again")
    results = {"model": model.to_json(), "original": original.to_json() if original else None}
    atomic_write(folder / METADATA, stable_json(metadata | {"results": results}))
    atomic_write(folder / CARD, card)


def write_merged_card(folder: Path, adapter: Path, card: str) -> None:
    """Write card and metadata of a model that an adapter has been merged into.

    Args:
        folder: the merged model's.
        adapter: the adapter's folder, with its metadata.
        card: the adapter's card, whose results are those of the merged model.

    Raises:
        RPSAError: there is no metadata in `adapter`.
    """
    metadata = _read(adapter)
    if metadata is None:
        raise RPSAError(
            f"{adapter / METADATA}: missing or unreadable; only a model that was saved with it is published"
        )
    metadata |= {"merged": True}
    results = _RESULTS.search(card)
    text = render_card(metadata)
    if results:
        text = _RESULTS.sub(lambda _: results[0], text, count=1)
    atomic_write(folder / METADATA, stable_json(metadata))
    atomic_write(folder / CARD, text)


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


_RESULTS = re.compile(r"^## Results\n.*?(?=^## |\Z)", re.M | re.S)
"""The section, up to the next heading of the same level, or the end."""


def _with_results(card: str, model: Measured, original: Measured | None) -> str:
    before = original.rates if original else {}
    text = render("rpsa.training", "results.md", model=model, original=original, before=before)
    section = f"## Results\n\n{text}"
    replaced, count = _RESULTS.subn(lambda _: section + "\n", card, count=1)
    return (replaced if count else f"{card.rstrip()}\n\n{section}").rstrip() + "\n"


def _one_line_each(text: str) -> str:
    """In a template's Markdown an indented line goes on with the line before it."""
    return re.sub(r"\n +", " ", text)
