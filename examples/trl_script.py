# /// script
# requires-python = ">=3.11"
# dependencies = ["rpsa"]
# ///
"""RPSA in a TRL script, on a tiny reasoning model that comes with the package; half a minute on a laptop's CPU.

    python examples/trl_script.py [OUTPUT_DIR]

What an ordinary `SFTTrainer` script does not have: D_ref (the model's own responses to reasoning problems), the
Fisher on it, and `RPSATrainer` in place of `SFTTrainer`. For a real model, take `load_problems("math500.jsonl", ...)`
and `load_safety_data("safety.jsonl")`.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpsa import RPSAConfig, RPSATrainer, estimate_fisher
from rpsa.answers import grade
from rpsa.generation.transformers import TransformersGenerator
from rpsa.reference import ReferenceConfig, build_reference
from rpsa.safety_data import tokenize_safety_data
from rpsa.tiny import REFERENCE_FAMILIES, reasoning_problems, safety_examples, tiny_model_dir


def main(out: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(0))

    reference = build_reference(
        TransformersGenerator(model, tokenizer, batch_size=50),
        tokenizer,
        reasoning_problems(50, seed=0, families=REFERENCE_FAMILIES),
        ReferenceConfig(max_new_tokens=64),
        out / "reference",
        grade=lambda response, answer: grade(response, answer, "math"),
    )
    fisher = estimate_fisher(model, reference.batches(batch_size=10, max_length=None))
    fisher.save(out / "fisher")

    dataset, counts = tokenize_safety_data(
        safety_examples("balanced", 64, seed=0), tokenizer, max_length=None
    )
    print(f"{counts.examples} safety examples, {counts.response_tokens} response tokens")
    trainer = RPSATrainer(
        model=model,
        args=RPSAConfig(
            output_dir=str(out / "aligned"),
            per_device_train_batch_size=8,
            num_train_epochs=3,
            learning_rate=1e-3,
            frozen_ratio="dynamic",
            window=4,  # so short a run never fills the paper's window of 20 measurements, one every 25 steps
            every=2,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        fisher=fisher,
        reference_dataset=reference,
    )
    trainer.train()
    trainer.save_model()
    audit = json.loads((out / "aligned" / "rpsa_audit.json").read_text())
    print(
        f"{audit['frozen_elements_moved']} frozen elements moved, {audit['frozen_element_steps_checked']:,} checked"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trl-script"))
