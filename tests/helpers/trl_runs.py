"""Real trainers on a small random model, with what they are given."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig

from helpers.devices import DEVICE
from helpers.rank_runs import QUIET
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.recipe.problems import installed_names
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.config import RPSAArguments, RPSAConfig
from rpsa.training.trainer import RPSAMixin, RPSATrainer

VOCABULARY = 40


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def make_model(tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if tied:
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).to(DEVICE)
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.1)).to(DEVICE)


def make_lora(model: Any = None, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": ["up_proj", "down_proj"],
            "task_type": "CAUSAL_LM",
        }
        | settings
    )
    return get_peft_model(model or make_model(), config)


def sequences(n: int, seed: int, low: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 12, (n,), generator=generator).tolist()
    return [[*torch.randint(low, VOCABULARY, (m,), generator=generator).tolist(), 1] for m in lengths]


def safety_rows() -> Dataset:
    rows = sequences(24, seed=2, low=20)
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]})


def reference_traces() -> ReferenceDataset:
    rows = sequences(10, seed=3, low=2)
    return ReferenceDataset([Trace(str(i), r[:2], r[2:], "", "stop", True) for i, r in enumerate(rows)])


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "seed": 1,
    **QUIET,
}
SFT_SETTINGS = installed_names(SETTINGS, SFTConfig)


def config(folder: Path, **settings: Any) -> RPSAConfig:
    rpsa = {"frozen_ratio": "dynamic", "window": 2, "every": 1}
    chosen = installed_names(SFT_SETTINGS | rpsa | settings, RPSAConfig)
    return RPSAConfig(**chosen, output_dir=str(folder))


def fisher_of(model: Any, reference: ReferenceDataset) -> FisherDiagonal:
    return estimate_fisher(model, reference.batches(5, None), FisherConfig(progress=False))


def make_trainer(
    model: Any,
    args: RPSAConfig,
    data: Dataset,
    tokenizer: Any,
    reference: ReferenceDataset,
    **settings: Any,
) -> RPSATrainer:
    return RPSATrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        fisher=settings.pop("fisher", None) or fisher_of(model, reference),
        reference_dataset=reference,
        **settings,
    )


@dataclass
class RPSADPOConfig(RPSAArguments, DPOConfig):
    pass


class RPSADPOTrainer(RPSAMixin, DPOTrainer):
    pass


STEPS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 4}
"""A checkpoint lies between two logs."""


def pieces() -> SimpleNamespace:
    """What a trainer is given: tokenizer, data, reference, and a Fisher by the function that builds its model."""
    reference = reference_traces()
    return SimpleNamespace(
        tokenizer=word_tokenizer(),
        data=safety_rows(),
        reference=reference,
        fisher={build: fisher_of(build(), reference) for build in (make_model, make_lora)},
    )


def rpsa_trainer(pieces: Any, folder: Path, build: Any = make_model, **settings: Any) -> RPSATrainer:
    args = config(folder, **STEPS | {"every": 2} | settings)
    return make_trainer(
        build(),
        args,
        pieces.data,
        pieces.tokenizer,
        pieces.reference,
        fisher=pieces.fisher[build],
        eval_dataset=pieces.data,
    )
