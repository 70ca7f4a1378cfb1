"""Packing: several examples in one row, each of which must see itself alone.

TRL leaves it to the attention to keep them apart, by positions that begin again. Transformers' masks for sdpa and eager
do so, and flash attention's kernels; an attention of another name may not, and nothing but the gradient shows it.
"""

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from rpsa.errors import RPSAError
from rpsa.fisher.log_probs import evaluation_mode, is_low_precision
from rpsa.sharding import reshard

_LOOKED_AT = 16
"""Tokens of each of two examples."""


def refuse_wrapped(args: Any) -> None:
    """Raise RPSAError for the strategy that cuts examples wherever a row is full, and lets them see each other."""
    if getattr(args, "packing", False) and args.packing_strategy == "wrapped":
        raise RPSAError(
            "packing_strategy: wrapped is not supported: examples of one row would see each other, and be cut; use bfd"
        )


def check_apart(trainer: Any) -> None:
    """Raise RPSAError if an example sees another one of its row: its logits must not change with the other's tokens.

    Two short forward passes of the trainer's model before the first step; all ranks' work. Nothing is done where rows
    are padded, one example in each.
    """
    if not isinstance(trainer, SFTTrainer) or not trainer.padding_free:
        return
    ids = torch.tensor(trainer.train_dataset[0]["input_ids"][:_LOOKED_AT])
    values = torch.unique(ids)
    others = values[(torch.searchsorted(values, ids) + 1) % len(values)]
    first, second = (_second_of_two(trainer, before, ids) for before in (ids, others))
    model, device = trainer.model_wrapped, trainer.accelerator.device
    tolerance = 0.05 if is_low_precision(model, device) else 1e-4
    if bool((first - second).norm() > tolerance * (first - first.mean()).norm()):
        name = getattr(getattr(trainer.model, "config", None), "_attn_implementation", None)
        raise RPSAError(
            f"packing and padding_free: with the attention {name!r} the examples of a row see each other; use sdpa or "
            "flash_attention_2 (model.attn_implementation), or leave them off"
        )


def _second_of_two(trainer: Any, before: Tensor, ids: Tensor) -> Tensor:
    """The logits of `ids` in one row behind another example."""
    rows = [{"input_ids": one.tolist(), "labels": one.tolist()} for one in (before, ids)]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    del inputs["labels"]
    model = trainer.model_wrapped
    with torch.no_grad(), evaluation_mode(model):
        logits: Tensor = model(**inputs, use_cache=False).logits
    reshard(model)
    return logits[0, len(before) : len(before) + len(ids)].double()
