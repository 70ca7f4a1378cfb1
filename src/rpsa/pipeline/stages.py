"""The stages of a study: reference traces, Fisher, safety data, analyses, alignment, evaluation: kinds of tasks.

Stages fill the folders of a run in this order. Two cells that need the same thing (a base's D_ref, a whole model's
Fisher) have one task between them: tasks are equal where their places are.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rpsa.artifacts import atomic_write, folder_name, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.models import (
    ADAPTER,
    add_adapter,
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
from rpsa.pipeline.tasks import Task, source_identity, task_options, tasks_identity
from rpsa.progress import Progress, no_progress
from rpsa.provenance import TIMING, Stage
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import OF_SELF_MADE, Alternatives, Fisher, Reference, Safety
from rpsa.sharding import rank, world_size

if TYPE_CHECKING:
    from rpsa.pipeline.alignment import Groundwork

log = logging.getLogger(__name__)

_REFERENCE_COSTS = {"reference_max_length", "batch_size", "engine"}
"""Settings of the section reference that do not change a response."""

_FISHER_COSTS = {"batch_size", "activation_checkpointing"}
"""Settings of the section fisher that do not change it."""


def _model_inputs(recipe: Recipe, base: str) -> dict[str, Any]:
    return identity(base, recipe.model) | recipe.model.model_dump(exclude={"name"})


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
            "model": _model_inputs(self.recipe, self.base),
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
        config = BackendConfig(settings.backend, settings.batch_size, vllm_engine(model, settings.engine))
        dtype = generation_dtype(model, on_gpu=has_gpu())
        generator = make_generator(
            config, location(self.base), tokenizer, lambda _: load_model(self.base, model, dtype), thought
        )
        done = 0

        def on_trace(trace: Any) -> None:
            nonlocal done
            done += 1
            progress(done, len(problems))

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
                progress=progress is not no_progress,
            ),
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


def _alternatives_settings(alternatives: Alternatives) -> dict[str, Any]:
    """Without those of an anchor where there is none: runs were made before there was a choice."""
    return alternatives.model_dump(exclude=set() if alternatives.has_anchor else set(alternatives.anchoring))


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
            "model": _model_inputs(self.recipe, self.base),
            "safety": own,
            "seed": self.seed,
            "sampling": self.recipe.reference.model_dump(include=sampled),
            "data": source_identity(self.settings.prompts or "", "prompts"),
            "benign": source_identity(self.settings.benign, "prompts") if self.settings.benign else None,
        }

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.evaluation.run import make_subject
        from rpsa.generation import Sampling
        from rpsa.self_data.making import SelfDataConfig, make_self_data
        from rpsa.self_data.offers import prompts_of

        settings, sampled = self.settings, self.recipe.reference
        subject = make_subject(
            sha256_of(identity(self.base, self.recipe.model)), self.base, None, self.recipe.model, sampled
        )
        config = SelfDataConfig(
            Sampling(sampled.temperature, sampled.top_p, sampled.max_new_tokens, self.seed),
            settings.steer,
            settings.per_prompt,
            settings.filter,
            settings.filter_settings,
        )
        asked = prompts_of(settings, self.seed)
        make_self_data(subject, asked, config, folder, progress, self.earlier_folders(folder))


@dataclass(frozen=True)
class FisherMapTask(Task):
    """Fig. 1 and 2 of all bases whose full Fisher is measured."""

    stage: ClassVar[Stage] = "analyse"
    name = "fisher-map"
    place = "analyse/fisher-map"

    def needs(self) -> list[FisherTask]:
        return full_fishers(self.recipe)

    def inputs(self) -> dict[str, Any]:
        return {"fishers": [fisher.result() for fisher in self.needs()], "k": self.recipe.analysis.fisher_map}

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.pipeline.analyses import fisher_map

        fisher_map([fisher.folder for fisher in self.needs()], self.recipe.analysis.fisher_map, folder)


@dataclass(frozen=True)
class PerturbationTask(Task):
    """Fig. 3: the perturbation of one base by its full Fisher."""

    fisher: FisherTask

    stage: ClassVar[Stage] = "analyse"

    @property
    def name(self) -> str:
        return f"perturb {self.fisher.base}"

    @property
    def place(self) -> str:
        return f"analyse/perturb/{folder_name(self.fisher.base)}"

    def needs(self) -> list[FisherTask]:
        return [self.fisher]

    def inputs(self) -> dict[str, Any]:
        recipe = self.recipe
        assert recipe.analysis.perturb is not None
        return {
            "fisher": [self.fisher.result()],
            "perturb": recipe.analysis.perturb.model_dump(),
            "evaluate": recipe.evaluate.model_dump(exclude={"batch_size"}),
            "data": tasks_identity(recipe.evaluate.tasks, recipe.data_dir),
            "data_dir": recipe.data_dir,
        }

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.pipeline.analyses import PerturbationConfig, run_perturbation

        recipe, settings = self.recipe, self.recipe.analysis.perturb
        assert settings is not None
        config = PerturbationConfig(
            tuple(settings.fractions), tuple(settings.factors), tuple(settings.selections), settings.draws
        )
        run_perturbation(
            *(self.fisher.base, self.fisher.folder, recipe.evaluate, config),
            *(folder, recipe.data_dir, recipe.model),
            earlier=self.earlier_folders(folder),
        )


@dataclass(frozen=True)
class CellTask(Task):
    """What one run of the matrix or of a sweep needs for itself alone."""

    cell: Cell

    @property
    def name(self) -> str:
        return self.cell.id

    @property
    def title(self) -> str:
        return self.stage

    @property
    def place(self) -> str:
        return f"{self.stage}/{self.cell.id}"


@dataclass(frozen=True)
class AlignTask(CellTask):
    """One cell's fine-tuning on safety data, plainly or with RPSA."""

    stage: ClassVar[Stage] = "align"

    def needs(self) -> list[Task]:
        of_cell = (reference_task, fisher_task, watched_task, safety_task)
        tasks = (task(self.recipe, self.cell) for task in of_cell)
        return [task for task in tasks if task is not None]

    def inputs(self) -> dict[str, Any]:
        cell = self.cell
        assert cell.safety is not None
        fisher = fisher_task(self.recipe, cell)
        inputs = {
            "model": _model_inputs(self.recipe, cell.base),
            "paradigm": cell.paradigm,
            "seed": cell.seed,
            "train": dict(cell.train),
            "lora": dict(cell.lora),
            "align": cell.align.model_dump() if cell.align else None,
            "safety": _safety_settings(cell.safety),
            "data": source_identity(cell.safety.data or "", "safety"),
            "fisher": fisher.result() if fisher else None,
        }
        if cell.alternatives:
            reference = reference_task(self.recipe, cell) if cell.alternatives.needs_reference else None
            longest = self.recipe.reference.reference_max_length
            has_cut = cell.alternatives.projection is not None or cell.alternatives.has_anchor
            inputs |= {
                "alternatives": _alternatives_settings(cell.alternatives),
                "reference": reference.result() if reference else None,
                "reference_max_length": longest if has_cut else None,
            }
        own_data = safety_task(self.recipe, cell)
        if own_data is not None:
            inputs |= {"self_made": own_data.result()}
        elif cell.safety.benign and cell.safety.benign_share:
            benign = source_identity(cell.safety.benign, "safety")
            # a key only where a file is read: other runs keep the inputs that they had before it counted
            inputs |= {"benign": benign} if isinstance(benign, dict) else {}
        if cell.safety.keep_best == "safety_and_reasoning" and (watched := watched_task(self.recipe, cell)):
            longest = self.recipe.reference.reference_max_length
            inputs |= {"held_out": {"traces": watched.result(), "max_length": longest}}
        return inputs

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.pipeline.alignment import align

        align(self.recipe, self.cell, self.groundwork, folder, quiet=progress is no_progress)

    @property
    def groundwork(self) -> "Groundwork":
        """Where the results are that alignment takes."""
        from rpsa.pipeline.alignment import Groundwork

        recipe, cell = self.recipe, self.cell
        of_cell = (fisher_task, reference_task, watched_task, safety_task)
        tasks = (task(recipe, cell) for task in of_cell)
        return Groundwork(*(task.folder if task else None for task in tasks))


def _safety_settings(safety: Safety) -> dict[str, Any]:
    # runs on other data keep the inputs that they had before these settings were there
    settings = safety.model_dump(exclude=set(OF_SELF_MADE))
    if settings["keep_best"] is None:  # what runs were made with before there was a choice
        del settings["keep_best"]
    return settings


@dataclass(frozen=True)
class EvaluateTask(CellTask):
    """Answers of one cell's model to every evaluation prompt, graded; stored sample by sample."""

    stage: ClassVar[Stage] = "evaluate"

    @property
    def _left_out(self) -> ReferenceTask | None:
        """MATH-500 as a test leaves out what D_ref has, so that its result stands on D_ref."""
        needed = "rpsa_math500" in self.recipe.evaluate.tasks
        return reference_of(self.recipe, self.cell.base) if needed else None

    def needs(self) -> list[Task]:
        recipe, base = self.recipe, self.cell.base
        tasks = (align_task(recipe, self.cell), self._left_out, held_out_task(recipe, base))
        return [task for task in tasks if task is not None]

    def inputs(self) -> dict[str, Any]:
        recipe, aligned, left_out = self.recipe, align_task(self.recipe, self.cell), self._left_out
        held_out = held_out_task(recipe, self.cell.base)
        longest = recipe.reference.reference_max_length
        measured = {"traces": held_out.result(), "max_length": longest} if held_out else None
        return {
            "model": aligned.result() if aligned else _model_inputs(recipe, self.cell.base),
            "evaluate": recipe.evaluate.model_dump(exclude={"batch_size"}),
            "data": tasks_identity(recipe.evaluate.tasks, recipe.data_dir),
            "data_dir": recipe.data_dir,
            "reference": left_out.result() if left_out else None,
            **({"held_out": measured} if measured else {}),
        }

    def run(self, folder: Path, progress: Progress) -> None:
        from rpsa.evaluation.original import HeldOut
        from rpsa.evaluation.run import evaluate

        # the problems of this base's D_ref are not a test of it, whatever the method
        reference = reference_of(self.recipe, self.cell.base)
        options = task_options(self.recipe, reference.folder if reference else None)
        earlier = self.earlier_folders(folder)
        held_out = None
        if task := held_out_task(self.recipe, self.cell.base):
            longest = self.recipe.reference.reference_max_length
            held_out = HeldOut(task.folder, self.cell.base, longest, self.recipe.model)
        evaluate(self.subject(), self.recipe.evaluate, options, folder, progress, earlier, held_out)

    def subject(self) -> Any:
        """The model that the cell's alignment left, or its untouched base."""
        from rpsa.evaluation.run import make_subject

        cell, settings = self.cell, self.recipe.evaluate
        task = align_task(self.recipe, cell)
        if task is None:
            key = sha256_of(identity(cell.base, self.recipe.model))
            return make_subject(key, cell.base, None, self.recipe.model, settings)
        folder = str(task.folder)
        base, adapter = (cell.base, folder) if cell.paradigm == "lora" else (folder, None)
        return make_subject(task.result(), base, adapter, self.recipe.model, settings)


# which tasks a recipe has


def tasks_of(recipe: Recipe, stage: Stage) -> list[Task]:
    """The tasks of a stage, without repetition. Nothing is measured that no method of the matrix uses."""
    if stage == "analyse":
        return list(analysis_tasks(recipe))
    if stage == "evaluate" and not recipe.evaluate.tasks:
        return []
    of_cell: dict[Stage, Callable[[Recipe, Cell], Task | None]] = {
        "reference": reference_task,
        "fisher": fisher_task,
        "safety": safety_task,
        "align": align_task,
        "evaluate": EvaluateTask,
    }
    found = [of_cell[stage](recipe, cell) for cell in recipe.cells()]
    if stage == "reference":
        found += [held_out_task(recipe, base) for base in recipe.bases if _is_held_out(recipe, base)]
    return list({task.place: task for task in found if task is not None}.values())


def reference_task(recipe: Recipe, cell: Cell) -> ReferenceTask | None:
    return ReferenceTask(recipe, cell.base) if cell.needs_reference else None


def reference_of(recipe: Recipe, base: str) -> ReferenceTask | None:
    """The D_ref of a base, if any method of the matrix has one."""
    has_one = any(cell.needs_reference for cell in recipe.cells() if cell.base == base)
    return ReferenceTask(recipe, base) if has_one else None


def held_out_task(recipe: Recipe, base: str) -> HeldOutTask | None:
    """None where the recipe names no reasoning problems, or asks for no reasoning loss."""
    settings = recipe.reference
    return HeldOutTask(recipe, base) if settings.problems is not None and settings.held_out else None


def watched_task(recipe: Recipe, cell: Cell) -> HeldOutTask | None:
    """The held-out traces on which the reasoning loss is measured while the cell is trained: if it is evaluated."""
    return held_out_task(recipe, cell.base) if cell.evaluates_in_training else None


def _is_held_out(recipe: Recipe, base: str) -> bool:
    """Whether anything is measured on a base's held-out traces."""
    cells = [cell for cell in recipe.cells() if cell.base == base]
    return bool(recipe.evaluate.tasks and cells) or any(watched_task(recipe, cell) for cell in cells)


def fisher_task(recipe: Recipe, cell: Cell) -> FisherTask | None:
    if not cell.needs_fisher:
        return None
    return FisherTask(recipe, cell.base, cell.fisher, cell if cell.starts_from_fisher else None)


def safety_task(recipe: Recipe, cell: Cell) -> SafetyTask | None:
    """Where the cell's safety data are the model's own."""
    if cell.safety is None or not cell.safety.is_self_made:
        return None
    return SafetyTask(recipe, cell.base, cell.safety, cell.safety.drawing_seed(cell.seed))


def align_task(recipe: Recipe, cell: Cell) -> AlignTask | None:
    return AlignTask(recipe, cell) if cell.paradigm != "none" else None


def analysis_tasks(recipe: Recipe) -> list[FisherMapTask | PerturbationTask]:
    """Fig. 1 and 2 of all bases whose full Fisher is measured, and Fig. 3 of each."""
    fishers = full_fishers(recipe)
    tasks: list[FisherMapTask | PerturbationTask] = []
    if recipe.analysis.fisher_map and fishers:
        tasks.append(FisherMapTask(recipe))
    if recipe.analysis.perturb:
        tasks += [PerturbationTask(recipe, fisher) for fisher in fishers]
    return tasks


def full_fishers(recipe: Recipe) -> list[FisherTask]:
    """The Fishers of whole models, by the recipe's own estimator."""
    found = (fisher_task(recipe, cell) for cell in recipe.cells())
    return list({task.place: task for task in found if task is not None and task.is_whole_model}.values())
