"""One Fisher from several ranks, with the model replicated or sharded: what one process finds, to rounding."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from helpers.fisher_models import ragged_batch, relative_error, tiny_model, with_lora
from helpers.ranks import run_ranks
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.fisher.squares import SquaredGradients
from rpsa.sharding import full

BATCHES = [  # as many batches as leave one of two ranks, and two of three, without a last one
    ragged_batch([(2, 5), (3, 9), (1, 3)], seed=1),
    ragged_batch([(4, 2), (2, 7)], seed=2),
    ragged_batch([(1, 12), (5, 5), (2, 2)], seed=3),
    ragged_batch([(3, 1)], seed=4),
    ragged_batch([(2, 6), (2, 3)], seed=5),
]


def build(kind: str) -> nn.Module:
    base, _, adapter = kind.partition("+")
    model = tiny_model(base)
    return with_lora(model) if adapter else model


class Twice(nn.Module):
    """A model with a module that is called twice, which hooks find out about in a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.extra = nn.Linear(23, 23)

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = self.extra(output.logits) + self.extra(output.logits.square())
        return output


def wrap(model: nn.Module, engine: str) -> nn.Module:
    if dist.is_initialized() and engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if dist.is_initialized() and engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for module in model.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                fully_shard(module)
        if not getattr(model, "config", None) or not model.config.tie_word_embeddings:
            for name, module in list(model.named_modules()):
                if name.endswith(("lm_head", "embed_tokens")):
                    fully_shard(module)  # as accelerate does, which puts a subclass in the module's place
        fully_shard(model)
    return model


def estimate(
    kind: str,
    engine: str,
    settings: dict[str, Any],
    sample_size: int,
    folder: Path | None,
    spoil: bool = False,
) -> Any:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    SquaredGradients.__init__.__defaults__ = (sample_size,)
    torch.manual_seed(0)
    model = build(kind.removesuffix("*"))
    if kind.endswith("*"):
        model = Twice(model)
    if spoil:  # sample 1 of the first batch and the only one of the fourth have log-probabilities of NaN
        spoil_tokens(model)
    model = wrap(model, engine)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    fisher = estimate_fisher(model, BATCHES, FisherConfig(progress=False, **settings))
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    if folder is not None:
        fisher.save(folder)
    return {
        "scores": {name: full(fisher[name]).clone() for name in fisher},
        "held": sum(getattr(s, "_local_tensor", s).numel() for s in fisher.scores.values()),
        "threshold": fisher.threshold(0.6),
        "mask": {n: full(m) for n, m in fisher.mask(0.6).items()},
        "manifest": fisher.manifest,
    }


def spoil_tokens(model: nn.Module) -> None:
    tokens = {int(BATCHES[0]["input_ids"][1, 3]), int(BATCHES[3]["input_ids"][0, 0])}

    def forward(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        bad = torch.isin(inputs[0], torch.tensor(sorted(tokens)))
        return output.masked_fill(bad.unsqueeze(-1), float("nan"))

    next(m for m in model.modules() if isinstance(m, nn.Embedding)).register_forward_hook(forward)


CASES = [
    ("llama", "ddp", {}, 2),
    ("llama", "fsdp2", {}, 2),
    ("llama", "fsdp2", {"probes": 12}, 3),
    ("qwen2", "fsdp2", {}, 2),
    ("llama+lora", "fsdp2", {}, 2),
    ("llama", "fsdp2", {"estimator": "per_token"}, 2),
    ("llama*", "fsdp2", {}, 2),
    ("qwen2", "ddp", {"estimator": "per_token"}, 3),
    ("llama+lora", "ddp", {"estimator": "per_sequence"}, 2),
    ("qwen3", "fsdp2", {"scope": "mlp"}, 3),
]


def how_often(number: int, place: int) -> list[pytest.MarkDecorator]:
    if (number + place) % 2 or number > 6:
        return [pytest.mark.slow]
    return [pytest.mark.integration] if number > 1 else []


def both_ways() -> list[Any]:
    """Each case with the split halves on all elements and on a sample of them."""
    return [
        pytest.param(*case, size, marks=how_often(number, place))
        for number, case in enumerate(CASES)
        for place, size in enumerate((1 << 24, 1000))
    ]


@pytest.mark.parametrize(("kind", "engine", "settings", "ranks", "sample_size"), both_ways())
def test_ranks_find_what_one_process_finds(
    kind: str, engine: str, settings: dict[str, Any], ranks: int, sample_size: int, tmp_path: Path
) -> None:
    [alone] = run_ranks(1, estimate, tmp_path / "one", kind, engine, settings, sample_size, None)
    folder = tmp_path / "fisher"
    several = run_ranks(ranks, estimate, tmp_path / "several", kind, engine, settings, sample_size, folder)
    for one in several:
        assert relative_error(one["scores"], alone["scores"]) < 1e-5
        ours, theirs = one["manifest"], alone["manifest"]
        assert ours["data_fingerprint"] == theirs["data_fingerprint"]
        assert ours["fingerprint"] == theirs["fingerprint"]
        for key in ("samples", "tokens", "skipped", "path"):
            assert ours["estimation"][key] == theirs["estimation"][key]
        for k, overlap in theirs["estimation"]["split_half"].items():
            assert ours["estimation"]["split_half"][k] == pytest.approx(overlap, abs=0.01)
    print(
        "relative error",
        relative_error(several[0]["scores"], alone["scores"]),
        alone["manifest"]["estimation"]["path"],
    )
    if engine == "fsdp2":
        sizes = [one["held"] for one in several]
        assert sum(sizes) == sum(score.numel() for score in alone["scores"].values())
        assert max(sizes) < 0.7 * sum(sizes)
    loaded = FisherDiagonal.load(folder)
    assert all(torch.equal(loaded[n], several[0]["scores"][n]) for n in loaded)
    assert loaded.threshold(0.6) == several[0]["threshold"]
    assert all(torch.equal(m, several[0]["mask"][n]) for n, m in loaded.mask(0.6).items())


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.integration)])
def test_samples_that_are_not_finite_are_left_out_on_all_ranks(engine: str, tmp_path: Path) -> None:
    arguments = ("llama", engine, {}, 1 << 24, None, True)
    [alone] = run_ranks(1, estimate, tmp_path / "one", *arguments)
    assert alone["manifest"]["estimation"]["samples"] < 11
    for one in run_ranks(2, estimate, tmp_path / "two", *arguments):
        assert relative_error(one["scores"], alone["scores"]) < 1e-5
        for key in ("samples", "tokens", "skipped", "path"):
            assert one["manifest"]["estimation"][key] == alone["manifest"]["estimation"][key]


def different_data() -> str:
    dist.init_process_group("gloo")
    try:
        estimate_fisher(build("llama"), BATCHES[dist.get_rank() :], FisherConfig(progress=False))
    except RPSAError as error:
        return str(error)
    return ""


def test_ranks_must_have_the_same_samples(tmp_path: Path) -> None:
    for message in run_ranks(2, different_data, tmp_path):
        assert message.startswith("the ranks have different samples")
