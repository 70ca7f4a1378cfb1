"""`rpsa init`: a commented recipe for a model, fitted to the GPUs that are there by what `rpsa plan` says of it."""

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rpsa.artifacts import atomic_write, folder_name
from rpsa.errors import RPSAError
from rpsa.plan.configs import check_configs
from rpsa.recipe import Recipe, load_recipe
from rpsa.recipe.methods import PARADIGM_DEFAULTS, RECOMMENDED, Paradigm
from rpsa.rows import read_rows
from rpsa.templates import render

if TYPE_CHECKING:
    from rpsa.plan.render import Plan

LENGTHS = (4096, 2048, 1024)
"""Of thoughts, in tokens: how much of them is looked at and trained on; the longest that fits is taken."""
_SAYS: dict[Paradigm, str] = {"fft": "all of its weights are trained", "lora": "an adapter is trained (LoRA)"}
_GIB = 1 << 30
_REFERENCES, _REFERENCES_ON_CPU, _HELD_OUT = 100, 30, 32
_BENIGN_SHARE = 0.45
"""What docs/bench.md recommends."""


@dataclass(frozen=True)
class Start:
    """What a recipe is made for.

    Attributes:
        safety, benign, problems: files or datasets; without `benign`, `safety` should have rows that comply itself.
        gpu_memory: GiB of each of the GPUs; None: there is none.
    """

    model: str
    safety: str
    benign: str | None
    problems: str
    gpus: int
    gpu_memory: float | None


def write_start(start: Start, out: Path) -> str:
    """Write the recipe into `out`; returns in a few words what was chosen.

    Full fine-tuning is taken where it fits, else LoRA; without a GPU, LoRA.

    Raises:
        RPSAError: the file is there already, the model's config or a file cannot be read, or nothing fits.
    """
    if out.exists():
        raise RPSAError(f"{out}: exists already; give another --out, or remove it")
    amounts = _amounts(start)
    if start.gpu_memory is None:
        text = _text(
            start,
            amounts,
            "lora",
            LENGTHS[-1],
            out,
            "Without a GPU: for models of up to about a billion weights.",
        )
        check_configs(_recipe(text))
        atomic_write(out, text)
        return "LoRA, on the CPU"
    needed = 0.0
    for paradigm, length in product(_SAYS, LENGTHS):
        plan = _planned(_text(start, amounts, paradigm, length, out, ""), start)
        needed, room = _most(plan), f"{start.gpus} × {start.gpu_memory:g} GiB"
        if _fits(plan):
            fit = f"Memory (rpsa plan): at most {needed:.0f} GiB of each GPU, of {room}."
            atomic_write(out, _text(start, amounts, paradigm, length, out, fit))
            return f"{_SAYS[paradigm]}; thoughts of {length:,} tokens; at most {needed:.0f} GiB on {room}"
    raise RPSAError(
        f"{start.model} does not fit on {start.gpus} × {start.gpu_memory:g} GiB: LoRA on thoughts of {LENGTHS[-1]:,} "
        f"tokens takes {needed:.0f} GiB; take larger GPUs or a smaller model"
    )


@dataclass(frozen=True)
class _Amounts:
    """How much of the data is taken: of files that are here no more than they have."""

    references: int
    held_out: int
    benign_share: float


def _amounts(start: Start) -> _Amounts:
    problems = _rows_here(start.problems, _REFERENCES + _HELD_OUT)
    references = min(_REFERENCES if start.gpu_memory else _REFERENCES_ON_CPU, max(1, problems * 3 // 4))
    safety, benign = _rows_here(start.safety, 1000), _rows_here(start.benign, 1000)
    share = min(_BENIGN_SHARE, benign * 100 // (safety + benign) / 100)
    return _Amounts(references, min(_HELD_OUT, problems - references), share)


def _rows_here(source: str | None, otherwise: int) -> int:
    """Rows of a file; of anything else enough."""
    return len(read_rows(source)) if source and Path(source).is_file() else otherwise


def _text(start: Start, amounts: _Amounts, paradigm: Paradigm, length: int, out: Path, fit: str) -> str:
    return render(
        "rpsa.plan",
        "recipe.yaml",
        **asdict(start),
        **asdict(amounts),
        says=_SAYS[paradigm],
        fit=fit,
        file=out.name,
        run=folder_name(Path(start.model).name),
        length=length,
        paradigm=paradigm,
        recommended=RECOMMENDED,
        learning_rate=PARADIGM_DEFAULTS[paradigm]["learning_rate"],
        epochs=PARADIGM_DEFAULTS[paradigm]["num_train_epochs"],
    )


def _recipe(text: str) -> Recipe:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)


def _planned(text: str, start: Start) -> "Plan":
    assert start.gpu_memory is not None
    recipe = _recipe(text)
    check_configs(recipe)
    from rpsa.models import quiet
    from rpsa.plan.planning import make_plan

    quiet()
    return make_plan(recipe, start.gpu_memory, [start.gpus])


def _fits(plan: "Plan") -> bool:
    trains = all(layout.fits for method in plan.methods for layout in method.layouts)
    return trains and all(stage.fits for stages in plan.stages.values() for stage in stages)


def _most(plan: "Plan") -> float:
    """GiB of one GPU at the worst moment of any stage."""
    of_methods = [layout.memory.total for method in plan.methods for layout in method.layouts]
    of_stages = [stage.memory.total for stages in plan.stages.values() for stage in stages]
    return max([*of_methods, *of_stages]) / _GIB
