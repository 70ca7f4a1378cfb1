"""What the audit costs: its time as a share of a training run, at the paper's `every: 25`.

    python benchmarks/audit.py

One process, one thread; a 12M-parameter Llama, 8 sequences of 256 tokens a step, medians of three runs.
"""

import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rpsa import ConflictRatio, FisherDiagonal, Freezer
from rpsa.freezing.audit import Audit
from rpsa.parameters import trainable_parameters

EVERY, STEPS = 25, 50


def main() -> None:
    torch.set_num_threads(1)
    shares = [audit_share() for _ in range(3)]
    print(
        f"audit: {100 * statistics.median(shares):.2f}% of the run (of {[f'{100 * s:.2f}%' for s in shares]})"
    )


def audit_share() -> float:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    fisher = FisherDiagonal(
        {name: torch.rand(p.shape) ** 4 for name, p in trainable_parameters(model).items()}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    freezer = Freezer(model, fisher, ConflictRatio(window=1, every=EVERY))
    freezer.attach(optimizer)
    audit = Audit(freezer)
    ids = torch.randint(0, 8192, (8, 256))
    auditing = 0.0
    started = time.perf_counter()
    for _ in range(STEPS):
        if freezer.reference_due:
            model(input_ids=ids, labels=ids).loss.backward()
            freezer.capture_reference()
        model(input_ids=ids.flip(1), labels=ids.flip(1)).loss.backward()
        measuring = freezer.reference_captured
        freezer.mask_gradients()
        if measuring:
            before = time.perf_counter()
            audit.next_interval()
            auditing += time.perf_counter() - before
        optimizer.step()
        optimizer.zero_grad()
    before = time.perf_counter()
    audit.close()
    auditing += time.perf_counter() - before
    return auditing / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
