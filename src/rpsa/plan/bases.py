"""Bases: of one base of a recipe the skeletons, and what the plans of its stages share."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from rpsa.models import load_tokenizer, location, thought_of
from rpsa.pipeline.stages import tasks_of
from rpsa.plan.dry_run import Shape, build_model, cache_bytes, fake_tensors, load_config
from rpsa.plan.layers import SHALLOW, Skeleton, are_alike, with_layers
from rpsa.plan.time import CHARACTERS_PER_TOKEN, prompt_tokens, reference_responses
from rpsa.plan.totals import kind_of
from rpsa.provenance import Stage
from rpsa.recipe.schema import Cell, Recipe
from rpsa.thought import ThoughtFormat


def base_of(task: Any) -> str:
    """Of a base's own task, or of a cell's."""
    return str(task.cell.base if getattr(task, "cell", None) else task.base)


class Base:
    """A base of a recipe: its skeletons, and what the plans of its stages share.

    Args:
        gpus: numbers of them to plan for, ascending.
        gpu_memory: GiB of each.

    Raises:
        RPSAError: there is no config.
    """

    def __init__(self, recipe: Recipe, name: str, gpus: list[int], gpu_memory: float) -> None:
        self.recipe = recipe
        self.name = name
        self.gpus = gpus
        self.gpu_memory = gpu_memory
        self.gpu = kind_of(gpu_memory)
        self.config = load_config(name, recipe.model)
        self.cells: list[Cell] = [cell for cell in recipe.cells() if cell.base == name]
        self._skeletons: dict[str, Skeleton] = {}

    def skeleton(self, dtype: str, lora: Mapping[str, Any] | None = None) -> Skeleton:
        """The model without weights, built once. Call it in `fake_tensors`."""
        key = json.dumps([dtype, dict(lora or {})])
        if key not in self._skeletons:
            model = build_model(self.config, dtype, lora)
            shallow = (
                [build_model(with_layers(self.config, number), dtype, lora) for number in SHALLOW]
                if are_alike(model)
                else []
            )
            self._skeletons[key] = Skeleton(model, shallow)
        return self._skeletons[key]

    @cached_property
    def parameters(self) -> int:
        with fake_tensors():
            return sum(p.numel() for p in self.skeleton(self.recipe.model.dtype).model.parameters())

    def tasks(self, stage: Stage) -> list[Any]:
        """What `rpsa run` does in a stage for this base."""
        return [task for task in tasks_of(self.recipe, stage) if base_of(task) == self.name]

    def token_bytes(self, skeleton: Skeleton) -> int:
        """Keys and values of one token."""
        return skeleton.size(lambda model: cache_bytes(model, Shape(1, 64))) // 64

    @property
    def context(self) -> int:
        """Tokens that the model can read: vLLM does not start without room for them, unless it is told of fewer."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 0))

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
