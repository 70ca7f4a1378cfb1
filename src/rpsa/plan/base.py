"""One base of a recipe: its skeletons, and what the plans of its stages share."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from rpsa.pipeline.models import load_tokenizer, location, thought_of
from rpsa.plan.skeleton import build_model, load_config
from rpsa.plan.tokens import CHARACTERS_PER_TOKEN, prompt_tokens, reference_responses
from rpsa.recipe.schema import Cell, Recipe
from rpsa.thought import ThoughtFormat


class Base:
    """`gpus`: numbers of GPUs to plan for, ascending; `gpu_memory`: GiB of each.

    Raises:
        RPSAError: there is no config.
    """

    def __init__(self, recipe: Recipe, name: str, gpus: list[int], gpu_memory: float) -> None:
        self.recipe = recipe
        self.name = name
        self.gpus = gpus
        self.gpu_memory = gpu_memory
        self.config = load_config(name, recipe.model)
        self.cells: list[Cell] = [cell for cell in recipe.cells() if cell.base == name]
        self._models: dict[str, Any] = {}

    def model(self, dtype: str, lora: Mapping[str, Any] | None = None) -> Any:
        """The skeleton, built once. Call it in `fake_tensors`."""
        key = json.dumps([dtype, dict(lora or {})])
        if key not in self._models:
            self._models[key] = build_model(self.config, dtype, lora)
        return self._models[key]

    @property
    def reference_tokens(self) -> int:
        """The longest that a trace can be for Fisher and g_R."""
        settings = self.recipe.reference
        return min(settings.reference_max_length, prompt_tokens(settings.problems) + settings.max_new_tokens)

    @property
    def mean_reference_tokens(self) -> int:
        responses = reference_responses(self.recipe)
        return min(prompt_tokens(self.recipe.reference.problems) + responses.tokens, self.reference_tokens)

    @cached_property
    def count_tokens(self) -> Callable[[str], int]:
        """The model's own tokenizer where it is on this machine; elsewhere a rule of thumb."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return lambda text: len(text) // CHARACTERS_PER_TOKEN + 1
        return lambda text: len(tokenizer(text)["input_ids"])

    @cached_property
    def thought(self) -> ThoughtFormat | None:
        """What sets the model's thoughts apart; None where its chat template is not on this machine."""
        return thought_of(self._tokenizer, self.recipe.model) if self._tokenizer else None

    @cached_property
    def _tokenizer(self) -> Any:
        is_here = (Path(location(self.name)) / "tokenizer.json").is_file()
        return load_tokenizer(self.name, self.recipe.model) if is_here else None
