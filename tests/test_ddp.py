"""DDP through the trainer: two gloo ranks do what one process does, from one saved Fisher and the same batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from fisher_models import VOCABULARY, tiny_model
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rpsa.fisher.config import FisherConfig
from rpsa.fisher.estimators import estimate_fisher
from rpsa.parameters import trainable_parameters
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.config import RPSAConfig
from rpsa.training.trainer import RPSATrainer

GLOBAL_BATCH = 4


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """`kind`: llama (untied) or qwen2 (tied), then perhaps +lora."""
    base, _, adapter = kind.partition("+")
    model: Any = tiny_model(base).to(dtype)
    if not adapter:
        return model
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 2, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).to(dtype)


def sequences(n: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 14, (n,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (m,), generator=generator).tolist() for m in lengths]


def reference() -> ReferenceDataset:
    rows = sequences(11, seed=3)
    return ReferenceDataset([Trace(str(i), r[:2], r[2:], "", "stop", True) for i, r in enumerate(rows)])


def make_trainer(kind: str, dtype: str, folder: Path, fisher: Path, **settings: Any) -> RPSATrainer:
    disable_progress_bars()
    ranks = int(__import__("os").environ.get("WORLD_SIZE", "1"))
    rows = sequences(40, seed=2)
    data = Dataset.from_dict({"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]})
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "window": 2,
        "every": 1,
    }
    return RPSATrainer(
        model=make_model(kind, getattr(torch, dtype)),
        args=RPSAConfig(**arguments | settings, output_dir=str(folder)),
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
        fisher=fisher,
        reference_dataset=reference(),
    )


def train(kind: str, dtype: str, folder: Path, fisher: Path, settings: dict[str, Any]) -> dict[str, Any]:
    resume = settings.pop("resume", None)
    trainer = make_trainer(kind, dtype, folder, fisher, **settings)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    weights = {n: p.detach().clone() for n, p in trainable_parameters(trainer.accelerator.unwrap_model(trainer.model)).items()}
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "trajectory": trainer.rpsa.trajectory,
        "report": trainer.rpsa.report(),
        "weights": weights,
        "logs": len(trainer.state.log_history),
    }


def save_fisher(kind: str, dtype: str, folder: Path) -> Path:
    fisher = estimate_fisher(
        make_model(kind, getattr(torch, dtype)), reference().batches(4, None), FisherConfig(progress=False)
    )
    fisher.save(folder)
    return folder


def deviations(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    pairs = list(zip(ours["trajectory"], expected["trajectory"], strict=True))
    return {
        "tau": max(abs(a["tau"] - b["tau"]) for a, b in pairs),
        "c": max(abs(a["c"] - b["c"]) for a, b in pairs),
        "k": max(abs(a["k"] - b["k"]) for a, b in pairs),
        "weights": max(
            float((ours["weights"][n] - w).norm() / w.norm()) for n, w in expected["weights"].items()
        ),
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama+lora"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_train_as_one(
    kind: str, dtype: str, accumulation: int, checkpointing: bool, tmp_path: Path
) -> None:
    fisher = save_fisher(kind, dtype, tmp_path / "fisher")
    settings = {"gradient_accumulation_steps": accumulation, "activation_checkpointing": checkpointing}
    [alone] = run_ranks(1, train, tmp_path / "one", kind, dtype, tmp_path / "one", fisher, settings)
    first, second = run_ranks(2, train, tmp_path / "two", kind, dtype, tmp_path / "two", fisher, settings)
    assert first["engine"] == "DistributedDataParallel"
    assert first["trajectory"] == second["trajectory"]
    assert all(torch.equal(w, second["weights"][n]) for n, w in first["weights"].items())
    found = deviations(first, alone)
    print(kind, dtype, accumulation, checkpointing, found, [round(e["k"],3) for e in alone["trajectory"]], [round(e["c"],3) for e in alone["trajectory"]])
    assert first["report"]["frozen_elements_moved"] == 0
    assert first["report"]["frozen_element_steps_checked"] == alone["report"]["frozen_element_steps_checked"]
