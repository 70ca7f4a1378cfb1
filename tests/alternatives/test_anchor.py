"""The anchor against its definition, alone and in trainers, with freezing, and over ways to be wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from helpers.alternatives_runs import make_trainer, opposed, safety_rows, trained, weights_of
from helpers.rank_runs import QUIET, id_tokenizer, make_model, reference
from rpsa.alternatives.anchor import Anchor
from rpsa.artifacts import read_json
from rpsa.errors import RPSAError
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.fisher.log_probs import evaluation_mode
from rpsa.fisher.samples import Samples, read_samples
from rpsa.recipe.problems import installed_names
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer
from rpsa.training.anchoring import ORIGINAL_FILE
from rpsa.training.config import RPSAConfig
from rpsa.training.trainer import RPSATrainer

CPU = torch.device("cpu")


def _moved(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.05 * noise.to(parameter))


def _samples() -> list[Samples]:
    return read_samples(opposed().batches(4, None))


def _logits(model: nn.Module, samples: Samples) -> torch.Tensor:
    logits = model(input_ids=samples.input_ids, attention_mask=samples.attention_mask).logits[:, :-1]
    answered: torch.Tensor = logits[samples.labels[:, 1:] != -100]
    return answered


@pytest.mark.parametrize(("kl", "der"), [(1.0, 0.0), (0.0, 0.3), (0.5, 2.0)])
def test_loss_and_gradient_are_the_definition(kl: float, der: float) -> None:
    model, samples = make_model("llama", torch.float64), _samples()
    model.eval()
    before = _logits(model, samples[1]).detach()
    anchor = Anchor(kl, der, top=None)
    anchor.record(model, samples, CPU)
    _moved(model)

    after = _logits(model, samples[1])
    divergence = nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum"
    )
    expected = kl * divergence + der * (after - before).square().mean(-1).sum()
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    found = anchor.loss(model, samples[1], CPU)
    gradients = torch.autograd.grad(found, list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("top", [None, 3])
def test_nothing_pulls_before_the_first_step(top: int | None) -> None:
    model, samples = make_model("llama", torch.float32), _samples()
    anchor = Anchor(1.0, 1.0, top)
    anchor.record(model, samples, CPU)
    with evaluation_mode(model):
        value = anchor.loss(model, samples[0], CPU)
        gradients = torch.autograd.grad(value, list(model.parameters()))
    assert float(value.detach()) == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_without_its_adapter_a_model_is_the_original() -> None:
    model, samples = make_model("llama+lora", torch.float64), _samples()
    recorded, switched = Anchor(1.0, 0.1, top=None), Anchor(1.0, 0.1, without_adapter=model.disable_adapter)
    assert recorded.needs_record
    assert not switched.needs_record
    with model.disable_adapter():
        recorded.record(model, samples, CPU)
    _moved_adapter(model)
    with evaluation_mode(model):
        values = [float(anchor.loss(model, samples[0], CPU).detach()) for anchor in (recorded, switched)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert values[0] > 0


def _moved_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def test_what_was_recorded_survives_a_file(tmp_path: Path) -> None:
    model, samples = make_model("llama", torch.float32), _samples()
    anchor = Anchor(1.0, top=3)
    anchor.record(model, samples, CPU)
    anchor.save(tmp_path / "a")
    ids = [name for batch in samples for name in batch.ids]
    again = Anchor(1.0, top=3)
    again.load(tmp_path / "a", ids)
    _moved(model)
    values = [float(one.loss(model, samples[2], CPU).detach()) for one in (anchor, again)]
    assert values[0] == values[1] > 0
    with pytest.raises(RPSAError, match="of other samples"):
        again.load(tmp_path / "a", ids[1:])
    with pytest.raises(RPSAError, match="missing"):
        again.load(tmp_path / "b", ids)
    (tmp_path / "a").write_bytes(b"damaged")
    with pytest.raises(RPSAError, match=r"a: "):
        again.load(tmp_path / "a", ids)


# In trainers


@pytest.mark.parametrize("kind", ["llama", "llama+lora"])
def test_the_first_step_is_the_plain_one_and_later_ones_are_not(kind: str, tmp_path: Path) -> None:
    sgd: dict[str, Any] = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
    plain = weights_of(trained(tmp_path, kind, **sgd))
    anchored = weights_of(trained(tmp_path, kind, **sgd, kl=5.0, der=1.0, anchor_top=None))
    for name in plain:
        # rounding: another batch has another padding
        torch.testing.assert_close(plain[name], anchored[name], rtol=0, atol=1e-7)
    plain = weights_of(trained(tmp_path, kind, max_steps=3))
    anchored = weights_of(trained(tmp_path, kind, max_steps=3, kl=5.0))
    assert any(not torch.equal(plain[name], anchored[name]) for name in plain)


def test_an_anchor_keeps_the_model_near_itself(tmp_path: Path) -> None:
    def divergence(**settings: Any) -> float:
        trainer = trained(tmp_path, max_steps=30, logging_steps=1, **settings)
        values = [entry["alternatives/anchor"] for entry in trainer.state.log_history if "loss" in entry]
        assert abs(values[0]) < 1e-6 * settings["kl"]
        return float(values[-1])

    assert divergence(kl=10.0) / 10.0 < 0.5 * divergence(kl=1e-3) / 1e-3


def test_a_step_has_as_many_rows_as_a_batch_and_the_mean_over_their_tokens(tmp_path: Path) -> None:
    """Plain SGD, so that the weights tell the gradients: those of two steps."""
    own: dict[str, Any] = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 2}
    own |= {"lr_scheduler_type": "constant", "learning_rate": 1e-2}
    start = weights_of(make_trainer(tmp_path))
    plain, anchored = weights_of(trained(tmp_path, **own)), weights_of(trained(tmp_path, **own, kl=1.0))
    one = trained(tmp_path, **(own | {"max_steps": 1}))
    [samples] = read_samples([opposed().rotating_batch(1, 4, None)])
    model = one.model.eval()
    after = _logits(model, samples)
    for name, parameter in model.named_parameters():
        assert parameter.shape == start[name].shape
    with torch.no_grad():
        before = _logits(make_trainer(tmp_path).model.eval(), samples)
    divergence = nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum"
    )
    model.zero_grad()
    (divergence / len(after)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found = (plain[name] - anchored[name]) / 1e-2
        torch.testing.assert_close(found, parameter.grad, rtol=5e-3, atol=2e-5)


def _frozen(folder: Path, **settings: Any) -> RPSATrainer:
    model = make_model("llama", torch.float32)
    fisher = estimate_fisher(model, reference().batches(4, None), FisherConfig(progress=False))
    arguments = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, **QUIET}
    trainer = RPSATrainer(
        model=model,
        args=RPSAConfig(**installed_names(arguments | settings, RPSAConfig), output_dir=str(folder)),
        train_dataset=safety_rows(40),
        processing_class=id_tokenizer(),
        fisher=fisher,
        reference_dataset=opposed(),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


@pytest.mark.parametrize("ratio", ["0.5", "dynamic"])
def test_it_goes_together_with_freezing(ratio: str, tmp_path: Path) -> None:
    own = {"frozen_ratio": ratio, "window": 2, "every": 1}
    whole = _frozen(tmp_path / "whole", **own, kl=1.0)
    compact = _frozen(tmp_path / "compact", **own, kl=1.0, compact=True)
    without = _frozen(tmp_path / "without", **own)
    for trainer in (whole, compact):
        folder = Path(str(trainer.args.output_dir))
        assert read_json(folder / "rpsa_audit.json")["frozen_elements_moved"] == 0
    ours, theirs, plain = (weights_of(trainer) for trainer in (whole, compact, without))
    if ratio == "0.5":  # where k moves, compact training gives up moments
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(ours[name], plain[name]) for name in ours)


def test_what_it_needs_and_has_not_is_one_line(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)

    def fails(message: str, **settings: Any) -> None:
        common = {"model": trainer.model, "processing_class": trainer.processing_class}
        given = {name: settings.pop(name) for name in ("benign_dataset",) if name in settings}
        args = AlternativesConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], kl=1.0, **settings
        )
        with pytest.raises(RPSAError, match=message):
            AlternativesTrainer(args=args, train_dataset=safety_rows(), **common, **given)

    fails("an anchor on reference needs D_ref: give reference_dataset")
    fails("an anchor on both needs D_ref", anchor="both")
    fails("an anchor on benign needs rows to be complied with", anchor="benign")
    rows = Dataset.from_dict({"input_ids": [[2, 3]], "labels": [[-100, -100]]})
    fails("benign_dataset row 0 has no label", anchor="benign", benign_dataset=rows)


@pytest.mark.parametrize("anchor", ["benign", "both"])
def test_rows_to_be_complied_with(anchor: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    args = AlternativesConfig(
        **installed_names({**QUIET, "max_steps": 3, "per_device_train_batch_size": 2}, AlternativesConfig),
        output_dir=str(tmp_path / "run"),
        kl=1.0,
        anchor=anchor,
    )
    made = AlternativesTrainer(
        model=trainer.model,
        args=args,
        train_dataset=safety_rows(),
        processing_class=trainer.processing_class,
        reference_dataset=opposed() if anchor == "both" else None,
        benign_dataset=safety_rows(6),
    )
    assert made.anchoring is not None
    assert len(made.anchoring.rows.traces) == 6 + (40 if anchor == "both" else 0)
    made.train()
    assert made.anchoring.value > 0
    assert (tmp_path / "run" / ORIGINAL_FILE).is_file()
