"""What a Fisher estimate costs, in units of a plain batched forward and backward pass over the same samples.

    python benchmarks/fisher.py [--hidden 256] [--tokens 256] [--samples 64] [--batch 8] [--rounds 3]

A random Llama, one thread, one process; CPU time, rounds interleaved, medians. Each figure is a whole call of
`estimate_fisher`: the check of the hooks against the loop, the overlap and the fingerprints included.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rpsa.fisher import estimators
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.fisher.hooked import NotHookable

VOCABULARY = 4096
PROMPT = 16


def build_model(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def build_batches(samples: int, batch: int, tokens: int) -> list[dict[str, Any]]:
    result = []
    for _ in range(samples // batch):
        ids = torch.randint(VOCABULARY, (batch, tokens))
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return result


def forward_backward(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    """What a training step does, without the optimizer."""
    for batch in batches:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        targets = batch["labels"][:, 1:].flatten()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100).backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def loop_only() -> Iterator[None]:
    """Make the estimator take its loop, as it does for a model that the hooks do not know."""

    def refuse(*_: object) -> None:
        raise NotHookable("benchmark")

    hooks = estimators.Hooks
    estimators.Hooks = refuse  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        estimators.Hooks = hooks  # type: ignore[misc]


def token_by_token(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    """Eq. 4 with one plain backward pass for each token of one sample."""
    parameters = list(model.parameters())
    squares = [torch.zeros_like(p) for p in parameters]
    ids = batches[0]["input_ids"][:1]
    log_probs = model(input_ids=ids, use_cache=False).logits[0, PROMPT - 1 : -1].log_softmax(-1)
    for t, token in enumerate(ids[0, PROMPT:]):
        gradients = torch.autograd.grad(log_probs[t, token], parameters, retain_graph=True)
        for square, gradient in zip(squares, gradients, strict=True):
            square.addcmul_(gradient, gradient)


def seconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 256), ("tokens", 256), ("samples", 64), ("batch", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model = build_model(args.hidden)
    batches = build_batches(args.samples, args.batch, args.tokens)
    one = [{key: value[:1] for key, value in batches[0].items()}]

    def fisher(data: list[dict[str, Any]], **fields: Any) -> None:
        estimate_fisher(model, data, FisherConfig(progress=False, **fields))

    def loop(**fields: Any) -> None:
        with loop_only():
            fisher(batches, **fields)

    # name -> (what to run, how many samples it covers)
    cases: dict[str, tuple[Callable[[], None], int]] = {
        "plain forward + backward": (lambda: forward_backward(model, batches), args.samples),
        "hooked, token_signs m = 1": (lambda: fisher(batches, probes=1), args.samples),
        "hooked, token_signs m = 4": (lambda: fisher(batches, probes=4), args.samples),
        "hooked, per_sequence": (lambda: fisher(batches, estimator="per_sequence"), args.samples),
        "loop, token_signs m = 1": (lambda: loop(probes=1), args.samples),
        "loop, token_signs m = 4": (lambda: loop(probes=4), args.samples),
        "per_token": (lambda: fisher(one, estimator="per_token"), 1),
        "one backward a token": (lambda: token_by_token(model, batches), 1),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(args.rounds):
        for name, (function, covered) in cases.items():
            if covered > 1 or number == 0:  # the exact ones take minutes
                times[name].append(seconds(function) / covered)
    unit = statistics.median(times["plain forward + backward"])
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {VOCABULARY}, {vars(args)}\n"
    )
    print("| | ms a sample | x plain |\n|---|---:|---:|")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {1000 * median:.1f} | {median / unit:.2f} |")


if __name__ == "__main__":
    main()
