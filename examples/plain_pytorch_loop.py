# /// script
# requires-python = ">=3.11"
# dependencies = ["rpsa"]
# ///
"""RPSA in a plain PyTorch loop, on a tiny reasoning model that comes with the package; a minute on a laptop's CPU.

    python examples/plain_pytorch_loop.py

It measures the Fisher on the model's own chains of thought, then fine-tunes on refusals with a frozen ratio that
follows the conflict between the two gradients, and shows that no frozen element moved.
"""

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpsa import ConflictRatio, FisherConfig, Freezer, estimate_fisher
from rpsa.chat import render_example, render_prompt
from rpsa.tiny import REFERENCE_FAMILIES, reasoning_problems, safety_examples, tiny_model_dir

STEPS = 60


def pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batch_of(examples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """(prompt ids, response ids) -> right-padded input_ids, attention_mask, labels."""
    rows = [prompt + response for prompt, response in examples]
    return {
        "input_ids": pad(rows, 0),
        "attention_mask": pad([[1] * len(row) for row in rows], 0),
        "labels": pad([[-100] * len(prompt) + response for prompt, response in examples], -100),
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(0))

    # D_ref: the model's own responses to reasoning problems
    reference = []
    for problem in reasoning_problems(40, seed=0, families=REFERENCE_FAMILIES):
        prompt = render_prompt(tokenizer, problem.prompt)
        output = model.generate(
            torch.tensor([prompt]), do_sample=True, temperature=0.6, top_p=0.95, max_new_tokens=64
        )
        reference.append((prompt, output[0, len(prompt) :].tolist()))
    batches = [batch_of(reference[i : i + 10]) for i in range(0, len(reference), 10)]
    fisher = estimate_fisher(model, batches, FisherConfig(probes=4, progress=False))
    print("split-half overlap of the top k:", fisher.manifest["estimation"]["split_half"])

    # D_S: refusals
    safety = []
    for example in safety_examples("refusals", 128, seed=0):
        rendered = render_example(tokenizer, example.prompt, example.response, max_length=None)
        start = sum(label == -100 for label in rendered.labels)
        safety.append((rendered.input_ids[:start], rendered.input_ids[start:]))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    freezer = Freezer(model, fisher, ConflictRatio(window=10, every=2))
    freezer.attach(optimizer)
    model.train()
    checked = moved = 0
    for step in range(STEPS):
        if freezer.reference_due:
            model(**batches[step // 2 % len(batches)]).loss.backward()
            freezer.capture_reference()
        loss = model(**batch_of(safety[step * 8 % 128 : step * 8 % 128 + 8])).loss
        loss.backward()
        freezer.mask_gradients()
        clip_grad_norm_(model.parameters(), 1.0)
        before = {name: parameter.detach().clone() for name, parameter in freezer.parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in freezer.parameters.items():
            frozen = freezer.frozen(name)
            checked += int(frozen.sum())
            moved += int((parameter != before[name])[frozen].sum())
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss:.3f}  c {freezer.conflict:.3f}  k {freezer.frozen_ratio:.2f}")
    freezer.detach()

    print(f"{moved} frozen elements moved, {checked:,} checked")


if __name__ == "__main__":
    main()
