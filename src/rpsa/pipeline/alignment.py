"""Alignment, the stage align: one cell's safety data, its model, its trainer, and what is kept of the run."""

import json
import logging
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trl import DPOConfig, SFTConfig

from rpsa.artifacts import LOG_FILE, atomic_write, read_json, stable_json
from rpsa.chat import format_of_response
from rpsa.checkpoints import load_adapter
from rpsa.errors import Diverged, RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.items import load_tasks
from rpsa.evaluation.refusals import is_refusal
from rpsa.models import (
    ADAPTER,
    add_adapter,
    alignment_dtype,
    load_model,
    load_tokenizer,
    settle_adapter,
    thought_of,
    will_be_sharded,
)
from rpsa.pipeline import termination
from rpsa.pipeline.tasks import task_options
from rpsa.pipeline.tracking import names_of_run
from rpsa.progress import Progress, no_progress
from rpsa.provenance import TIMING
from rpsa.recipe.problems import installed_names
from rpsa.recipe.schema import Cell, Recipe
from rpsa.recipe.sections import Safety
from rpsa.reference import ReferenceDataset
from rpsa.safety_data import (
    OneExample,
    Preference,
    SafetyExample,
    TokenCounts,
    contamination,
    hold_out,
    load_benign_data,
    load_preferences,
    load_safety_data,
    mix_benign,
    tokenize_preferences,
    tokenize_safety_data,
    without_thoughts,
)
from rpsa.self_data.stored import drawn, load_self_data, tokenized
from rpsa.sharding import barrier, local, on_any_rank, rank
from rpsa.thought import NO_THOUGHT, ThoughtFormat
from rpsa.tiny import preference_examples, safety_examples
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer, rehearse
from rpsa.training.card import write_card
from rpsa.training.config import RPSAConfig, why_not_compact
from rpsa.training.metadata import CardNames, model_metadata
from rpsa.training.perplexity import EXAMPLES, PerplexityCallback
from rpsa.training.preferences import (
    AlternativesDPOConfig,
    AlternativesDPOTrainer,
    ResumableDPOTrainer,
    RPSADPOConfig,
    RPSADPOTrainer,
    drop_reference,
)
from rpsa.training.telling import ProgressCallback
from rpsa.training.trainer import ResumableSFTTrainer, RPSATrainer

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_TIMES = ("runtime", "per_second")
"""In the names of what the trainer measures by the clock."""


@dataclass(frozen=True)
class Groundwork:
    """Folders of what a cell's base was measured by and said; None where the cell does not need it.

    `benign` are rows to be complied with, for an anchor on them.
    """

    fisher: Path | None = None
    reference: Path | None = None
    held_out: Path | None = None
    safety: Path | None = None
    benign: "Dataset | None" = None


def make_trainer(recipe: Recipe, cell: Cell, groundwork: Groundwork, **common: Any) -> Any:
    """RPSA's trainer or the alternatives' if the cell asks for it, else TRL's own, for SFT or DPO; on the same start.

    Args:
        common: of every trainer: `args`, the datasets, `processing_class`.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer_class = _classes(cell).trainer
    if not _is_plain(cell):
        common |= {
            "fisher": groundwork.fisher,
            "reference_dataset": groundwork.reference,
            "benign_dataset": groundwork.benign,
        }
    if cell.trainer == "dpo" and cell.paradigm == "fft" and not common["args"].precompute_ref_log_probs:
        # TRL would load it by the model's name, without the recipe's revision
        common |= {"ref_model": starting_model(recipe, cell, groundwork)}
    with refusals_of_trl(cell):
        trainer = trainer_class(model=starting_model(recipe, cell, groundwork), **common)
    trainer.remove_callback(PrinterCallback)
    if groundwork.held_out is not None:
        watch_reasoning(trainer, recipe, cell, groundwork.held_out)
    return trainer


class _Classes(NamedTuple):
    trainer: Any
    config: Any


_PLAIN = {
    "sft": _Classes(ResumableSFTTrainer, SFTConfig),
    "dpo": _Classes(ResumableDPOTrainer, DPOConfig),
}
_RPSA = {
    "sft": _Classes(RPSATrainer, RPSAConfig),
    "dpo": _Classes(RPSADPOTrainer, RPSADPOConfig),
}
_ALTERNATIVES = {
    "sft": _Classes(AlternativesTrainer, AlternativesConfig),
    "dpo": _Classes(AlternativesDPOTrainer, AlternativesDPOConfig),
}


def _classes(cell: Cell) -> _Classes:
    """Who trains a cell: on responses or on pairs; plainly, with RPSA, or with an alternative to it."""
    return (_PLAIN if _is_plain(cell) else _RPSA if cell.align else _ALTERNATIVES)[cell.trainer]


def watch_reasoning(trainer: Any, recipe: Recipe, cell: Cell, held_out: Path) -> None:
    """Measure the reasoning loss where the trainer evaluates; it comes last, after what changes weights in the end."""
    from rpsa.training.loss_callback import ReasoningLossCallback

    assert cell.safety is not None
    if read_json(held_out / "manifest.json")["traces"]:
        longest = recipe.reference.reference_max_length
        trainer.add_callback(ReasoningLossCallback(trainer, held_out, longest))
    elif cell.safety.keep_best == "safety_and_reasoning":
        raise RPSAError(
            f"{cell.id}: safety.keep_best: safety_and_reasoning needs held-out reasoning, and D_ref leaves none of "
            "reference.problems; lower reference.n"
        )


def training_arguments(recipe: Recipe, cell: Cell, folder: Path) -> Any:
    """The config of the cell's trainer: RPSA's or the alternatives', or TRL's own where training itself is plain.

    Raises:
        RPSAError: the settings contradict each other, or are not supported.
    """
    config = _classes(cell).config
    settings = installed_names(cell.train, config)
    if cell.safety is not None and cell.safety.keep_best is not None:
        settings = _keeping_best(settings, cell.safety.keep_best)
    ours = {
        "output_dir": str(folder / CHECKPOINTS),
        "enable_jit_checkpoint": False,
    }  # see `_stop_where_asked`
    arguments: dict[str, Any] = {"disable_tqdm": True} | names_of_run(recipe, cell) | settings | ours
    if settings.get("padding_free") and not settings.get("packing"):
        arguments["max_length"] = None  # TRL wants it so; the rows have been cut already
    longest: dict[str, Any] = {"reference_max_length": recipe.reference.reference_max_length}
    with refusals_of_trl(cell):
        if cell.align is not None:
            own = cell.align.model_dump() | {"compact": bool(cell.align.compact)}
            own |= cell.alternatives.anchoring if cell.alternatives else {}
            made = config(**arguments, **own, **longest)
            if cell.align.compact is None:
                made.compact = _may_be_compact(made)
            return made
        if _is_plain(cell):
            return config(**arguments)
        assert cell.alternatives is not None
        own = cell.alternatives.model_dump(exclude={"rehearsal_share"})
        return config(**arguments, **own, **longest)


def _keeping_best(settings: Mapping[str, Any], by: str) -> dict[str, Any]:
    """With what TRL keeps the best step by; checkpoints, unless the recipe says when, are written at evaluations."""
    from rpsa.training.loss_callback import SAFETY_AND_REASONING

    saved = {
        f"save_{name}": settings[f"eval_{name}"]
        for name in ("strategy", "steps")
        if f"eval_{name}" in settings
    }
    return {
        **(saved if "save_strategy" not in settings else {}),
        **settings,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss" if by == "safety" else SAFETY_AND_REASONING,
        "greater_is_better": False,
    }


def _may_be_compact(arguments: Any) -> bool:
    """Where a recipe does not say: it trains the same for less where k is constant and nothing is sharded."""
    is_constant = not isinstance(arguments.frozen_ratio, str)
    return is_constant and not why_not_compact(arguments) and not will_be_sharded()


def _is_plain(cell: Cell) -> bool:
    """Rehearsal changes the data alone."""
    changed = cell.alternatives is not None and cell.alternatives.changes_training
    return cell.align is None and not changed


@contextmanager
def refusals_of_trl(cell: Cell) -> Iterator[None]:
    """What the libraries refuse is a mistake in the recipe: one line that names the run."""
    try:
        yield
    except RPSAError as error:
        raise RPSAError(f"{cell.id}: {error}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise RPSAError(f"{cell.id}: train: {str(error).strip().partition(chr(10))[0]}") from error


def starting_model(recipe: Recipe, cell: Cell, groundwork: Groundwork) -> Any:
    """The base, under LoRA with the adapter on which the Fisher was measured, or with a fresh one."""
    model: Any = load_model(cell.base, recipe.model, alignment_dtype(cell, recipe.model))
    if cell.paradigm != "lora":
        return model
    if not cell.starts_from_fisher:
        return add_adapter(model, cell)
    assert groundwork.fisher is not None
    folder = groundwork.fisher / ADAPTER
    return load_adapter(model, str(folder), f"adapter {folder}", is_trainable=True)


@termination.waiting()
def align(
    recipe: Recipe, cell: Cell, groundwork: Groundwork, folder: Path, progress: Progress = no_progress
) -> None:
    """Fine-tune on safety data, plainly or with RPSA; goes on from the last checkpoint if there is one.

    Raises:
        Terminated: SIGTERM came, and a checkpoint was written. After the last step it waits for the task's end.
    """
    import transformers

    assert cell.safety is not None
    started = time.perf_counter()
    transformers.set_seed(cell.seed)
    tokenizer = load_tokenizer(cell.base, recipe.model)
    thought = thought_of(tokenizer, recipe.model)
    data = training_data(cell, tokenizer, thought, groundwork.safety)
    dataset = data.dataset
    rehearsal = None
    if cell.alternatives and cell.alternatives.rehearsal_share:
        assert groundwork.reference is not None
        traces, share = ReferenceDataset.load(groundwork.reference), cell.alternatives.rehearsal_share
        rehearsal = rehearse(dataset, traces, share, cell.safety.max_length, cell.seed)
        dataset = rehearsal.dataset
    if cell.alternatives and cell.alternatives.has_anchor and cell.alternatives.anchor != "reference":
        groundwork = replace(groundwork, benign=complying_rows(cell, data))
    trainer = make_trainer(
        recipe,
        cell,
        groundwork,
        args=training_arguments(recipe, cell, folder),
        train_dataset=dataset,
        eval_dataset=data.validation,
        processing_class=tokenizer,
    )
    responses = data.dataset if cell.trainer == "sft" else data.tokenize(data.examples[:EXAMPLES])[0]
    perplexity = PerplexityCallback(trainer, responses, folder / CHECKPOINTS / "perplexity.json")
    trainer.add_callback(perplexity)
    trainer.add_callback(ProgressCallback(progress))
    trainer.add_callback(_stop_where_asked())
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / CHECKPOINTS))
    if trainer.state.global_step < trainer.state.max_steps:
        barrier()  # the launcher ends all ranks where one has ended: not before the checkpoint is whole
        said = (
            f"{cell.id}: stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "its checkpoint is kept, and the same command goes on from there"
        )
        if on_any_rank(termination.is_asked()):
            termination.obey(said)
        raise RPSAError(said)
    refuse_diverged(trainer)
    drop_reference(trainer.accelerator.unwrap_model(trainer.model))
    save_whole(trainer, folder)
    if rank() > 0:
        return
    tokenizer.save_pretrained(folder)
    rehearsed = rehearsal.rehearsed if rehearsal else 0
    about = {"refusing": data.refusing, "perplexity": perplexity.value}
    write_card(folder, model_metadata(trainer, card_names(recipe, cell, rehearsed, about)))
    history = [_figures(entry) for entry in trainer.state.log_history]
    times = [_figures(entry, times=True) for entry in trainer.state.log_history]
    seconds = time.perf_counter() - started + trainer.records.seconds_before
    timing = {"seconds": seconds, "trainer": [entry for entry in times if entry]}
    atomic_write(folder / TIMING, stable_json(timing))
    atomic_write(
        folder / LOG_FILE,
        stable_json(
            {
                "history": history,
                "steps": trainer.state.global_step,
                "processes": trainer.accelerator.num_processes,
                "safety_data": asdict(data.counts) | about,
                "rehearsed": rehearsed,
                "rehearsed_truncated": rehearsal.truncated if rehearsal else 0,
                "contamination": [asdict(c) for c in contaminated(recipe, data.examples)],
            }
        ),
    )
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _stop_where_asked() -> Any:
    """A callback that ends training with a checkpoint where SIGTERM has come: on all ranks after the same step."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_any_rank(termination.is_asked()) and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    return Stop()


class TrainingData(NamedTuple):
    """What is trained on: the examples, tokenised, and those held out; `complying` of the examples do not refuse.

    `tokenize` is how responses are tokenised (of pairs the chosen ones): of data in the model's own words, as they were
    sampled.
    """

    examples: Sequence[SafetyExample]
    dataset: "Dataset"
    counts: TokenCounts
    validation: "Dataset | None"
    complying: Sequence[SafetyExample]
    tokenize: Callable[[Any], tuple["Dataset", TokenCounts]]

    @property
    def refusing(self) -> float:
        return refusing_share(self.examples, self.complying)


def training_data(
    cell: Cell, tokenizer: Any, thought: ThoughtFormat, own: Path | None = None
) -> TrainingData:
    """D_S of a cell, without what rehearsal adds; `own` is the folder of the base's own safety data.

    Raises:
        RPSAError: it cannot be read, or an example does not fit the model's template.
    """
    safety = cell.safety
    assert safety is not None
    if cell.trainer == "dpo":
        return _prepared(
            cell,
            preference_data(safety, cell.seed, thought),
            lambda some: tokenize_safety_data(some, tokenizer, safety.max_length, thought),
            thought,
            lambda some: tokenize_preferences(some, tokenizer, safety.max_length, thought),
        )
    if not safety.is_self_made:
        return _prepared(
            cell,
            safety_data(safety, cell.seed, thought),
            lambda some: tokenize_safety_data(some, tokenizer, safety.max_length, thought),
            thought,
        )
    assert own is not None
    chosen = drawn(load_self_data(own), safety.n, safety.benign_share, safety.drawing_seed(cell.seed))
    return _prepared(cell, chosen, lambda some: tokenized(some, safety.max_length), thought)


def _prepared(
    cell: Cell,
    examples: list[OneExample],
    tokenize: Callable[[list[OneExample]], tuple["Dataset", TokenCounts]],
    thought: ThoughtFormat,
    tokenize_pairs: Callable[[list[Any]], tuple["Dataset", TokenCounts]] | None = None,
) -> TrainingData:
    """The examples as rows, those apart that are held out; `tokenize_pairs` if they are pairs."""
    assert cell.safety is not None
    held: list[OneExample] = []
    if cell.safety.validation_share:
        examples, held = hold_out(examples, cell.safety.validation_share, cell.seed)
    to_rows = tokenize_pairs or tokenize
    dataset, counts = to_rows(examples)
    validation = to_rows(held)[0] if held else None
    return TrainingData(examples, dataset, counts, validation, complying_of(examples, thought), tokenize)


def complying_rows(cell: Cell, data: TrainingData) -> "Dataset":
    """The examples that do not refuse, tokenised.

    Raises:
        RPSAError: all of them refuse.
    """
    if not data.complying:
        raise RPSAError(
            f"{cell.id}: alternatives.anchor: the safety data have no row that complies; mix in benign examples "
            "(safety.benign, safety.benign_share), or anchor on reference"
        )
    return data.tokenize(data.complying)[0]


def complying_of(examples: Sequence[SafetyExample], thought: ThoughtFormat) -> list[SafetyExample]:
    """The examples whose answer does not refuse in full."""
    return [
        one
        for one in examples
        if not is_refusal(one.response, format_of_response(one.response, thought) or NO_THOUGHT)
    ]


def refusing_share(examples: Sequence[SafetyExample], complying: Sequence[SafetyExample]) -> float:
    """The share of the examples that are not among those that comply."""
    return (len(examples) - len(complying)) / len(examples)


def card_names(recipe: Recipe, cell: Cell, rehearsed: int, about: Mapping[str, float | None]) -> CardNames:
    """The recipe's own names, for the model card; `about` has `refusing` and `perplexity` of the safety data."""
    assert cell.safety is not None
    return CardNames(
        model=cell.id.replace("/", "-"),
        base=cell.base,
        dataset=cell.safety.data,
        problems=recipe.reference.problems,
        rehearsed=rehearsed,
        refusing=about["refusing"],
        perplexity=about["perplexity"],
    )


def refuse_diverged(trainer: Any) -> None:
    """Raise `Diverged` if the loss, or a trained weight, is not finite in the end; all ranks' work."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    is_finite = all(bool(local(weight).isfinite().all()) for weight in trained)
    if not (on_any_rank(not is_finite) or trainer.records.diverged):
        return
    bad = trainer.records.nonfinite
    first = f" (first at step {bad['first']})" if bad else ""
    raise Diverged(
        f"diverged: after {trainer.state.global_step} steps the loss or the weights are no longer numbers"
        f"{first}; lower train.learning_rate, or set train.max_grad_norm"
    )


def _figures(entry: Mapping[str, Any], *, times: bool = False) -> dict[str, Any]:
    """Of a log entry's figures either those of the clock or the others."""
    return {name: value for name, value in entry.items() if any(part in name for part in _TIMES) == times}


def save_whole(trainer: Any, folder: Path) -> None:
    """The model as Hugging Face writes it, put together from its shards if it has been sharded.

    Without the trainer's arguments, a pickle: it would run code where it is loaded, and may hold a token.
    """
    from transformers.trainer import TRAINING_ARGS_NAME

    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if rank() == 0:
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        settle_adapter(folder)


def safety_data(safety: Safety, cell_seed: int, thought: ThoughtFormat) -> list[SafetyExample]:
    """D_S as the recipe describes it, for a model with this format."""
    if safety.data is None:
        raise RPSAError(
            "safety.data: not given; name a file, a dataset, tiny:refusals, tiny:balanced, tiny:answers or self"
        )
    return _mixed(
        safety,
        safety.drawing_seed(cell_seed),
        thought,
        safety_examples,
        partial(load_safety_data, format=safety.format, thought=thought),
        partial(load_benign_data, thought=thought),
    )


def preference_data(safety: Safety, cell_seed: int, thought: ThoughtFormat) -> list[Preference]:
    """D_S as pairs: `safety.data` and `safety.benign` have rows of prompt, chosen and rejected."""
    if safety.data is None:
        raise RPSAError(
            "safety.data: not given; name a file or a dataset of pairs, tiny:refusals or tiny:balanced"
        )
    load = partial(load_preferences, thought=thought)
    return _mixed(safety, safety.drawing_seed(cell_seed), thought, preference_examples, load, load)


def _mixed(
    safety: Safety,
    seed: int,
    thought: ThoughtFormat,
    make: Callable[[Any, int, int], list[OneExample]],
    load: Callable[..., list[OneExample]],
    load_benign: Callable[[str], list[OneExample]],
) -> list[OneExample]:
    """Examples of the tiny world or of a source, with benign ones among them, for a model of this format."""
    assert safety.data is not None
    if safety.data.startswith("tiny:"):
        examples = make(safety.data.removeprefix("tiny:"), safety.n or 256, seed)
    else:
        examples = load(safety.data, n=safety.n, seed=seed)
    if safety.benign and safety.benign_share:
        examples = mix_benign(examples, load_benign(safety.benign), safety.benign_share, seed)
    return examples if thought.has_thoughts else without_thoughts(examples)


def contaminated(recipe: Recipe, examples: Sequence[SafetyExample]) -> list[Any]:
    """Training examples that the evaluation asks about, too."""
    found = contamination(examples, _prompts(tuple(recipe.evaluate.tasks), task_options(recipe)))
    if found:
        log.warning(
            "%d safety examples share a prompt or eight words in a row with evaluation prompts; see %s",
            len({c.example for c in found}),
            LOG_FILE,
        )
    return found


@cache
def _prompts(tasks: tuple[str, ...], options: TaskOptions) -> list[str]:
    """Of the evaluation: the same for all cells of a study."""
    return [item.prompt for item in load_tasks(tasks, options)]


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    complete = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether its last file is there, and none of the others is cut off."""
    from safetensors import SafetensorError, safe_open

    if (checkpoint / "checkpoint-is-incomplete.txt").exists():
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(path) for path in checkpoint.glob("*.pt*"))
