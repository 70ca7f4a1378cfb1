"""The alternatives to freezing against slow, obvious references: in a plain loop, in a trainer, in a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers.alternatives_runs import make_trainer, opposed, safety_rows, trained, weights_of
from helpers.examples import examples
from helpers.rank_runs import reference
from helpers.small_alternatives import recipe
from rpsa.alternatives.after_training import interpolate, restore, starting_weights
from rpsa.alternatives.penalty import WeightPenalty
from rpsa.alternatives.projection import Projection
from rpsa.chat import IGNORED_LABEL
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.parameters import trainable_parameters
from rpsa.reference import ReferenceDataset
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer, rehearse


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def moved(dtype: torch.dtype = torch.float64) -> tuple[Three, dict[str, torch.Tensor]]:
    """A model that is not where it started, and where it started."""
    model = Three().to(dtype)
    start = starting_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, start


def random_fisher(model: nn.Module) -> FisherDiagonal:
    generator = torch.Generator().manual_seed(1)
    return FisherDiagonal(
        {n: torch.rand(p.shape, generator=generator).square() for n, p in trainable_parameters(model).items()}
    )


# The penalty


@pytest.mark.parametrize("kind", ["fisher", "uniform"])
def test_the_penalty_is_the_gradient_of_its_loss(kind: str) -> None:
    model, start = moved()
    fisher = random_fisher(model) if kind == "fisher" else None
    if fisher:
        fisher["first.weight"][:2] = 0  # the mean is over all elements
    penalty = WeightPenalty(model, start, fisher, strength=0.7)
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).square().mean().backward()
    penalty.add_gradients()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    mean = torch.cat([fisher[n].flatten() for n in fisher]).mean() if fisher else None
    used = {n: p for n, p in model.named_parameters() if "unused" not in n}
    terms = [
        ((fisher[n] / mean if fisher else 1) * (p - start[n]).square()).sum()
        for n, p in model.named_parameters()
    ]
    explicit = 0.7 / 2 * torch.stack(terms).sum()
    (model(x).square().mean() + explicit).backward()
    assert set(got) == set(used)  # what the loss does not reach is not moved by the optimizer either
    for name, parameter in used.items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-8)  # F is in fp32
    assert penalty.loss() == pytest.approx(float(explicit), rel=1e-5)


def test_what_has_no_fisher_is_not_pulled_at() -> None:
    model, start = moved()
    scores = {n: torch.ones_like(p) for n, p in trainable_parameters(model).items()}
    scores["first.bias"].zero_()
    penalty = WeightPenalty(model, start, FisherDiagonal(scores), strength=1.0)
    weight = sum(s.numel() for s in scores.values()) / sum(int(s.sum()) for s in scores.values())
    model(torch.zeros(1, 4, dtype=torch.float64)).sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    penalty.add_gradients()
    for name, parameter in model.named_parameters():
        if name in before:
            pulled = 0 if name == "first.bias" else weight * (parameter - start[name])
            torch.testing.assert_close(parameter.grad, (before[name] + pulled).detach())


def test_a_fisher_of_zeros_is_refused() -> None:
    model, start = moved()
    zeros = FisherDiagonal({n: torch.zeros_like(p) for n, p in trainable_parameters(model).items()})
    with pytest.raises(RPSAError, match="every Fisher score is zero"):
        WeightPenalty(model, start, zeros)


# Projections


def two_gradients(seed: int) -> tuple[Three, list[torch.Tensor], list[torch.Tensor]]:
    """A model with g_S in `.grad` after g_R has been there, and both."""
    model, generator = Three().double(), torch.Generator().manual_seed(seed)
    used = [p for n, p in model.named_parameters() if "unused" not in n]
    first, second = (
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in used] for _ in "rs"
    )
    for p, gradient in zip(used, first, strict=True):
        p.grad = gradient.clone()
    return model, first, second


def projected(model: Three, kind: Any, safety: list[torch.Tensor]) -> tuple[Projection, torch.Tensor]:
    projection = Projection(model, kind)
    projection.capture_reference()
    assert all(p.grad is None for p in model.parameters())
    used = [p for n, p in model.named_parameters() if "unused" not in n]
    for p, gradient in zip(used, safety, strict=True):
        p.grad = gradient.clone()
    projection.project_gradients()
    return projection, torch.cat([p.grad.flatten() for p in used])  # type: ignore[union-attr]


@given(st.integers(0, 10_000))
@examples(60)
def test_agem_takes_out_what_would_raise_the_reasoning_loss(seed: int) -> None:
    model, reasoning, safety = two_gradients(seed)
    r, s = (torch.cat([g.flatten() for g in gradients]) for gradients in (reasoning, safety))
    projection, result = projected(model, "agem", safety)
    expected = s - (s @ r) / (r @ r) * r if s @ r < 0 else s
    torch.testing.assert_close(result, expected)
    assert result @ r >= -1e-9
    assert projection.cosine == pytest.approx(float(s @ r / s.norm() / r.norm()))


@given(st.integers(0, 10_000))
@examples(30)
def test_sign_projection_stops_the_elements_that_eq_6_counts(seed: int) -> None:
    model, reasoning, safety = two_gradients(seed)
    safety[0][0] = 0
    reasoning[1][0] = 0
    for p, gradient in zip(model.parameters(), reasoning, strict=False):
        p.grad = gradient.clone()
    r, s = (torch.cat([g.flatten() for g in gradients]) for gradients in (reasoning, safety))
    _, result = projected(model, "signs", safety)
    assert torch.equal(result, torch.where(s * r < 0, torch.zeros_like(s), s))


def test_a_projection_without_a_reasoning_gradient_changes_nothing() -> None:
    model, _, safety = two_gradients(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    projection, result = projected(model, "agem", safety)
    assert torch.equal(result, torch.cat([g.flatten() for g in safety]))
    assert projection.cosine == 0
    with pytest.raises(RPSAError, match="'pcgrad' is not one of agem, signs"):
        Projection(model, "pcgrad")  # type: ignore[arg-type]


# After training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolation_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    for weight in (0.0, 0.25, 1.0):
        model, start = moved(dtype)
        trained = starting_weights(model, "cpu")
        interpolate(model, start, weight)
        for name, parameter in model.named_parameters():
            if weight in (0.0, 1.0):
                assert torch.equal(parameter, (trained if weight else start)[name])
            else:
                expected = start[name] + weight * (trained[name] - start[name])
                torch.testing.assert_close(parameter.detach(), expected)


def test_interpolating_lora_scales_its_update() -> None:
    base: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    base.config = {}
    weights = [layer.weight.detach().clone() for layer in base]
    model: Any = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.0, target_modules=["0", "1"]))
    start = starting_weights(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.add_(torch.randn_like(parameter) * (2 if "lora_B" in name else 0.5))
    updates = [layer.get_delta_weight("default").clone() for layer in model.base_model.model]
    interpolate(model, start, 0.3)
    merged = model.merge_and_unload()
    for layer, before, update in zip(merged, weights, updates, strict=True):
        torch.testing.assert_close(layer.weight.detach(), before + 0.3 * update.detach())


def test_interpolating_an_adapter_that_starts_elsewhere_is_refused_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "llama+lora", interpolation=0.5)
    with torch.no_grad():
        next(p for n, p in trainable_parameters(trainer.model).items() if "lora_B" in n)[0, 0] = 1e-3
    with pytest.raises(RPSAError, match="does not start at B = 0"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(RPSAError, match="does not start at B = 0"):
        interpolate(trainer.model, starting_weights(trainer.model), 0.5)


def test_g_r_survives_gradients_that_are_views_of_buckets() -> None:
    """As under DDP with `gradient_as_bucket_view`: the next pass fills the same memory."""
    model, reasoning, safety = two_gradients(1)
    used = [p for n, p in model.named_parameters() if "unused" not in n]
    buckets = [p.grad for p in used]
    projection = Projection(model, "agem")
    projection.capture_reference()
    for p, bucket, gradient in zip(used, buckets, safety, strict=True):
        assert bucket is not None
        p.grad = bucket.copy_(gradient)
    projection.project_gradients()
    s, r = (torch.cat([g.flatten() for g in gradients]) for gradients in (safety, reasoning))
    assert projection.cosine == pytest.approx(float(s @ r / s.norm() / r.norm()))


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_restoring_puts_back_what_freezing_would_have_kept(ratio: float) -> None:
    model, start = moved()
    fisher, trained = random_fisher(model), starting_weights(model)
    restore(model, start, fisher, ratio)
    moved_elements = 0
    for name, trainable in fisher.mask(ratio).items():
        parameter = dict(model.named_parameters())[name]
        assert torch.equal(parameter[trainable], trained[name][trainable])
        assert torch.equal(parameter[~trainable], start[name][~trainable])
        moved_elements += int(trainable.sum())
    total = sum(p.numel() for p in model.parameters())
    assert moved_elements == {0.0: total, 0.6: total - int(0.6 * total), 1.0: 1}[ratio]


# Rehearsal


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 4), (0.5, 12), (0.75, 36)])
def test_rehearsal_adds_the_models_own_traces(share: float, count: int) -> None:
    data, traces = safety_rows(), reference()
    mixed = rehearse(data, traces, share, 64, seed=3).dataset
    own = {tuple(row) for row in data["input_ids"]}
    known = {(*t.prompt_ids, *t.response_ids): len(t.prompt_ids) for t in traces.traces}
    added = [row for row in mixed if tuple(row["input_ids"]) not in own]
    assert len(added) == count
    assert len(mixed) == len(data) + count
    for row in added:
        prompt = known[tuple(row["input_ids"])]
        assert row["labels"] == [IGNORED_LABEL] * prompt + row["input_ids"][prompt:]
    # each trace as often as any other, give or take one
    times = [sum(tuple(row["input_ids"]) == ids for row in added) for ids in known]
    assert max(times) - min(times) <= 1
    assert mixed["input_ids"] == rehearse(data, traces, share, 64, seed=3).dataset["input_ids"]


def test_which_traces_are_rehearsed_is_the_seeds(caplog: pytest.LogCaptureFixture) -> None:
    own = {tuple(row) for row in safety_rows()["input_ids"]}

    def added(seed: int) -> set[tuple[int, ...]]:
        mixed = rehearse(safety_rows(), reference(), 0.25, 64, seed).dataset
        return {tuple(row) for row in mixed["input_ids"]} - own

    assert len({frozenset(added(seed)) for seed in range(5)}) > 1
    assert not caplog.records


def test_rehearsal_keeps_to_the_longest_sequence(caplog: pytest.LogCaptureFixture) -> None:
    rehearsal = rehearse(safety_rows(), reference(), 0.5, 6)
    longer = sum(trace.length > 6 for trace in reference().traces)
    assert (rehearsal.rehearsed, len(rehearsal.dataset)) == (12, 24)
    assert rehearsal.truncated in (longer, longer + 1)  # 11 traces, one of which comes twice
    assert f"max_length 6 cuts {rehearsal.truncated} of 12 rehearsed traces" in caplog.text
    with pytest.raises(RPSAError, match="max_length 2 leaves no response token"):
        rehearse(safety_rows(), reference(), 0.5, 2)
    with pytest.raises(RPSAError, match="rehearsal share is 1"):
        rehearse(safety_rows(), reference(), 1.0, 64)


# In a trainer


WAYS: list[dict[str, Any]] = [
    {"penalty": "fisher"},
    {"penalty": "uniform", "penalty_strength": 0.5},
    {"projection": "agem"},
    {"projection": "signs"},
    {"interpolation": 0.5, "restored_ratio": 0.3},
    {"kl": 1.0},
    {"der": 1.0, "anchor_top": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(map(str, way.values())))
@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("qwen2", marks=pytest.mark.integration), "llama+lora"]
)
def test_resuming_is_bit_identical(kind: str, way: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", kind, save_strategy="steps", save_steps=2, **way)
    resume = str(tmp_path / "whole" / "checkpoint-2")
    resumed = trained(tmp_path / "resumed", kind, resume, **way)
    plain = trained(tmp_path / "plain", kind)
    before, after, without = weights_of(whole), weights_of(resumed), weights_of(plain)
    assert all(torch.equal(before[name], after[name]) for name in before)
    cosines = [e["alternatives/cosine"] for e in whole.state.log_history if "alternatives/cosine" in e]
    does_something = way != {"projection": "agem"} or min(cosines) < 0
    assert any(not torch.equal(before[name], without[name]) for name in before) == does_something


def test_a_step_is_what_the_definitions_say(tmp_path: Path) -> None:
    """Plain SGD, so that the weights tell the gradients: penalty and projection by autograd alone."""
    settings: dict[str, Any] = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 1}
    start = weights_of(make_trainer(tmp_path))
    safety = {n: (start[n] - w) / 1e-2 for n, w in weights_of(trained(tmp_path, **settings)).items()}
    projected = weights_of(trained(tmp_path, **settings, projection="agem"))

    trainer = make_trainer(tmp_path)
    model = trainer.model.eval()
    batch = opposed().rotating_batch(0, 4, 4096)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    reasoning = {n: p.grad for n, p in trainable_parameters(model).items()}
    product = sum((safety[n] * reasoning[n]).sum() for n in safety)
    norm = sum(reasoning[n].square().sum() for n in safety)
    assert product < 0
    for name in safety:
        expected = safety[name] - product / norm * reasoning[name]
        torch.testing.assert_close((start[name] - projected[name]) / 1e-2, expected, rtol=1e-3, atol=2e-5)


def test_each_step_projects_against_the_next_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rotating_batch = ReferenceDataset.rotating_batch

    def listening(self: ReferenceDataset, step: int, size: int, max_length: int | None) -> Any:
        asked.append((step, size))
        return rotating_batch(self, step, size, max_length)

    monkeypatch.setattr(ReferenceDataset, "rotating_batch", listening)
    trained(tmp_path, projection="agem")
    assert asked == [(step, 4) for step in range(4)]


def test_a_penalty_keeps_weights_near_and_its_value_is_logged(tmp_path: Path) -> None:
    start = weights_of(make_trainer(tmp_path))

    def distance(strength: float) -> float:
        trainer = trained(tmp_path, penalty="uniform", penalty_strength=strength, max_steps=12)
        logged = [e["alternatives/penalty"] for e in trainer.state.log_history if "loss" in e]
        assert len(logged) == 12
        moved = sum((w - start[n]).square().sum().item() for n, w in weights_of(trainer).items())
        assert logged[-1] == pytest.approx(strength / 2 * moved, rel=1e-4)
        return moved

    far, near = distance(0.01), distance(10.0)
    assert near < 0.5 * far


def test_after_training_means_after_training(tmp_path: Path) -> None:
    start, plain = weights_of(make_trainer(tmp_path)), weights_of(trained(tmp_path))
    half = weights_of(trained(tmp_path, interpolation=0.25))
    for name in start:
        torch.testing.assert_close(half[name], torch.lerp(start[name], plain[name], 0.25))
    restored = trained(tmp_path, restored_ratio=0.6)
    for name, trainable in restored.fisher.mask(0.6).items():
        expected = torch.where(trainable, plain[name], start[name])
        assert torch.equal(weights_of(restored)[name], expected)


def test_a_smaller_batch_after_running_out_of_memory_starts_where_the_first_did(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, interpolation=0.0, auto_find_batch_size=True)
    start, steps = weights_of(trainer), []
    training_step = trainer.training_step

    def runs_out_of_memory_once(*args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(trainer.state.global_step)
        if len(steps) == 4:
            raise RuntimeError("CUDA out of memory.")
        return training_step(*args, **kwargs)

    trainer.training_step = runs_out_of_memory_once
    trainer.train()
    assert steps[3:5] == [1, 0]  # it had moved, and began again
    assert all(torch.equal(start[name], weights) for name, weights in weights_of(trainer).items())


def test_training_twice_starts_afresh(tmp_path: Path) -> None:
    trainer = trained(tmp_path, interpolation=0.0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1)
    between = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(between[name], weights) for name, weights in weights_of(trainer).items())


def test_what_is_missing_or_impossible_is_one_line(tmp_path: Path) -> None:
    def fails(message: str, **settings: Any) -> None:
        with pytest.raises(RPSAError, match=message):
            make_trainer(tmp_path, **settings)

    fails("penalty 'l1' is not one of fisher, uniform", penalty="l1")
    fails("projection 'pcgrad' is not one of agem, signs", projection="pcgrad")
    fails("penalty_strength -1.0 is negative", penalty="fisher", penalty_strength=-1.0)
    fails("interpolation 1.5 is not between 0 and 1", interpolation=1.5)
    fails("restored_ratio -0.1 is not between 0 and 1", restored_ratio=-0.1)
    trainer = make_trainer(tmp_path)
    common = {"model": trainer.model, "processing_class": trainer.processing_class}
    for own, message in (
        ({"penalty": "fisher"}, "give fisher"),
        ({"restored_ratio": 0.5}, "give fisher"),
        ({"projection": "agem"}, "give reference_dataset"),
    ):
        args = AlternativesConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **own)
        with pytest.raises(RPSAError, match=message):
            AlternativesTrainer(args=args, train_dataset=safety_rows(), **common)
    from trl import SFTConfig

    plain = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(RPSAError, match="args must include AlternativesArguments"):
        AlternativesTrainer(args=plain, train_dataset=safety_rows(), **common)


# In a recipe


@pytest.mark.integration
def test_each_alternative_through_a_recipe(tmp_path: Path) -> None:
    from rpsa.pipeline import run, verify
    from rpsa.recipe.methods import WELL_KNOWN

    names = [
        name for name, method in WELL_KNOWN.items() if "alternatives" in method and "align" not in method
    ]
    assert len(names) >= 14
    run(recipe(tmp_path, f"matrix.methods={json.dumps(['fft', 'lora', *names])}"))
    verify(tmp_path / "run")
    fingerprints = {}
    for name in ["fft", "lora", *names]:
        folder = tmp_path / "run" / "align" / name / "tiny-0" / "seed0"
        metadata = json.loads((folder / "rpsa_metadata.json").read_text())
        log = json.loads((folder / "log.json").read_text())
        fingerprints[name] = metadata["weights_fingerprint"]
        assert log["rehearsed"] == (5 if "rehearsal" in name else 0)
        assert bool(metadata["alternatives"]) == (name in names)
        assert metadata["freezing"] is None
        card = (folder / "README.md").read_text()
        assert ("instead of freezing" in card) == (name in names), card
        assert ("Where the Fisher information comes from" in card) == name.endswith(
            ("ewc", "ewc_product", "restored")
        )
        on_traces = ("agem", "sign_projection", "nullspace", "+kl", "+der")
        assert ("Where the reasoning data comes from" in card) == name.endswith(on_traces)
    full = [print_ for name, print_ in fingerprints.items() if name.startswith("fft")]
    assert len(set(full)) == len(full)
    # in LoRA, whose A has no Fisher at the start, and whose B starts at 0, every one does something, too
    adapters = [print_ for name, print_ in fingerprints.items() if name.startswith("lora")]
    assert len(set(adapters)) == len(adapters)


def test_nothing_is_measured_that_an_alternative_does_not_use(tmp_path: Path) -> None:
    from rpsa.pipeline import run

    unevaluated = "evaluate.tasks=[]"
    folder = run(recipe(tmp_path, "matrix.methods=[fft, fft+l2sp]", unevaluated))
    assert not (folder / "reference").exists()
    run(recipe(tmp_path, "matrix.methods=[fft, fft+l2sp, fft+rehearsal]", unevaluated))
    assert (folder / "reference").exists()
    assert not (folder / "fisher").exists()
    before = {p: p.stat().st_mtime_ns for p in (folder / "align").rglob("stage.json")}
    stronger = "matrix.methods={fft: , fft+l2sp: {alternatives: {penalty_strength: 2.0}}, fft+rehearsal: }"
    run(recipe(tmp_path, stronger, unevaluated))
    again = {p.parent.parent.parent.name for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert again == {"fft+l2sp"}


def test_a_projection_is_done_again_when_its_traces_are_cut_elsewhere(tmp_path: Path) -> None:
    from helpers.small_runs import unfinished
    from rpsa.pipeline import run
    from rpsa.pipeline.stages import tasks_of

    methods = "matrix.methods=[fft+agem, fft+rehearsal]"
    run(recipe(tmp_path, methods, "evaluate.tasks=[]"))
    changed = recipe(tmp_path, methods, "evaluate.tasks=[]", "reference.reference_max_length=32")
    assert [task.name.partition("/")[0] for task in unfinished(tasks_of(changed, "align"))] == ["fft+agem"]


def test_what_training_refuses_is_known_before_anything_runs(tmp_path: Path) -> None:
    from rpsa.pipeline import run

    settings = ("matrix.methods=[fft+ewc]", "train.optim=lion_8bit")
    with pytest.raises(RPSAError, match=r"fft\+ewc.*lion_8bit is not supported"):
        run(recipe(tmp_path, *settings))
    assert not (tmp_path / "run" / "reference").exists()


def test_freezing_goes_with_rehearsal_and_anchors_alone(tmp_path: Path) -> None:
    both = "matrix.methods={fft+rpsa: {alternatives: {rehearsal_share: 0.25}}}"
    [cell] = recipe(tmp_path, both).cells()
    assert cell.align is not None
    assert cell.alternatives.rehearsal_share == 0.25
    [cell] = recipe(tmp_path, "matrix.methods={fft+rpsa: {alternatives: {kl: 0.5}}}").cells()
    assert cell.align is not None
    assert cell.alternatives.anchoring == {"kl": 0.5, "der": 0.0, "anchor": "reference", "anchor_top": 64}
    with pytest.raises(
        RPSAError, match=r"fft\+rpsa: only rehearsal_share, kl and der go together with align"
    ):
        recipe(tmp_path, "matrix.methods={fft+rpsa: {alternatives: {penalty: fisher}}}")
    with pytest.raises(
        RPSAError, match=r"fft\+rpsa: only rehearsal_share, kl and der go together with align"
    ):
        recipe(
            tmp_path,
            both,
            "matrix.grid={alternatives.rehearsal_share: [0.1], alternatives.interpolation: [0.5, 1.0]}",
            "matrix.methods={fft+rpsa: {alternatives: {interpolation: 1.0}}}",
        )
    with pytest.raises(RPSAError, match=r"reference.problems: missing; fft\+agem needs"):
        recipe(tmp_path, "matrix.methods=[fft+agem]", "reference.problems=null")
    assert recipe(tmp_path, "matrix.methods=[fft+l2sp]", "reference.problems=null")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("{mine: {paradigm: fft, alternatives: {}}}", "matrix.methods.mine.alternatives: does nothing"),
        (
            "{mine: {paradigm: fft, alternatives: {penalty_strength: 3.0}}}",
            "matrix.methods.mine.alternatives: does nothing",
        ),
        (
            "{fft+agem: {alternatives: {penalty_strength: 3.0}}}",
            "matrix.methods.fft+agem.alternatives.penalty_strength: of no penalty",
        ),
        (
            "{original: {alternatives: {penalty: fisher}}}",
            "matrix.methods.original.alternatives: the untouched model is not trained",
        ),
        ("{fft+ewc: {alternatives: {penalty: null}}}", "matrix.methods.fft+ewc.alternatives: does nothing"),
        ("{fft+ewc: {alternatives: {penalty: fishr}}}", "did you mean 'fisher'?"),
        (
            "{fft+ewc: {alternatives: {anchor: benign}}}",
            "alternatives.anchor: of no anchor; set kl or der, too",
        ),
        ("{mine: {paradigm: fft, alternatives: {anchor_top: 3}}}", "mine.alternatives: does nothing"),
    ],
)
def test_an_alternative_that_would_do_nothing_is_one_line(tmp_path: Path, methods: str, message: str) -> None:
    with pytest.raises(RPSAError) as error:
        recipe(tmp_path, f"matrix.methods={methods}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_method_may_do_nothing_at_one_point_of_a_grid(tmp_path: Path) -> None:
    methods = "matrix.methods={mine: {paradigm: fft, alternatives: {interpolation: 1.0}}}"
    with pytest.raises(RPSAError, match=r"mine\.alternatives: does nothing"):
        recipe(tmp_path, methods)
    cells = recipe(tmp_path, methods, "matrix.grid={alternatives.interpolation: [0.5, 1.0]}").cells()
    assert [cell.alternatives.interpolation for cell in cells] == [0.5, 1.0]
    with pytest.raises(RPSAError, match=r"alternatives: not a section; a method has them"):
        recipe(tmp_path, "alternatives.penalty_strength=2")


def test_a_name_with_nothing_behind_it_stays_what_it_is(tmp_path: Path) -> None:
    for name in ("fft+ewc", "fft+rpsa"):
        section = "alternatives" if name == "fft+ewc" else "align"
        empty = recipe(tmp_path, f"matrix.methods={{{name}: {{{section}: }}}}").cells()
        assert empty == recipe(tmp_path, f"matrix.methods=[{name}]").cells()


def test_a_grid_over_an_alternative_concerns_those_who_have_it(tmp_path: Path) -> None:
    grid = "matrix.grid={alternatives.penalty_strength: [0.1, 1.0]}"
    cells = recipe(tmp_path, "matrix.methods=[fft, fft+ewc, fft+agem]", grid).cells()
    strengths = [cell.alternatives.penalty_strength for cell in cells if cell.method == "fft+ewc"]
    assert strengths == [0.1, 1.0]
    assert len(cells) == 4
    with pytest.raises(RPSAError, match=r"alternatives\.penalty_strenth"):
        recipe(tmp_path, "matrix.grid={alternatives.penalty_strenth: [1.0]}")


def test_the_adapter_of_an_alternative_is_saved_as_any_other(tmp_path: Path) -> None:
    from rpsa.models import load_model
    from rpsa.pipeline import run

    settings = recipe(tmp_path, "matrix.methods=[lora+interpolation]")
    folder = run(settings) / "align" / "lora+interpolation" / "tiny-0" / "seed0"
    model: Any = PeftModel.from_pretrained(load_model("tiny:0", settings.model, "float32"), str(folder))
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
