"""A plain loop over `fully_shard`: two ranks do what one process does, and a checkpoint of four goes on with two."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_

import rpsa.freezing.audit as audit_module
from helpers.rank_runs import KINDS, RANKS, assert_same, make_model, save_fisher, weights_tolerance
from helpers.ranks import run_ranks
from helpers.sharded import STEPS, accumulate, batches, shard
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.freezing.audit import Audit
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.masks import control_scores
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio
from rpsa.parameters import trainable_parameters
from rpsa.sharding import full, rank, world_size


def train(
    kind: str,
    dtype: str,
    accumulation: int,
    checkpointing: bool,
    fisher_folder: Path,
    settings: dict[str, Any] | None = None,
    until: int = STEPS,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Trains up to step `until` and leaves a checkpoint, or goes on from the one that is there."""
    settings = dict(settings or {})
    model: Any = make_model(kind, getattr(torch, dtype))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    if dist.is_initialized():
        model = shard(model)
    fisher = FisherDiagonal.load(fisher_folder)
    parameters = trainable_parameters(model)
    ranking = control_scores(settings.pop("mask", "fisher"), fisher, parameters)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    kind_of_optimizer = settings.pop("optimizer", "adamw")
    more = {"momentum": 0.9} if kind_of_optimizer == "sgd" else {"eps": 1e-6}
    optimizer: Any = kinds[kind_of_optimizer](parameters.values(), lr=1e-3, weight_decay=0.1, **more)
    freezer = Freezer(model, fisher, ConflictRatio(window=2, every=1), ranking=ranking, **settings)
    freezer.attach(optimizer)
    if checkpoint is not None and checkpoint.is_dir():
        exchange(model, optimizer, freezer, checkpoint, is_saving=False)
    audit = Audit(freezer)
    if checkpoint is not None and checkpoint.is_dir():
        audit.set_start(torch.load(checkpoint / "start.pt"), step=0)
    audit.open()
    reasoning, safety = batches(seed=5), batches(seed=6)
    trajectory = []
    for step in range(freezer.step, until):
        accumulate(model, reasoning[step], accumulation)
        freezer.capture_reference()
        accumulate(model, safety[step], accumulation)
        freezer.mask_gradients()
        audit.next_interval()
        trajectory.append({"c": freezer.conflict, "k": freezer.frozen_ratio, "tau": freezer.threshold})
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    audit.close()
    if checkpoint is not None and until < STEPS:
        exchange(model, optimizer, freezer, checkpoint, is_saving=True)
        start = audit.start_values()
        if rank() == 0:
            torch.save(start, checkpoint / "start.pt")
    return {
        "trajectory": trajectory,
        "report": audit.report(),
        "weights": {n: full(p).detach().clone() for n, p in parameters.items()},
        "shares": freezer.frozen_counts(),
    }


def exchange(model: Any, optimizer: Any, freezer: Freezer, folder: Path, *, is_saving: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    if is_saving:
        dcp.save(state, checkpoint_id=folder)
        if rank() == 0:
            (folder / "freezer.json").write_text(json.dumps(freezer.state_dict()))
        return
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    freezer.load_state_dict(json.loads((folder / "freezer.json").read_text()))


Case = tuple[str, str, int, bool, dict[str, Any]]
ALL_CASES: list[Case] = [
    (*case, {}) for case in itertools.product(KINDS, ["float32", "float64"], [1, 4], [False, True])
]
CASES: list[Case] = [
    ("llama", "float32", 4, False, {}),
    ("qwen2", "float64", 4, True, {}),
    ("llama+lora", "float32", 4, True, {}),
    ("llama", "float64", 1, False, {"frozen_moments": "raw"}),
    ("qwen2", "float64", 1, False, {"mask": "magnitude", "zero_fisher": "frozen"}),
    ("llama", "float64", 4, False, {"mask": "random", "optimizer": "sgd"}),
]


def train_all(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    # one process takes the ranks' micro-batches in turn
    times = RANKS // world_size()
    return [
        train(kind, dtype, accumulation * times, checkpointing, folder / f"fisher-{kind}-{dtype}", settings)
        for kind, dtype, accumulation, checkpointing, settings in cases
    ]


def compare(cases: list[Case], folder: Path) -> None:
    for kind, dtype in {(kind, dtype) for kind, dtype, *_ in cases}:
        save_fisher(kind, dtype, folder)
    [alone] = run_ranks(1, train_all, folder / "one", cases, folder)
    first, second = run_ranks(RANKS, train_all, folder / "two", cases, folder)
    for case, expected, ours, theirs in zip(cases, alone, first, second, strict=True):
        print("CASE", case)
        assert ours["trajectory"] == theirs["trajectory"]
        assert ours["report"] == theirs["report"]
        assert ours["shares"] == expected["shares"]
        assert_same(ours, expected, case[1], weights_tolerance(*case[:3]))
        for group, drift in expected["report"]["drift"]["groups"].items():
            assert ours["report"]["drift"]["groups"][group]["relative"] == pytest.approx(
                drift["relative"], rel=1e-3
            )


@pytest.mark.parametrize(
    "cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.integration)], ids=["one", "others"]
)
def test_two_ranks_train_as_one_process(cases: list[Case], tmp_path: Path) -> None:
    compare(cases, tmp_path)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_in_every_way(tmp_path: Path) -> None:
    compare([case for case in ALL_CASES if case not in CASES], tmp_path)


def train_on(sampled: int, *args: Any) -> dict[str, Any]:
    dist.init_process_group("gloo")
    audit_module.SAMPLED_ELEMENTS = sampled
    return train(*args)


@pytest.mark.integration
@pytest.mark.parametrize(
    "sampled", [500, pytest.param(1 << 22, marks=pytest.mark.slow)], ids=["sampled", "all"]
)
def test_a_checkpoint_of_four_ranks_goes_on_with_two(sampled: int, tmp_path: Path) -> None:
    save_fisher("qwen2", "float64", tmp_path)
    arguments = (sampled, "qwen2", "float64", 1, False, tmp_path / "fisher-qwen2-float64", {})
    whole = run_ranks(4, train_on, tmp_path / "whole", *arguments)[0]
    started = run_ranks(4, train_on, tmp_path / "four", *arguments, 3, tmp_path / "checkpoint")[0]
    resumed = run_ranks(2, train_on, tmp_path / "two", *arguments, STEPS, tmp_path / "checkpoint")[0]
    resumed["trajectory"] = started["trajectory"] + resumed["trajectory"]
    assert_same(resumed, whole, "float64")
    drifts = [of["report"]["drift"] for of in (resumed, whole)]
    assert [drift["since_step"] for drift in drifts] == [0, 0]
    for group, drift in drifts[1]["groups"].items():
        assert drifts[0]["groups"][group] == pytest.approx(drift, rel=1e-6)


def what_moved() -> dict[str, Any]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = shard(nn.Linear(8, 7))  # an odd number of rows: the shards differ in size
    scores = {"weight": torch.rand(7, 8, generator=torch.Generator().manual_seed(1)) + 0.1}
    freezer = Freezer(model, FisherDiagonal(scores | {"bias": torch.zeros(7)}), ConstantRatio(0.5))
    freezer.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    audit = Audit(freezer)
    audit.open()
    frozen = freezer.frozen("weight")
    if rank() == 1:
        with torch.no_grad():
            shard_of_weight = model.weight.to_local()
            shard_of_weight.view(-1)[frozen.flatten().nonzero()[:3].flatten()] += 1
    freezer.step = 4
    audit.close()
    return audit.report()


def test_the_audit_counts_what_moved_on_another_rank(tmp_path: Path) -> None:
    for report in run_ranks(2, what_moved, tmp_path):
        assert report["frozen_elements_moved"] == 3
        assert report["frozen_element_steps_checked"] == 4 * 28
        assert report["intervals"][0]["tensors_changed"] == ("weight",)
        assert report["drift"]["groups"]["weight"]["changed"] == pytest.approx(3 / 56)


def unsupported() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    messages = []

    def refused(model: nn.Module) -> None:
        scores = {n: torch.rand(p.shape) + 0.1 for n, p in trainable_parameters(model).items()}
        with pytest.raises(RPSAError) as error:
            Freezer(model, FisherDiagonal(scores), ConstantRatio(0.5))
        messages.append(str(error.value))

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    refused(fully_shard(nn.Linear(4, 4), mesh=mesh))
    partly = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(partly[0])
    refused(partly)
    return messages


def test_other_ways_to_shard_are_refused(tmp_path: Path) -> None:
    for hybrid, partly in run_ranks(2, unsupported, tmp_path):
        assert "only FSDP2 over all ranks is supported" in hybrid
        assert "'0.weight' is sharded and '1.weight' is not" in partly


def freeze_at_once(folder: Path) -> tuple[float, float, dict[str, int], dict[str, int]]:
    dist.init_process_group("gloo")
    model = shard(make_model("llama"))
    rows = batches(seed=7)[0]
    data = [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}]
    fisher = estimate_fisher(model, data, FisherConfig(progress=False))
    fisher.save(folder)
    at_once = Freezer(model, fisher, ConstantRatio(0.6))
    later = Freezer(model, FisherDiagonal.load(folder), ConstantRatio(0.6))
    return at_once.threshold, later.threshold, at_once.frozen_counts(), later.frozen_counts()


def test_a_sharded_fisher_freezes_as_the_saved_one(tmp_path: Path) -> None:
    for tau, tau_later, counts, counts_later in run_ranks(2, freeze_at_once, tmp_path, tmp_path / "fisher"):
        assert tau == tau_later
        assert counts == counts_later
