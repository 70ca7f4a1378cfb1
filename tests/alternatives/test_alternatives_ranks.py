"""The alternatives on two ranks: DDP through the trainer, shards in a plain loop; one process is the reference."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from helpers.alternatives_runs import trained, weights_of
from helpers.rank_runs import make_model, save_fisher
from helpers.ranks import run_ranks
from helpers.sharded import STEPS, accumulate, batches, shard, shard_on_cpus
from rpsa.alternatives.after_training import interpolate, restore, starting_weights
from rpsa.alternatives.penalty import WeightPenalty
from rpsa.alternatives.projection import Projection
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.parameters import trainable_parameters
from rpsa.sharding import full, is_sharded


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], most: float) -> None:
    for name, expected in theirs.items():
        difference = (ours[name].double() - expected.double()).norm() / expected.double().norm().clamp_min(
            1e-12
        )
        assert difference <= most, (name, float(difference))


WAYS = [{"penalty": "fisher"}, {"projection": "agem"}, {"projection": "signs"}, {"restored_ratio": 0.5},
        {"kl": 1.0, "anchor_top": 3}, {"der": 0.5}]  # fmt: skip


def through_the_trainer(folder: Path) -> list[dict[str, torch.Tensor]]:
    # one process takes the ranks' micro-batches in turn
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    settings: dict[str, Any] = {"gradient_accumulation_steps": 4 if alone else 2, "dtype": torch.float64}
    return [weights_of(trained(folder / str(i), **settings, **way)) for i, way in enumerate(WAYS)]


@pytest.mark.integration
def test_ddp_through_the_trainer(tmp_path: Path) -> None:
    [alone] = run_ranks(1, through_the_trainer, tmp_path / "one", tmp_path / "runs-1")
    two = run_ranks(2, through_the_trainer, tmp_path / "two", tmp_path / "runs-2")
    for ours in two:
        for way, expected in zip(ours, alone, strict=True):
            same(way, expected, 1e-8)


SHARDED_WAYS: list[dict[str, Any]] = [
    {"penalty": "fisher", "interpolation": 0.5},
    {"projection": "agem", "restored_ratio": 0.5},
    {"kl": 1.0, "der": 0.1},
]


def through_fsdp2(folder: Path, resume: Path | None) -> list[dict[str, torch.Tensor]]:
    if "RANK" in os.environ:
        shard_on_cpus()
    alone = "RANK" not in os.environ
    results = []
    for number, way in enumerate(SHARDED_WAYS):
        settings: dict[str, Any] = {"gradient_accumulation_steps": 4 if alone else 2, **way}
        settings |= {"save_strategy": "steps", "save_steps": 2, "dtype": torch.float64}
        checkpoint = str(resume / str(number) / "checkpoint-2") if resume else None
        trainer = trained(folder / str(number), "llama", checkpoint, **settings)
        parameters = trainable_parameters(trainer.accelerator.unwrap_model(trainer.model))
        assert is_sharded(parameters) != alone
        results.append({n: full(p).detach().clone() for n, p in parameters.items()})
    return results


@pytest.mark.integration
def test_fsdp2_through_the_trainer_and_resumed(tmp_path: Path) -> None:
    [alone] = run_ranks(1, through_fsdp2, tmp_path / "one", tmp_path / "runs-1", None)
    whole = run_ranks(2, through_fsdp2, tmp_path / "two", tmp_path / "runs-2", None)[0]
    resumed = run_ranks(2, through_fsdp2, tmp_path / "three", tmp_path / "runs-3", tmp_path / "runs-2")[0]
    for number in range(len(SHARDED_WAYS)):
        same(whole[number], alone[number], 1e-8)
        same(resumed[number], whole[number], 1e-12)


def in_a_loop(way: str, fisher_folder: Path) -> dict[str, Any]:
    model: Any = make_model("llama", torch.float64)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        model = shard(model)
        assert is_sharded(trainable_parameters(model))
    fisher = FisherDiagonal.load(fisher_folder)
    start = starting_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-6)
    penalty = WeightPenalty(model, start, fisher if way == "fisher" else None, 0.5)
    projection = Projection(model, "signs" if way == "signs" else "agem")
    reasoning, safety = batches(seed=5), -batches(seed=5) + 40  # other tokens in the same places
    values = []
    for step in range(STEPS):
        if way in ("agem", "signs"):
            accumulate(model, reasoning[step], 1)
            projection.capture_reference()
        accumulate(model, safety[step].clamp(2, 20), 2)
        if way in ("agem", "signs"):
            projection.project_gradients()
            values.append(projection.cosine)
        if way in ("fisher", "uniform"):
            values.append(penalty.loss())
            penalty.add_gradients()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if way == "after":
        restore(model, start, fisher, 0.4)
        interpolate(model, start, 0.7)
    weights = {n: full(p).detach().clone() for n, p in trainable_parameters(model).items()}
    return {"weights": weights, "values": values}


@pytest.mark.parametrize(
    "way",
    [
        "fisher",
        "agem",
        *(pytest.param(way, marks=pytest.mark.integration) for way in ("uniform", "signs", "after")),
    ],
)
def test_shards_in_a_loop(way: str, tmp_path: Path) -> None:
    folder = save_fisher("llama", "float64", tmp_path / "fisher")
    [alone] = run_ranks(1, in_a_loop, tmp_path / "one", way, folder)
    two = run_ranks(2, in_a_loop, tmp_path / "two", way, folder)
    for ours in two:
        assert ours["values"] == pytest.approx(alone["values"], rel=1e-9)
        same(ours["weights"], alone["weights"], 1e-9)
    if way in ("agem", "signs"):
        assert min(alone["values"]) < 0
