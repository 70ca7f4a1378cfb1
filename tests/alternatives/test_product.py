"""EWC on a LoRA adapter's product against autograd of the written-out loss: in a loop, on ranks, in a recipe."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.alternatives_runs import safety_rows, weights_of
from helpers.rank_runs import QUIET, id_tokenizer, make_model, reference
from helpers.ranks import run_ranks
from helpers.small_alternatives import recipe
from rpsa.alternatives.after_training import starting_weights
from rpsa.alternatives.product import ProductPenalty, lora_updates
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.parameters import trainable_parameters
from rpsa.recipe.problems import installed_names
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer


def adapted(dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    base.config = {}
    settings: dict[str, Any] = {"r": 2, "lora_dropout": 0.0, "target_modules": ["0", "2"], **lora}
    return get_peft_model(base, LoraConfig(**settings)).to(dtype)


def fisher_of_base() -> FisherDiagonal:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (5, 6), "0.bias": (5,), "2.weight": (4, 5), "2.bias": (4,)}
    return FisherDiagonal({n: torch.rand(s, generator=generator).square() for n, s in shapes.items()})


def move(model: Any, scale: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * scale)


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    yield from (("0.weight", model.base_model.model[0]), ("2.weight", model.base_model.model[2]))


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"rank_pattern": {"2": 1}}, {"moved": True}])
def test_the_gradient_is_that_of_the_loss_on_the_product(lora: dict[str, Any]) -> None:
    starts_moved = bool(lora) and "moved" in lora
    model = adapted(**({} if starts_moved else lora))
    if starts_moved:
        move(model)
    updates = {name: layer.get_delta_weight("default").detach().clone() for name, layer in layers(model)}
    fisher = fisher_of_base()
    penalty = ProductPenalty(model, starting_weights(model), fisher, strength=0.7)
    move(model)
    x = torch.randn(7, 6, dtype=torch.float64)
    model(x).square().mean().backward()
    penalty.add_gradients()
    got = {n: p.grad.clone() for n, p in trainable_parameters(model).items()}

    model.zero_grad()
    mean = torch.cat([fisher[name].flatten() for name in updates]).double().mean()
    terms = [
        (fisher[name].double() / mean * (layer.get_delta_weight("default") - updates[name]).square()).sum()
        for name, layer in layers(model)
    ]
    loss = 0.7 / 2 * torch.stack(terms).sum()
    (model(x).square().mean() + loss).backward()
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-6, atol=1e-6)
    assert penalty.loss() == pytest.approx(float(loss.detach()), rel=1e-6)


def test_at_the_start_there_is_neither_loss_nor_gradient() -> None:
    model = adapted()
    move(model)
    penalty = ProductPenalty(model, starting_weights(model), fisher_of_base(), strength=3.0)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_gradients()
    assert penalty.loss() == 0
    assert all(not p.grad.any() for p in trainable_parameters(model).values())


def test_another_way_to_write_the_same_product_costs_the_same() -> None:
    model = adapted()
    penalty = ProductPenalty(model, starting_weights(model), fisher_of_base())
    move(model)
    before = penalty.loss()
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.mul_(8.0 if "lora_A" in name else 1 / 8)
    assert before > 0.1
    assert penalty.loss() == pytest.approx(before, rel=1e-12)


def test_what_is_not_plain_lora_on_linear_layers_is_one_line() -> None:
    def fails(message: str, model: Any, fisher: FisherDiagonal | None = None) -> None:
        with pytest.raises(RPSAError, match=message) as error:
            ProductPenalty(model, starting_weights(model), fisher or fisher_of_base())
        assert "\n" not in str(error.value)

    fails("none is trained", nn.Linear(2, 2))
    fails("'base_model.model.0.lora_.* is trained", adapted(use_dora=True))
    fails("bias' is trained", adapted(bias="lora_only"))
    several = adapted()
    several.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    several.base_model.set_adapter(["default", "other"])
    fails("'base_model.model.0.lora_A.other.weight' is trained", several)
    base = make_model("llama")
    embedding = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens", "up_proj"]))
    fails("embed_tokens.lora_embedding_A.* is trained", embedding)
    fails("no scores of '0.weight'", adapted(), FisherDiagonal({"2.weight": torch.ones(4, 5)}))
    wrong = {"0.weight": torch.ones(6, 5), "2.weight": torch.ones(4, 5)}
    fails(r"scores of shape \(6, 5\), the weight is \(5, 6\)", adapted(), FisherDiagonal(wrong))
    zeros = {name: torch.zeros_like(score) for name, score in fisher_of_base().scores.items()}
    fails("every Fisher score of the adapted weights is zero", adapted(), FisherDiagonal(zeros))


# In a trainer


def make_trainer(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **own: Any) -> Any:
    model = make_model(kind, dtype)
    fisher = estimate_fisher(model, reference().batches(4, None), FisherConfig(progress=False))
    arguments = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4,
        "learning_rate": 1e-2, "penalty": "product", **QUIET, **own,
    }  # fmt: skip
    return AlternativesTrainer(
        model=make_model(f"{kind}+lora", dtype) if "+" not in kind else model,
        args=AlternativesConfig(**installed_names(arguments, AlternativesConfig), output_dir=str(folder)),
        train_dataset=safety_rows(40),
        processing_class=id_tokenizer(),
        fisher=fisher if arguments["penalty"] else None,
    )


def trained(folder: Path, resume: str | None = None, **own: Any) -> Any:
    trainer = make_trainer(folder, **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_no_strength_is_plain_training_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", save_strategy="steps", save_steps=2)
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    nothing = trained(tmp_path / "nothing", penalty_strength=0.0)
    plain = trained(tmp_path / "plain", penalty=None)
    before, after, none, without = map(weights_of, (whole, resumed, nothing, plain))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(none[name], without[name]) for name in none)
    assert any(not torch.equal(before[name], without[name]) for name in before)
    logged = [e["alternatives/penalty"] for e in whole.state.log_history if "alternatives/penalty" in e]
    assert min(logged) > 0


def test_a_trainer_refuses_the_fisher_of_another_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    common = {
        "args": trainer.args, "train_dataset": safety_rows(8), "processing_class": trainer.processing_class,
    }  # fmt: skip
    other = make_model("llama+lora")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "base_layer" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(RPSAError, match="measured on other weights than the adapter's base"):
        AlternativesTrainer(model=other, fisher=trainer.fisher, **common)
    with pytest.raises(RPSAError, match="give fisher"):
        AlternativesTrainer(model=make_model("llama+lora"), **common)
    with pytest.raises(RPSAError, match="none is trained"):
        AlternativesTrainer(model=make_model("llama"), fisher=trainer.fisher, **common)
    with pytest.raises(RPSAError, match="restored_ratio by the adapter's"):
        AlternativesConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, penalty="product", restored_ratio=0.5
        )
    assert len(lora_updates(trainer.model)) == 14


def on_ranks(folder: Path) -> dict[str, torch.Tensor]:
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    own: dict[str, Any] = {"gradient_accumulation_steps": 4 if alone else 2, "penalty_strength": 5.0}
    return weights_of(trained(folder, dtype=torch.float64, **own))


@pytest.mark.integration
def test_two_ranks_are_one(tmp_path: Path) -> None:
    [alone] = run_ranks(1, on_ranks, tmp_path / "one", tmp_path / "runs-1")
    for ours in run_ranks(2, on_ranks, tmp_path / "two", tmp_path / "runs-2"):
        for name, expected in alone.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12)


# In a recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["matrix.methods=[fft+ewc_product]"], "'fft+ewc_product' is not a well-known method"),
        (["matrix.methods={fft+ewc: {alternatives: {penalty: product}}}"], "in full fine-tuning use fisher"),
        (
            ["matrix.methods=[fft+ewc]", "matrix.grid={alternatives.penalty: [fisher, product]}"],
            "in full fine-tuning use fisher",
        ),
        (
            ["matrix.methods={lora+ewc_product: {alternatives: {restored_ratio: 0.5}}}"],
            "restored_ratio by the adapter's",
        ),
    ],
)
def test_where_there_is_no_product_is_one_line(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(RPSAError) as error:
        recipe(tmp_path, *settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_it_does_not_know_is_known_before_anything_runs(tmp_path: Path) -> None:
    from rpsa.pipeline import run

    methods = "matrix.methods=[lora+ewc_product]"
    with pytest.raises(RPSAError, match=r"lora\+ewc_product.*lora_.* is trained"):
        run(recipe(tmp_path, methods, "lora.use_dora=true"))
    with pytest.raises(
        RPSAError, match=r"fisher.scope 'q_proj' leaves out 'model.layers.0.mlp.gate_proj.weight'"
    ):
        run(recipe(tmp_path, methods, "fisher.scope=q_proj"))
    assert not (tmp_path / "run" / "reference").exists()


@pytest.mark.integration
def test_through_a_recipe_with_the_whole_models_fisher(tmp_path: Path) -> None:
    from rpsa.pipeline import run, verify

    methods = (
        "matrix.methods={lora: , fft+ewc: , lora+ewc: , lora+ewc_product: , "
        "lora+none: {paradigm: lora, alternatives: {penalty: product, penalty_strength: 0.0}}}"
    )
    folder = run(recipe(tmp_path, methods, "evaluate.tasks=[]"))
    verify(folder)
    fishers = {path.name.partition("-")[0] for path in (folder / "fisher" / "tiny-0").iterdir()}
    assert fishers == {"full", "lora"}
    prints, facts = {}, {}
    for name in ("lora", "lora+ewc", "lora+ewc_product", "lora+none"):
        run_folder = folder / "align" / name / "tiny-0" / "seed0"
        facts[name] = json.loads((run_folder / "rpsa_metadata.json").read_text())
        prints[name] = facts[name]["weights_fingerprint"]
    assert prints["lora+none"] == prints["lora"]
    assert len(set(prints.values())) == 3
    assert facts["lora+ewc_product"]["alternatives"]["penalty"] == "product"
    card = (folder / "align" / "lora+ewc_product" / "tiny-0" / "seed0" / "README.md").read_text()
    assert "update B A" in card
