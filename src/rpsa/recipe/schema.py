"""A recipe: one YAML file that says everything about a study, checked as a whole before anything runs.

`load_recipe` reads and checks it; `Recipe.cells` expands its matrix into the single runs, each with every
setting resolved. From weakest to strongest, a setting comes from Appendix A of the paper (the defaults below), the
recipe's section, `matrix.paradigms`, the method itself, `matrix.grid`. What the command line sets replaces the
section's value, and takes the same key out of `matrix.paradigms` and `matrix.grid`.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    WithJsonSchema,
)

from rpsa.recipe.problems import did_you_mean

Paradigm = Literal["none", "fft", "lora"]
Share = Annotated[float, Field(ge=0, le=1)]

TRAIN_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
PARADIGM_DEFAULTS: dict[str, dict[str, Any]] = {
    "fft": {"learning_rate": 1e-5, "num_train_epochs": 3},
    "lora": {"learning_rate": 1e-4, "num_train_epochs": 6},
}
LORA_DEFAULTS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
}
# What `align` says for each variant of RPSA that has a name: `fft+rpsa`, `lora+constant`, ... (section 4.4 and more)
_VARIANTS: dict[str, dict[str, Any]] = {
    "rpsa": {},
    "noise_k": {"frozen_ratio": "noise"},
    "gradient_only": {"gradient_only": True},
    "raw_moments": {"frozen_moments": "raw"},
    "sigma4": {"sigma_scale": 4.0},
    "constant": {"frozen_ratio": 0.6},
    "random": {"frozen_ratio": 0.6, "mask": "random"},
    "random_nonzero": {"frozen_ratio": 0.6, "mask": "random_nonzero"},
    "random_per_tensor": {"frozen_ratio": 0.6, "mask": "random_per_tensor"},
    "magnitude": {"frozen_ratio": 0.6, "mask": "magnitude"},
    "inverse": {"frozen_ratio": 0.6, "mask": "inverse"},
    "zero_frozen": {"frozen_ratio": 0.6, "zero_fisher": "frozen"},
    "per_sequence": {"frozen_ratio": 0.6},
}
_ESTIMATORS: dict[str, dict[str, Any]] = {"per_sequence": {"fisher": {"estimator": "per_sequence"}}}
WELL_KNOWN: dict[str, dict[str, Any]] = {
    "original": {"paradigm": "none"},
    **{paradigm: {"paradigm": paradigm} for paradigm in ("fft", "lora")},
    **{
        f"{paradigm}+{name}": {"paradigm": paradigm, "align": align} | _ESTIMATORS.get(name, {})
        for paradigm in ("fft", "lora")
        for name, align in _VARIANTS.items()
    },
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """The model to align. `name`: a Hugging Face id, a folder, or `tiny:0` to `tiny:2`; `matrix.bases`: several.

    `generation_dtype`: of the weights while they generate; by default bfloat16 on a GPU and `dtype` on a CPU.
    """

    name: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    generation_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    trust_remote_code: bool = False


class Reference(Section):
    """D_ref (section 3.1): the model's own responses to reasoning problems.

    `backend` "auto" is vLLM where it is installed with a GPU, else transformers; `engine` is passed to vLLM.
    """

    problems: str | None = None
    n: PositiveInt = 100
    seed: int = 42
    temperature: Annotated[float, Field(ge=0)] = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_new_tokens: PositiveInt = 32768
    reference_max_length: PositiveInt = 4096
    only_correct: bool = False
    batch_size: PositiveInt = 16
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    engine: dict[str, Any] = {}


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression ({error})") from error
    return value


class Fisher(Section):
    """The estimator of Eq. 4."""

    estimator: Literal["token_signs", "per_token", "per_sequence"] = "token_signs"
    probes: PositiveInt = 4
    seed: int = 42
    scope: Annotated[str, AfterValidator(_regex)] | None = None
    on_nonfinite: Literal["skip", "stop"] = "skip"
    batch_size: PositiveInt = 4
    activation_checkpointing: bool = False


def _frozen_ratio(value: Any) -> Any:
    if isinstance(value, str) and value not in ("dynamic", "noise"):
        raise ValueError(f"{value!r} is neither a number between 0 and 1 nor 'dynamic' nor 'noise'")
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not between 0 and 1")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected a number between 0 and 1, 'dynamic' or 'noise', not {value!r}")
    return value


class Align(Section):
    """Freezing (section 3.2) and the dynamic k of Eq. 6 and 7."""

    frozen_ratio: Annotated[
        float | Literal["dynamic", "noise"],
        BeforeValidator(_frozen_ratio),
        WithJsonSchema(
            {"anyOf": [{"enum": ["dynamic", "noise"]}, {"type": "number", "minimum": 0, "maximum": 1}]}
        ),
    ] = "dynamic"
    window: PositiveInt = 20
    every: PositiveInt = 25
    sigma_scale: Annotated[float, Field(gt=0)] = 2.0
    mask: Literal["fisher", "random", "random_nonzero", "random_per_tensor", "magnitude", "inverse"] = (
        "fisher"
    )
    gradient_only: bool = False
    frozen_moments: Literal["zero", "raw"] = "zero"
    zero_fisher: Literal["trainable", "frozen"] = "trainable"
    audit: bool = True


class Safety(Section):
    """D_S: the safety examples to train on."""

    data: str | None = None
    format: Literal["auto", "direct_refusal", "safechain", "star1", "prompt_response", "messages"] = "auto"
    max_length: PositiveInt | None = 4096
    n: PositiveInt | None = None
    seed: int = 42
    benign: str | None = None
    benign_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.05


class Evaluate(Section):
    """What the models are asked afterwards, and who judges.

    A task is a benchmark (`rpsa_aime24`, ...), a group, `tiny`, or a file whose columns say what it holds:
    `entry_point` and `test` make its rows programs to write, `answer` reasoning problems, a `label` "safe" requests
    to comply with; other rows are harmful requests. Benchmarks are read from files in the recipe's `data_dir` where
    it has them, else from the Hugging Face hub. `n` draws items of each set, `samples` responses to each (by default
    as many as the benchmark asks for). `judge` judges answers to attacks (`second_judge` too, for their agreement),
    `refusal_judge` answers to requests that nobody should refuse; their settings and `engine` (vLLM's) are passed on.
    """

    tasks: list[str] = []
    n: PositiveInt | None = None
    samples: PositiveInt | None = None
    seed: int = 123
    prompt_style: Literal["appendix_b", "section_4"] = "appendix_b"
    temperature: Annotated[float, Field(ge=0)] = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_new_tokens: PositiveInt = 32768
    batch_size: PositiveInt = 16
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    engine: dict[str, Any] = {}
    judge: str = "refusal"
    judge_settings: dict[str, Any] = {}
    judge_traces: bool = False
    second_judge: str | None = None
    second_judge_settings: dict[str, Any] = {}
    refusal_judge: str = "refusal"
    refusal_judge_settings: dict[str, Any] = {}
    accept_unsandboxed: bool = False


class Perturb(Section):
    """Fig. 3: the elements with the largest Fisher, scaled, against other choices of as many."""

    fractions: list[Share] = [0.01]
    factors: list[float] = [0.9]
    selections: list[str] = ["fisher", "random", "random_per_tensor", "magnitude"]
    draws: PositiveInt = 5


class Analysis(Section):
    """What is made of the bases' Fishers: `fisher_map` at these k (Fig. 1 and 2), `perturb` (Fig. 3)."""

    fisher_map: list[Share] = []
    perturb: Perturb | None = None


class Report(Section):
    """The report has no settings yet."""


class Settings(Section):
    """What a paradigm or a method sets for itself; the rest comes from the recipe's sections."""

    train: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    align: Align | None = None
    safety: Safety | None = None


class Method(Settings):
    """One way to align. Without `align` it is plain fine-tuning; `align: {}` is RPSA as section `align` says."""

    paradigm: Paradigm
    fisher: Fisher | None = None


class Paradigms(Section):
    fft: Settings = Settings()
    lora: Settings = Settings()


def _methods(value: Any) -> Any:
    """Expand well-known names, alone in a list or with settings of their own in a mapping."""
    if isinstance(value, list):
        value = dict.fromkeys(value) if all(isinstance(name, str) for name in value) else value
    if not isinstance(value, dict):
        raise ValueError(f"expected a list of names or a mapping, not {value!r}")
    if not value:
        raise ValueError(f"empty; name at least one of {', '.join(WELL_KNOWN)}")
    return {name: _method(name, own) for name, own in value.items()}


def _method(name: str, own: Any) -> Any:
    if own is not None and not isinstance(own, dict):
        return own
    own = own or {}
    if name not in WELL_KNOWN:
        if "paradigm" not in own:
            raise ValueError(
                f"'{name}' is no well-known method and has no paradigm{did_you_mean(name, WELL_KNOWN)}"
            )
        return own
    merged = WELL_KNOWN[name] | own
    if isinstance(own.get("align"), dict):
        merged["align"] = WELL_KNOWN[name].get("align", {}) | own["align"]
    return merged


def _distinct(values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} appears twice")
    return values


class Matrix(Section):
    """Every method on every base with every seed, and at every point of the grid that concerns it."""

    methods: Annotated[
        dict[str, Method],
        BeforeValidator(_methods),
    ] = Field(default=["original", "fft+rpsa"], validate_default=True)
    paradigms: Paradigms = Paradigms()
    bases: Annotated[list[str], AfterValidator(_distinct)] = []
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_distinct)] = [42]
    grid: dict[str, Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]] = {}
    parallel: PositiveInt = 1


class Sweep(Section):
    """A figure over settings (Fig. 5 and 7): `methods` at every point of `over`, on every base.

    With every seed of `seeds`; without them, of the matrix.
    """

    methods: Annotated[dict[str, Method], BeforeValidator(_methods)]
    over: Annotated[
        dict[str, Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]], Field(min_length=1)
    ]
    seeds: Annotated[list[NonNegativeInt], AfterValidator(_distinct)] = []


@dataclass(frozen=True)
class Cell:
    """One run of the matrix with every setting resolved.

    `id` is unique and fit for a folder's path. `align` is None for plain fine-tuning; `safety` is None and `train`
    and `lora` are empty for the untouched model (`paradigm == "none"`). `train` holds SFTConfig fields, `seed` and
    `max_length` among them; `lora` LoraConfig fields, empty unless the paradigm is "lora". `grid` is the point of
    the grid, or of the sweep named `sweep`, that this cell stands for.
    """

    id: str
    method: str
    base: str
    seed: int
    paradigm: Paradigm
    align: Align | None = None
    fisher: Fisher = field(default_factory=Fisher)
    safety: Safety | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    sweep: str | None = None

    @property
    def learning_rate(self) -> float | None:
        return self.train.get("learning_rate")


class Launch(Section):
    """Several processes for the stages fisher and align, through `accelerate launch`: its config file (`config`),
    or a number of processes for DDP. What is set beside `config` replaces the file's value."""

    config: str | None = None
    num_processes: PositiveInt | None = None
    num_machines: PositiveInt | None = None
    machine_rank: NonNegativeInt | None = None
    main_process_ip: str | None = None
    main_process_port: NonNegativeInt | None = None


class Recipe(Section):
    """The whole file."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Model = Model()
    reference: Reference = Reference()
    fisher: Fisher = field(default_factory=Fisher)
    align: Align = Align()
    safety: Safety = Safety()
    train: dict[str, Any] = Field(default={}, description="Any field of trl.SFTConfig.")
    lora: dict[str, Any] = Field(default={}, description="Any field of peft.LoraConfig.")
    evaluate: Evaluate = Evaluate()
    report: Report = Report()
    matrix: Matrix = Field(default_factory=Matrix)
    sweeps: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Sweep] = {}
    analysis: Analysis = Analysis()
    launch: Launch | None = None
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
        axes = {key: values for key, values in grid.items() if _concerns(key, method)}
        for seed, values in itertools.product(seeds, itertools.product(*axes.values())):
            yield self._cell(name, method, base, seed, dict(zip(axes, values, strict=True)))

    def _cell(self, name: str, method: Method, base: str, seed: int, point: Mapping[str, Any]) -> Cell:
        own = self.matrix.paradigms.lora if method.paradigm == "lora" else self.matrix.paradigms.fft
        safety = Safety(**_set(self.safety) | _set(own.safety) | _set(method.safety) | _part(point, "safety"))
        align = Align(**_set(self.align) | _set(own.align) | _set(method.align) | _part(point, "align"))
        train = TRAIN_DEFAULTS | PARADIGM_DEFAULTS[method.paradigm]
        train |= self.train | own.train | method.train | _part(point, "train")
        lora = LORA_DEFAULTS | self.lora | own.lora | method.lora | _part(point, "lora")
        return Cell(
            id=_cell_id(name, base, seed, point),
            method=name,
            base=base,
            seed=seed,
            paradigm=method.paradigm,
            align=align if method.align is not None else None,
            fisher=Fisher(**_set(self.fisher) | _set(method.fisher))
            if method.align is not None
            else Fisher(),
            safety=safety,
            train=train | {"seed": seed, "max_length": safety.max_length},
            lora=lora if method.paradigm == "lora" else {},
            grid=dict(point),
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
    return schema


def _concerns(key: str, method: Method) -> bool:
    section = key.partition(".")[0]
    if section == "align":
        return method.align is not None
    return section != "lora" or method.paradigm == "lora"


def _set(section: Section | None) -> dict[str, Any]:
    """Only what was written down, so that it can be laid over something else."""
    return section.model_dump(exclude_unset=True) if section else {}


def _part(point: Mapping[str, Any], section: str) -> dict[str, Any]:
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in point.items() if key.startswith(prefix)}


def _cell_id(method: str, base: str, seed: int | None = None, point: Mapping[str, Any] | None = None) -> str:
    parts = [method, base]
    if seed is not None:
        parts.append(f"seed{seed}")
    if point:
        parts.append(",".join(f"{key.rpartition('.')[2]}={slug(str(value))}" for key, value in point.items()))
    return "/".join(slug(part) for part in parts)


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9+.,=_-]+", "-", text).strip("-")
