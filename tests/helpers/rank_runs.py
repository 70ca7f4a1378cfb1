"""Short runs of the trainer that come out the same on any number of ranks, and how they are compared."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.devices import DEVICE
from helpers.fisher_models import VOCABULARY, tiny_model
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.parameters import trainable_parameters
from rpsa.recipe.problems import installed_names
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.config import RPSAConfig
from rpsa.training.trainer import RPSATrainer

GLOBAL_BATCH = 4
RANKS = 2


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


QUIET: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "report_to": [],
    "use_cpu": DEVICE.type == "cpu",
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "activation_checkpointing": False,
}
"""Of every trainer in a test: nothing on the screen or the disk that no test asks for."""


def id_tokenizer() -> PreTrainedTokenizerFast:
    """For data that are token ids already."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def make_trainer(kind: str, dtype: str, folder: Path, fisher: Path, **settings: Any) -> RPSATrainer:
    disable_progress_bars()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = sequences(40, seed=2)
    data = Dataset.from_dict({"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]})
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-6,  # a smaller one makes a step of what is rounding in a gradient that is nearly 0
        **QUIET,
        "window": 2,
        "every": 1,
    }
    return RPSATrainer(
        model=make_model(kind, getattr(torch, dtype)),
        args=RPSAConfig(**installed_names(arguments | settings, RPSAConfig), output_dir=str(folder)),
        train_dataset=data,
        processing_class=id_tokenizer(),
        fisher=fisher,
        reference_dataset=reference(),
    )


def train(kind: str, dtype: str, folder: Path, fisher: Path, settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    resume = settings.pop("resume", None)
    trainer = make_trainer(kind, dtype, folder, fisher, **settings)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "trajectory": trainer.rpsa.trajectory,
        "report": trainer.rpsa.report(),
        "weights": {n: p.detach().clone() for n, p in trainable_parameters(model).items()},
        "logged": len([entry for entry in trainer.state.log_history if "rpsa/k" in entry]),
        "losses": [e[key] for key in ("loss", "train_loss") for e in trainer.state.log_history if key in e],
    }


def save_fisher(kind: str, dtype: str, folder: Path) -> Path:
    model = make_model(kind, getattr(torch, dtype))
    fisher = estimate_fisher(model, reference().batches(4, None), FisherConfig(progress=False))
    fisher.save(folder / f"fisher-{kind}-{dtype}")
    return folder / f"fisher-{kind}-{dtype}"


def weights_tolerance(kind: str, dtype: str, accumulation: int) -> float:
    """Sums over micro-batches are taken in another order on two ranks. In fp32 that is seen in LoRA's B, which starts
    at 0: one process that only cuts its batch differently ends up 5e-6 away."""
    return 1e-5 if "lora" in kind and dtype == "float32" and accumulation > 1 else 1e-6


def assert_same(ours: dict[str, Any], expected: dict[str, Any], dtype: str, tolerance: float = 1e-6) -> None:
    """The tolerances of every comparison between runs on different numbers of ranks."""
    pairs = list(zip(ours["trajectory"], expected["trajectory"], strict=True))
    furthest = {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in ("tau", "c", "k")}
    norms = [float((ours["weights"][n] - w).norm() / w.norm()) for n, w in expected["weights"].items()]
    print(f"DEVIATION {dtype} {furthest} weights {max(norms):.2g}")
    assert furthest["c"] <= 1e-5
    assert furthest["k"] <= (0 if dtype == "float64" else 1e-3)
    if furthest["k"] == 0:
        assert furthest["tau"] == 0
    assert max(norms) < tolerance
    for run in (ours, expected):
        assert run["report"]["frozen_elements_moved"] == 0
        assert run["report"]["frozen_element_steps_checked"] > 500


KINDS = ["llama", "qwen2", "llama+lora", "qwen2+lora"]
