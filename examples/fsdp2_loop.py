# /// script
# requires-python = ">=3.11"
# dependencies = ["rpsa"]
# ///
"""RPSA in a plain PyTorch loop on several GPUs: FSDP2's `fully_shard`, gradient accumulation, and a checkpoint.

    torchrun --nproc-per-node 2 examples/fsdp2_loop.py [FOLDER]

What differs from `plain_pytorch_loop.py` is what FSDP2 asks for in any loop. `estimate_fisher` gets the same batches
on every rank and shares them out; each rank holds its shard of the scores, of the signs and of the audit's checksums.
Started again with the same FOLDER it goes on from its checkpoint, on as many ranks as there are then. It runs on GPUs
where there are some, on CPU processes elsewhere.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from rpsa import ConflictRatio, FisherConfig, FisherDiagonal, Freezer, estimate_fisher
from rpsa.freezing.audit import Audit
from rpsa.tiny import tiny_model_dir

STEPS, CHECKPOINT_AT = 8, 4
GLOBAL_BATCH, ACCUMULATION = 8, 2


def random_batches(vocabulary: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Stand-ins for D_ref and D_S: the same on every rank, as a data loader's sampler would have them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, vocabulary, (STEPS, GLOBAL_BATCH, 24), generator=generator)
    return [
        {"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in tokens
    ]


def part(batch: dict[str, torch.Tensor], number: int, device: torch.device) -> dict[str, torch.Tensor]:
    """This rank's rows of the `number`-th of the parts that are accumulated; all parts are of equal size."""
    place = number * dist.get_world_size() + dist.get_rank()
    return {
        key: value.chunk(ACCUMULATION * dist.get_world_size())[place].to(device)
        for key, value in batch.items()
    }


def accumulate(model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> float:
    """The gradient of a global batch and its loss: ranks average theirs after the last part."""
    total = torch.zeros((), device=device)
    for number in range(ACCUMULATION):
        model.set_requires_gradient_sync(number == ACCUMULATION - 1)
        loss = model(**part(batch, number, device)).loss / ACCUMULATION
        loss.backward()
        total += loss.detach() / dist.get_world_size()
    dist.all_reduce(total)
    return float(total)


def main(folder: Path) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
    model.config.use_cache = False
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    reference = random_batches(model.config.vocab_size, seed=1)
    safety = random_batches(model.config.vocab_size, seed=2)

    if not (folder / "fisher" / "manifest.json").is_file():
        fisher = estimate_fisher(model, reference, FisherConfig(probes=1, progress=False))
        fisher.save(folder / "fisher")
    fisher = FisherDiagonal.load(folder / "fisher")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    freezer = Freezer(model, fisher, ConflictRatio(window=2, every=1))
    freezer.attach(optimizer)
    checkpoint = folder / "checkpoint"
    if checkpoint.is_dir():
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        freezer.load_state_dict(json.loads((folder / "freezer.json").read_text()))

    audit = Audit(freezer)
    audit.open()
    for step in range(freezer.step, STEPS):
        if freezer.reference_due:
            accumulate(model, reference[step], device)
            freezer.capture_reference()
        loss = accumulate(model, safety[step], device)
        freezer.mask_gradients()
        audit.next_interval()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}  loss {loss:.3f}  c {freezer.conflict:.5f}  k {freezer.frozen_ratio:.3f}")
        if step + 1 == CHECKPOINT_AT:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
            if dist.get_rank() == 0:
                (folder / "freezer.json").write_text(json.dumps(freezer.state_dict()))
    audit.close()
    report = audit.report()
    if dist.get_rank() == 0:
        print(
            f"{report['frozen_elements_moved']} frozen elements moved, "
            f"{report['frozen_element_steps_checked']:,} checked"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fsdp2-loop"))
