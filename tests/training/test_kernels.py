"""What people train with: chunked losses, packing, torch.compile, 8-bit optimizers; the same as without, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from helpers.trl_runs import config, fisher_of, make_lora, make_model
from rpsa.errors import RPSAError
from rpsa.parameters import trainable_parameters
from rpsa.training.trainer import RPSATrainer

BUILDS = pytest.mark.parametrize("build", [make_model, make_lora], ids=["full", "lora"])
DYNAMIC: dict[str, Any] = {"frozen_ratio": "dynamic"}
CONSTANT: dict[str, Any] = {"frozen_ratio": 0.6}
COMPACT = {**CONSTANT, "compact": True}
FREEZING = pytest.mark.parametrize(
    "freezing", [DYNAMIC, CONSTANT, COMPACT], ids=["dynamic", "constant", "compact"]
)


class PlainLoss(RPSATrainer):
    """All logits at once, and torch's own cross entropy."""

    def compute_loss(
        self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["labels"][:, 1:].flatten()
        nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
        return nll / num_items_in_batch


def without_dropout(build: Any) -> Any:
    """Whose order of drawing is another where rows are."""
    model = build()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trained(
    model: Any,
    folder: Path,
    data: Any,
    tokenizer: Any,
    reference: Any,
    kind: Any = RPSATrainer,
    **settings: Any,
) -> Any:
    """The trainer after training, with what was in `.grad` at the first step, where frozen elements have one."""
    trainer = kind(
        model=model,
        args=config(folder, **{"learning_rate": 1e-3} | settings),
        train_dataset=data,
        processing_class=tokenizer,
        fisher=fisher_of(model, reference),
        reference_dataset=reference,
    )
    trainer.first = {}
    masking = trainer.rpsa.on_gradients_complete

    def record() -> None:
        if not trainer.first:
            grads = {name: p.grad for name, p in trainer.freezer.parameters.items()}
            trainer.first = {name: grad.clone() for name, grad in grads.items() if grad is not None}
        masking()

    trainer.rpsa.on_gradients_complete = record
    trainer.train()
    return trainer


def assert_same(one: Any, other: Any, gradients: float = 1e-5) -> None:
    """Gradients of the first step, masks, k and audit; and the weights in the end, which Adam's signs may set apart."""
    if not one.args.compact:
        assert one.first
    for name, grad in one.first.items():
        assert float((grad - other.first[name]).norm()) <= gradients * float(grad.norm()) + 1e-9, name
    for ours, theirs in zip(one.rpsa.trajectory, other.rpsa.trajectory, strict=True):
        assert ours["c"] == pytest.approx(theirs["c"], abs=0.01)
    assert [e["k"] for e in one.rpsa.trajectory] == pytest.approx(
        [e["k"] for e in other.rpsa.trajectory], abs=0.05
    )
    reports = [trainer.rpsa.report() for trainer in (one, other)]
    assert all(
        report["frozen_elements_moved"] == 0 < report["frozen_element_steps_checked"] for report in reports
    )
    weights = [trainable_parameters(trainer.model) for trainer in (one, other)]
    assert list(weights[0]) == list(weights[1])
    if not isinstance(one.args.frozen_ratio, str):
        for name in weights[0]:
            torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-4, rtol=0, msg=name)


# Losses


@FREEZING
@BUILDS
def test_a_chunked_loss_has_the_gradients_of_a_plain_one(
    build: Any,
    freezing: Any,
    tmp_path: Path,
    safety_data: Any,
    tokenizer: Any,
    reference: Any,
) -> None:
    """With dropout, of which both see the same."""
    given = (safety_data, tokenizer, reference)
    chunked = trained(build(), tmp_path / "a", *given, loss_type="chunked_nll", max_steps=3, **freezing)
    plain = trained(build(), tmp_path / "b", *given, kind=PlainLoss, max_steps=3, **freezing)
    assert_same(chunked, plain)


# Packing

BFD = {"packing": True, "max_length": 128}
SPLIT = {**BFD, "packing_strategy": "bfd_split"}
PADDING_FREE = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize(
    ("build", "freezing", "packing", "attention"),
    [
        (make_model, DYNAMIC, BFD, "sdpa"),
        (make_model, DYNAMIC, BFD, "eager"),
        (make_model, CONSTANT, SPLIT, "sdpa"),
        (make_model, COMPACT, BFD, "sdpa"),
        (make_lora, DYNAMIC, BFD, "sdpa"),
        (make_lora, COMPACT, BFD, "sdpa"),
        (make_model, DYNAMIC, PADDING_FREE, "sdpa"),
        (make_model, COMPACT, PADDING_FREE, "sdpa"),
        (make_lora, CONSTANT, PADDING_FREE, "eager"),
    ],
)
def test_packed_rows_have_the_gradients_of_padded_ones(
    build: Any, freezing: Any, packing: Any, attention: str, tmp_path: Path, safety_data: Any, tokenizer: Any,
    reference: Any,
) -> None:  # fmt: skip
    def run(name: str, **settings: Any) -> Any:
        model = without_dropout(build)
        (model.get_base_model() if build is make_lora else model).set_attn_implementation(attention)
        given = (safety_data.select(range(8)), tokenizer, reference)
        batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2}
        return trained(model, tmp_path / name, *given, **batch | freezing | settings)

    packed = run("packed", **packing)
    assert len(packed.data_collator([packed.train_dataset[0]] * 2)["input_ids"]) == 1
    assert_same(packed, run("padded"))


def test_examples_that_see_each_other_are_refused(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    """An attention of another name, which knows nothing of positions that begin again, as a kernel might."""

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("no_borders", attend)
    model = make_model()
    model.set_attn_implementation("no_borders")
    given = (safety_data, tokenizer, reference)
    trained(model, tmp_path, *given, max_steps=1)  # one example in each row
    for settings in ({"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}):
        model = make_model()
        model.set_attn_implementation("no_borders")
        with pytest.raises(
            RPSAError, match="with the attention 'no_borders' the examples of a row see each other"
        ):
            trained(model, tmp_path, *given, max_steps=1, **settings)


def test_a_packing_that_lets_examples_see_each_other_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="packing_strategy: wrapped is not supported"):
        config(tmp_path, packing=True, packing_strategy="wrapped", max_length=32)
