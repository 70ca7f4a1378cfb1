"""The null space of D_ref's inputs: against numpy, under AdamW, in a trainer, on ranks, in a recipe."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.alternatives_runs import make_trainer, opposed, trained, weights_of
from helpers.examples import examples
from helpers.rank_runs import make_model, sequences
from helpers.ranks import run_ranks
from helpers.small_alternatives import recipe
from rpsa.alternatives.after_training import starting_weights
from rpsa.alternatives.nullspace import NullSpace, principal_directions
from rpsa.errors import RPSAError
from rpsa.parameters import trainable_parameters
from rpsa.reference import ReferenceDataset, Trace

# Directions


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 20), st.floats(0.01, 1.0))
@examples(80)
def test_the_fewest_directions_that_hold_the_energy(seed: int, width: int, rows: int, energy: float) -> None:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(rows, width)) * generator.uniform(0.01, 3.0, size=width)
    covariance = inputs.T @ inputs
    basis = principal_directions(torch.from_numpy(covariance), energy)
    values = np.linalg.eigh(covariance)[0][::-1]
    shares = values.cumsum() / values.sum()
    expected = min(int((shares < energy - 1e-12).sum()) + 1, min(rows, width))
    assert basis.shape == (width, expected)
    torch.testing.assert_close(basis.T @ basis, torch.eye(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    held = np.square(inputs @ basis.numpy()).sum() / np.square(inputs).sum()
    assert held >= energy - 1e-9
    fewer = np.square(inputs @ basis.numpy()[:, :-1]).sum() / np.square(inputs).sum()
    assert expected == 1 or fewer < energy


def test_no_input_has_no_direction_and_the_least_energy_has_one() -> None:
    assert principal_directions(torch.zeros(3, 3, dtype=torch.float64), 1.0).shape == (3, 0)
    assert principal_directions(torch.eye(3, dtype=torch.float64), 1e-12).shape == (3, 1)


# In a loop


def few_traces() -> ReferenceDataset:
    """Of 9 tokens in all, fewer than the narrowest layer is wide, and of two lengths."""
    rows = [sequences(1, seed=7)[0][:5], sequences(1, seed=8)[0][:4]]
    return ReferenceDataset([Trace(str(i), r[:2], r[2:], "", "stop", True) for i, r in enumerate(rows)])


def inputs_of(model: Any, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Of every linear layer on the tokens of the batches, collected one sequence after the other, (N, in)."""
    found: dict[str, list[torch.Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, []).append(args[0].detach()[0].clone())
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: model.get_submodule(name)(rows) for name, rows in inputs.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("projected", ["movement", "gradients"])
def test_what_layers_make_of_d_ref_stays_under_adamw(kind: str, projected: str) -> None:
    model = make_model(kind).eval()
    batches = list(few_traces().batches(2, None))
    inputs = inputs_of(model, batches)
    assert all(len(rows) < rows.shape[1] for rows in inputs.values())
    before, logits = outputs(model, inputs), model(input_ids=batches[0]["input_ids"][:1, :4]).logits.detach()
    start = starting_weights(model)
    null_space = NullSpace(model, start, batches, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if projected == "movement":
        optimizer.register_step_post_hook(lambda *_: null_space.project())
    parameters = trainable_parameters(model)
    for step in range(5):
        rows = torch.tensor([row[:5] for row in sequences(8, seed=20 + step)])
        model(input_ids=rows, labels=rows).loss.backward()
        if projected == "gradients":  # what is not enough
            for name, basis in null_space.bases.items():
                gradient = parameters[name].grad
                assert gradient is not None
                gradient -= gradient @ basis @ basis.T
        optimizer.step()
        optimizer.zero_grad()
    after = outputs(model, inputs)
    furthest = max(float((after[name] - before[name]).abs().max()) for name in before)
    if projected == "gradients":
        assert furthest > 1e-3
        return
    assert furthest < 1e-5
    now = model(input_ids=batches[0]["input_ids"][:1, :4]).logits.detach()
    torch.testing.assert_close(now, logits, rtol=0, atol=1e-4)
    moved = {name: parameter.detach() - start[name] for name, parameter in parameters.items()}
    assert all(bool(moved[name].any()) == (moved[name].ndim > 1) for name in moved)
    embedding = next(name for name in moved if "embed_tokens" in name)
    seen = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in batches]).unique()
    assert not moved[embedding][seen].any()
    assert moved[embedding].any()


def test_bases_are_orthonormal_and_padding_is_no_input() -> None:
    model = make_model("llama")
    model.train()
    before = torch.get_rng_state()
    spaces = [
        NullSpace(model, starting_weights(model), opposed().batches(size, None), 0.9) for size in (1, 8)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    inputs = inputs_of(model.eval(), list(opposed().batches(1, None)))
    for name, rows in inputs.items():
        bases = [space.bases[f"{name}.weight"].double() for space in spaces]
        expected = principal_directions(rows.double().T @ rows.double(), 0.9)
        for basis in bases:
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-4)
    assert 0 < spaces[0].free_share < 1


class _Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(2, 2, 1)


def test_what_it_does_not_know_is_one_line() -> None:
    def fails(message: str, model: nn.Module, batches: Any = None, energy: float = 0.9) -> None:
        with pytest.raises(RPSAError, match=message) as error:
            NullSpace(model, starting_weights(model), batches or opposed().batches(4, None), energy)
        assert "\n" not in str(error.value)

    fails("is for full fine-tuning, and this model has an adapter", make_model("llama+lora"))
    fails("'kernel.weight' is of a Conv1d", _Convolution())
    fails("energy 0.0 is not above 0", make_model("llama"), energy=0.0)
    broken = make_model("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(torch.inf)
    fails("inputs of .* are not finite", broken)


# In a trainer


NULLSPACE: dict[str, Any] = {"projection": "nullspace", "weight_decay": 0.1}


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen2", marks=pytest.mark.integration)])
def test_resuming_is_bit_identical(kind: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", kind, save_strategy="steps", save_steps=2, **NULLSPACE)
    resumed = trained(tmp_path / "resumed", kind, str(tmp_path / "whole" / "checkpoint-2"), **NULLSPACE)
    before, after, plain = (
        weights_of(whole),
        weights_of(resumed),
        weights_of(trained(tmp_path / "plain", kind)),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], plain[name]) for name in before)
    assert [e["alternatives/free_share"] for e in whole.state.log_history if "loss" in e] == 4 * [
        whole.null_space.free_share
    ]
    start = weights_of(make_trainer(tmp_path, kind))
    assert all(torch.equal(before[n], start[n]) for n in before if before[n].ndim < 2)
    for name, basis in whole.null_space.bases.items():
        moved = before[name] - start[name]
        assert float((moved @ basis).abs().max()) < 1e-6
        assert float(moved.abs().max()) > 1e-3


def test_the_optimizer_is_let_go_of(tmp_path: Path) -> None:
    trainer = trained(tmp_path, **NULLSPACE)
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_post_hooks
    before = trainer.null_space
    trainer.train()
    assert trainer.null_space is not before


def test_a_trainer_with_an_adapter_or_without_d_ref_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="is for full fine-tuning"):
        make_trainer(tmp_path, "llama+lora", **NULLSPACE)
    with pytest.raises(RPSAError, match=r"nullspace_energy 1\.5 is not above 0 and at most 1"):
        make_trainer(tmp_path, nullspace_energy=1.5, **NULLSPACE)


def on_ranks(folder: Path) -> dict[str, torch.Tensor]:
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    own: dict[str, Any] = {"gradient_accumulation_steps": 4 if alone else 2, "dtype": torch.float64}
    return weights_of(trained(folder, **own, **NULLSPACE))


@pytest.mark.integration
def test_two_ranks_are_one(tmp_path: Path) -> None:
    [alone] = run_ranks(1, on_ranks, tmp_path / "one", tmp_path / "runs-1")
    first, second = run_ranks(2, on_ranks, tmp_path / "two", tmp_path / "runs-2")
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-12)


# In a recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["matrix.methods=[lora+nullspace]"], "'lora+nullspace' is not a well-known method"),
        (
            ["matrix.methods={lora+agem: {alternatives: {projection: nullspace}}}"],
            "lora+agem: alternatives.projection: nullspace is for full fine-tuning",
        ),
        (
            ["matrix.methods={fft+agem: {alternatives: {nullspace_energy: 0.5}}}"],
            "matrix.methods.fft+agem.alternatives.nullspace_energy: of no null space",
        ),
        (
            ["matrix.methods={mine: {paradigm: fft, alternatives: {nullspace_energy: 0.5}}}"],
            "matrix.methods.mine.alternatives: does nothing",
        ),
        (["matrix.methods=[fft+nullspace]", "reference.problems=null"], "fft+nullspace needs"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(RPSAError) as error:
        recipe(tmp_path, *settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_inputs_of_other_methods_are_what_they_were(tmp_path: Path) -> None:
    from rpsa.pipeline.stages import AlignTask

    of = recipe(tmp_path, "matrix.methods=[fft+l2sp, fft+interpolation]")
    for cell in of.cells():
        assert set(AlignTask(of, cell).inputs()["alternatives"]) == {
            "penalty", "penalty_strength", "projection", "rehearsal_share", "interpolation", "restored_ratio",
        }  # fmt: skip
    grid = "matrix.grid={alternatives.nullspace_energy: [0.5, 0.9]}"
    cells = recipe(tmp_path, "matrix.methods=[fft+agem, fft+nullspace]", grid).cells()
    assert [cell.alternatives.nullspace_energy for cell in cells if cell.method == "fft+nullspace"] == [
        0.5,
        0.9,
    ]
    assert len(cells) == 3


@pytest.mark.integration
def test_through_a_recipe(tmp_path: Path) -> None:
    from rpsa.pipeline import run, verify

    folder = run(recipe(tmp_path, "matrix.methods=[fft, fft+nullspace]", "evaluate.tasks=[]"))
    verify(folder)
    assert not (folder / "fisher").exists()
    run_folder = folder / "align" / "fft+nullspace" / "tiny-0" / "seed0"
    facts = json.loads((run_folder / "rpsa_metadata.json").read_text())["alternatives"]
    assert (facts["projection"], facts["nullspace_energy"]) == ("nullspace", 0.95)
    assert "0.95 of the energy of each linear layer's inputs" in (run_folder / "README.md").read_text()
