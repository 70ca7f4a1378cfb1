"""Compact training inside TRL: the weights of exact freezing, whatever a run goes through."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from helpers import trl_runs as t
from helpers.rank_runs import RANKS, assert_same, make_trainer, save_fisher, train
from helpers.ranks import run_ranks
from helpers.sharded import shard_on_cpus
from rpsa.errors import RPSAError
from rpsa.freezing.compact import CompactFreezer
from rpsa.parameters import trainable_parameters
from rpsa.sharding import full
from rpsa.training.trainer import AUDIT_FILE, RPSATrainer

CONSTANT: dict[str, Any] = {"frozen_ratio": "0.6", "optim": "adamw_torch"}
BUILDS = {"full": t.make_model, "lora": t.make_lora}


@pytest.fixture
def run(tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any) -> Any:
    def run(name: str, build: Any = t.make_model, resume: Path | None = None, **settings: Any) -> RPSATrainer:
        fisher = t.fisher_of(build(), reference)
        dtype = settings.pop("dtype", torch.float32)
        model = build()
        for parameter in model.parameters():
            if build is t.make_model or not parameter.requires_grad:  # PEFT has adapters in fp32
                parameter.data = parameter.data.to(dtype)
        if dtype != torch.float32:
            fisher = fisher.for_any_weights()
        args = t.config(tmp_path / name, **settings)
        trainer = t.make_trainer(
            model, args, safety_data, tokenizer, reference, fisher=fisher, eval_dataset=safety_data
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    return run


def weights_of(trainer: RPSATrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(
    "settings", [{"max_grad_norm": 0.0}, {"max_grad_norm": 0.1}], ids=["unclipped", "clipped"]
)
def test_it_ends_where_exact_freezing_ends(kind: str, settings: Any, run: Any) -> None:
    exact = weights_of(run("exact", BUILDS[kind], **CONSTANT | settings))
    trainer = run("compact", BUILDS[kind], compact=True, **CONSTANT | settings)
    close = 1e-6 if settings["max_grad_norm"] else 0.0
    for name, weights in weights_of(trainer).items():
        torch.testing.assert_close(weights, exact[name], rtol=close, atol=close)
    assert isinstance(trainer.freezer, CompactFreezer)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 8
    assert all(norm > 0 for norm in norms)


def test_a_dynamic_k_ends_there_too_where_the_optimizer_keeps_nothing(run: Any) -> None:
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "every": 2}
    exact, compact = run("exact", **settings), run("compact", compact=True, **settings)
    assert compact.rpsa.trajectory == exact.rpsa.trajectory
    assert len({entry["k"] for entry in compact.rpsa.trajectory}) > 1
    for name, weights in weights_of(compact).items():
        assert torch.equal(weights, weights_of(exact)[name])


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(
    "settings",
    [CONSTANT, CONSTANT | {"dtype": torch.bfloat16}, {"every": 2, "window": 2}],
    ids=["constant", "bf16 weights", "dynamic"],
)
def test_resuming_is_bit_identical(kind: str, settings: Any, run: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "compact": True}
    whole = run("whole", BUILDS[kind], **saving, **settings)
    resumed = run("resumed", BUILDS[kind], tmp_path / "whole" / "checkpoint-3", **saving, **settings)
    for name, weights in weights_of(whole).items():
        assert torch.equal(weights, weights_of(resumed)[name])
    assert whole.freezer.state_dict() == resumed.freezer.state_dict()
    assert whole.rpsa.report() == resumed.rpsa.report()


def test_bf16_weights_move_by_less_than_bf16_shows(run: Any) -> None:
    """Steps too small for bf16 add up in the masters."""
    small = CONSTANT | {"learning_rate": 1e-5, "dtype": torch.bfloat16, "weight_decay": 0.0, "max_steps": 8}
    lost, kept = run("exact", **small), run("compact", compact=True, **small)
    start = dict(t.make_model().to(torch.bfloat16).named_parameters())
    moved = [
        sum(int((weights != start[name]).sum()) for name, weights in weights_of(trainer).items())
        for trainer in (lost, kept)
    ]
    assert moved[1] > 0
    assert kept.rpsa.report()["frozen_elements_moved"] == 0


def test_the_audit_has_looked_and_the_card_says_so(run: Any, tmp_path: Path) -> None:
    trainer = run("out", compact=True, **CONSTANT)
    trainer.save_model(str(tmp_path / "final"))
    report = json.loads((tmp_path / "final" / AUDIT_FILE).read_text())
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 500
    assert "held the trainable elements alone" in (tmp_path / "final" / "README.md").read_text()
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(saved[name], weights) for name, weights in weights_of(trainer).items())


def test_the_best_checkpoint_is_what_is_left_in_the_end(run: Any, tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    keeping = {**steps, "greater_is_better": True}  # so that the first one is the best
    trainer = run("out", compact=True, load_best_model_at_end=True, **keeping, **CONSTANT)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-8"
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(saved[name], weights) for name, weights in weights_of(trainer).items())


def test_a_second_run_goes_on_in_the_same_optimizer(run: Any) -> None:
    once = {**CONSTANT, "compact": True, "max_steps": 3, "max_grad_norm": 0.0}
    trainer, exact = run("compact", **once), run("exact", **once | {"compact": False})
    for one in (trainer, exact):
        set_seed(5)  # which a trainer does when it is made
        one.train()
    for name, weights in weights_of(trainer).items():
        assert torch.equal(weights, weights_of(exact)[name])


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_after_an_interruption_starts_with_a_whole_optimizer(run: Any) -> None:
    trainer = run("out", compact=True, **CONSTANT | {"max_steps": 1})
    trainer.args.max_steps = 4
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable_parameters(trainer.model).values()}
    assert trainer.rpsa.report()["frozen_elements_moved"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_only": True}, "compact and gradient_only"),
        ({"frozen_moments": "raw"}, "compact and frozen_moments=raw"),
        ({"optim": "adafactor"}, "compact: optim adafactor does not treat each element by itself"),
    ],
)
def test_what_is_not_compact_is_one_line(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match=message):
        t.config(tmp_path, compact=True, **settings)


def test_a_checkpoint_of_another_kind_is_one_line(run: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    run("exact", **saving, **CONSTANT)
    with pytest.raises(RPSAError, match="was not saved by compact training"):
        run("compact", t.make_model, tmp_path / "exact" / "checkpoint-3", compact=True, **CONSTANT)


# Ranks

KIND, DTYPE = "llama", "float32"
COMPACT = {"frozen_ratio": "0.6", "compact": True, "save_strategy": "steps", "save_steps": 3}


def without_trajectory(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"trajectory": [{"tau": 0.0, "c": 0.0, "k": 0.6}]}


def train_sharded(folder: Path, fisher: Path, resume: Path | None) -> dict[str, Any]:
    shard_on_cpus()
    trainer = make_trainer(KIND, DTYPE, folder, fisher, **COMPACT)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    parameters = trainable_parameters(trainer.accelerator.unwrap_model(trainer.model))
    return {
        "report": trainer.rpsa.report(),
        "weights": {n: full(p).detach().clone() for n, p in parameters.items()},
    }


@pytest.mark.integration
def test_ranks_train_as_one_process_and_go_on(tmp_path: Path) -> None:
    fisher = save_fisher(KIND, DTYPE, tmp_path)
    one = run_ranks(1, train, tmp_path / "r1", KIND, DTYPE, tmp_path / "one", fisher, COMPACT)[0]
    exact = {**COMPACT, "compact": False}
    plain = run_ranks(1, train, tmp_path / "r2", KIND, DTYPE, tmp_path / "plain", fisher, exact)[0]
    copies = run_ranks(RANKS, train, tmp_path / "r3", KIND, DTYPE, tmp_path / "ddp", fisher, COMPACT)[0]
    shards = run_ranks(RANKS, train_sharded, tmp_path / "r4", tmp_path / "fsdp", fisher, None)[0]
    rest = run_ranks(
        RANKS, train_sharded, tmp_path / "r5", tmp_path / "rest", fisher, tmp_path / "fsdp" / "checkpoint-3"
    )[0]
    for found in (one, copies, shards, rest):
        assert_same(without_trajectory(found), without_trajectory(plain), DTYPE, tolerance=1e-5)
    for name, weights in shards["weights"].items():
        assert torch.equal(rest["weights"][name], weights)
