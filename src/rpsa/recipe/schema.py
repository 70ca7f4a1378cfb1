"""A recipe: one YAML file that says everything about a study, checked as a whole before anything runs.

`load_recipe` reads and checks it; `Recipe.cells` expands its matrix into the single runs, each with every
setting resolved. From weakest to strongest, a setting comes from Appendix A of the paper (the defaults in
`sections` and `methods`), the recipe's section, `matrix.paradigms`, the method itself, `matrix.grid`. What the
command line sets replaces the section's value, and takes the same key out of `matrix.paradigms` and
`matrix.grid`.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from rpsa.artifacts import folder_name
from rpsa.recipe.methods import (
    LORA_DEFAULTS,
    PARADIGM_DEFAULTS,
    TRAIN_DEFAULTS,
    TRAINER_DEFAULTS,
    WELL_KNOWN,
    Method,
    Paradigm,
    Paradigms,
    named_methods,
)
from rpsa.recipe.sections import (
    Align,
    Alternatives,
    Analysis,
    Bench,
    Evaluate,
    Fisher,
    Launch,
    Model,
    Reference,
    Report,
    Robustness,
    Safety,
    Section,
    Seed,
)

_LONGEST_POINT = 140


def _distinct(values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} appears twice")
    return values


class Matrix(Section):
    """Every method on every base with every seed, and at every point of the grid that concerns it."""

    methods: Annotated[
        dict[str, Method],
        BeforeValidator(named_methods),
    ] = Field(default=["original", "fft+rpsa"], validate_default=True)
    paradigms: Paradigms = Paradigms()
    bases: Annotated[list[str], AfterValidator(_distinct)] = []
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] = [42]
    grid: dict[str, Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]] = {}
    parallel: PositiveInt = 1


class Sweep(Section):
    """A figure over settings (Fig. 5 and 7): `methods` at every point of `over`, on every base.

    With every seed of `seeds`; without them, of the matrix.
    """

    methods: Annotated[dict[str, Method], BeforeValidator(named_methods)]
    over: Annotated[
        dict[str, Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]], Field(min_length=1)
    ]
    seeds: Annotated[list[Seed], AfterValidator(_distinct)] = []


@dataclass(frozen=True)
class Cell:
    """One run of the matrix with every setting resolved.

    `id` is unique and fit for a folder's path. `align` is None where nothing is frozen, `alternatives` where nothing
    is done instead; `safety` is None and `train` and `lora` are empty for the untouched model
    (`paradigm == "none"`). `train` holds fields of the `trainer`'s config (SFTConfig, DPOConfig), `seed` and
    `max_length` among them; `lora` LoraConfig fields, empty unless the paradigm is "lora". `grid` is the point of the
    grid, or of the sweep named `sweep`, that this cell stands for.
    """

    id: str
    method: str
    base: str
    seed: int
    paradigm: Paradigm
    align: Align | None = None
    alternatives: Alternatives | None = None
    fisher: Fisher = field(default_factory=Fisher)
    safety: Safety | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    trainer: str = "sft"

    @property
    def learning_rate(self) -> float | None:
        return self.train.get("learning_rate")

    @property
    def evaluates_in_training(self) -> bool:
        """Whether the held-out safety data are looked at while it is trained."""
        asked = self.train.get("eval_strategy") or "no"
        return asked != "no" and self.safety is not None and self.safety.validation_share > 0

    @property
    def needs_fisher(self) -> bool:
        return self.align is not None or bool(self.alternatives and self.alternatives.needs_fisher)

    @property
    def starts_from_fisher(self) -> bool:
        """Whether its Fisher is that of a LoRA adapter, on which alignment goes on; else the Fisher is the base's."""
        of_base = self.alternatives is not None and self.alternatives.penalty == "product"
        return self.paradigm == "lora" and self.needs_fisher and not of_base

    @property
    def needs_reference(self) -> bool:
        """D_ref: for itself, or because the Fisher is measured on it."""
        return self.needs_fisher or bool(self.alternatives and self.alternatives.needs_reference)


class Recipe(Section):
    """The whole file."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Model = Model()
    reference: Reference = Reference()
    fisher: Fisher = field(default_factory=Fisher)
    align: Align = Align()
    safety: Safety = Safety()
    train: dict[str, Any] = Field(
        default={}, description="`trainer`, sft or dpo, and any field of its config in TRL."
    )
    lora: dict[str, Any] = Field(default={}, description="Any field of peft.LoraConfig.")
    evaluate: Evaluate = Evaluate()
    robustness: Robustness | None = None
    report: Report = Report()
    matrix: Matrix = Field(default_factory=Matrix)
    sweeps: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Sweep] = {}
    analysis: Analysis = Analysis()
    launch: Launch | None = None
    bench: Bench | None = None
    output_dir: str | None = None
    data_dir: str | None = None

    @property
    def folder(self) -> Path:
        """Where the run writes: `output_dir`, or runs/<name>."""
        return Path(self.output_dir or Path("runs") / self.name)

    @property
    def bases(self) -> list[str]:
        """`matrix.bases`, or the one model that `model.name` names."""
        return self.matrix.bases or [name for name in (self.model.name,) if name]

    def cells(self) -> list[Cell]:
        """Every run of the matrix, base by base, then the sweeps'. The untouched model comes once for each base."""
        matrix = (
            cell
            for base, (name, method) in itertools.product(self.bases, self.matrix.methods.items())
            for cell in self._cells_of(name, method, base, self.matrix.grid, self.matrix.seeds)
        )
        swept = (
            replace(cell, id=f"sweep-{sweep}/{cell.id}", sweep=sweep)
            for sweep, settings in self.sweeps.items()
            for base, (name, method) in itertools.product(self.bases, settings.methods.items())
            for cell in self._cells_of(name, method, base, settings.over, settings.seeds or self.matrix.seeds)
        )
        return [*matrix, *swept]

    def _cells_of(
        self, name: str, method: Method, base: str, grid: Mapping[str, list[Any]], seeds: list[int]
    ) -> Iterator[Cell]:
        if method.paradigm == "none":
            yield Cell(_cell_id(name, base), name, base, self.matrix.seeds[0], "none")
            return
        axes = {key: values for key, values in grid.items() if concerns(key, method)}
        for seed, values in itertools.product(seeds, itertools.product(*axes.values())):
            yield self._cell(name, method, base, seed, dict(zip(axes, values, strict=True)))

    def _cell(self, name: str, method: Method, base: str, seed: int, point: Mapping[str, Any]) -> Cell:
        own = self.matrix.paradigms.lora if method.paradigm == "lora" else self.matrix.paradigms.fft
        safety = Safety(**_set(self.safety) | _set(own.safety) | _set(method.safety) | _part(point, "safety"))
        align = Align(**_set(self.align) | _set(own.align) | _set(method.align) | _part(point, "align"))
        alternatives = Alternatives(**_set(method.alternatives) | _part(point, "alternatives"))
        written = self.train | own.train | method.train | _part(point, "train")
        trainer = written.pop("trainer", None) or "sft"
        train = TRAIN_DEFAULTS | PARADIGM_DEFAULTS[method.paradigm]
        train |= TRAINER_DEFAULTS.get(str(trainer), {}).get(method.paradigm, {}) | written
        lora = LORA_DEFAULTS | self.lora | own.lora | method.lora | _part(point, "lora")
        protected = method.align is not None or method.alternatives is not None
        own_fisher = _set(self.fisher) | _set(method.fisher) | _part(point, "fisher")
        fisher = Fisher(**own_fisher) if protected else Fisher()
        return Cell(
            id=_cell_id(name, base, seed, point),
            method=name,
            base=base,
            seed=seed,
            paradigm=method.paradigm,
            align=align if method.align is not None else None,
            alternatives=alternatives if method.alternatives is not None else None,
            fisher=fisher,
            safety=safety,
            train=train | {"seed": seed, "max_length": safety.max_length},
            lora=lora if method.paradigm == "lora" else {},
            grid=dict(point),
            trainer=trainer,
        )


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe as it is written, well-known methods by name included."""
    schema = Recipe.model_json_schema()
    del schema["$defs"]["Method"]["required"]
    matrix = schema["$defs"]["Matrix"]["properties"]
    mapping = matrix["methods"] | {
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/Method"}, {"type": "null"}]}
    }
    names = {"type": "array", "items": {"enum": list(WELL_KNOWN)}}
    matrix["methods"] = {"default": mapping.pop("default"), "anyOf": [names, mapping]}
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "The recipe that this one is laid over.",
    }
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return schema


def concerns(key: str, method: Method) -> bool:
    """Whether a grid over this setting varies anything of the method."""
    section, _, name = key.partition(".")
    if section == "align":
        return method.align is not None
    if section == "fisher":
        return method.align is not None or bool(method.alternatives and method.alternatives.needs_fisher)
    if section == "alternatives":
        own = method.alternatives.model_fields_set if method.alternatives else set()
        beside = {"penalty_strength": {"penalty"}, "anchor": {"kl", "der"}, "anchor_top": {"kl", "der"}}
        if name == "nullspace_energy" and method.alternatives:
            return method.alternatives.projection == "nullspace"
        return name in own or bool(beside.get(name, set()) & own)
    return section != "lora" or method.paradigm == "lora"


def _set(section: Section | None) -> dict[str, Any]:
    """Only what was written down, so that it can be laid over something else."""
    return section.model_dump(exclude_unset=True) if section else {}


def _part(point: Mapping[str, Any], section: str) -> dict[str, Any]:
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in point.items() if key.startswith(prefix)}


def _cell_id(method: str, base: str, seed: int | None = None, point: Mapping[str, Any] | None = None) -> str:
    """A path of folders none of which holds another run's: a point of a grid stands beside its seed."""
    parts = [folder_name(method), folder_name(base)]
    if seed is not None:
        parts.append(
            ",".join(
                [f"seed{seed}", *([point_name({k: _written(v) for k, v in point.items()})] if point else [])]
            )
        )
    return "/".join(parts)


def point_name(point: Mapping[str, str]) -> str:
    """A point of a grid as the name of a folder; another point of the same grid has another name."""
    name = ",".join(f"{key.rpartition('.')[2]}={folder_name(value)}" for key, value in point.items())
    return name if len(name) <= _LONGEST_POINT else folder_name(name)


def _written(value: Any) -> str:
    """Text stands as it is, unless it would read as a value of another kind: "1" is not 1."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
