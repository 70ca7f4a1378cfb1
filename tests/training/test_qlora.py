"""A base in 4 bits with LoRA adapters on it (QLoRA): adapters freeze exactly; the base alone is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.parameters import trainable_parameters
from rpsa.reference import ReferenceDataset, Trace
from rpsa.tiny import tiny_model_dir
from rpsa.training.config import RPSAConfig
from rpsa.training.trainer import RPSATrainer

pytest.importorskip("bitsandbytes")


def base() -> Any:
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        tiny_model_dir(0), quantization_config=four_bits, device_map={"": "cpu"}
    )


def sequences(n: int, seed: int) -> list[list[int]]:
    return torch.randint(5, 60, (n, 12), generator=torch.Generator().manual_seed(seed)).tolist()


def make_trainer(model: Any, fisher: FisherDiagonal, folder: Path) -> RPSATrainer:
    rows = sequences(16, seed=1)
    reference = [Trace(str(i), row[:3], row[3:], "", "stop", True) for i, row in enumerate(sequences(6, 2))]
    arguments: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2}
    arguments |= {"weight_decay": 0.1, "window": 2, "every": 1, "save_strategy": "no", "report_to": []}
    arguments |= {"use_cpu": True, "bf16": False, "disable_tqdm": True}
    return RPSATrainer(
        model=model,
        args=RPSAConfig(output_dir=str(folder), **arguments),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir(0)),
        fisher=fisher,
        reference_dataset=ReferenceDataset(reference),
    )


def test_adapters_on_a_base_of_four_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: Any = {"r": 2, "target_modules": ["up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(), LoraConfig(**settings))
    rows = torch.tensor(sequences(8, seed=3))
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    fisher = estimate_fisher(model, [batch], FisherConfig(progress=False))
    assert set(fisher) == set(trainable_parameters(model))
    trainer = make_trainer(model, fisher, tmp_path)
    trainer.train()
    report = trainer.rpsa.report()
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 1000
    assert all(group["changed"] > 0 for group in report["drift"]["groups"].values())


def test_a_quantised_base_itself_is_refused(tmp_path: Path) -> None:
    fisher = FisherDiagonal({"model.norm.weight": torch.ones(3)})
    with pytest.raises(RPSAError, match="quantised base weights cannot be fine-tuned in full"):
        make_trainer(base(), fisher, tmp_path)
