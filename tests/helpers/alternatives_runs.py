"""Short runs of the alternatives' trainer."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from helpers.fisher_models import VOCABULARY
from helpers.rank_runs import QUIET, id_tokenizer, make_model, reference, sequences
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.parameters import trainable_parameters
from rpsa.recipe.problems import installed_names
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer


def safety_rows(n: int = 12) -> Dataset:
    rows = sequences(n, seed=2)
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]})


def opposed() -> ReferenceDataset:
    """D_ref that begins as the safety data does and goes on otherwise, so that the gradients conflict."""
    rows = safety_rows(40)["input_ids"]
    answers = [[(token + 9) % (VOCABULARY - 2) + 2 for token in row[2:]] for row in rows]
    return ReferenceDataset(
        [
            Trace(str(i), row[:2], answer, "", "stop", True)
            for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]
    )


def make_trainer(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> AlternativesTrainer:
    model = make_model(kind, dtype)
    fisher = estimate_fisher(model, reference().batches(4, None), FisherConfig(progress=False))
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        **QUIET,
    }
    return AlternativesTrainer(
        model=model,
        args=AlternativesConfig(
            **installed_names(arguments | settings, AlternativesConfig), output_dir=str(folder)
        ),
        train_dataset=safety_rows(40),
        processing_class=id_tokenizer(),
        fisher=fisher,
        reference_dataset=opposed(),
    )


def trained(folder: Path, kind: str = "llama", resume: str | None = None, **settings: Any) -> Any:
    trainer = make_trainer(folder, kind, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainable_parameters(trainer.model).items()}
