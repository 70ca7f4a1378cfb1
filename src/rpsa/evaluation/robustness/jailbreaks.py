"""Attacks by the prompt: a response's beginning put into the model's mouth, many shots, templates.

Each changes how harmful requests are asked, and nothing else: requests that nobody should refuse are asked as they are.
What is judged is the whole response, with the beginning that it was given, against the request itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rpsa.chat import render_beginning, render_prompt, split_response
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import Item
from rpsa.evaluation.run import Questions
from rpsa.generation import ResponseDecoder
from rpsa.rows import read_rows, text_field
from rpsa.safety_data import SafetyExample
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{prompt}"
"""Where a template has the request."""


def prefilled(
    asked: Questions, tokenizer: "PreTrainedTokenizerBase", thinking: str, answer: str | None = None
) -> Questions:
    """The response begins with `thinking` inside its thought, or with `answer` after a thought that holds `thinking`.

    Raises:
        RPSAError: the tokenizer cannot spell it.
    """
    beginning = render_beginning(tokenizer, thinking, answer, asked.thought)
    attacked = _attacked(asked)
    prompts = [[*ids, *beginning] if n in attacked else ids for n, ids in enumerate(asked.prompts)]
    decoder = ResponseDecoder(tokenizer, asked.thought)
    return replace(asked, prompts=prompts, begun=dict.fromkeys(attacked, len(beginning)), decoder=decoder)


def many_shot(
    asked: Questions,
    tokenizer: "PreTrainedTokenizerBase",
    shots: Sequence[SafetyExample],
    positions: int | None,
) -> Questions:
    """Earlier turns in which the assistant complied (Anil et al., 2024), through the model's own template.

    Args:
        positions: as many tokens as the model can take; None where that is not known.

    Raises:
        RPSAError: a prompt and its response would be longer.
    """
    turns = [(shot.prompt, _as_said(shot.response, asked.thought)) for shot in shots]
    prompts = {n: item.prompt for n, item in _attacked(asked).items()}
    found = _rendered(asked, tokenizer, prompts, turns)
    longest = max(map(len, found.prompts)) + asked.sampling.max_new_tokens
    if positions is not None and longest > positions:
        raise RPSAError(
            f"many_shot: {len(shots)} shots and max_new_tokens make {longest} tokens, and the model takes {positions}: "
            "give fewer shots"
        )
    return found


def _as_said(response: str, thought: ThoughtFormat) -> str:
    """A response in the model's own format, as a template takes it."""
    parts = (thought.open, *thought.pieces(*split_response(response, thought)))
    between = "" if thought.open.endswith("\n") else " "
    return between.join(part for part in parts if part)


def templated(asked: Questions, tokenizer: "PreTrainedTokenizerBase", templates: Sequence[str]) -> Questions:
    """Each harmful request in a template; the templates take turns."""
    attacked = _attacked(asked)
    turns = (templates[place % len(templates)] for place in range(len(attacked)))
    texts = [
        template.replace(PLACE, item.prompt) for template, item in zip(turns, attacked.values(), strict=True)
    ]
    return _rendered(asked, tokenizer, dict(zip(attacked, texts, strict=True)))


def read_templates(source: str) -> list[str]:
    """The templates of a file or a dataset, in its column `template`, `prompt` or `text`.

    Raises:
        RPSAError: it cannot be read, or a row has no place for the request.
    """
    found = []
    for row in read_rows(source):
        template = text_field(row, ["template", "prompt", "text"])
        if PLACE not in template:
            raise RPSAError(f"{row.where} has no {PLACE}, where the request is to stand")
        found.append(template)
    return found


def _attacked(asked: Questions) -> dict[int, Item]:
    """The harmful requests by their positions."""
    return {n: item for n, (item, _) in enumerate(asked.asked) if item.kind == "attack"}


def _rendered(
    asked: Questions,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Mapping[int, str],
    earlier: Sequence[tuple[str, str]] = (),
) -> Questions:
    """With other texts at some positions; the same text is rendered once."""
    rendered = {text: render_prompt(tokenizer, text, asked.thought, earlier) for text in set(texts.values())}
    prompts = [rendered[texts[n]] if n in texts else ids for n, ids in enumerate(asked.prompts)]
    return replace(asked, prompts=prompts)
