"""RPSA inside TRL: exactness, the conflict, resuming, what is refused; real trainers on a small random model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from helpers.trl_runs import SFT_SETTINGS, config, fisher_of, make_lora, make_model, make_trainer
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.audit import Audit, checksums
from rpsa.freezing.bits import BitMask
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.masks import control_scores
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, NoiseRatio
from rpsa.parameters import trainable_parameters
from rpsa.reference import ReferenceDataset
from rpsa.training.config import RPSAArguments
from rpsa.training.trainer import AUDIT_FILE, RPSAMixin, RPSATrainer


def full_history(trainer: RPSATrainer) -> list[dict[str, Any]]:
    return trainer.rpsa.trajectory


@pytest.mark.gpu
@pytest.mark.parametrize(
    "build", [make_model, lambda: make_model(tied=True), make_lora], ids=["full", "tied", "lora"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_frozen_moves_and_k_follows_the_conflict(
    build: Any,
    checkpointing: bool,
    tmp_path: Path,
    safety_data: Any,
    tokenizer: Any,
    reference: Any,
) -> None:
    model = build()
    args = config(tmp_path, activation_checkpointing=checkpointing)
    trainer = make_trainer(model, args, safety_data, tokenizer, reference)
    trainer.train()
    report = trainer.rpsa.report()
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 1000
    assert [entry["step"] for entry in report["trajectory"]] == list(range(8))
    ks = [entry["k"] for entry in report["trajectory"]]
    assert ks[:2] == [0.5, 0.5]
    assert set(ks[2:]) != {0.5}
    assert any(group["changed"] > 0 for group in report["drift"]["groups"].values())
    assert sum(i["end"] - i["start"] for i in report["intervals"]) == 8


@pytest.mark.gpu
def test_gradient_only_moves_and_the_audit_says_so(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    trainer = make_trainer(
        make_model(), config(tmp_path, gradient_only=True), safety_data, tokenizer, reference
    )
    trainer.train()
    trainer.save_model()
    report = json.loads((tmp_path / AUDIT_FILE).read_text())
    assert report["gradient_only"] is True
    assert report["frozen_elements_moved"] > 100
    assert any(interval["tensors_changed"] for interval in report["intervals"])


def test_the_first_step_is_what_the_definitions_say(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    """c of step 0 from plain autograd: token-mean NLL on D_ref's first batch, and the accumulated safety gradient."""
    model = make_model()  # with dropout, which the reasoning gradient must not see
    trainer = make_trainer(model, config(tmp_path, max_steps=1), safety_data, tokenizer, reference)
    twin = make_model().eval()
    batch = reference.rotating_batch(0, 4, None)
    twin_inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = twin(**twin_inputs).logits
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    reasoning = torch.autograd.grad(nll, list(twin.parameters()))

    seen: list[dict[str, torch.Tensor]] = []
    original = trainer.rpsa.on_gradients_complete

    def record() -> None:
        seen.append({n: p.grad.clone() for n, p in trainer.freezer.parameters.items()})
        original()

    trainer.rpsa.on_gradients_complete = record  # type: ignore[method-assign]
    trainer.train()
    opposed = support = 0
    for (name, _), g in zip(twin.named_parameters(), reasoning, strict=True):
        positive = trainer.fisher[name] > 0
        opposed += int(((g * seen[0][name] < 0) & positive).sum())
        support += int(positive.sum())
    assert trainer.rpsa.trajectory[0]["c"] == pytest.approx(opposed / support, abs=3 / support)


def test_each_measurement_takes_the_next_traces(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    asked: list[tuple[int, int]] = []

    class Recording(ReferenceDataset):
        def rotating_batch(self, step: int, size: int, max_length: int | None) -> dict[str, Any]:
            asked.append((step, size))
            return super().rotating_batch(step, size, max_length)

    args = config(tmp_path, every=3)
    make_trainer(make_model(), args, safety_data, tokenizer, Recording(reference.traces)).train()
    assert asked == [(0, 4), (1, 4), (2, 4)]  # steps 0, 3, 6; as many sequences as a step of safety training


def test_measuring_the_conflict_does_not_touch_dropout(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    """k = 0 throughout: a run that measures must train the same weights as TRL's own trainer."""
    measured = make_model()
    # fused AdamW rounds its weight decay in another place than a separate multiplication does
    args = config(tmp_path, max_steps=4, optim="adamw_torch")
    trainer = make_trainer(measured, args, safety_data, tokenizer, reference)
    trainer.rpsa._make_freezer = lambda model: Freezer(model, trainer.fisher, Measuring(every=1))  # type: ignore[method-assign]
    trainer.train()
    assert len(trainer.rpsa.trajectory) == 4

    plain = make_model()
    sft = SFTConfig(**(SFT_SETTINGS | {"max_steps": 4, "optim": "adamw_torch"}), output_dir=str(tmp_path))
    SFTTrainer(model=plain, args=sft, train_dataset=safety_data, processing_class=tokenizer).train()
    for a, b in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


class Measuring(ConflictRatio):
    """Measures every step, freezes nothing."""

    def initial(self) -> float:
        return 0.0

    def update(self, conflict: float) -> float:
        return 0.0


@pytest.mark.parametrize("build", [make_model, make_lora], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"frozen_moments": "raw"}, {"frozen_ratio": "noise"}],
    ids=["zero", "raw", "noise"],
)
def test_resuming_is_bit_identical(
    build: Any, settings: Any, tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    fisher = fisher_of(build(), reference)

    def train(folder: Path, resume: str | None = None) -> tuple[RPSATrainer, list[torch.Tensor]]:
        model = build()
        args = config(folder, save_strategy="steps", save_steps=3, every=2, window=2, **settings)
        trainer = make_trainer(model, args, safety_data, tokenizer, reference, fisher=fisher)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [p.detach().clone() for p in trainable_parameters(model).values()]

    whole, weights = train(tmp_path / "whole")
    resumed, resumed_weights = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.rpsa.trajectory == whole.rpsa.trajectory
    assert resumed.freezer.state_dict() == whole.freezer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights, strict=True))
    steps = [(i.start, i.end) for i in resumed.rpsa.audit.intervals]  # type: ignore[union-attr]
    assert sum(end - start for start, end in steps) == 8
    assert whole.rpsa.trajectory[-1]["k"] != 0.5


@pytest.mark.parametrize(
    "steps", [(2, 5), pytest.param((1, 3, 4, 6, 7), marks=pytest.mark.integration)], ids=["two", "others"]
)
@pytest.mark.parametrize("compact", [False, True], ids=["exact", "compact"])
def test_resuming_from_any_step_is_bit_identical(
    compact: bool, steps: tuple[int, ...], tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    """Also where k at the checkpoint is below the 0.5 that every run starts with."""
    fisher = fisher_of(make_model(), reference)

    def train(folder: Path, resume: Path | None = None) -> RPSATrainer:
        args = config(folder, save_strategy="steps", save_steps=1, compact=compact)
        trainer = make_trainer(make_model(), args, safety_data, tokenizer, reference, fisher=fisher)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        trainer.save_model(str(folder / "final"))
        return trainer

    def files(folder: Path) -> dict[str, bytes]:
        return {name: (folder / "final" / name).read_bytes() for name in ("model.safetensors", AUDIT_FILE)}

    whole = train(tmp_path / "whole")
    assert min(entry["k"] for entry in whole.rpsa.trajectory) < 0.5
    for step in steps:
        train(tmp_path / str(step), tmp_path / "whole" / f"checkpoint-{step}")
        assert files(tmp_path / str(step)) == files(tmp_path / "whole"), step


def test_noise_k_costs_and_measures_the_same_and_ignores_the_conflict(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    def train(ratio: str, **settings: Any) -> list[dict[str, Any]]:
        args = config(tmp_path / ratio, frozen_ratio=ratio, every=1, **settings)
        trainer = make_trainer(make_model(), args, safety_data, tokenizer, reference)
        trainer.train()
        return trainer.rpsa.trajectory

    dynamic, noise = (train(ratio, window=3, sigma_scale=20.0) for ratio in ("dynamic", "noise"))
    # as long as k is 0.5 in both, the runs are the same run: g_R is measured, and no other random number is drawn
    assert noise[:3] == dynamic[:3]
    assert noise[3]["c"] == dynamic[3]["c"]
    assert noise[3]["k"] != dynamic[3]["k"]
    drawn = NoiseRatio(window=3, every=1, sigma_scale=20.0, seed=1)
    assert [entry["k"] for entry in noise] == [drawn.update(0.0) for _ in noise]


def test_a_checkpoint_without_rpsa_is_refused(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    args = config(tmp_path, save_strategy="steps", save_steps=4)
    trainer = make_trainer(make_model(), args, safety_data, tokenizer, reference)
    trainer.train()
    state_file = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["stateful_callbacks"]["RPSACallback"]
    state_file.write_text(json.dumps(state))
    again = make_trainer(make_model(), args, safety_data, tokenizer, reference)
    with pytest.raises(RPSAError, match="not saved by an RPSA trainer"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_training_starts_where_the_fisher_was_measured_or_goes_on(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    fisher = fisher_of(make_model(), reference)
    args = config(tmp_path, save_strategy="steps", save_steps=4, learning_rate=1e-3)
    trained = make_model()
    make_trainer(trained, args, safety_data, tokenizer, reference, fisher=fisher).train()
    checkpoint = str(tmp_path / "checkpoint-4")

    with pytest.raises(RPSAError, match="measured on other weights"):
        make_trainer(trained, args, safety_data, tokenizer, reference, fisher=fisher).train()
    for model, own in ((trained, fisher), (trained, fisher.for_any_weights()), (make_model(), fisher)):
        trainer = make_trainer(model, args, safety_data, tokenizer, reference, fisher=own)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 8
    other_model = LlamaForCausalLM(make_model().config)
    with pytest.raises(RPSAError, match="measured on another model"):
        make_trainer(other_model, args, safety_data, tokenizer, reference, fisher=fisher)


def test_logs_say_what_is_frozen_and_what_trains(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    trainer = make_trainer(make_model(), config(tmp_path), safety_data, tokenizer, reference)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rpsa/k" in entry]
    assert len(logs) == 8
    last = logs[-1]
    shares = [v for key, v in last.items() if key.startswith("rpsa/trainable_share/")]
    assert math.isclose(sum(shares), 1.0)
    assert {"rpsa/c", "rpsa/tau", "rpsa/share_k_0", "rpsa/share_k_1", "rpsa/frozen/q_proj"} <= set(last)
    assert last["rpsa/grad_norm_unmasked"] >= last["grad_norm"]
    counts = trainer.freezer.frozen_counts()
    total = sum(p.numel() for p in trainer.freezer.parameters.values())
    assert last["rpsa/frozen_fraction"] == sum(counts.values()) / total


def test_a_run_too_short_for_dynamic_k_warns(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        make_model(), config(tmp_path, window=20, every=25), safety_data, tokenizer, reference
    )
    trainer.train()
    assert (
        "k will stay at 0.5: this run has 8 steps, and the first dynamic k comes at step 500" in caplog.text
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (make_model, {"packing": True, "max_length": 32}),
        (make_model, {"padding_free": True, "max_length": None}),
        (lambda: make_lora(use_dora=True), {}),
        (lambda: make_lora(modules_to_save=["lm_head"]), {}),
        (make_model, {"optim": "adafactor"}),
        (make_model, {"optim": "sgd"}),
        (make_model, {"frozen_ratio": 0.6, "mask": "random"}),
        (make_model, {"bf16": True}),
    ],
    ids=["packing", "padding_free", "dora", "modules_to_save", "adafactor", "sgd", "constant_random", "bf16"],
)
def test_what_is_supported_freezes_exactly(
    build: Any, settings: Any, tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    trainer = make_trainer(build(), config(tmp_path, **settings), safety_data, tokenizer, reference)
    trainer.train()
    report = trainer.rpsa.report()
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lion_8bit"}, "optim: lion_8bit is not supported"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not supported"),
        ({"fp16": True}, "fp16 is not supported"),
        ({"deepspeed": "zero3.json"}, "deepspeed is not supported"),
        ({"frozen_ratio": "dynamics"}, "frozen_ratio 'dynamics' is neither 'dynamic', 'noise' nor a number"),
        ({"frozen_ratio": 1.5}, "not a number from 0 to 1"),
        ({"window": 0}, "window must be a number greater than 0"),
        ({"frozen_moments": "some"}, "frozen_moments 'some' is not one of zero, raw"),
    ],
)
def test_what_is_not_supported_is_one_line(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match=message) as error:
        config(tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_missing_pieces_are_named(tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any) -> None:
    model = make_model()
    fisher = fisher_of(model, reference)
    common = {"model": model, "train_dataset": safety_data, "processing_class": tokenizer}
    with pytest.raises(RPSAError, match="give reference_dataset"):
        RPSATrainer(**common, args=config(tmp_path), fisher=fisher)
    with pytest.raises(RPSAError, match="does not fit the model"):
        RPSATrainer(
            **(common | {"model": make_model(tied=True)}),
            args=config(tmp_path),
            fisher=fisher,
            reference_dataset=reference,
        )
    sft = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(RPSAError, match="args must include RPSAArguments"):
        RPSATrainer(**common, args=sft, fisher=fisher, reference_dataset=reference)


def test_a_fisher_of_another_lora_start_is_refused(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    fisher = fisher_of(make_lora(), reference)
    base = make_model()
    torch.manual_seed(99)
    other = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj", "down_proj"]))
    with pytest.raises(RPSAError, match="another LoRA initialisation"):
        make_trainer(other, config(tmp_path), safety_data, tokenizer, reference, fisher=fisher)


def test_only_lora_b_can_be_frozen_at_the_start(reference: Any) -> None:
    fisher = fisher_of(make_lora(), reference)
    assert all((fisher[name] == 0).all() for name in fisher if "lora_A" in name)
    assert any((fisher[name] > 0).any() for name in fisher if "lora_B" in name)


def test_dpo_through_the_mixin(tmp_path: Path, tokenizer: Any, reference: Any) -> None:
    from dataclasses import dataclass

    @dataclass
    class RPSADPOConfig(RPSAArguments, DPOConfig):
        pass

    class RPSADPOTrainer(RPSAMixin, DPOTrainer):
        pass

    pairs = Dataset.from_list(
        [
            {"prompt": f"w{i} w{i + 1}", "chosen": f"w{30 - i} w3", "rejected": f"w{i + 2} w5"}
            for i in range(2, 14)
        ]
    )
    model = make_model()
    args = RPSADPOConfig(
        **(SFT_SETTINGS | {"max_steps": 4, "window": 2, "every": 1}), output_dir=str(tmp_path)
    )
    trainer = RPSADPOTrainer(
        model=model,
        ref_model=make_model(),
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer,
        fisher=fisher_of(model, reference),
        reference_dataset=reference,
    )
    trainer.train()
    report = trainer.rpsa.report()
    assert report["frozen_elements_moved"] == 0
    assert len(report["trajectory"]) == 4


def test_training_twice_starts_afresh(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    trainer = make_trainer(make_model(), config(tmp_path, max_steps=3), safety_data, tokenizer, reference)
    trainer.train()
    trainer.train()
    assert [entry["step"] for entry in trainer.rpsa.trajectory] == [0, 1, 2]


def test_the_best_checkpoint_at_the_end_does_not_disturb_the_audit(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    args = config(
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.5,
    )
    trainer = make_trainer(
        make_model(), args, safety_data, tokenizer, reference, eval_dataset=safety_data.select(range(4))
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    report = json.loads((tmp_path / "final" / AUDIT_FILE).read_text())
    assert report["frozen_elements_moved"] == 0
    assert sum(i["end"] - i["start"] for i in report["intervals"]) == 8


# The audit by itself


def test_the_checksum_sees_one_ulp_and_a_swap() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    frozen = torch.rand(5000, generator=torch.Generator().manual_seed(1)) < 0.5

    def checksum(tensor: torch.Tensor) -> int:
        return int(checksums(tensor, BitMask.pack(frozen)))

    start = checksum(values)
    index = int(frozen.nonzero()[7])
    moved = values.clone()
    moved[index] = torch.nextafter(moved[index], torch.tensor(math.inf))
    assert checksum(moved) != start
    up_and_down = moved.clone()
    other = int(frozen.nonzero()[9])
    up_and_down.view(torch.int32)[other] -= 1
    assert checksum(up_and_down) != start
    elsewhere = values.clone()
    elsewhere[~frozen] += 1
    assert checksum(elsewhere) == start


def test_the_audit_counts_what_moved() -> None:
    model = nn.Linear(8, 8)
    fisher = FisherDiagonal({n: torch.rand(p.shape) + 0.1 for n, p in trainable_parameters(model).items()})
    freezer = Freezer(model, fisher, ConstantRatio(0.5))
    freezer.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    audit = Audit(freezer)
    audit.open()
    frozen = freezer.frozen("weight")
    with torch.no_grad():
        model.weight.view(-1)[frozen.flatten().nonzero()[:3].flatten()] += 1
        model.weight.view(-1)[(~frozen).flatten().nonzero()[:5].flatten()] += 1
    freezer.step = 4
    audit.close()
    report = audit.report()
    assert report["frozen_elements_moved"] == 3
    assert report["frozen_element_steps_checked"] == 4 * 36
    assert report["intervals"][0]["tensors_changed"] == ("weight",)
    assert report["drift"]["groups"]["weight"]["changed"] == 8 / 64


@pytest.mark.parametrize("compact", [False, True])
def test_a_ranking_says_what_is_frozen_first(
    compact: bool, tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    """Frozen as by a Freezer with the scores of the control mask: as many elements as by the Fisher."""
    model, twin = make_model(), make_model()
    size = FisherDiagonal({name: p.detach().abs() for name, p in trainable_parameters(model).items()})
    args = config(tmp_path, frozen_ratio=0.6, max_steps=2, compact=compact)
    trainer = make_trainer(model, args, safety_data, tokenizer, reference, ranking=size)
    trainer.train()
    assert size.nonzero > trainer.fisher.nonzero
    scores = control_scores("magnitude", trainer.fisher, trainable_parameters(twin))
    expected = Freezer(twin, trainer.fisher, ConstantRatio(0.6), ranking=scores)
    by_fisher = Freezer(twin, trainer.fisher, ConstantRatio(0.6))
    for name in expected.parameters:
        assert torch.equal(trainer.freezer.frozen(name), expected.frozen(name)), name
    assert sum(trainer.freezer.frozen_counts().values()) == sum(by_fisher.frozen_counts().values())
    assert any(not torch.equal(by_fisher.frozen(n), expected.frozen(n)) for n in expected.parameters)
    assert trainer.rpsa.report()["frozen_elements_moved"] == 0


def test_the_conflict_does_not_depend_on_the_ranking(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    histories = []
    for ranked in (False, True):
        model = make_model()
        size = FisherDiagonal({name: p.detach().abs() for name, p in trainable_parameters(model).items()})
        ranking = {"ranking": size} if ranked else {}
        args = config(tmp_path, max_steps=1)
        trainer = make_trainer(model, args, safety_data, tokenizer, reference, **ranking)
        trainer.train()
        histories.append(full_history(trainer)[0])
    assert histories[0]["c"] == histories[1]["c"] is not None
    assert histories[0]["tau"] != histories[1]["tau"]


def test_a_ranking_that_does_not_fit_is_refused(
    tmp_path: Path, safety_data: Any, tokenizer: Any, reference: Any
) -> None:
    model = make_model()
    fisher = fisher_of(model, reference)
    first = next(iter(fisher))
    less = FisherDiagonal({name: fisher[name] for name in fisher if name != first})
    more = FisherDiagonal(fisher.scores | {"more": torch.ones(2)})
    other = FisherDiagonal(fisher.scores | {first: torch.ones(2)})
    for settings, ranking, message in (
        ({"mask": "random"}, fisher, "ranking and mask 'random': both say what is frozen first"),
        ({}, less, f"ranking: it has no scores of '{first}'"),
        ({}, more, "ranking: it scores 'more', which the Fisher does not"),
        ({}, other, rf"ranking: '{first}' has scores of shape \(2,\)"),
        ({}, dict(fisher.scores), "ranking"),
    ):
        args = config(tmp_path, frozen_ratio=0.6, **settings)
        with pytest.raises(RPSAError, match=message) as error:
            make_trainer(model, args, safety_data, tokenizer, reference, fisher=fisher, ranking=ranking)
        assert "\n" not in str(error.value)
