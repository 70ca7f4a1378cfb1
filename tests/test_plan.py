"""`rpsa plan` against what is really there: live bytes of real runs, and the trainer's own count of steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import invoke
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config
from trl import SFTConfig, SFTTrainer

from rpsa.errors import RPSAError
from rpsa.fisher.config import FisherConfig
from rpsa.fisher.estimators import estimate_fisher
from rpsa.parameters import trainable_parameters
from rpsa.plan import make_plan
from rpsa.plan.dry_run import Precision, Shape
from rpsa.plan.live_bytes import LiveBytes
from rpsa.plan.memory import (
    Freezing,
    StageMemory,
    align_memory,
    dry_passes,
    fisher_memory,
    generation_memory,
)
from rpsa.plan.skeleton import build_model, fake_tensors
from rpsa.plan.steps import count_steps
from rpsa.recipe import load_recipe
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.config import RPSAConfig
from rpsa.training.trainer import RPSATrainer

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = ["matrix.bases=[tiny:0]"]
LORA = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
}
SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
# Wide, deep, and with a large vocabulary on tied weights: each has its peak at another place.
CONFIGS = {
    "wide": LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=704, num_hidden_layers=2, **SIZES,
        tie_word_embeddings=False,
    ),
    "deep": LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=8, **SIZES,
        tie_word_embeddings=False,
    ),
    "tied": Qwen2Config(
        vocab_size=8000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **SIZES,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
SEQUENCES, LENGTH, THOUGHT = 2, 48, 96


def real_model(config: PreTrainedConfig, dtype: str, lora: bool) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at 0 it leaves A without a gradient, and half of the elements with F = 0
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def reference_dataset(vocabulary: int) -> ReferenceDataset:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocabulary, (4, THOUGHT), generator=generator).tolist()
    traces = [Trace(str(i), row[:8], row[8:], "x", "stop", None) for i, row in enumerate(rows)]
    return ReferenceDataset(traces, {"pad_token_id": 0})


def safety_dataset(vocabulary: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, vocabulary, (16, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 8 + row[8:] for row in rows]})


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from rpsa.tiny import tiny_model_dir

    return AutoTokenizer.from_pretrained(tiny_model_dir(0))


def live_run(
    config: PreTrainedConfig, *, lora: bool, rpsa: bool, bf16: bool, checkpointing: bool, folder: Path
) -> tuple[dict[str, int], int]:
    """Bytes of the real objects between two steps, by part; and the most that was alive, by counting."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": bf16, "activation_checkpointing": checkpointing,
        "per_device_train_batch_size": SEQUENCES, "max_steps": 3, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "weight_decay": 0.1,
    }  # fmt: skip
    model = real_model(config, "bfloat16" if lora and bf16 else "float32", lora)
    common = {"train_dataset": safety_dataset(config.vocab_size), "processing_class": tokenizer()}
    reference = reference_dataset(config.vocab_size)
    trainer: Any
    if rpsa:
        fisher = estimate_fisher(model, reference.batches(2, None), FisherConfig(progress=False))
        args = RPSAConfig(**settings, frozen_ratio="dynamic", every=1, window=2)
        trainer = RPSATrainer(model=model, args=args, fisher=fisher, reference_dataset=reference, **common)
    else:
        trainer = SFTTrainer(model=model, args=SFTConfig(**settings), **common)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        trainer.train()
    parts = {
        "weights": size_of([*model.parameters(), *model.buffers()]),
        "gradients": size_of(p for p in model.parameters() if p.requires_grad),
        "optimizer": size_of(t for state in trainer.optimizer.optimizer.state.values() for t in state.values()),
    }
    if rpsa:
        freezer, audit = trainer.freezer, trainer.rpsa.audit
        parts["Fisher"] = size_of(freezer._fisher.values())
        values = [*audit._initial.values(), *audit._opened[2].values()]
        parts["audit"] = size_of(values)
    return parts, parts["weights"] + parts.get("Fisher", 0) + live.peak


def size_of(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def planned_run(
    config: PreTrainedConfig, *, lora: bool, rpsa: bool, bf16: bool, checkpointing: bool
) -> StageMemory:
    shape, reference = Shape(SEQUENCES, LENGTH), Shape(SEQUENCES, THOUGHT) if rpsa else None
    freezing = Freezing(
        dynamic=True, control=False, raw_moments=False, gradient_only=False, audit=True, largest_k=1.0
    )
    with fake_tensors():
        model = build_model(config, "bfloat16" if lora and bf16 else "float32", LORA if lora else None)
        passes = dry_passes(model, shape, reference, Precision(bf16, checkpointing), accumulated=False)
        memory = align_memory(model, passes, "adamw_torch_fused", freezing if rpsa else None)
    return memory.on(1, "one GPU")


@pytest.mark.parametrize("rpsa", [False, True], ids=["plain", "rpsa"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_memory_is_what_is_alive(name: str, lora: bool, rpsa: bool, tmp_path: Path) -> None:
    how = {"lora": lora, "rpsa": rpsa, "bf16": True, "checkpointing": name == "deep"}
    parts, peak = live_run(CONFIGS[name], folder=tmp_path, **how)
    planned = planned_run(CONFIGS[name], **how)
    print(f"{name} {how}: kept {sum(planned.kept.values())} of {sum(parts.values())}, {planned.total} of {peak}")
    assert set(planned.kept) == set(parts)
    for part, size in parts.items():
        assert planned.kept[part] == pytest.approx(size, rel=0.02), part
    assert planned.total == pytest.approx(peak, rel=0.15)
