"""The reasoning loss in trainers: the same training, one history, resumed or not, and the step that is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from helpers.trl_runs import (
    SFT_SETTINGS,
    RPSADPOConfig,
    RPSADPOTrainer,
    fisher_of,
    make_lora,
    make_model,
    rpsa_trainer,
)
from rpsa.parameters import trainable_parameters
from rpsa.reasoning_loss import reasoning_loss, record_original
from rpsa.recipe.problems import installed_names
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer
from rpsa.training.loss_callback import ORIGINAL, SAFETY_AND_REASONING, ReasoningLossCallback
from rpsa.training.trainer import ResumableSFTTrainer

HELD_OUT = ReferenceDataset(
    [Trace(f"h{i}", [2 + i, 3], [5 + i, 9 + i, 7, 1][: 2 + i % 3], "", "stop", True) for i in range(6)]
)
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4}
NAMES = ("eval_reasoning_nll", "eval_reasoning_kl")


def watched(trainer: Any) -> Any:
    trainer.add_callback(ReasoningLossCallback(trainer, HELD_OUT))
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}


def history(trainer: Any, *names: str) -> list[dict[str, Any]]:
    """All entries, or those with `names`, without what the clock says."""
    kept = [
        {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in kept if not names or set(names) <= set(entry)]


@pytest.mark.parametrize("build", [make_model, make_lora], ids=["full", "lora"])
def test_training_is_the_same_to_the_bit_and_the_loss_is_in_its_history(
    pieces: Any, build: Any, tmp_path: Path
) -> None:
    plain = rpsa_trainer(pieces, tmp_path / "plain", build, **EVALUATING)
    plain.train()
    trainer = watched(rpsa_trainer(pieces, tmp_path / "watched", build, **EVALUATING))
    trainer.train()
    ours, theirs = weights(trainer), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [entry for entry in history(trainer) if NAMES[0] not in entry] == history(plain)
    found = history(trainer, *NAMES)
    assert [entry["step"] for entry in found] == [0, 2, 4, 6, 8, 8]
    assert found[0]["eval_reasoning_kl"] == 0
    assert all(entry["eval_reasoning_kl"] > 0 for entry in found[1:])
    expected = reasoning_loss(trainer.model, HELD_OUT, 4096, record_original(build(), HELD_OUT, 4096))
    assert (found[-1]["eval_reasoning_nll"], found[-1]["eval_reasoning_kl"]) == (expected.nll, expected.kl)


def test_a_resumed_run_has_the_same_history_and_compares_with_the_original(
    pieces: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = watched(rpsa_trainer(pieces, tmp_path / "run", **EVALUATING))
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    resumed = watched(rpsa_trainer(pieces, tmp_path / "run", **EVALUATING))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert history(resumed) == history(whole)
    assert not caplog.records
    (tmp_path / "run" / ORIGINAL).unlink()
    without = watched(rpsa_trainer(pieces, tmp_path / "run", **EVALUATING))
    without.train(resume_from_checkpoint=checkpoint)
    assert "the reasoning KL of this run is not known" in caplog.text
    assert [entry["step"] for entry in history(without, NAMES[1])] == [0, 2, 4]
    assert [entry["step"] for entry in history(without, NAMES[0])] == [0, 2, 4, 6, 8, 8]


def plain_config(folder: Path, cls: Any = SFTConfig, **settings: Any) -> Any:
    return cls(**installed_names(SFT_SETTINGS | settings, cls), output_dir=str(folder))


def test_any_trainer_has_it_and_it_comes_after_what_changes_the_weights_in_the_end(
    pieces: Any, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"train_dataset": pieces.data, "processing_class": pieces.tokenizer}
    plain = watched(ResumableSFTTrainer(model=make_model(), args=plain_config(tmp_path / "sft"), **common))
    plain.train()
    assert [entry["step"] for entry in history(plain, *NAMES)] == [0, 8]
    args = plain_config(tmp_path / "alternatives", AlternativesConfig, interpolation=0.0)
    back = watched(AlternativesTrainer(model=make_model(), args=args, **common))
    back.train()
    assert [entry["eval_reasoning_kl"] for entry in history(back, *NAMES)] == [0, 0]  # it was put back


def test_a_trainer_for_preferences_has_it(pieces: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = {"prompt": ["w2 w3"] * 8, "chosen": [" w5 w6"] * 8, "rejected": [" w7 w8"] * 8}
    settings = installed_names(SFT_SETTINGS | {"max_steps": 2, "frozen_ratio": 0.5}, RPSADPOConfig)
    model = make_model()
    trainer = RPSADPOTrainer(
        model=model,
        ref_model=make_model(),
        args=RPSADPOConfig(**settings, output_dir=str(tmp_path)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=pieces.tokenizer,
        fisher=fisher_of(model, pieces.reference),
    )
    watched(trainer).train()
    assert [entry["step"] for entry in history(trainer, *NAMES)] == [0, 2]


@pytest.mark.parametrize("by", ["eval_loss", SAFETY_AND_REASONING])
def test_the_best_step_is_that_of_the_metric(pieces: Any, tmp_path: Path, by: str) -> None:
    settings: dict[str, Any] = {f"{what}_strategy": "steps" for what in ("save", "eval")}
    settings |= {"save_steps": 2, "eval_steps": 2, "metric_for_best_model": by}
    settings |= {"load_best_model_at_end": True, "greater_is_better": False}
    common: dict[str, Any] = {"train_dataset": pieces.data, "eval_dataset": pieces.data}
    trainer = watched(
        ResumableSFTTrainer(
            model=make_model(),
            args=plain_config(tmp_path, **settings),
            processing_class=pieces.tokenizer,
            **common,
        )
    )
    trainer.train()
    safety = {e["step"]: e["eval_loss"] for e in history(trainer, "eval_loss")}
    reasoning = {e["step"]: e["eval_reasoning_nll"] for e in history(trainer, *NAMES)[:-1]}
    score = {s: safety[s] + (reasoning[s] if by == SAFETY_AND_REASONING else 0) for s in safety}
    best = min(score, key=lambda step: score[step])
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == pytest.approx(score[best])
    # what is measured in the end is the model that is kept
    assert history(trainer, *NAMES)[-1]["eval_reasoning_nll"] == pytest.approx(reasoning[best], abs=1e-9)
