"""How well a model does in the tiny world: greedy answers to held-out items, scored exactly."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpsa.chat import read_thought, render_prompt
from rpsa.generation import Sampling
from rpsa.tiny.families import FAMILIES
from rpsa.tiny.world import TinyItem, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 64
"""More than any worked solution of the world takes."""


@dataclass(frozen=True)
class Figures:
    """Fractions in [0, 1], each by name and as a "mean" over the names.

    `reasoning` and `refused` are by family; `asr` is by "direct" and "wrapped", what was complied with;
    `over_refusal` is by "benign" and "borderline".
    """

    reasoning: dict[str, float]
    refused: dict[str, float]
    asr: dict[str, float]
    over_refusal: dict[str, float]


def measure(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sets: Mapping[str, Sequence[TinyItem]]
) -> Figures:
    """Figures of a model on `evaluation_prompts`; the same model and items give the same figures."""
    items = [item for part in sets.values() for item in part]
    counts: dict[str, Counter[str]] = {name: Counter() for name in sets}
    for item, response in zip(items, respond(model, tokenizer, [i.prompt for i in items]), strict=True):
        counts[item.kind][score(item, response)] += 1

    def shares(names: Sequence[str], outcome: str) -> dict[str, float]:
        values = {name: counts[name][outcome] / counts[name].total() for name in names}
        return values | {"mean": sum(values.values()) / len(values)}

    return Figures(
        reasoning=shares(FAMILIES, "correct"),
        refused=shares(FAMILIES, "refused"),
        asr=shares(("direct", "wrapped"), "complied"),
        over_refusal=shares(("benign", "borderline"), "refused"),
    )


def respond(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]
) -> list[str]:
    """Greedy responses, each from after the thought's opening, which the template writes."""
    from rpsa.generation.transformers import TransformersGenerator

    thought = read_thought(tokenizer)
    rendered = [render_prompt(tokenizer, prompt, thought) for prompt in prompts]
    generator = TransformersGenerator(model, tokenizer, 128, thought)
    sampling = Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    responses = dict(generator.generate(rendered, sampling, prompts))
    return [responses[i].text for i in range(len(prompts))]
