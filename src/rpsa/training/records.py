"""Records: of a run that is resumed they are those of an uninterrupted one; transformers forgets a part of them.

Its trainer counts losses, tokens and time from the last start, and takes a step too many where a run that had all its
steps is resumed in the midst of an epoch. Losses that are not finite it hides from the log.

`check_kept` says whether thoughts and the ends of responses reach the model, as on its way through TRL data loses both
without a word: the chat templates of reasoning models delete thoughts, so that conversational data trains on bare
answers; and `SFTConfig`'s own `max_length`, 1024, cuts the end of the thought, the answer and EOS off longer responses.
"""

import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from rpsa.artifacts import reading, without_nan
from rpsa.chat import format_of_response, read_thought
from rpsa.checkpoints import check_adapter, refuse_misfits
from rpsa.errors import RPSAError
from rpsa.parameters import fingerprint, keep_four_bits
from rpsa.sharding import all_reduce, gather_objects, rank, world_size
from rpsa.thought import THINK, ThoughtFormat
from rpsa.training.config import refuse_order
from rpsa.training.packing import check_apart

log = logging.getLogger(__name__)

LOOKED_AT = 10_000
"""Rows, evenly spaced, that are looked at."""

_COUNTERS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")
"""What a trainer sums up over a run and since its last log: transformers' attributes, then TRL's."""

_NEVER = 1 << 62

_Trainer: Any = Trainer if TYPE_CHECKING else object


@dataclass
class _Kept:
    """Counts of rows. `deleted` and `unfinished` are of those `with_thoughts`."""

    rows: int = 0
    with_thoughts: int = 0
    deleted: int = 0
    cut: int = 0
    unfinished: int = 0


def check_kept(trainer: Any, dataset: Any, formatting: Callable[[Any], str] | None = None) -> None:
    """Say in one line, with counts, what is lost of the `dataset` that an SFT trainer has been given.

    Nothing is said of another trainer's data, or of a stream.

    Raises RPSAError if every thought in the data is deleted, or cut before its end.
    """
    if not isinstance(trainer, SFTTrainer) or not hasattr(dataset, "__len__"):
        return
    tokenizer = _tokenizer_of(trainer)
    own = read_thought(tokenizer) if tokenizer.chat_template else THINK
    kept = _Kept()
    for number in range(0, len(dataset), max(1, -(-len(dataset) // LOOKED_AT))):
        row = dict(dataset[number])
        if formatting and "input_ids" not in row:
            row = {trainer.args.dataset_text_field: formatting(row)}
        _count(kept, trainer, own, row)
    lost = []
    if kept.deleted:
        lost.append(
            f"the chat template deletes the thoughts of {kept.deleted} of {kept.rows} examples: train on input_ids and "
            "labels (rpsa.safety_data.tokenize_safety_data)"
        )
    if kept.cut:
        lost.append(
            f"max_length {trainer.args.max_length} cuts {kept.cut} of {kept.rows} examples, {kept.unfinished} of them "
            "before the end of the thought: raise max_length"
        )
    if kept.with_thoughts and kept.deleted + kept.unfinished == kept.with_thoughts:
        raise RPSAError(f"no thought in the training data reaches the model: {'; '.join(lost)}")
    if lost and trainer.accelerator.is_main_process:
        log.warning("%s", "; ".join(lost))


def _count(kept: _Kept, trainer: Any, own: ThoughtFormat, row: Mapping[str, Any]) -> None:
    tokenizer = _tokenizer_of(trainer)
    text, thought, is_plain = _read(trainer, tokenizer, own, row)
    is_deleted = _bare(thought) not in _bare(text)
    kept.rows += 1
    kept.with_thoughts += bool(thought)
    kept.deleted += is_deleted
    left = _left(trainer.args, tokenizer, row, text, is_plain)
    if left is not None:
        kept.cut += 1
        kept.unfinished += not is_deleted and _bare(thought) not in _bare(left)


def _read(trainer: Any, tokenizer: Any, own: ThoughtFormat, row: Mapping[str, Any]) -> tuple[str, str, bool]:
    """What TRL makes of a row, the thought of its last response, and whether it is text to be tokenised as such."""
    if "input_ids" in row:
        text = tokenizer.decode(row["input_ids"])
        return text, _thought_in(text, own), False
    row = maybe_convert_to_chatml(row)
    if not is_conversational(row):
        text = row["prompt"] + row["completion"] if "prompt" in row else row[trainer.args.dataset_text_field]
        return text + (tokenizer.eos_token or ""), _thought_in(text, own), True
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    said = [message for message in messages if message["role"] == "assistant"]
    last = said[-1] if said else {}
    apart = next((last[key] for key in ("reasoning_content", "thinking") if last.get(key)), "")
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=trainer.chat_template,
        tokenize=False,
        **(row.get("chat_template_kwargs") or {}),
    )
    return text, apart or _thought_in(str(last.get("content") or ""), own), False


def _left(args: Any, tokenizer: Any, row: Mapping[str, Any], text: str, is_plain: bool) -> str | None:
    """What `max_length` leaves of a text; None if that is all of it. No text has more tokens than bytes, and BOS."""
    limit = args.max_length
    is_split = args.packing and args.packing_strategy != "bfd"  # the rest begins the next sequence
    is_prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if limit is None or is_split or is_prepared or len(text.encode()) < limit:
        return None
    ids = row.get("input_ids") or tokenizer(text, add_special_tokens=is_plain, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return None
    return str(tokenizer.decode(ids[:limit] if args.truncation_mode == "keep_start" else ids[-limit:]))


def _thought_in(text: str, own: ThoughtFormat) -> str:
    """What stands before the end of a thought; empty if none ends."""
    written = format_of_response(text, own)
    if written is None:
        return ""
    before, close, _ = text.rpartition(written.close.strip())
    return before.rpartition(written.open.strip())[2].strip() if close else ""


def _tokenizer_of(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _bare(text: str) -> str:
    return "".join(text.split())


class RecordsMixin(_Trainer):
    """The base of the package's other mixins; goes before a `Trainer` subclass, as they do.

    Raises:
        RPSAError: it goes after one, or a checkpoint is not this run's.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_order(cls, RecordsMixin, Trainer)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = given(self, args, kwargs)
        _check_data(arguments.get("train_dataset"), arguments.get("processing_class"))
        model: Any = arguments.get("model")
        adapter: list[tuple[Any, Any]] = []
        if getattr(model, "is_quantized", False):
            keep_four_bits(model)
            adapter = [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(*args, **kwargs)
        for parameter, weights in adapter:
            # TRL casts it to bf16, in which small updates are rounded away; and F was measured on these weights
            parameter.data = weights.to(parameter.device)
        if isinstance(self.train_dataset, Sized) and len(self.train_dataset) == 0:
            raise RPSAError("train_dataset: no example is left that has a label; see what was dropped above")
        self.records = RunRecords(self)
        self.resumed_from: Path | None = None
        # before callbacks that save
        self.callback_handler.callbacks.insert(0, self.records)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.resumed_from = None
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)
            if folder is None:
                raise RPSAError(f"{self.args.output_dir}: no checkpoint here to resume from")
            self.resumed_from = Path(folder)
            with reading(f"checkpoint {folder}"):
                TrainerState.load_from_json(str(self.resumed_from / TRAINER_STATE_NAME))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with reading(f"checkpoint {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if hasattr(self.model, "peft_config") and not self.is_fsdp_enabled:
            check_adapter(self.model, resume_from_checkpoint, f"checkpoint {resume_from_checkpoint}")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(parameter) for name, parameter in named.items() if name not in load_result.missing_keys}
        # a tied weight is stored under one of its names
        missing = [name for name in load_result.missing_keys if id(named.get(name)) not in loaded]
        refuse_misfits(f"checkpoint {self.resumed_from}", missing, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"checkpoint {checkpoint}: its optimizer"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"checkpoint {checkpoint}: its random state"):
            super()._load_rng_state(checkpoint)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # in the midst of an epoch there would be one more step
        return epochs, batches

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.records.see(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.records.complete(logs)
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = without_nan(self.state.log_history[-1])

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        super().save_metrics(split, without_nan(metrics), combined)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_best: bool = super()._determine_best_metric(*args, **kwargs)
        self.state.best_metric = without_nan(self.state.best_metric)  # infinite until one is finite
        return is_best

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.records.keep()
        super()._save_checkpoint(*args, **kwargs)


def _check_data(data: Any, tokenizer: Any) -> None:
    """Raise RPSAError for what TRL trips over."""
    if not isinstance(data, Dataset):
        return
    if len(data) == 0:
        raise RPSAError("train_dataset is empty: give it examples")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    is_text = "input_ids" not in data.column_names and not is_conversational(data[0])
    if is_text and tokenizer is not None and getattr(tokenizer, "eos_token", "") is None:
        raise RPSAError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token to end a text with: set tokenizer.eos_token"
        )


def given(trainer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by name, as transformers or TRL will see them behind the mixins."""
    signatures = [
        inspect.signature(cls)
        for cls in type(trainer).__mro__
        if issubclass(cls, Trainer) and not issubclass(cls, RecordsMixin)
    ]
    if not signatures:
        name = type(trainer).__name__
        raise RPSAError(f"{name} is not a trainer by itself: class MyTrainer({name}, SFTTrainer)")
    # a class in between may hand on what it is given
    named = next(one for one in signatures if "model" in one.parameters)
    known = {name: value for name, value in kwargs.items() if name in named.parameters}
    return dict(named.bind_partial(*args, **known).arguments)


def check_args(trainer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], kind: type) -> None:
    """Raise RPSAError unless the trainer is given a model, and a config with the settings of `kind`."""
    arguments = given(trainer, args, kwargs)
    if arguments.get("model") is None and arguments.get("model_init") is None:
        raise RPSAError("model is None: give the model to train")
    if not isinstance(arguments.get("args"), kind):
        raise RPSAError(f"args must include {kind.__name__}: class MyConfig({kind.__name__}, ...)")


class RunRecords(TrainerCallback, ExportableState):
    """What a checkpoint holds of a run beside its weights, so that the records go on in it."""

    def __init__(self, trainer: RecordsMixin) -> None:
        self.trainer = trainer
        self._fisher: str | None = None
        self._started = self.seconds_before = 0.0
        self._step = -1
        self._nonfinite = torch.tensor([0, -1, _NEVER])
        self._is_said = False
        self._between_steps: dict[str, Any] | None = None
        self._kept: dict[str, Any] = {}

    # Losses that are not finite

    @property
    def nonfinite(self) -> dict[str, int] | None:
        """Of the steps whose loss was not finite: how many, the first and the last; None where there was none."""
        steps, last, first = self._nonfinite.tolist()
        return {"steps": steps, "first": first, "last": last} if steps else None

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last step was not finite."""
        return self.nonfinite is not None and self.nonfinite["last"] == self._step

    def see(self, loss: Tensor) -> None:
        """Count a loss that is not finite, without waiting for the device."""
        self._step = self.trainer.state.global_step
        steps, last, first = self._nonfinite = self._nonfinite.to(loss.device)
        is_bad = ~torch.isfinite(loss.detach())
        self._nonfinite = torch.stack(
            [
                steps + (is_bad & (last != self._step)),
                torch.where(is_bad, self._step, last),
                torch.where(is_bad, first.clamp(max=self._step), first),
            ]
        )

    def complete(self, logs: dict[str, float]) -> None:
        """Say what is not finite, and make the times that are logged in the end those of the whole run."""
        if not {"loss", "train_loss"} & logs.keys():
            return
        counts, first = self._nonfinite[:2].clone(), self._nonfinite[2:].clone()
        self._nonfinite = torch.cat([all_reduce(counts, "MAX").cpu(), all_reduce(first, "MIN").cpu()])
        bad = self.nonfinite
        if bad and rank() == 0:
            if not self._is_said:
                log.warning(
                    "the loss is not finite at step %d (which the logged loss need not show)", bad["first"]
                )
            elif "train_loss" in logs and bad["steps"] > 1:
                log.warning(
                    "the loss was not finite in %d of %d steps, the first and the last: %d, %d",
                    *(bad["steps"], self._step + 1, bad["first"], bad["last"]),
                )
        self._is_said = bad is not None
        if "train_loss" in logs and self.seconds_before:
            seconds = logs["train_runtime"]
            logs["train_runtime"] = round(seconds + self.seconds_before, 4)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                if name in logs:
                    logs[name] = round(logs[name] * seconds / logs["train_runtime"], 3)

    # The life of a run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        fisher = getattr(self.trainer, "fisher", None)
        self._fisher = fingerprint(fisher.scores) if fisher is not None else None
        self._started, self.seconds_before = time.monotonic(), 0.0
        self._step = state.global_step - 1
        self._nonfinite = torch.tensor([0, -1, _NEVER])
        self._is_said, self._between_steps, self._kept = False, None, {}
        check_apart(self.trainer)
        if state.global_step > 0:
            self._resume(state)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a checkpoint may be written within the step, which is then taken again
        self._between_steps = self._now()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._between_steps = None

    # Checkpoints

    def keep(self) -> None:
        """Take what `state` will return; all ranks' work."""
        now = self._between_steps or self._now()
        losses, flos = zip(*gather_objects((float(now["loss"]), now["flos"])), strict=True)
        self._kept = without_nan(
            {
                "fisher": self._fisher,
                "start": self._start(),
                "seconds": self.seconds_before + time.monotonic() - self._started,
                "counters": now["counters"],
                "losses": losses,
                "state": now["state"] | {"total_flos": now["state"]["total_flos"] + sum(flos)},
                "metrics": now["metrics"],
                "nonfinite": now["nonfinite"].tolist(),
            }
        )

    def _start(self) -> str | None:
        """What tells the weights before training, if the trainer has kept them and this rank has them whole."""
        start = getattr(self.trainer, "start", None)
        return fingerprint(start) if start and world_size() == 1 else None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self._kept}

    def _now(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        metrics = getattr(trainer, "_metrics", {}).get("train", {})
        return {
            "counters": {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)},
            "loss": trainer._tr_loss.clone(),
            "flos": trainer.current_flos,
            "state": {name: getattr(trainer.state, name) for name in ("total_flos", "num_input_tokens_seen")},
            "metrics": {name: list(values) for name, values in metrics.items()},
            "nonfinite": self._nonfinite,
        }

    def _resume(self, state: TrainerState) -> None:
        # a checkpoint of another trainer has none, and transformers asks for it when it saves the next one
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if not saved:
            log.warning(
                "this checkpoint holds no records of its run: losses and tokens are counted from here on"
            )
            return
        if saved["fisher"] != self._fisher:
            raise RPSAError("this checkpoint was trained with another Fisher: give that one, or start afresh")
        start = self._start()
        if start and saved["start"] not in (None, start):
            raise RPSAError(
                "the trainer was given other weights than this run started from, to which its penalty or what follows "
                "training goes back: give it the model as it was before training"
            )
        trainer: Any = self.trainer
        for name, value in saved["counters"].items():
            setattr(trainer, name, math.nan if value is None else value)
        for name, value in saved["state"].items():
            setattr(state, name, value)
        losses = [math.nan if loss is None else loss for loss in saved["losses"]]
        mean = sum(losses) / len(losses)  # for as many ranks as there are now
        trainer._tr_loss = torch.tensor(
            losses[rank()] if len(losses) == world_size() else mean, device=trainer.args.device
        )
        trainer._initial_global_step = 0
        for name, values in saved["metrics"].items():
            trainer._metrics["train"][name] = [math.nan if value is None else value for value in values]
        self.seconds_before = saved["seconds"]
        self._nonfinite = torch.tensor(saved["nonfinite"])
        self._is_said = self.nonfinite is not None
