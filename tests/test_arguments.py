"""Arguments of the wrong type or form, of every public name: one line that says which, and what belongs there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer, SFTConfig, SFTTrainer

from helpers import trl_runs as t
from rpsa.alternatives.penalty import WeightPenalty
from rpsa.analysis.perturbation import PerturbationConfig
from rpsa.errors import RPSAError, check_fields
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, NoiseRatio
from rpsa.recipe.problems import installed_names
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.alternatives import AlternativesArguments, AlternativesConfig, AlternativesTrainer
from rpsa.training.config import RPSAArguments, RPSAConfig
from rpsa.training.trainer import RPSAMixin, RPSATrainer

Make = Callable[[SimpleNamespace], Any]


def batch(pieces: SimpleNamespace, **changes: Callable[[Tensor], Any]) -> dict[str, Any]:
    found = next(iter(pieces.reference.batches(3, None)))
    return found | {name: change(found[name]) for name, change in changes.items()}


def estimated(model: Any, batches: Any, config: Any = FisherConfig(progress=False)) -> Any:  # noqa: B008
    return estimate_fisher(model, batches, config)


def of_batch(**changes: Callable[[Tensor], Any]) -> Make:
    return lambda pieces: estimated(t.make_model(), [batch(pieces, **changes)])


def shifted(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


ESTIMATION: dict[str, tuple[Make, str]] = {
    "a model's name": (lambda p: estimated("tiny:0", []), "model is of type str: give a loaded model"),
    "no model": (lambda p: estimated(None, []), "model is None"),
    "one batch": (lambda p: estimated(t.make_model(), batch(p)), "batches is of type dict: give a list of batches"),
    "a path": (lambda p: estimated(t.make_model(), "d_ref"), "batches is of type str"),
    "nothing": (lambda p: estimated(t.make_model(), None), "batches is None"),
    "D_ref itself": (lambda p: estimated(t.make_model(), p.reference), r"D_ref's batches\(batch_size, max_length\)"),
    "tensors": (lambda p: estimated(t.make_model(), [batch(p)["labels"]]), "batch 0 is of type Tensor: give a dict"),
    "lists": (of_batch(input_ids=Tensor.tolist), "batch 0: input_ids is of type list"),
    "one dimension": (of_batch(labels=lambda labels: labels[0]), r"labels is \(8,\), torch.int64, beside"),
    "fractions": (of_batch(input_ids=Tensor.float), "input_ids is .* torch.float32"),
    "a shorter row": (of_batch(labels=lambda labels: labels[:, :-1]), r"labels is \(3, 7\)"),
    "a sample less": (of_batch(labels=lambda labels: labels[:-1]), r"labels is \(2, 8\)"),
    "no sample": (lambda p: estimated(t.make_model(), [{k: v[:0] for k, v in batch(p).items()}]), "one sample at"),
    "names of others": (lambda p: estimated(t.make_model(), [batch(p) | {"sample_ids": ["a"]}]), "3 samples, and 1"),
    "ids below 0": (of_batch(input_ids=lambda ids: ids - 50), "token ids below 0"),
    "another tokenizer's": (of_batch(input_ids=lambda ids: ids + 500), "and the model embeds 40: they are another"),
    "labels on padding": (of_batch(attention_mask=lambda mask: mask * 0), "labels where attention_mask is 0"),
    "shifted labels": (of_batch(labels=shifted), "its labels are shifted"),
    "a dict of settings": (lambda p: estimated(t.make_model(), [batch(p)], {"probes": 4}), "config is of type dict"),
    "no settings": (lambda p: estimated(t.make_model(), [batch(p)], None), "config is None"),
}  # fmt: skip
SETTINGS: dict[str, tuple[Make, str]] = {
    "probes": (lambda p: FisherConfig(probes="4"), "fisher.probes is '4': give a whole number"),  # type: ignore[arg-type]
    "half a probe": (lambda p: FisherConfig(probes=2.5), "fisher.probes is 2.5"),  # type: ignore[arg-type]
    "true probes": (lambda p: FisherConfig(probes=True), "fisher.probes is True"),
    "seed": (lambda p: FisherConfig(seed="42"), "fisher.seed is '42'"),  # type: ignore[arg-type]
    "no seed": (lambda p: FisherConfig(seed=None), "fisher.seed is None"),  # type: ignore[arg-type]
    "scope": (lambda p: FisherConfig(scope=["mlp"]), "give text or None"),  # type: ignore[arg-type]
    "estimator": (lambda p: FisherConfig(estimator="exact"), "give one of token_signs, per_token"),  # type: ignore[arg-type]
    "progress": (lambda p: FisherConfig(progress="no"), "give True or False"),  # type: ignore[arg-type]
    "constant": (lambda p: ConstantRatio("0.6"), "value is '0.6': give a number"),  # type: ignore[arg-type]
    "window": (lambda p: ConflictRatio(window="20"), "window is '20'"),  # type: ignore[arg-type]
    "half steps": (lambda p: ConflictRatio(every=2.5), "every is 2.5: give a whole number"),  # type: ignore[arg-type]
    "noise": (lambda p: NoiseRatio(seed="1"), "seed is '1'"),  # type: ignore[arg-type]
    "fraction": (lambda p: PerturbationConfig(fractions=0.01), "give a tuple of numbers"),  # type: ignore[arg-type]
    "selection": (lambda p: PerturbationConfig(selections="fisher"), "give a tuple of"),  # type: ignore[arg-type]
    "draws": (lambda p: PerturbationConfig(draws="5"), "draws is '5'"),  # type: ignore[arg-type]
}  # fmt: skip


def freezer(pieces: SimpleNamespace, **changes: Any) -> Freezer:
    given = {
        "model": t.make_model(),
        "fisher": pieces.fisher[t.make_model],
        "ratio": ConstantRatio(0.5),
    } | changes
    return Freezer(**given)


FREEZING: dict[str, tuple[Make, str]] = {
    "a model's name": (lambda p: freezer(p, model="x"), "model is of type str"),
    "a path": (lambda p: freezer(p, fisher="fisher/"), r"fisher is of type str: give .* FisherDiagonal.load"),
    "no Fisher": (lambda p: freezer(p, fisher=None), "fisher is None"),
    "a dict of scores": (lambda p: freezer(p, fisher=dict(p.fisher[t.make_model].scores)), "fisher is of type dict"),
    "a number": (lambda p: freezer(p, ratio=0.6), r"ratio is 0.6: give ConstantRatio\(0.6\)"),
    "a word": (lambda p: freezer(p, ratio="dynamic"), "ratio is 'dynamic'"),
    "moments": (lambda p: freezer(p, frozen_moments="keep"), "frozen_moments 'keep' is not one of zero, raw"),
    "zeros": (lambda p: freezer(p, zero_fisher="thawed"), "zero_fisher 'thawed' is not one of"),
    "ranking": (lambda p: freezer(p, ranking="random"), "ranking is of type str"),
    "strength": (lambda p: WeightPenalty(t.make_model(), {}, strength=float("nan")), "strength nan"),
    "lists of scores": (lambda p: FisherDiagonal({"a": [1.0]}), r"scores\['a'\] is of type list"),  # type: ignore[dict-item]
    "a list": (lambda p: FisherDiagonal([1.0]), "scores is of type list"),  # type: ignore[arg-type]
    "no folder": (lambda p: FisherDiagonal.load(None), "folder is None"),  # type: ignore[arg-type]
    "k": (lambda p: p.fisher[t.make_model].threshold("0.6"), "frozen ratio '0.6' is not between 0 and 1"),
}  # fmt: skip
REFERENCE: dict[str, tuple[Make, str]] = {
    "nothing": (lambda p: ReferenceDataset.load(None), "path_dir is None"),  # type: ignore[arg-type]
    "a number": (lambda p: ReferenceDataset.load(3), "path_dir is of type int"),  # type: ignore[arg-type]
    "a file": (lambda p: ReferenceDataset.load(__file__), "holds no finished D_ref"),
    "dicts": (lambda p: ReferenceDataset([{"problem_id": "a"}]), "trace 0 is of type dict"),  # type: ignore[list-item]
    "no batch": (lambda p: list(p.reference.batches(0, None)), "batch_size is 0"),
    "a batch of words": (lambda p: list(p.reference.batches("4", None)), "batch_size is of type str"),
    "a length of words": (lambda p: list(p.reference.batches(4, "10")), "max_length is of type str"),
}  # fmt: skip


def trainer(pieces: SimpleNamespace, **changes: Any) -> Any:
    given = {
        "model": t.make_model(),
        "args": t.config(pieces.folder),
        "train_dataset": pieces.data,
        "processing_class": pieces.tokenizer,
        "fisher": pieces.fisher[t.make_model],
        "reference_dataset": pieces.reference,
    } | changes
    return RPSATrainer(**{name: value for name, value in given.items() if value is not ...})


def alternative(pieces: SimpleNamespace, fisher: Any = None, **settings: Any) -> Any:
    chosen = installed_names(t.SFT_SETTINGS | settings, AlternativesConfig)
    args = AlternativesConfig(**chosen, output_dir=str(pieces.folder))
    return AlternativesTrainer(
        model=t.make_model(),
        args=args,
        train_dataset=pieces.data,
        processing_class=pieces.tokenizer,
        fisher=fisher,
    )


def masked(count: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[2, 3]] * count, "labels": [[-100, -100]] * count})


def without_eos(pieces: SimpleNamespace, row: dict[str, str]) -> Any:
    tokenizer = t.word_tokenizer()
    tokenizer.eos_token = None
    return trainer(pieces, train_dataset=Dataset.from_list([row] * 4), processing_class=tokenizer)


def plain_config(pieces: SimpleNamespace) -> SFTConfig:
    return SFTConfig(output_dir=str(pieces.folder), use_cpu=True, bf16=False)


TRAINERS: dict[str, tuple[Make, str]] = {
    "fisher None": (lambda p: trainer(p, fisher=None), "fisher is None: give what estimate_fisher"),
    "no Fisher": (lambda p: trainer(p, fisher=...), "fisher is None"),
    "a dict of scores": (lambda p: trainer(p, fisher=dict(p.fisher[t.make_model].scores)), "fisher is of type dict"),
    "no such folder": (lambda p: trainer(p, fisher="nowhere"), "nowhere: no Fisher here"),
    "traces": (lambda p: trainer(p, reference_dataset=p.reference.traces), "reference_dataset is of type list"),
    "rows": (lambda p: trainer(p, reference_dataset=p.data), "reference_dataset is of type Dataset"),
    "no model": (lambda p: trainer(p, model=...), "model is None"),
    "model None": (lambda p: trainer(p, model=None), "model is None"),
    "another config": (lambda p: trainer(p, args=plain_config(p)), "args must include RPSAArguments"),
    "no config": (lambda p: trainer(p, args=None), "args must include RPSAArguments"),
    "a dict of settings": (lambda p: trainer(p, args={"max_steps": 2}), "args must include RPSAArguments"),
    "no rows": (lambda p: trainer(p, train_dataset=p.data.select([])), "train_dataset is empty"),
    "rows without labels": (lambda p: trainer(p, train_dataset=masked(3)), "no example is left that has a label"),
    "no EOS": (lambda p: without_eos(p, {"text": "w5 w6"}), "has no EOS token to end a text with"),
    "no EOS, a prompt": (lambda p: without_eos(p, {"prompt": "w5", "completion": "w6"}), "has no EOS token"),
    "another tokenizer's D_ref": (
        lambda p: trainer(p, reference_dataset=ReferenceDataset([Trace("a", [1, 2], [99], "", "stop", None)])),
        "D_ref: there is token 99, and the model embeds 40",
    ),
    "alternatives, a dict": (lambda p: alternative(p, {}, penalty="fisher"), "fisher is of type dict"),
    "alternatives, strength": (lambda p: alternative(p, penalty="uniform", penalty_strength="1"), "is '1': give a"),
    "alternatives, no number": (
        lambda p: alternative(p, penalty="uniform", penalty_strength=float("nan")), "penalty_strength nan"
    ),
    "alternatives, None": (lambda p: alternative(p, restored_ratio=None), "restored_ratio is None: give a number"),
}  # fmt: skip


def ours(**settings: Any) -> Make:
    return lambda pieces: t.config(pieces.folder, **settings)


CONFIG: dict[str, tuple[Make, str]] = {
    "ratio None": (ours(frozen_ratio=None), "frozen_ratio None is neither"),
    "ratio True": (ours(frozen_ratio=True), "frozen_ratio True is neither"),
    "ratios": (ours(frozen_ratio=[0.5]), r"frozen_ratio \[0.5\] is neither"),
    "window": (ours(window="20"), "window is '20': give a whole number"),
    "half a window": (ours(window=2.5), "window is 2.5"),
    "every": (ours(every=2.0), "every is 2.0"),
    "sigma": (ours(sigma_scale="2"), "sigma_scale is '2': give a number"),
    "mask None": (ours(mask=None), "mask is None"),
    "mask": (ours(mask="fishr"), "mask 'fishr' is not one of fisher, random"),
    "a word for a truth": (ours(gradient_only="false"), "gradient_only is 'false': give True or False"),
    "audit": (ours(audit="no"), "audit is 'no'"),
    "length": (ours(reference_max_length="4096"), "reference_max_length is '4096': give a whole number or None"),
    "no length": (ours(reference_max_length=0), "reference_max_length is 0: give 1 or more"),
    "TRL's numbers": (ours(learning_rate="1e-2"), "learning_rate is '1e-2': give a number"),
    "TRL's steps": (ours(max_steps="2"), "max_steps is '2': give a whole number"),
    "TRL's truths": (ours(packing="no"), "packing is 'no': give True or False"),
}  # fmt: skip
ALL = {
    f"{group}: {name}": case
    for group, cases in (
        ("estimate_fisher", ESTIMATION), ("settings", SETTINGS), ("freezing", FREEZING), ("D_ref", REFERENCE),
        ("trainers", TRAINERS), ("RPSAConfig", CONFIG),
    )
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_argument_is_one_line(name: str, pieces: SimpleNamespace, tmp_path: Path) -> None:
    make, said = ALL[name]
    with pytest.raises(RPSAError, match=said) as error:
        make(SimpleNamespace(**vars(pieces), folder=tmp_path))
    assert "\n" not in str(error.value)


def test_right_arguments_are_let_through(pieces: SimpleNamespace, tmp_path: Path) -> None:
    for config in (FisherConfig(), ConstantRatio(1), ConflictRatio(sigma_scale=2), PerturbationConfig()):
        check_fields(config)
    estimated(t.make_model(), (one for one in [batch(pieces, attention_mask=Tensor.bool)]))
    t.config(
        tmp_path, frozen_ratio="0.6", window=3, save_steps=0.5, warmup_steps=0, reference_max_length=None
    )
    trainer(SimpleNamespace(**vars(pieces), folder=tmp_path))


def test_a_mixin_after_the_trainer_is_one_line(pieces: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="class Late: put RPSAMixin before DPOTrainer in the bases"):

        class Late(DPOTrainer, RPSAMixin):
            pass

    for arguments in (RPSAArguments, AlternativesArguments):
        with pytest.raises(RPSAError, match=f"put {arguments.__name__} before SFTConfig in the bases"):
            type("LateConfig", (SFTConfig, arguments), {})
    with pytest.raises(RPSAError, match="RPSAArguments goes before a config"):
        RPSAArguments()

    class Alone(RPSAMixin):
        pass

    with pytest.raises(
        RPSAError, match=r"Alone is not a trainer by itself: class MyTrainer\(Alone, SFTTrainer\)"
    ):
        Alone(model=t.make_model(), fisher=pieces.fisher[t.make_model])


def test_a_trainer_of_ones_own_may_stand_between(pieces: SimpleNamespace, tmp_path: Path) -> None:
    class Own(SFTTrainer):
        def __init__(self, *args: Any, mine: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = mine

    @dataclass
    class OwnConfig(RPSAConfig):
        more: int = 3

    class Both(RPSAMixin, Own):
        pass

    chosen = installed_names(t.SFT_SETTINGS | {"frozen_ratio": 0.5, "max_steps": 1}, OwnConfig)
    made = Both(
        t.make_model(),
        OwnConfig(**chosen, output_dir=str(tmp_path)),
        train_dataset=pieces.data,
        processing_class=pieces.tokenizer,
        fisher=pieces.fisher[t.make_model],
        mine=7,
    )
    made.train()
    assert (made.mine, made.args.more, made.rpsa.report()["frozen_elements_moved"]) == (7, 3, 0)
