"""What can be set about the method is declared once: same defaults and same refusals in recipes, configs, library."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rpsa import settings
from rpsa.alternatives.after_training import interpolate
from rpsa.alternatives.nullspace import NullSpace
from rpsa.alternatives.penalty import WeightPenalty
from rpsa.alternatives.projection import Projection
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig
from rpsa.freezing.compact import CompactFreezer
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.masks import control_scores
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio, NoiseRatio
from rpsa.recipe.sections import Align, Alternatives, Fisher, Reference, Section
from rpsa.settings import Setting
from rpsa.training.alternatives import AlternativesConfig, rehearse
from rpsa.training.config import RPSAConfig

SECTIONS: list[tuple[type[Section], Any, tuple[Setting[Any], ...]]] = [
    (Fisher, FisherConfig, settings.FISHER),
    (Align, RPSAConfig, settings.FREEZING),
    (Alternatives, AlternativesConfig, settings.ALTERNATIVES),
    (Reference, RPSAConfig, (settings.REFERENCE_MAX_LENGTH,)),
    (Reference, AlternativesConfig, (settings.REFERENCE_MAX_LENGTH,)),
]
CASES = [(section, config, setting) for section, config, of_it in SECTIONS for setting in of_it]
NAMES = [f"{section.__name__}-{config.__name__}-{setting.name}" for section, config, setting in CASES]
RECIPES_ONLY = {"rehearsal_share"}
"""Rehearsal changes the data, before there is a trainer."""
UNDECIDED = {"compact"}
"""A recipe may leave it open."""


def fisher() -> FisherDiagonal:
    return FisherDiagonal({"weight": torch.ones(2, 2), "bias": torch.ones(2)})


LIBRARY: dict[str, Callable[[Any], Any]] = {
    **{s.name: (lambda v, name=s.name: FisherConfig(**{name: v})) for s in settings.FISHER},  # type: ignore[misc]
    "frozen_ratio": ConstantRatio,
    "window": lambda v: ConflictRatio(window=v),
    "every": lambda v: NoiseRatio(every=v),
    "sigma_scale": lambda v: ConflictRatio(sigma_scale=v),
    "mask": lambda v: control_scores(v, fisher(), {}),
    "frozen_moments": lambda v: Freezer(nn.Linear(2, 2), fisher(), frozen_moments=v),
    "zero_fisher": lambda v: CompactFreezer(nn.Linear(2, 2), fisher(), zero_fisher=v),
    "penalty_strength": lambda v: WeightPenalty(nn.Linear(2, 2), {}, strength=v),
    "projection": lambda v: Projection(nn.Linear(2, 2), v),
    "nullspace_energy": lambda v: NullSpace(nn.Linear(2, 2), {}, [], v),
    "rehearsal_share": lambda v: rehearse(None, None, v, None),  # type: ignore[arg-type]
    "interpolation": lambda v: interpolate(nn.Linear(2, 2), {}, v),
    "restored_ratio": lambda v: fisher().threshold(v),
}


def trainers(config: Any, folder: Path, name: str, value: Any) -> Any:
    common = {} if config is FisherConfig else {"output_dir": str(folder), "use_cpu": True, "bf16": False}
    return config(**common, **{name: value})


def impossible(setting: Setting[Any]) -> list[Any]:
    beyond = [
        *([setting.above] if setting.above is not None else []),
        *([setting.at_least - 1] if setting.at_least is not None else []),
        *([setting.at_most + 1] if setting.at_most is not None else []),
        *([setting.below] if setting.below is not None else []),
        *([math.nan, math.inf] if isinstance(setting.default, float) else []),
    ]
    return [*(type(setting.default)(v) if setting.bounds and not setting.choices else v for v in beyond),
            *(["fishr"] if setting.choices else [])]  # fmt: skip


@pytest.mark.parametrize(("section", "config", "setting"), CASES, ids=NAMES)
def test_recipes_and_configs_have_the_default_that_is_declared(
    section: type[Section], config: Any, setting: Setting[Any]
) -> None:
    if setting.name not in UNDECIDED:
        assert section.model_fields[setting.name].default is setting.default
    if setting.name not in RECIPES_ONLY:
        assert config.__dataclass_fields__[setting.name].default is setting.default
    if config is not FisherConfig and setting.name not in RECIPES_ONLY:
        assert config.__dataclass_fields__[setting.name].metadata["help"] == setting.help


def test_all_that_the_sections_hold_is_declared() -> None:
    runs = {"warmup_steps", "batch_size", "activation_checkpointing"}
    for section, _, of_it in SECTIONS[:3]:
        assert set(section.model_fields) - runs == {setting.name for setting in of_it}


def test_the_library_has_the_defaults_that_are_declared() -> None:
    found: dict[str, Any] = {}
    for made in (ConflictRatio, Freezer, CompactFreezer):
        for name, parameter in inspect.signature(made).parameters.items():
            if name in LIBRARY or name == "gradient_only":
                assert found.setdefault(name, parameter.default) is parameter.default
    declared = {setting.name: setting.default for setting in settings.FREEZING if setting.name in found}
    assert found == declared
    assert len(found) == 6
    assert ConstantRatio().value is settings.CONSTANT_RATIO.default
    assert NoiseRatio().seed is inspect.signature(control_scores).parameters["seed"].default
    strength = inspect.signature(WeightPenalty).parameters["strength"].default
    assert strength is settings.PENALTY_STRENGTH.default


@pytest.mark.parametrize(("section", "config", "setting"), CASES, ids=NAMES)
def test_what_is_out_of_range_is_refused_everywhere(
    section: type[Section], config: Any, setting: Setting[Any], tmp_path: Path
) -> None:
    for value in impossible(setting):
        assert not setting.admits(value)
        with pytest.raises(ValidationError):
            section.model_validate({setting.name: value})
        if setting.name not in RECIPES_ONLY:
            with pytest.raises(RPSAError, match=setting.name):
                trainers(config, tmp_path, setting.name, value)
        if setting.name in LIBRARY:
            with pytest.raises(RPSAError):
                LIBRARY[setting.name](value)


@pytest.mark.parametrize(("section", "config", "setting"), CASES, ids=NAMES)
def test_what_is_admitted_is_admitted_everywhere(
    section: type[Section], config: Any, setting: Setting[Any], tmp_path: Path
) -> None:
    values = [setting.default, *setting.choices]
    values += [bound for bound in (setting.at_least, setting.at_most) if bound is not None]
    for value in values:
        assert setting.admits(value)
        section.model_validate({setting.name: value})
        if setting.name not in RECIPES_ONLY:
            trainers(config, tmp_path, setting.name, value)


def test_a_refusal_says_what_and_what_else() -> None:
    with pytest.raises(RPSAError, match=r"^mask 'fishr' is not one of fisher, random, random_nonzero"):
        settings.check(settings.MASK, "fishr")
    with pytest.raises(RPSAError, match=r"^fisher\.probes is 0: use 1 or more$"):
        settings.check(settings.PROBES, 0, "fisher.probes")
    with pytest.raises(RPSAError, match=r"^window must be a number greater than 0, not -1$"):
        settings.check(settings.WINDOW, -1)
    settings.check(settings.PENALTY, None)
    with pytest.raises(RPSAError, match=r"^mask None is not one of"):
        settings.check(settings.MASK, None)
