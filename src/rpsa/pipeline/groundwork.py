"""Groundwork: what a base says and how it is measured before anything is trained: D_ref, Fisher, its own safety data.

One task serves all cells that need the same thing: tasks are equal where their places are.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rpsa.artifacts import atomic_write, folder_name, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.models import (
    ADAPTER,
    add_adapter,
    generating_backend,
    generation_dtype,
    identity,
    load_model,
    load_tokenizer,
    location,
    settle_adapter,
    sharded,
    thought_of,
    training_dtype,
    vllm_engine,
)
from rpsa.pipeline.tasks import Task, source_identity
from rpsa.progress import Progress
from rpsa.provenance import TIMING, Stage
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import OF_SELF_MADE, Fisher, Reference, Safety
from rpsa.sharding import rank, world_size

log = logging.getLogger(__name__)

_REFERENCE_COSTS = {"reference_max_length", "batch_size", "engine"}
"""Settings of the section reference that do not change a response."""

_FISHER_COSTS = {"batch_size", "activation_checkpointing"}
"""Settings of the section fisher that do not change it."""


def model_inputs(recipe: Recipe, base: str) -> dict[str, Any]:
    """What tells a base as a recipe names it from any other."""
    kernels = {"attn_implementation", "quantization"}  # which the identity has, where there are any
    return identity(base, recipe.model) | recipe.model.model_dump(exclude={"name", *kernels})


@dataclass(frozen=True)
class ReferenceTask(Task):
    """D_ref: a base's own responses to reasoning problems."""

    base: str

    stage: ClassVar[Stage] = "reference"

    @property
    def name(self) -> str:
        return self.base

    @property
    def place(self) -> str:
        return f"reference/{folder_name(self.base)}"

    def inputs(self) -> dict[str, Any]:
        settings = self.recipe.reference
        return {
            "model": model_inputs(self.recipe, self.base),
            "reference": settings.model_dump(exclude=_REFERENCE_COSTS | {"held_out"}),
            "problems": source_identity(settings.problems or "", "problems"),
        }

    def run(self, folder: Path, progress: Progress) -> None:
        settings = self.recipe.reference
        if settings.problems is None:
            raise RPSAError(
                "reference.problems: not given; a frozen ratio needs reasoning problems to measure on"
            )
        problems = reference_problems(settings.problems, settings.n, settings.seed)
        self._answer(problems, folder, progress)

    def _answer(self, problems: list[Any], folder: Path, progress: Progress) -> None:
        """The base's responses to `problems`, as section reference says they are sampled."""
        from rpsa.answers import grade
        from rpsa.generation.backends import BackendConfig, has_gpu, make_generator
        from rpsa.reference import ReferenceConfig, build_reference

        settings, model = self.recipe.reference, self.recipe.model
        tokenizer = load_tokenizer(self.base, model)
        thought = thought_of(tokenizer, model)
        backend = generating_backend(model, settings.backend)
        config = BackendConfig(backend, settings.batch_size, vllm_engine(model, settings.engine))
        dtype = generation_dtype(model, on_gpu=has_gpu())
        generator = make_generator(
            config, location(self.base), tokenizer, lambda _: load_model(self.base, model, dtype), thought
        )
        done = tokens = 0

        def on_trace(trace: Any) -> None:
            nonlocal done, tokens
            done += 1
            tokens += len(trace.response_ids)
            progress(done, len(problems), unit="response", tokens=tokens)

        build_reference(
            generator,
            tokenizer,
            problems,
            ReferenceConfig(
                problems=len(problems),
                seed=settings.seed,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens,
                only_correct=settings.only_correct,
            ),
            folder,
            grade=lambda response, answer: grade(response, answer, "math", thought),
            identity=self.base,
            on_trace=on_trace,
            thought=thought,
        )


@dataclass(frozen=True)
class HeldOutTask(ReferenceTask):
    """Responses like those of D_ref to other problems, on which the reasoning loss is measured.

    Where no problem is left there are no traces, and the manifest says so.
    """

    @property
    def name(self) -> str:
        return f"{self.base} held out"

    @property
    def place(self) -> str:
        return f"held-out/{folder_name(self.base)}"

    def inputs(self) -> dict[str, Any]:
        settings = self.recipe.reference
        return super().inputs() | {"reference": settings.model_dump(exclude=_REFERENCE_COSTS)}

    def run(self, folder: Path, progress: Progress) -> None:
        problems = held_out_problems(self.recipe.reference)
        if problems:
            self._answer(problems, folder, progress)
            return
        atomic_write(folder / "traces.jsonl", "")
        atomic_write(folder / "manifest.json", stable_json({"problems": 0, "traces": 0}))


def held_out_problems(settings: Reference) -> list[Any]:
    """As many as section reference asks for, none of them D_ref's; says where there are fewer."""
    from rpsa.reference import load_held_out
    from rpsa.tiny import REFERENCES
    from rpsa.tiny import held_out_problems as held_out_of_tiny

    assert settings.problems is not None
    if families := REFERENCES.get(settings.problems):
        found = held_out_of_tiny(settings.held_out, settings.seed, settings.n, families)
    else:
        found = load_held_out(settings.problems, settings.n, settings.seed, settings.held_out)
    if len(found) < settings.held_out:
        log.warning(
            "reference.held_out: %s has %d problems beside D_ref's, not %d%s",
            *(settings.problems, len(found), settings.held_out),
            "" if found else "; there is no reasoning loss",
        )
    return found


def reference_problems(source: str, n: int, seed: int) -> list[Any]:
    """The problems that D_ref answers: the tiny world's, or those of a file."""
    from rpsa.reference import load_problems
    from rpsa.tiny import REFERENCES, reasoning_problems

    if families := REFERENCES.get(source):
        return reasoning_problems(n, seed, "train", families)
    return load_problems(source, n, seed)


@dataclass(frozen=True)
class FisherTask(Task):
    """The Fisher diagonal of a base, or of a LoRA adapter on it, which is saved too: alignment starts from it.

    `cell` is None for a whole model's, which serves every seed; `settings` say how it is estimated.
    """

    base: str
    settings: Fisher
    cell: Cell | None = None

    stage: ClassVar[Stage] = "fisher"

    @property
    def name(self) -> str:
        adapter = f" lora seed{self.cell.seed}" if self.cell else ""
        return f"{self.base}{adapter}{self._own}"

    @property
    def place(self) -> str:
        kind = "full"
        if self.cell is not None:
            # F depends on the adapter's random start
            kind = f"lora-{sha256_of({'lora': dict(self.cell.lora), 'seed': self.cell.seed})[:8]}"
        return f"fisher/{folder_name(self.base)}/{kind}{self._own}"

    @property
    def is_whole_model(self) -> bool:
        """Of all parameters, and by the recipe's own estimator: what the analyses are about."""
        return self.cell is None and not self._own

    @property
    def _own(self) -> str:
        """What tells a method's own Fisher from the recipe's in a folder's name."""
        settings = [_fisher_settings(one) for one in (self.settings, self.recipe.fisher)]
        if settings[0] == settings[1]:
            return ""
        return f"-{self.settings.estimator}-{sha256_of(settings[0])[:8]}"

    def needs(self) -> list[Task]:
        return [ReferenceTask(self.recipe, self.base)]

    def inputs(self) -> dict[str, Any]:
        cell = self.cell
        return {
            "reference": ReferenceTask(self.recipe, self.base).result(),
            "reference_max_length": self.recipe.reference.reference_max_length,
            "fisher": _fisher_settings(self.settings),
            "adapter": {"lora": dict(cell.lora), "seed": cell.seed} if cell else None,
            "dtype": self._dtype,
        }

    @property
    def _dtype(self) -> str:
        train = self.cell.train if self.cell else {}
        return training_dtype(train, "lora" if self.cell else "fft", self.recipe.model)

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.fisher.estimators import FisherConfig, estimate_fisher
        from rpsa.reference import ReferenceDataset

        reference = ReferenceDataset.load(ReferenceTask(self.recipe, self.base).folder)
        settings, longest = self.settings, self.recipe.reference.reference_max_length
        model: Any = load_model(self.base, self.recipe.model, self._dtype)
        if self.cell is not None:
            model = add_adapter(model, self.cell)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.cell is not None:
            if settings.warmup_steps:
                self._warm_up(self.cell, model, reference)
            if rank() == 0:
                model.save_pretrained(folder / ADAPTER)
                settle_adapter(folder / ADAPTER)
        fisher = estimate_fisher(
            sharded(model),
            reference.batches(settings.batch_size, longest),
            FisherConfig(
                estimator=settings.estimator,
                probes=settings.probes,
                seed=settings.seed,
                scope=settings.scope,
                on_nonfinite=settings.on_nonfinite,
                precision=settings.precision,
            ),
            progress,
        )
        log.info("%s: split-half overlap %s", self.name, fisher.manifest["estimation"]["split_half"])
        seconds = fisher.manifest["estimation"].pop("seconds", None)
        fisher.save(folder)
        if rank() == 0:
            atomic_write(folder / TIMING, stable_json({"seconds": seconds}))

    def _warm_up(self, cell: Cell, model: Any, reference: Any) -> None:
        from rpsa.training.reasoning import warm_up

        if world_size() > 1:
            raise RPSAError("fisher.warmup_steps is for one process: run --only fisher without launch first")
        size, longest = self.settings.batch_size, self.recipe.reference.reference_max_length
        steps = range(self.settings.warmup_steps)
        batches = (reference.rotating_batch(step, size, longest) for step in steps)
        warm_up(model, batches, cell.train["learning_rate"])


def _fisher_settings(fisher: Fisher) -> dict[str, Any]:
    settings = fisher.model_dump(exclude=_FISHER_COSTS)
    if settings["precision"] == "fp32":  # what runs were made in before there was a choice
        del settings["precision"]
    return settings


def _self_made_settings(safety: Safety) -> dict[str, Any]:
    """What decides the responses that are offered and kept; `n` and shares are drawn from these later."""
    settings = safety.model_dump(include={"benign", *OF_SELF_MADE})
    is_tiny = "tiny" in (safety.prompts, safety.benign)
    return settings | ({"n": safety.n} if is_tiny else {})


@dataclass(frozen=True)
class SafetyTask(Task):
    """A base's own safety data: its responses to requests, filtered (ThinkSafe, arXiv 2601.23143).

    They are sampled as D_ref is, by the section reference, and with the `seed` that draws safety data.
    """

    base: str
    settings: Safety
    seed: int

    stage: ClassVar[Stage] = "safety"

    @property
    def name(self) -> str:
        return f"{self.base} seed{self.seed}{self._own}"

    @property
    def place(self) -> str:
        return f"safety/{folder_name(self.base)}/seed{self.seed}{self._own}"

    @property
    def _own(self) -> str:
        """What tells data of a method's own settings from those of the recipe's in a folder's name."""
        settings = [_self_made_settings(one) for one in (self.settings, self.recipe.safety)]
        return "" if settings[0] == settings[1] else f"-{sha256_of(settings[0])[:8]}"

    def inputs(self) -> dict[str, Any]:
        own, sampled = (
            _self_made_settings(self.settings),
            {"temperature", "top_p", "max_new_tokens", "backend"},
        )
        return {
            "model": model_inputs(self.recipe, self.base),
            "safety": own,
            "seed": self.seed,
            "sampling": self.recipe.reference.model_dump(include=sampled),
            "data": source_identity(self.settings.prompts or "", "prompts"),
            "benign": source_identity(self.settings.benign, "prompts") if self.settings.benign else None,
        }

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.evaluation.run import make_subject
        from rpsa.self_data.making import SelfDataConfig, make_self_data
        from rpsa.self_data.offers import prompts_of

        settings, sampled = self.settings, self.recipe.reference
        subject = make_subject(
            sha256_of(identity(self.base, self.recipe.model)), self.base, None, self.recipe.model, sampled
        )
        config = SelfDataConfig.of(settings, sampled, self.seed)
        asked = prompts_of(settings, self.seed)
        make_self_data(subject, asked, config, folder, progress, self.earlier_folders(folder))
