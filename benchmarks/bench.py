"""Every figure of docs/benchmarks.md that is a ratio: what freezing and its measurements cost beside a named peer.

    python benchmarks/bench.py [--write] [--only PART] [--rounds 7]

One process and one thread on a CPU; the peers' rounds and ours alternate; medians, with the lowest and the highest.
`--write` puts the table into docs/benchmarks.md, between its two marks. Where there is CUDA, gpu_8b.py follows.
"""

import argparse
import gc
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.fisher.quantile import Ranking, threshold_rank
from rpsa.freezing.bits import BitMask
from rpsa.freezing.compact import CompactFreezer
from rpsa.freezing.conflict import opposed, signs
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio
from rpsa.parameters import trainable_parameters

K = 0.6
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, END = "<!-- make bench -->", "<!-- end of make bench -->"

Timed = Callable[[], float]


@dataclass(frozen=True)
class Row:
    what: str
    peer: str
    ratios: list[float]
    bar: str = ""

    def cells(self) -> list[str]:
        middle, low, high = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        spread = f"{middle:.2f} ({low:.2f} to {high:.2f})" if len(self.ratios) > 1 else f"{middle:.2f}"
        return [self.what, self.peer, spread, self.bar]


def seconds(work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    prepare()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratios(ours: Timed, peer: Timed, rounds: int) -> list[float]:
    """Of times taken in turn, the first of which is thrown away."""
    pairs = [(ours(), peer()) for _ in range(rounds + 1)][1:]
    return [mine / theirs for mine, theirs in pairs]


def compared(
    what: str, ours: Callable[[], Any], named: str, peer: Callable[[], Any], rounds: int, bar: str
) -> Row:
    found = ratios(lambda: seconds(ours), lambda: seconds(peer), rounds)
    return Row(what, named, found, bar)


def llama(hidden: int, layers: int, vocabulary: int = 8192) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
    )


def scores_of(model: nn.Module) -> FisherDiagonal:
    generator = torch.Generator().manual_seed(1)
    parameters = trainable_parameters(model)
    return FisherDiagonal({n: torch.rand(p.shape, generator=generator) for n, p in parameters.items()})


# The optimizer's part of a step


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-5, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-5, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-5, foreach=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-5, foreach=True),
}


def mask_and_clip(freezer: Freezer | None, parameters: dict[str, nn.Parameter]) -> None:
    if freezer is None:
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    else:
        freezer.mask_gradients()
        freezer.clip_grad_norm_(1.0)


def optimizer_part(kind: str, optimizer: str, model: Any, ratio: Any) -> Timed:
    """Mask, clip, step: with gradients that are there."""
    parameters = trainable_parameters(model)
    gradients = {name: torch.randn_like(p) for name, p in parameters.items()}
    made = OPTIMIZERS[optimizer](list(parameters.values()))
    freezer = attached(kind, model, made, ratio)

    def prepare() -> None:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()

    def work() -> None:
        mask_and_clip(freezer, parameters)
        made.step()

    return lambda: seconds(work, prepare)


BARS = {  # of compact training, and of exact freezing between changes of k
    "AdamW, foreach": ("0.8", "1.6"),
    "AdamW, fused": ("1.2", ""),
    "Adam": ("", "2.5"),
    "SGD": ("", "4"),
    "Adafactor": ("", "1.6"),
}


def step_rows(rounds: int) -> Iterator[Row]:
    for optimizer, bars in BARS.items():
        for kind, bar in zip(("compact", "exact"), bars, strict=True):
            if (kind, optimizer) == ("compact", "Adafactor"):
                continue  # which does not treat each element by itself
            # a step in which the conflict could be measured, and is not, is one between two changes of k
            ratio = ConstantRatio(K) if kind == "compact" else ConflictRatio()
            ours = optimizer_part(kind, optimizer, llama(384, 8), ratio)
            peer = optimizer_part("plain", optimizer, llama(384, 8), None)
            name = "compact, constant k" if kind == "compact" else "exact, between changes of k"
            found = ratios(ours, peer, rounds)
            yield Row(f"mask + clip + step, {optimizer}: {name}", "without freezing", found, bar)
            gc.collect()


def whole_step(kind: str, tokens: int) -> Timed:
    model = llama(192, 4, vocabulary=4096)
    model.train()
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-5, foreach=True)
    freezer = attached(kind, model, optimizer)
    ids = torch.randint(4096, (1, tokens))

    def work() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        mask_and_clip(freezer, parameters)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(work)


def loop_rows(rounds: int) -> Iterator[Row]:
    for tokens, bar in ((64, "1.05"), (256, "1.00"), (1024, "0.99")):
        for kind in ("compact", "exact"):
            found = ratios(whole_step(kind, tokens), whole_step("plain", tokens), 3 * rounds)
            what = f"a whole step, 3M parameters, {tokens} tokens, AdamW: {kind}, constant k"
            yield Row(what, "without freezing", found, bar if kind == "compact" else "")


def trainer_rows(rounds: int) -> Iterator[Row]:
    """Twenty steps of TRL's trainer, as a user has them."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer

    from rpsa.tiny import tiny_model_dir
    from rpsa.training.config import RPSAConfig
    from rpsa.training.trainer import RPSATrainer

    logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(0))
    ids = torch.randint(3, len(tokenizer), (80, 128)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    common = {"max_steps": 20, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "logging_steps": 1000}

    def seconds_of(kind: str, folder: str) -> float:
        model = llama(192, 4, vocabulary=len(tokenizer))
        given = {"model": model, "train_dataset": data, "processing_class": tokenizer}
        with redirect_stdout(StringIO()):
            if kind == "plain":
                trainer = SFTTrainer(args=SFTConfig(output_dir=folder, **common), **given)
            else:
                own = {"frozen_ratio": K, "compact": kind == "compact"}
                args = RPSAConfig(output_dir=folder, **own, **common)
                trainer = RPSATrainer(args=args, fisher=scores_of(model), **given)
            return float(trainer.train().metrics["train_runtime"])

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("compact", "exact"):
            found = ratios(
                lambda kind=kind: seconds_of(kind, folder), lambda: seconds_of("plain", folder), rounds
            )
            yield Row(
                f"20 steps of the trainer, audit included: {kind}, constant k", "TRL's SFTTrainer", found
            )


def state_rows(rounds: int) -> Iterator[Row]:
    """Bytes a parameter, weights included, between the backward pass and the step of AdamW."""
    names = {
        "plain": "without freezing, fp32 weights (bf16 autocast)",
        "exact": "exact, fp32 weights (bf16 autocast)",
        "compact": "compact, bf16 weights (a CPU keeps 3.2 more, of indices)",
    }
    for kind, name in names.items():
        model = llama(384, 8).to(torch.bfloat16 if kind == "compact" else torch.float32)
        parameters = trainable_parameters(model)
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-5, foreach=False)
        freezer = attached(kind, model, optimizer)
        for _ in range(2):  # moments are made in the first step
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            if freezer is not None:
                freezer.mask_gradients()
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            whole: list[Tensor] = [*parameters.values(), *trained]
            held = [*whole, *(p.grad for p in whole if p.grad is not None)]
            optimizer.step()
        held += [value for state in optimizer.state.values() for value in state.values()]
        if freezer is not None:
            held += [bits.packed for bits in freezer.mask.values()]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        each = sum(sizes.values()) / sum(p.numel() for p in parameters.values())
        yield Row(f"training state: {name}", "bytes a parameter", [each], "8.6" if kind == "compact" else "")


def attached(kind: str, model: Any, optimizer: Any, ratio: Any = None) -> Freezer | None:
    if kind == "plain":
        return None
    made_by = CompactFreezer if kind == "compact" else Freezer
    freezer = made_by(model, scores_of(model), ratio or ConstantRatio(K))
    freezer.attach(optimizer)
    return freezer


# Measurements of the Fisher


def threshold_rows(rounds: int) -> Iterator[Row]:
    parts = [torch.rand(1 << 22) ** 8 for _ in range(24)]
    whole = torch.cat(parts)
    rank = threshold_rank(whole.numel(), K)

    def ours() -> None:
        Ranking(parts, sharded=False).value(rank)

    few, what = max(2, rounds // 3), "threshold of 100M scores"
    yield compared(what, ours, "kthvalue", lambda: whole.kthvalue(rank + 1), few, "0.20")
    yield compared(what, ours, "numpy.partition", lambda: np.partition(whole.numpy(), rank), few, "")
    yield compared(what, ours, "one sum over them", lambda: [part.sum() for part in parts], few, "15")


def conflict_rows(rounds: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(2)
    reasoning = {str(i): torch.randn(1 << 21, generator=generator) for i in range(10)}
    safety = {name: torch.randn(value.shape, generator=generator) for name, value in reasoning.items()}
    support = {name: BitMask.compare(value.abs(), "greater", 0.0) for name, value in reasoning.items()}

    def read() -> None:
        for name, value in reasoning.items():
            value.sum()
            safety[name].sum()

    what, peer = "conflict (Eq. 6) over 20M elements", "one sum over both gradients"
    yield compared(what, lambda: opposed(signs(reasoning, support), safety), peer, read, rounds, "2")


def score_rows(rounds: int) -> Iterator[Row]:
    scores = {str(i): torch.rand(1 << 22) for i in range(12)}

    def read() -> None:
        for score in scores.values():
            score.aminmax()

    what = "finiteness and sign of 50M scores"
    yield compared(what, lambda: FisherDiagonal(scores), "aminmax", read, rounds, "2")
    fisher = FisherDiagonal(scores)
    with tempfile.TemporaryDirectory() as folder:
        ours, raw = Path(folder) / "ours", Path(folder) / "raw.safetensors"
        yield compared(
            "FisherDiagonal.save, 200 MB", lambda: fisher.save(ours), "safetensors", lambda: save_file(scores, raw),
            rounds, "2",
        )  # fmt: skip

        def load() -> None:
            for score in load_file(raw).values():
                score.sum()

        named = "safetensors, each element read once"
        yield compared("FisherDiagonal.load", lambda: FisherDiagonal.load(ours), named, load, rounds, "2")


def fisher_rows(rounds: int) -> Iterator[Row]:
    few, config = max(2, rounds // 3), FisherConfig(probes=1, progress=False)
    for batch, tokens in ((8, 256), (4, 512)):
        model = llama(512, 8).eval()
        for count in (1, 4):
            data = batches(count * batch, batch, tokens)

            def ours(model: Any = model, data: Any = data) -> None:
                estimate_fisher(model, data, config)

            def peer(model: Any = model, data: Any = data) -> None:
                forward_backward(model, data)

            size = sum(p.numel() for p in model.parameters()) / 1e6
            what = (
                f"Fisher, token_signs, 1 probe, {count} x {batch} x {tokens} tokens, {size:.0f}M parameters"
            )
            yield compared(what, ours, "forward + backward", peer, few, "1.10" if count > 1 else "")
    if find_spec("opacus"):
        from opacus.grad_sample import GradSampleModule

        model = GradSampleModule(llama(512, 8).train())
        data = batches(16, 4, 512)
        plain = llama(512, 8).train()

        def by_sample() -> None:
            forward_backward(model, data)
            for parameter in model.parameters():
                parameter.grad_sample = None  # type: ignore[attr-defined]

        named = "opacus: gradients of each sample, 4 x 4 x 512 tokens"
        yield compared(named, by_sample, "forward + backward", lambda: forward_backward(plain, data), few, "")


def growth_rows(rounds: int) -> Iterator[Row]:
    """Exponents: 1 is time in proportion. Two decades, the time of each size the least of some rounds."""
    sizes = [(64, 2, 1024), (192, 4, 4096), (512, 10, 8192)]
    few = max(2, rounds // 2)

    def slope(numbers: list[float], times: list[float]) -> float:
        return math.log(times[-1] / times[0]) / math.log(numbers[-1] / numbers[0])

    def parameters(size: tuple[int, int, int]) -> int:
        return sum(p.numel() for p in llama(*size).parameters())

    def least(work: Timed) -> float:
        work()
        return min(work() for _ in range(few))

    numbers = [float(parameters(size)) for size in sizes]
    span = f"{numbers[0] / 1e6:.2f}M to {numbers[-1] / 1e6:.0f}M parameters"
    for kind in ("compact", "exact"):
        times = [least(optimizer_part(kind, "AdamW, foreach", llama(*size), None)) for size in sizes]
        yield Row(f"mask + clip + step, {kind}, {span}", "exponent", [slope(numbers, times)], "1.05")
    times = [fisher_seconds(llama(*size), 256, few) for size in sizes]
    yield Row(f"Fisher, 4 x 256 tokens, {span}", "exponent", [slope(numbers, times)], "1.05")
    tokens = [16.0, 160.0, 1600.0]
    times = [fisher_seconds(llama(192, 4, 4096), int(count), few) for count in tokens]
    yield Row("Fisher, 3M parameters, 4 x 16 to 4 x 1,600 tokens", "exponent", [slope(tokens, times)], "1.05")


def fisher_seconds(model: Any, tokens: int, rounds: int) -> float:
    """Of a pass: what a second batch adds to one."""
    model.eval()
    config = FisherConfig(probes=1, progress=False)
    vocabulary = model.config.vocab_size

    def taken(count: int) -> float:
        data = batches(4 * count, 4, tokens, vocabulary)
        return min(seconds(lambda: estimate_fisher(model, data, config)) for _ in range(rounds))

    taken(1)
    return (taken(5) - taken(1)) / 4


def batches(samples: int, batch: int, tokens: int, vocabulary: int = 8192) -> list[dict[str, Tensor]]:
    result = []
    for _ in range(samples // batch):
        ids = torch.randint(vocabulary, (batch, tokens))
        labels = ids.clone()
        labels[:, : tokens // 16] = -100
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return result


def forward_backward(model: Any, data: list[dict[str, Tensor]]) -> None:
    for batch in data:
        model.zero_grad(set_to_none=True)
        model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "optimizer": step_rows,
    "loop": loop_rows,
    "trainer": trainer_rows,
    "state": state_rows,
    "threshold": threshold_rows,
    "conflict": conflict_rows,
    "scores": score_rows,
    "fisher": fisher_rows,
    "growth": growth_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| What | beside | ratio: median (range) | bar |", "|---|---|---:|---:|"]
    print("\n".join(lines))
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            for row in part(arguments.rounds):
                lines.append(f"| {' | '.join(row.cells())} |")
                print(lines[-1], flush=True)
    if arguments.write:
        lines.append(
            f"\nOne thread of {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}."
        )
        before, rest = DOCS.read_text().split(START)
        DOCS.write_text(before + "\n\n".join([START, "\n".join(lines), END]) + rest.split(END)[1])
    if torch.cuda.is_available() and arguments.only is None:
        for paradigm in ("lora", "fft"):
            subprocess.run([sys.executable, Path(__file__).with_name("gpu_8b.py"), paradigm], check=True)


if __name__ == "__main__":
    main()
