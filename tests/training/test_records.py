"""The records of a run: those of a resumed one are those of one that was never stopped, and JSON whatever happens."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import SFTConfig

from helpers import trl_runs as t
from helpers.trl_runs import STEPS, RPSADPOConfig, RPSADPOTrainer, rpsa_trainer
from rpsa.errors import RPSAError
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.freezing.audit import _sampled_places
from rpsa.parameters import trainable_parameters
from rpsa.recipe.problems import installed_names
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer
from rpsa.training.callback import AUDIT_START
from rpsa.training.card import METADATA
from rpsa.training.config import refuse_unsupported_ranks
from rpsa.training.trainer import AUDIT_FILE, ResumableSFTTrainer

TIMES = ("_runtime", "_per_second")


def alternative(pieces: Any, folder: Path, **settings: Any) -> AlternativesTrainer:
    own = {"penalty": "fisher", "projection": "agem", "restored_ratio": 0.5}
    chosen = installed_names(t.SFT_SETTINGS | STEPS | own | settings, AlternativesConfig)
    return AlternativesTrainer(
        model=t.make_model(),
        args=AlternativesConfig(**chosen, output_dir=str(folder)),
        train_dataset=pieces.data,
        eval_dataset=pieces.data,
        processing_class=pieces.tokenizer,
        fisher=pieces.fisher[t.make_model],
        reference_dataset=pieces.reference,
    )


def plain(pieces: Any, folder: Path, **settings: Any) -> ResumableSFTTrainer:
    chosen = installed_names(t.SFT_SETTINGS | STEPS | settings, SFTConfig)
    return ResumableSFTTrainer(
        model=t.make_model(),
        args=SFTConfig(**chosen, output_dir=str(folder)),
        train_dataset=pieces.data,
        eval_dataset=pieces.data,
        processing_class=pieces.tokenizer,
    )


def preferring(pieces: Any, folder: Path) -> Any:
    args = RPSADPOConfig(**(t.SFT_SETTINGS | STEPS | {"window": 2, "every": 1}), output_dir=str(folder))
    pairs = [{"prompt": f"w{i}", "chosen": f"w{30 - i} w3", "rejected": f"w{i + 2} w5"} for i in range(2, 14)]
    return RPSADPOTrainer(
        model=t.make_model(),
        ref_model=t.make_model(),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=pieces.tokenizer,
        fisher=pieces.fisher[t.make_model],
        reference_dataset=pieces.reference,
    )


TRAINERS: dict[str, Callable[[Any, Path], Any]] = {
    "rpsa": rpsa_trainer,
    "rpsa, lora": lambda pieces, folder: rpsa_trainer(pieces, folder, t.make_lora),
    "gradients only": lambda pieces, folder: rpsa_trainer(
        pieces, folder, gradient_only=True, frozen_ratio=0.5
    ),
    "alternatives": alternative,
    "plain": plain,
    "dpo": preferring,
}


def run(trainer: Any, resume: Path | None = None) -> dict[str, Any]:
    """Everything that a run tells, but for times."""
    output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    folder = Path(trainer.args.output_dir) / "final"
    trainer.save_model(str(folder))
    found = {
        name: json.loads((folder / name).read_text())
        for name in (METADATA, AUDIT_FILE)
        if (folder / name).is_file()
    }
    weights = trainable_parameters(trainer.accelerator.unwrap_model(trainer.model))
    return found | {
        "history": [
            {key: value for key, value in entry.items() if not key.endswith(TIMES)}
            for entry in trainer.state.log_history
        ],
        "train_loss": output.training_loss,
        "weights": {name: parameter.tolist() for name, parameter in weights.items()},
        "trajectory": trainer.rpsa.trajectory if hasattr(trainer, "rpsa") else None,
    }


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_has_the_records_of_a_whole_one(kind: str, pieces: Any, tmp_path: Path) -> None:
    whole = run(TRAINERS[kind](pieces, tmp_path / "whole"))
    resumed = run(TRAINERS[kind](pieces, tmp_path / "resumed"), tmp_path / "whole" / "checkpoint-3")
    assert resumed == whole
    again = run(TRAINERS[kind](pieces, tmp_path / "again"), tmp_path / "resumed" / "checkpoint-6")
    assert again == whole
    losses = [entry["loss"] for entry in whole["history"] if "loss" in entry]
    assert whole["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


class SavesAt(TrainerCallback):
    """A checkpoint that a run would not have written: at a step's end, as a signal does, or in its midst, as TRL's own
    answer to a signal does."""

    def __init__(self, trainer: Any, step: int, within: bool) -> None:
        self.trainer, self.step, self.within = trainer, step, within

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.within and state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.within and state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def without_dropout() -> Any:
    model = t.make_model()
    model.config.attention_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return model


@pytest.mark.parametrize("within", [False, True], ids=["at the end of a step", "in its midst"])
def test_where_a_run_was_stopped_leaves_no_trace(within: bool, pieces: Any, tmp_path: Path) -> None:
    # in the midst of a step some of its random numbers are spent: that is transformers' doing
    build = without_dropout
    pieces.fisher[build] = pieces.fisher[t.make_model]
    whole = run(rpsa_trainer(pieces, tmp_path / "whole", build, save_strategy="no"))
    stopped = rpsa_trainer(pieces, tmp_path / "stopped", build, save_strategy="no")
    stopped.add_callback(SavesAt(stopped, 5, within))
    stopped.train()
    resumed = run(
        rpsa_trainer(pieces, tmp_path / "resumed", build, save_strategy="no"),
        tmp_path / "stopped" / "checkpoint-5",
    )
    assert resumed == whole


def test_drift_is_from_the_true_start(pieces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsa.freezing.audit.SAMPLED_ELEMENTS", 600)
    run(rpsa_trainer(pieces, tmp_path))
    start = dict(t.make_model().named_parameters())
    kept = load_file(tmp_path / "checkpoint-3" / AUDIT_START)
    assert 0 < sum(values.numel() for values in kept.values()) <= 600
    for name, values in kept.items():
        assert torch.isin(values, start[name].detach()).all()
    trainer = rpsa_trainer(pieces, tmp_path / "resumed", max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    report = trainer.rpsa.report()
    assert report["drift"]["since_step"] == 0
    places = _sampled_places(trainer.freezer, trainer.args.seed)[
        "model.embed_tokens.weight"
    ]  # a group of its own
    now, before = (
        of["model.embed_tokens.weight"].detach().flatten()[places].double()
        for of in (dict(trainer.model.named_parameters()), start)
    )
    found = report["drift"]["groups"]["embed_tokens"]["relative"]
    assert found == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-6)
    assert found > 0


@pytest.mark.parametrize("kind", ["rpsa", "alternatives", "plain"])
def test_a_run_that_has_all_its_steps_takes_no_more(kind: str, pieces: Any, tmp_path: Path) -> None:
    """6 steps are an epoch: 8 end in the midst of one."""
    makers: dict[str, Any] = {"rpsa": rpsa_trainer, "alternatives": alternative, "plain": plain}
    settings = {"save_steps": 8}
    whole = run(makers[kind](pieces, tmp_path / "whole", **settings))
    resumed = run(makers[kind](pieces, tmp_path / "resumed", **settings), tmp_path / "whole" / "checkpoint-8")
    assert resumed == whole
    assert whole[METADATA]["training"]["steps"] == 8 if METADATA in whole else True


def test_another_fisher_is_another_run(pieces: Any, tmp_path: Path) -> None:
    run(rpsa_trainer(pieces, tmp_path))
    other = estimate_fisher(
        t.make_model(), pieces.reference.batches(5, None), FisherConfig(seed=7, progress=False)
    )
    trainer = t.make_trainer(
        t.make_model(),
        rpsa_trainer(pieces, tmp_path).args,
        pieces.data,
        pieces.tokenizer,
        pieces.reference,
        fisher=other,
    )
    with pytest.raises(RPSAError, match="trained with another Fisher"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_what_goes_back_to_the_start_knows_the_start(pieces: Any, tmp_path: Path) -> None:
    first = alternative(pieces, tmp_path, max_steps=3, learning_rate=1e-3)
    first.train()
    again = alternative(pieces, tmp_path / "again")
    again.model.load_state_dict(first.model.state_dict())
    with pytest.raises(RPSAError, match="as it was before training"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_plain_trl_goes_on(
    pieces: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(plain(pieces, tmp_path))
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    content = json.loads(state.read_text())
    del content["stateful_callbacks"]["RunRecords"]
    state.write_text(json.dumps(content))
    trainer = plain(pieces, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 8
    assert "no records of its run" in caplog.text


# What is not finite


class Poison(TrainerCallback):
    """Makes the loss of one step, or all weights from there on, not a number."""

    def __init__(self, step: int, *, for_good: bool) -> None:
        self.step, self.for_good, self.saved = step, for_good, torch.tensor(0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            weights = model.get_output_embeddings().weight
            self.saved = weights.detach().clone()
            weights.data.fill_(math.nan)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == self.step and not self.for_good:
            model.get_output_embeddings().weight.data.copy_(self.saved)
            for parameter in model.parameters():
                parameter.grad = None


def strict(path: Path) -> Any:
    def refuse(word: str) -> Any:
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("filter", [False, True], ids=["shown", "hidden"])
@pytest.mark.parametrize("kind", ["rpsa", "alternatives", "plain"])
def test_a_run_that_diverges_leaves_json_and_says_so(
    kind: str, filter: bool, pieces: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    makers: dict[str, Any] = {"rpsa": rpsa_trainer, "alternatives": alternative, "plain": plain}
    settings: dict[str, Any] = {"logging_steps": 1, "logging_nan_inf_filter": filter}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}
    settings |= {"rpsa": {"frozen_ratio": 0.1}, "alternatives": {"restored_ratio": 0.0}, "plain": {}}[kind]
    trainer = makers[kind](pieces, tmp_path, **settings)
    trainer.add_callback(Poison(2, for_good=True))
    output = trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer.save_metrics("train", output.metrics | {"eval_loss": math.nan})
    trainer.save_state()
    files = [*tmp_path.rglob("*.json")]
    assert len(files) > 5
    for path in files:
        strict(path)
    state = strict(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert state["best_metric"] is None
    assert any(entry.get("grad_norm", 0) is None for entry in state["log_history"])
    assert caplog.text.count("the loss is not finite at step 2") == 1
    assert "not finite in 6 of 8 steps, the first and the last: 2, 7" in caplog.text
    assert trainer.records.diverged
    again = makers[kind](pieces, tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.records.nonfinite == {"steps": 6, "first": 2, "last": 7}


def test_one_bad_step_is_said_and_counted(
    pieces: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = rpsa_trainer(pieces, tmp_path, frozen_ratio=0.5)
    trainer.add_callback(Poison(3, for_good=False))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert caplog.text.count("the loss is not finite") == 1
    facts = strict(tmp_path / "final" / METADATA)["training"]
    assert facts["nonfinite"] == {"steps": 1, "first": 3, "last": 3}
    assert not facts["diverged"]
    assert (
        "The loss was not finite in 1 of 8 steps, the first of them 3."
        in (tmp_path / "final" / "README.md").read_text()
    )


# Signals


class Terminate(TrainerCallback):
    """Sends SIGTERM in the midst of the second step, and looks who listens."""

    def __init__(self, *, sends: bool) -> None:
        self.sends, self.listening = sends, False
        self.before = signal.getsignal(signal.SIGTERM)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.listening = signal.getsignal(signal.SIGTERM) != self.before
        if self.sends and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while threading.active_count() > self.threads:  # TRL waits with its answer
                time.sleep(0.01)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.threads = threading.active_count()


def test_nobody_listens_to_sigterm_unless_asked_to(pieces: Any, tmp_path: Path) -> None:
    watch = Terminate(sends=False)
    trainer = rpsa_trainer(pieces, tmp_path, max_steps=2)
    trainer.add_callback(watch)
    trainer.train()
    assert not watch.listening


def test_trls_answer_to_sigterm_leaves_a_checkpoint_that_goes_on(pieces: Any, tmp_path: Path) -> None:
    trainer = rpsa_trainer(pieces, tmp_path, save_strategy="no", enable_jit_checkpoint=True)
    [jit] = [one for one in trainer.callback_handler.callbacks if isinstance(one, JITCheckpointCallback)]
    jit.jit_manager.kill_wait = 0
    trainer.add_callback(Terminate(sends=True))
    trainer.train()
    [checkpoint] = tmp_path.glob("checkpoint-*")
    state = strict(checkpoint / "trainer_state.json")
    saved = state["stateful_callbacks"]["RPSACallback"]["attributes"]
    assert saved["freezer"]["step"] == state["global_step"] == 1
    resumed = rpsa_trainer(pieces, tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.rpsa.report()["frozen_elements_moved"] == 0
    assert [entry["step"] for entry in resumed.rpsa.trajectory] == [0, 2, 4, 6]
    with pytest.raises(RPSAError, match="enable_jit_checkpoint is for one process"):
        refuse_unsupported_ranks(SimpleNamespace(enable_jit_checkpoint=True, world_size=2))
