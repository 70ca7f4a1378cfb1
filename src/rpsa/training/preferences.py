"""Preferences: TRL's `DPOTrainer` with reasoning protected, on pairs of responses as token ids or as TRL takes them."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rpsa.training.alternatives import AlternativesArguments, AlternativesMixin
from rpsa.training.config import RPSAArguments
from rpsa.training.records import RecordsMixin
from rpsa.training.trainer import RPSAMixin

_REFERENCE = "ref"
"""TRL's copy of the adapter that training starts from, the reference model of DPO."""


class PreferenceTrainer(DPOTrainer):
    """TRL's `DPOTrainer`, which also takes pairs as token ids (`rpsa.safety_data.tokenize_preferences`), as they are.

    TRL tokenises text itself: it may merge tokens across the end of the prompt, and add a BOS.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dataset, Dataset) and "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)


@dataclass
class RPSADPOConfig(RPSAArguments, DPOConfig):
    """`DPOConfig` and the settings of RPSA."""


class RPSADPOTrainer(RPSAMixin, PreferenceTrainer):
    """TRL's `DPOTrainer` with reasoning-critical parameters frozen: same arguments, `RPSADPOConfig`, and D_ref.

    The reasoning gradient is that of the token loss on D_ref.
    """


@dataclass
class AlternativesDPOConfig(AlternativesArguments, DPOConfig):
    """`DPOConfig` and the settings of the alternatives."""


class AlternativesDPOTrainer(AlternativesMixin, PreferenceTrainer):
    """TRL's `DPOTrainer` with an alternative to freezing."""


class ResumableDPOTrainer(RecordsMixin, PreferenceTrainer):
    """TRL's `DPOTrainer`, whose records are those of the whole run also where it was resumed."""


def drop_reference(model: Any) -> None:
    """Take DPO's copy of the adapter's start out of a trained model, where it would be saved beside the adapter."""
    if _REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(_REFERENCE)
