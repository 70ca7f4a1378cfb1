"""What people train with: chunked losses, packing, torch.compile, 8-bit optimizers; the same as without, or refused."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from helpers.trl_runs import SFT_SETTINGS, VOCABULARY, config, fisher_of, make_lora, make_model
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import ConstantRatio
from rpsa.parameters import trainable_parameters
from rpsa.training.config import RPSAArguments
from rpsa.training.trainer import RPSAMixin, RPSATrainer

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


# torch.compile


@pytest.mark.parametrize(
    ("build", "freezing", "backend"),
    [
        (make_model, DYNAMIC, "aot_eager"),
        (make_lora, COMPACT, "aot_eager"),
        pytest.param(make_model, DYNAMIC, "inductor", marks=pytest.mark.integration),
        pytest.param(make_model, COMPACT, "inductor", marks=pytest.mark.integration),
        pytest.param(make_lora, DYNAMIC, "inductor", marks=pytest.mark.integration),
    ],
)
def test_a_compiled_model_trains_as_an_eager_one(
    build: Any, freezing: Any, backend: str, tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    """The reasoning gradient, taken in the same module, included; and it is saved under its own names."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")

    def run(name: str, **settings: Any) -> Any:
        given = (safety_data, tokenizer, reference)
        return trained(without_dropout(build), tmp_path / name, *given, max_steps=3, **freezing | settings)

    compiled = run("compiled", torch_compile=True, torch_compile_backend=backend)
    assert hasattr(compiled.model_wrapped, "_orig_mod") or build is make_lora
    assert_same(compiled, run("eager"), gradients=1e-4)
    compiled.save_model(str(tmp_path / "saved"))
    [weights] = (tmp_path / "saved").glob("*.safetensors")
    assert not any("_orig_mod" in name for name in load_file(weights))


# Optimizers of 8 bits


def make_wide() -> Any:
    """With tensors so large that bitsandbytes keeps 8 bits of their moments."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


@pytest.mark.parametrize("build", [make_wide, make_lora], ids=["full", "lora"])
@pytest.mark.parametrize("freezing", [DYNAMIC, CONSTANT], ids=["dynamic", "constant"])
@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_an_optimizer_of_8_bits_freezes_exactly(
    optim: str, build: Any, freezing: Any, tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {
        "optim": optim,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    given = (safety_data, tokenizer, reference)
    trainer = trained(build(), tmp_path, *given, max_steps=4, **settings | freezing)
    report = trainer.rpsa.report()
    assert report["frozen_elements_moved"] == 0 < report["frozen_element_steps_checked"]
    assert any(group["changed"] > 0 for group in report["drift"]["groups"].values())
    kinds = {state["state1"].dtype for state in trainer.optimizer.optimizer.state.values()}
    assert (torch.uint8 in kinds) == (build is make_wide)  # small tensors are left in fp32


def test_what_freezes_forgets_its_momentum_of_8_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # what it knows of parameters, by address and place, would be taken from models of earlier tests for this one's
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    torch.manual_seed(0)
    model = nn.Linear(128, 64)
    fisher = FisherDiagonal({name: torch.rand(p.shape) + 0.1 for name, p in model.named_parameters()})
    freezer = Freezer(model, fisher, ConstantRatio(0.5))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):  # before anything is frozen
        model(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[model.weight]
    assert state["state1"].dtype == torch.uint8
    freezer.attach(optimizer)
    model(torch.randn(8, 128)).square().mean().backward()
    freezer.mask_gradients()
    before = model.weight.detach().clone()
    optimizer.step()
    frozen = freezer.frozen("weight")
    assert torch.equal(before[frozen], model.weight[frozen])
    assert (before[~frozen] != model.weight[~frozen]).float().mean() > 0.9
    momentum = state["qmap1"][state["state1"].long()]
    assert float(momentum[frozen].abs().max()) < 1e-4  # bitsandbytes writes 0 as the code next to it
    assert momentum[~frozen].count_nonzero() > 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw_8bit", "frozen_ratio": 0.6, "compact": True}, "compact: optim adamw_.*8bit does not"),
        ({"optim": "adamw_8bit", "frozen_moments": "raw"}, "frozen_moments: raw needs Adam's own moments"),
        ({"optim": "lion_8bit"}, "optim: lion_8bit is not supported"),
        ({"optim": "adamw_torch_4bit"}, "optim: adamw_torch_4bit is not supported"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not supported"),
    ],
)  # fmt: skip
def test_kernels_that_are_not_supported_are_one_line(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match=message) as error:
        config(tmp_path, **settings)
    assert "\n" not in str(error.value)


# GRPO


def test_grpo_through_the_mixin(tmp_path: Path, tokenizer: Any, reference: Any) -> None:
    @dataclass
    class RPSAGRPOConfig(RPSAArguments, GRPOConfig):
        pass

    class RPSAGRPOTrainer(RPSAMixin, GRPOTrainer):
        pass

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    own = {"num_generations": 2, "max_completion_length": 6, "window": 2, "every": 1, "max_steps": 4}
    trainer = RPSAGRPOTrainer(
        model=(model := make_model()),
        reward_funcs=reward,
        args=RPSAGRPOConfig(**(SFT_SETTINGS | own), output_dir=str(tmp_path)),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(2, 14)]),
        processing_class=tokenizer,
        fisher=fisher_of(model, reference),
        reference_dataset=reference,
    )
    trainer.train()
    report = trainer.rpsa.report()
    assert report["frozen_elements_moved"] == 0 < report["frozen_element_steps_checked"]
    assert len(report["trajectory"]) == 4
    assert any(group["changed"] > 0 for group in report["drift"]["groups"].values())
