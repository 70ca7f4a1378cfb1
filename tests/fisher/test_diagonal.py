"""FisherDiagonal as a value and as files."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.fisher_models import ragged_batch, tiny_model
from rpsa.alternatives.after_training import restore, starting_weights
from rpsa.alternatives.penalty import WeightPenalty
from rpsa.analysis.perturbation import PerturbationConfig, perturb
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import ConstantRatio
from rpsa.parameters import canonical_name, fingerprint, trainable_parameters

pytestmark = pytest.mark.gpu


def linear_fisher(model: nn.Module) -> FisherDiagonal:
    generator = torch.Generator().manual_seed(0)
    return FisherDiagonal(
        {n: torch.rand(p.shape, generator=generator) for n, p in trainable_parameters(model).items()}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_return_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    fisher = linear_fisher(nn.Linear(7, 5))
    fisher.manifest["seed"] = 42
    fisher.save(tmp_path / "fisher", dtype=dtype)
    loaded = FisherDiagonal.load(tmp_path / "fisher")
    assert loaded.manifest["seed"] == 42
    for name in fisher:
        assert torch.equal(loaded[name], fisher[name].to(dtype).float())
    rounded = FisherDiagonal({name: fisher[name].to(dtype) for name in fisher})
    assert loaded.threshold(0.6) == rounded.threshold(0.6)


def test_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsa.fisher.diagonal._SHARD_BYTES", 64)
    fisher = linear_fisher(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    fisher.save(tmp_path)
    assert len(json.loads((tmp_path / "manifest.json").read_text())["files"]) > 1
    loaded = FisherDiagonal.load(tmp_path)
    assert all(torch.equal(loaded[name], fisher[name]) for name in fisher)


def test_fp16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="fp16 turns small values into 0"):
        linear_fisher(nn.Linear(2, 2)).save(tmp_path, dtype=torch.float16)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="no Fisher here"):
        FisherDiagonal.load(tmp_path)
    linear_fisher(nn.Linear(2, 2)).save(tmp_path)
    (tmp_path / "fisher.safetensors").unlink()
    with pytest.raises(RPSAError, match=r"fisher\.safetensors is missing"):
        FisherDiagonal.load(tmp_path)


def test_check_names_the_parameter_and_why() -> None:
    fisher = linear_fisher(nn.Linear(3, 2))
    fisher.check(nn.Linear(3, 2))
    with pytest.raises(RPSAError, match=r"'weight' has scores of shape \(2, 3\), the parameter is \(2, 4\)"):
        fisher.check(nn.Linear(4, 2))
    with pytest.raises(RPSAError, match="it scores 'bias', which the model does not train"):
        fisher.check(nn.Linear(3, 2, bias=False))
    with pytest.raises(RPSAError, match="'bias' has no scores"):
        FisherDiagonal({"weight": torch.ones(2, 3)}).check(nn.Linear(3, 2))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_scores_must_be_finite_and_not_negative(value: float) -> None:
    with pytest.raises(RPSAError, match="finite and not negative"):
        FisherDiagonal({"a": torch.tensor([1.0, value])})


def test_wrappers_do_not_change_names() -> None:
    assert canonical_name("module.model.layers.0._orig_mod.mlp.weight") == "model.layers.0.mlp.weight"
    assert canonical_name("_orig_mod.lm_head.weight") == "lm_head.weight"
    assert canonical_name("model.module.weight") == "model.module.weight"
    compiled = torch.compile(nn.Linear(2, 2))
    assert set(trainable_parameters(compiled)) == {"weight", "bias"}


def test_fingerprint_follows_values_not_dtype() -> None:
    weights = {"a": torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).bfloat16()}
    assert fingerprint(weights) == fingerprint({"a": weights["a"].float()})
    changed = {"a": weights["a"].clone()}
    changed["a"][0, 0] += 1
    assert fingerprint(weights) != fingerprint(changed)


# Which weights it was measured on

BATCH = ragged_batch([(3, 7), (2, 4)])


def measured(model: nn.Module) -> FisherDiagonal:
    return estimate_fisher(model, [BATCH], FisherConfig(progress=False))


def trained(model: Any, learning_rate: float = 1e-2, steps: int = 5) -> Any:
    """Further than any real run goes: 1e-2 is half of what the weights are."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=learning_rate, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=BATCH["input_ids"], labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapter(model: nn.Module, seed: int) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


MEETINGS: dict[str, Callable[[Any, FisherDiagonal], Any]] = {
    "freezer": lambda model, fisher: Freezer(model, fisher, ConstantRatio(0.5)),
    "penalty": lambda model, fisher: WeightPenalty(model, starting_weights(model), fisher),
    "restoring": lambda model, fisher: restore(model, starting_weights(model), fisher, 0.5),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_another_models_fisher_is_refused_everywhere(meeting: str) -> None:
    fisher, use = measured(tiny_model("llama")), MEETINGS[meeting]
    with pytest.raises(RPSAError, match=r"measured on another model; .* fisher\.for_any_weights\(\)$"):
        use(tiny_model("llama", seed=1), fisher)
    use(tiny_model("llama", seed=1), fisher.for_any_weights())


@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_model_is_let_through_in_any_dtype(
    meeting: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured(tiny_model("llama")).save(tmp_path)
    MEETINGS[meeting](tiny_model("llama").to(dtype), FisherDiagonal.load(tmp_path))
    of_bf16 = measured(tiny_model("llama").bfloat16())
    MEETINGS[meeting](tiny_model("llama").bfloat16().to(dtype), of_bf16)
    assert not caplog.records


@pytest.mark.parametrize(
    "build", [tiny_model, lambda kind: adapter(tiny_model(kind), seed=1)], ids=["full", "lora"]
)
def test_a_model_in_the_midst_of_training_is_let_through_and_named(
    build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama")
    fisher = measured(model)
    Freezer(trained(model), fisher, ConstantRatio(0.5))
    assert "measured on other weights" in caplog.text
    with pytest.raises(RPSAError, match="measured on other weights"):
        fisher.check_weights(trained(model))
    fisher.for_any_weights().check_weights(trained(model))


def test_training_that_leaves_nothing_alike_but_what_is_frozen() -> None:
    model = tiny_model("llama")
    fisher = measured(model)
    freezer = Freezer(model, fisher, ConstantRatio(0.5))
    before = starting_weights(model)
    with torch.no_grad():
        for name, parameter in freezer.parameters.items():
            other = torch.randn_like(parameter)
            parameter.copy_(torch.where(freezer.frozen(name), before[name], other))
    Freezer(model, fisher, ConstantRatio(0.5))


def test_of_an_adapter_base_and_start_both_count(caplog: pytest.LogCaptureFixture) -> None:
    fisher = measured(adapter(tiny_model("llama"), seed=1))
    for use in MEETINGS.values():
        use(adapter(tiny_model("llama"), seed=1).bfloat16(), fisher)
        with pytest.raises(RPSAError, match="another LoRA initialisation; load the adapter"):
            use(adapter(tiny_model("llama"), seed=2), fisher)
        with pytest.raises(RPSAError, match="another model"):
            use(adapter(tiny_model("llama", seed=1), seed=1), fisher)
    assert not caplog.records


def test_a_fingerprint_alone_is_compared() -> None:
    model = tiny_model("llama")
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    known = FisherDiagonal(scores, {"fingerprint": fingerprint(model.named_parameters())})
    Freezer(model, known, ConstantRatio(0.5))
    with pytest.raises(RPSAError, match="another model"):
        Freezer(tiny_model("llama", seed=1), known, ConstantRatio(0.5))
    Freezer(tiny_model("llama", seed=1), FisherDiagonal(scores), ConstantRatio(0.5))  # scores of one's own


def test_a_perturbation_is_of_the_very_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fisher = measured(model)

    def run(model: Any, fisher: FisherDiagonal) -> int:
        config = PerturbationConfig(selections=("fisher",))
        return len(
            perturb(model, None, fisher, lambda *_: {"one": [1.0]}, config, tmp_path / "cells.jsonl", {})
        )

    with pytest.raises(RPSAError, match="another model"):
        run(tiny_model("llama", seed=1), fisher)
    with pytest.raises(RPSAError, match="other weights"):
        run(trained(model), fisher)
    assert not (tmp_path / "cells.jsonl").exists()
    assert run(model, fisher) == run(trained(model), fisher.for_any_weights()) == 2
