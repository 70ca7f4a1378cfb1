"""Alternatives in a Hugging Face trainer: to be compared with RPSA under the same settings.

`AlternativesMixin` has penalties, projections, and what is done after training. `rehearse` puts the model's own
reasoning among the safety data, so that training goes on practising it; it changes the data, and serves any trainer.
"""

import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rpsa import settings
from rpsa.alternatives.after_training import check_start, interpolate, restore, starting_weights
from rpsa.alternatives.nullspace import NullSpace
from rpsa.alternatives.penalty import WeightPenalty
from rpsa.alternatives.product import ProductPenalty, check_base
from rpsa.alternatives.projection import Projection
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.reference import ReferenceDataset
from rpsa.sharding import refuse_engines
from rpsa.training.config import (
    AnchorArguments,
    check_own_fields,
    declared,
    refuse_order,
    refuse_unsupported,
    refuse_unsupported_ranks,
)
from rpsa.training.reasoning import ReasoningMixin, given_fisher
from rpsa.training.records import check_args, given

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rehearsal:
    """`dataset` is what to train on; `rehearsed` of its rows are D_ref's, and `truncated` of these are cut."""

    dataset: "Dataset"
    rehearsed: int
    truncated: int


def rehearse(
    dataset: "Dataset",
    reference: ReferenceDataset,
    share: float,
    max_length: int | None,
    seed: int = settings.SEED.default,
) -> Rehearsal:
    """All rows of `dataset` and as many traces of D_ref as make up `share` of the whole, shuffled together.

    Traces come in a seeded order, and again where there are too few, with their exact token ids; labels are on
    the response. `max_length` (tokens, prompt included) keeps their beginning; one whose prompt fills it is out. What
    it cuts is logged.

    Args:
        dataset: with the columns `input_ids` and `labels`.

    Raises:
        RPSAError: `share` is not in [0, 1), or no trace fits.
    """
    from datasets import Dataset, concatenate_datasets

    settings.check(settings.REHEARSAL_SHARE, share, "rehearsal share")
    traces = [t for t in reference.traces if max_length is None or len(t.prompt_ids) < max_length]
    if not traces:
        raise RPSAError(f"max_length {max_length} leaves no response token of any trace: raise it")
    random.Random(seed).shuffle(traces)
    count = round(len(dataset) * share / (1 - share))
    chosen = [traces[i % len(traces)] for i in range(count)]
    rows = [trace.labelled(max_length) for trace in chosen]
    columns = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    added = Dataset.from_dict(columns, features=dataset.features)
    truncated = sum(max_length is not None and trace.length > max_length for trace in chosen)
    if truncated:
        log.warning("max_length %s cuts %d of %d rehearsed traces", max_length, truncated, count)
    return Rehearsal(concatenate_datasets([dataset, added]).shuffle(seed=seed), count, truncated)


@dataclass
class AlternativesArguments(AnchorArguments):
    """What `AlternativesMixin` reads; put it before any `TrainingArguments` subclass.

    Raises:
        RPSAError: a value is impossible, or the way of training is not supported.
    """

    penalty: str | None = declared(settings.PENALTY)
    penalty_strength: float = declared(settings.PENALTY_STRENGTH)
    projection: str | None = declared(settings.PROJECTION)
    nullspace_energy: float = declared(settings.NULLSPACE_ENERGY)
    interpolation: float = declared(settings.INTERPOLATION)
    restored_ratio: float = declared(settings.RESTORED_RATIO)
    reference_max_length: int | None = declared(settings.REFERENCE_MAX_LENGTH)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_order(cls, AlternativesArguments, TrainingArguments)

    def __post_init__(self) -> None:
        check_own_fields(self, AlternativesArguments)
        self.check_anchor()
        for setting in settings.ALTERNATIVES:
            if setting is not settings.REHEARSAL_SHARE:  # which changes the data
                settings.check(setting, getattr(self, setting.name))
        if self.penalty == "product" and self.restored_ratio > 0:
            raise RPSAError(
                "penalty 'product' goes by the base's Fisher, restored_ratio by the adapter's: leave one of them out"
            )
        refuse_unsupported(self)
        refuse_engines(os.environ)
        super().__post_init__()  # type: ignore[misc]
        refuse_unsupported_ranks(self)

    @property
    def needs_fisher(self) -> bool:
        return self.penalty in ("fisher", "product") or self.restored_ratio > 0

    @property
    def needs_start(self) -> bool:
        return self.needs_start_often or self.interpolation < 1 or self.restored_ratio > 0

    @property
    def needs_start_often(self) -> bool:
        """At every step, and so where the model is."""
        return self.penalty is not None or self.projection == "nullspace"


@dataclass
class AlternativesConfig(AlternativesArguments, SFTConfig):
    """`SFTConfig` and the settings of the alternatives."""


class AlternativesMixin(ReasoningMixin):
    """Put it before any `Trainer` subclass, as `AlternativesTrainer` does with `SFTTrainer`.

    Args:
        fisher: scores of the trainable parameters, or their folder; for `penalty: fisher` and `restored_ratio`. For
            `penalty: product`, scores of the model without its adapter.
        reference_dataset: D_ref, or its folder; for `projection`, and for an anchor on it.
        benign_dataset: as `ReasoningMixin`.

    The trainer's `args` must include `AlternativesArguments`.

    Raises:
        RPSAError: what the settings need is missing, or the Fisher does not fit the model.
    """

    def __init__(
        self,
        *args: Any,
        fisher: FisherDiagonal | str | Path | None = None,
        reference_dataset: ReferenceDataset | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        check_args(self, args, kwargs, AlternativesArguments)
        of_base = given(self, args, kwargs)["args"].penalty == "product"
        super().__init__(
            *args, fisher=None if of_base else fisher, reference_dataset=reference_dataset, **kwargs
        )
        if of_base:
            self._take_base_fisher(given_fisher(fisher))
        if self.args.needs_fisher and self.fisher is None:
            raise RPSAError(
                "penalties 'fisher' and 'product' and restored_ratio go by the Fisher: give fisher"
            )
        if self.args.projection and self.reference_dataset is None:
            raise RPSAError("a projection goes by the model's own reasoning, D_ref: give reference_dataset")
        if self.args.projection == "nullspace" and (
            hasattr(self.model, "peft_config") or self.is_fsdp_enabled
        ):
            raise RPSAError(
                "projection 'nullspace' is for full fine-tuning of models that are not sharded: use it without an "
                "adapter and without FSDP2, or use 'agem' or 'signs'"
            )
        self.start: dict[str, Tensor] | None = None
        self.weight_penalty: WeightPenalty | ProductPenalty | None = None
        self.gradient_projection: Projection | None = None
        self.null_space: NullSpace | None = None
        self.add_callback(_AlternativesCallback(self))

    def _take_base_fisher(self, fisher: FisherDiagonal | None) -> None:
        """The Fisher of weights that are not trained: it must fit the base, whether or not a run goes on."""
        if self.is_fsdp_enabled:
            raise RPSAError(
                "penalty 'product' is not for sharded models (FSDP2): use DDP, or penalty 'fisher'"
            )
        if fisher is not None:
            check_base(fisher, self.model)
        self.fisher = fisher

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.keep_start()  # the last moment at which the model is what it was before training
        super()._load_from_checkpoint(*args, **kwargs)

    def keep_start(self) -> None:
        """Remember the present weights (of a sharded model, this rank's shards) as those before training."""
        if self.args.needs_start and self.start is None:
            on = None if self.args.needs_start_often else "cpu"  # the others need them only once
            self.start = starting_weights(self.accelerator.unwrap_model(self.model_wrapped), on)
            if self.args.interpolation < 1:
                check_start(self.start)
            if self.args.projection == "nullspace":
                self.null_space = self._find_null_space(self.start)

    def _find_null_space(self, start: dict[str, Tensor]) -> NullSpace:
        assert self.reference_dataset is not None
        batches = self.reference_dataset.batches(
            self.args.per_device_train_batch_size, self.args.reference_max_length
        )
        # a model that goes on is not yet wrapped so that it casts by itself
        with self.accelerator.autocast():
            model = self.accelerator.unwrap_model(self.model_wrapped)
            return NullSpace(model, start, batches, self.args.nullspace_energy)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.start, self.null_space = None, None
        return super().train(*args, **kwargs)

    def on_gradients_complete(self) -> None:
        if self.gradient_projection is not None:
            self.gradient_projection.project_gradients()
        if self.weight_penalty is not None:
            self.weight_penalty.add_gradients()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.weight_penalty is not None:
            logs["alternatives/penalty"] = self.weight_penalty.loss()
        if "loss" in logs and self.gradient_projection is not None:
            logs["alternatives/cosine"] = self.gradient_projection.cosine
        if "loss" in logs and self.null_space is not None:
            logs["alternatives/free_share"] = self.null_space.free_share
        super().log(logs, *args, **kwargs)


class AlternativesTrainer(AlternativesMixin, SFTTrainer):
    """TRL's `SFTTrainer` with an alternative to freezing: same arguments, `AlternativesConfig`, Fisher, D_ref."""


class _AlternativesCallback(TrainerCallback):
    """What happens before the first step, before each, and after the last."""

    def __init__(self, trainer: AlternativesMixin) -> None:
        self.trainer = trainer
        self._after_step: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, own = self.trainer, self.trainer.args
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if state.global_step == 0:
            trainer.keep_start()
        if own.penalty:
            assert trainer.start is not None
            trainer.weight_penalty = self._penalty(model, trainer.start)
        if own.projection in get_args(settings.GradientProjection):
            trainer.gradient_projection = Projection(model, own.projection)
        self._release()
        if trainer.null_space is not None:
            optimizer = kwargs["optimizer"]
            inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            null_space = trainer.null_space
            self._after_step = inner.register_step_post_hook(lambda *_: null_space.project())

    def _release(self) -> None:
        """Let go of the optimizer, also of one whose training ended in an exception."""
        if self._after_step is not None:
            self._after_step.remove()
            self._after_step = None

    def _penalty(self, model: nn.Module, start: dict[str, Tensor]) -> WeightPenalty | ProductPenalty:
        trainer, own = self.trainer, self.trainer.args
        if own.penalty == "uniform":
            return WeightPenalty(model, start, None, own.penalty_strength)
        assert trainer.fisher is not None
        fisher = trainer.fisher.for_any_weights()  # the trainer has compared them
        kind = ProductPenalty if own.penalty == "product" else WeightPenalty
        return kind(model, start, fisher, own.penalty_strength)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.gradient_projection is not None:
            self.trainer.reasoning_backward(state.global_step)
            self.trainer.gradient_projection.capture_reference()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer, own = self.trainer, self.trainer.args
        self._release()
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if own.restored_ratio > 0:
            assert trainer.start is not None
            assert trainer.fisher is not None
            restore(model, trainer.start, trainer.fisher.for_any_weights(), own.restored_ratio)
        if own.interpolation < 1:
            assert trainer.start is not None
            interpolate(model, trainer.start, own.interpolation)
