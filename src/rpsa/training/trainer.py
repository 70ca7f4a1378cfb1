"""Trainer: RPSA inside Hugging Face's, `RPSATrainer` in place of TRL's `SFTTrainer`, `RPSAMixin` for any other.

Under FSDP2 checkpoints of compact training are ours: accelerate does not know masters, so each rank writes its own.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_model
from transformers.trainer import SCHEDULER_NAME
from trl import SFTTrainer

from rpsa.artifacts import AUDIT_FILE, atomic_write, without_nan
from rpsa.errors import RPSAError, check_type
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.freezer import Freezer, check_ranking
from rpsa.reference import ReferenceDataset
from rpsa.sharding import rank, world_size
from rpsa.training.callback import RPSACallback
from rpsa.training.card import write_card
from rpsa.training.config import RPSAArguments
from rpsa.training.metadata import CardNames, model_metadata
from rpsa.training.reasoning import ReasoningMixin
from rpsa.training.records import RecordsMixin, check_args


def save_shards(model: Any, optimizer: Any, scheduler: Any, folder: Path, accelerator: Any) -> None:
    """Write the model as accelerate does, and beside it this rank's part of the optimizer; all ranks' work."""
    plugin = accelerator.state.fsdp_plugin
    save_fsdp_model(plugin, accelerator, model, str(folder), adapter_only=True)
    torch.save(optimizer.state_dict(), _path(folder))
    if rank() == 0:
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_shards(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Read what `save_shards` wrote beside the model.

    Raises:
        RPSAError: another number of ranks has written it.
    """
    if not _path(folder).is_file():
        raise RPSAError(
            f"checkpoint {folder}: compact training under FSDP2 goes on with as many processes as it began with, "
            f"and {world_size()} is another number"
        )
    optimizer.load_state_dict(torch.load(_path(folder), map_location="cpu", weights_only=True))
    scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, map_location="cpu", weights_only=True))


def _path(folder: Path) -> Path:
    return folder / f"compact-{rank()}-of-{world_size()}.pt"


class RPSAMixin(ReasoningMixin):
    """Put it before any `Trainer` subclass: `class RPSADPOTrainer(RPSAMixin, DPOTrainer)`.

    Args:
        fisher: scores of the model's trainable parameters, or the folder of saved ones.
        ranking: what is frozen first, if not the highest Fisher: your own scores of the same parameters. The conflict
            is measured as ever, and k freezes as many elements as by the Fisher, if as many scores are not zero.
        reference_dataset: D_ref, or its folder; needed unless the frozen ratio is a number.
        benign_dataset: as `ReasoningMixin`.

    The trainer's `args` must include `RPSAArguments`.

    Raises:
        RPSAError: the Fisher does not fit the model, the ranking does not fit the Fisher or comes with a control
            mask, or D_ref is missing.
    """

    fisher: FisherDiagonal

    def __init__(
        self,
        *args: Any,
        fisher: FisherDiagonal | str | Path | None = None,
        ranking: FisherDiagonal | None = None,
        reference_dataset: ReferenceDataset | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if fisher is None:
            raise RPSAError(
                "fisher is None: give what estimate_fisher(model, batches) returns, or its folder"
            )
        check_args(self, args, kwargs, RPSAArguments)
        super().__init__(*args, fisher=fisher, reference_dataset=reference_dataset, **kwargs)
        if ranking is not None:
            check_type("ranking", ranking, FisherDiagonal, "scores by parameter, as FisherDiagonal(scores)")
            if self.args.mask != "fisher":
                raise RPSAError(
                    f"ranking and mask {self.args.mask!r}: both say what is frozen first; leave one of them out"
                )
            check_ranking(ranking, self.fisher)
        if self.args.ratio().every is not None and self.reference_dataset is None:
            raise RPSAError(
                f"frozen_ratio {self.args.frozen_ratio!r} measures the reasoning gradient on D_ref: "
                "give reference_dataset"
            )
        self.rpsa = RPSACallback(self, ranking)
        # before callbacks that save: what they store must be the state between two steps
        self.callback_handler.callbacks.insert(0, self.rpsa)

    @property
    def freezer(self) -> Freezer:
        """The freezer of the current (or last) call of `train`."""
        if self.rpsa.freezer is None:
            raise RPSAError("there is no freezer before train() has begun")
        return self.rpsa.freezer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.rpsa.release()
        return super().train(*args, **kwargs)

    def on_gradients_complete(self) -> None:
        self.rpsa.on_gradients_complete()

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.args.compact:
            return self.freezer.clip_grad_norm_(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.args.compact and grad_norm is None:
            return self.freezer.clip_grad_norm_(math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.compact and checkpoint is not None:
            self.rpsa.attach(self.optimizer)
            if self.is_fsdp_enabled:
                load_shards(self.optimizer, self.lr_scheduler, Path(checkpoint))
                return
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.compact and self.is_fsdp_enabled:
            save_shards(self.model, self.optimizer, self.lr_scheduler, Path(output_dir), self.accelerator)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.rpsa.freezer is not None:
            logs.update(self.rpsa.logs())
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights, tokenizer, model card, and the audit if there is one."""
        super().save_model(output_dir, _internal_call=_internal_call)
        report = self.rpsa.report() if self.rpsa.audit else None  # of a sharded model, all ranks' work
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            if report is not None:
                atomic_write(folder / AUDIT_FILE, json.dumps(without_nan(report), indent=1) + "\n")
            write_card(folder, model_metadata(self, CardNames(model=self._hub_name())))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.rpsa.end_interval()
        if self.rpsa.audit is not None:
            self.rpsa.report()  # all ranks' work; the model card, which TRL has one rank write, reads it
            self.rpsa.save_start(
                Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            )
        super()._save_checkpoint(model, trial)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        **front_matter: Any,
    ) -> None:
        """Write the card into `args.output_dir`; `push_to_hub` calls this with the keywords that it is given.

        Args:
            dataset_name: the safety data, as a Hugging Face id or what else it is called.
            finetuned_from: the base model, if the model's config does not name it.
            front_matter: more fields of the card's YAML, such as `license` or `language`.
        """
        if not self.is_world_process_zero():
            return
        names = CardNames(
            model=model_name or self._hub_name(),
            base=finetuned_from,
            dataset=dataset_name,
            tags=(tags,) if isinstance(tags, str) else tuple(tags or ()),
            front_matter=front_matter,
        )
        write_card(Path(str(self.args.output_dir)), model_metadata(self, names))

    def _hub_name(self) -> str | None:
        return self.args.hub_model_id.split("/")[-1] if self.args.hub_model_id else None


class RPSATrainer(RPSAMixin, SFTTrainer):
    """TRL's `SFTTrainer` with reasoning-critical parameters frozen: same arguments, `RPSAConfig`, and D_ref."""


class ResumableSFTTrainer(RecordsMixin, SFTTrainer):
    """TRL's `SFTTrainer`, whose records are those of the whole run also where it was resumed."""
