"""What RPSA costs at the size of Llama-3.1-8B: peak memory and tokens a second, beside the same run without it.

    python benchmarks/gpu_8b.py lora                                            # one card of 80 GB
    python benchmarks/gpu_8b.py fft --weights bfloat16                          # one card of 141 GB
    python benchmarks/gpu_8b.py fft --weights bfloat16 --methods plain compact  # one card of 80 GB
    torchrun --nproc-per-node 4 benchmarks/gpu_8b.py fft                        # FSDP2
    python benchmarks/gpu_8b.py lora --shape 1b --steps 2 --length 64 --batch 1  # a CPU

Random weights and tokens; activations in bf16 (autocast), checkpointed. Under LoRA the frozen base is bf16 and the
adapter fp32; in full fine-tuning the weights are fp32 unless `--weights` says otherwise. On a CPU all is fp32: without
bf16 units of its own it multiplies bf16 matrices hundreds of times slower. The loss is TRL's, without logits, as in the
trainer. `--json FILE` keeps the figures, also where a later method does not fit. `make gpu` runs this.
"""

import argparse
import gc
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rpsa import ConflictRatio, ConstantRatio, FisherConfig, FisherDiagonal, Freezer, estimate_fisher
from rpsa.fisher.log_probs import label_log_probs
from rpsa.freezing.audit import Audit
from rpsa.freezing.compact import CompactFreezer
from rpsa.parameters import trainable_parameters
from rpsa.sharding import rank, world_size

METHODS = ("plain", "rpsa", "compact")
RATIO = 0.6
"""k of compact training."""
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
LLAMA_3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "use_cache": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "test": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "head_dim": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}


def config_of(shape: str, layers: int | None = None) -> LlamaConfig:
    return LlamaConfig(**LLAMA_3 | SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}))


def weights_dtype(arguments: argparse.Namespace, device: torch.device) -> str:
    is_lora = arguments.paradigm == "lora"
    return "bfloat16" if is_lora and device.type == "cuda" else arguments.weights


def build(arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    is_lora = arguments.paradigm == "lora"
    config, dtype = config_of(arguments.shape, arguments.layers), weights_dtype(arguments, device)
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if is_lora:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(**LORA))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if world_size() > 1:
        from torch.distributed.fsdp import fully_shard

        for module in list(model.modules()):
            if type(module).__name__.endswith("DecoderLayer"):
                fully_shard(module)
        fully_shard(model)
    return model.train()


def tokens(arguments: argparse.Namespace, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank())
    vocabulary = SHAPES[arguments.shape].get("vocab_size", LLAMA_3["vocab_size"])
    return torch.randint(vocabulary, (arguments.batch, arguments.length), generator=generator).to(device)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def backward(model: nn.Module, ids: torch.Tensor) -> None:
    """The step of TRL's trainer: log-probabilities of the labels, tile by tile."""
    with autocast(ids.device):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    output.loss.backward()


def reasoning_backward(model: nn.Module, ids: torch.Tensor) -> None:
    """g_R, as `rpsa.training.reasoning` takes it."""
    with autocast(ids.device):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    rows = torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten()
    label_log_probs(logits.flatten(0, 1), rows, ids[:, 1:].flatten()).mean().neg().backward()


def measured_fisher(model: nn.Module, arguments: argparse.Namespace) -> FisherDiagonal:
    generator = torch.Generator().manual_seed(7)
    vocabulary = SHAPES[arguments.shape].get("vocab_size", LLAMA_3["vocab_size"])
    ids = torch.randint(vocabulary, (4, arguments.length), generator=generator)
    batches = [
        {"input_ids": i[None], "attention_mask": torch.ones_like(i[None]), "labels": i[None]} for i in ids
    ]
    with autocast(next(model.parameters()).device):
        fisher = estimate_fisher(model, batches, FisherConfig(probes=1, progress=False))
    # on the host, as one that was loaded; bf16 halves it and orders as well
    scores = {name: fisher.scores.pop(name).bfloat16() for name in list(fisher)}
    if world_size() == 1:
        scores = {name: scores.pop(name).cpu() for name in list(scores)}
    return FisherDiagonal(scores)


def run(
    model: nn.Module, arguments: argparse.Namespace, device: torch.device, method: str
) -> dict[str, float]:
    parameters = trainable_parameters(model)
    result: dict[str, float] = {}
    freezer = audit = None
    _reset_peak(device)
    if method != "plain":
        started = time.perf_counter()
        fisher = measured_fisher(model, arguments)
        result["fisher seconds a sample"] = (time.perf_counter() - started) / 4
        result["fisher peak GiB"] = _peak(device)
        if method == "compact":
            freezer = CompactFreezer(model, fisher, ConstantRatio(RATIO))
        else:
            freezer = Freezer(model, fisher, ConflictRatio(window=1, every=arguments.every))
        del fisher
        _reset_peak(device)
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[arguments.optimizer](parameters.values(), lr=1e-5, weight_decay=1e-4)
    if freezer is not None:
        freezer.attach(optimizer)
        audit = Audit(freezer)
        audit.open()
    started = time.perf_counter()
    for step in range(arguments.steps):
        if step == 1:  # the first step allocates the optimizer's state
            _synchronise(device)
            started = time.perf_counter()
        if freezer is not None and freezer.reference_due:
            reasoning_backward(model, tokens(arguments, device, seed=1))
            freezer.capture_reference()
        backward(model, tokens(arguments, device, seed=step + 2))
        if freezer is not None and audit is not None:
            is_measuring = freezer.reference_captured
            freezer.mask_gradients()
            if is_measuring:
                audit.next_interval()
        if method == "compact":
            assert freezer is not None
            freezer.clip_grad_norm_(1.0)
        else:
            clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _synchronise(device)
    steps = arguments.steps - 1
    result["tokens a second"] = (
        steps * arguments.batch * arguments.length * world_size() / (time.perf_counter() - started)
    )
    result["peak GiB"] = _peak(device)
    if freezer is not None and audit is not None:
        audit.close()
        result["frozen elements moved"] = audit.report()["frozen_elements_moved"]
        freezer.detach()
    return result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float:
    """Of this rank: allocated on the GPU; on a CPU the process's largest size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paradigm", choices=["lora", "fft"])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=["plain", "rpsa"])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: what there is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if arguments.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    model = build(arguments, device)
    results: dict[str, dict[str, float]] = {}
    for method in arguments.methods:
        results[method] = run(model, arguments, device, method)
        if rank() == 0 and arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    if rank() == 0:
        count = sum(parameter.numel() for parameter in model.parameters())
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{count:,} parameters on {world_size()} x {name}, {vars(arguments)}")
        print(json.dumps(results, indent=1))
        for method in results if "plain" in results else ():
            share = results[method]["tokens a second"] / results["plain"]["tokens a second"]
            print(f"{method} has {100 * share:.1f}% of the plain run's tokens a second")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
