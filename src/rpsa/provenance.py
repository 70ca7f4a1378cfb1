"""Provenance: the versions of packages and the digests of our own rooms that decide a stage's result.

A change of layout, comments or docstrings makes nothing out of date; a change of code makes out of date the stages
whose rooms it is in.
"""

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from rpsa.artifacts import package_versions, sha256_of

Stage = Literal["reference", "fisher", "safety", "analyse", "align", "evaluate", "robustness", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)

TIMING = "timing.json"
"""Wall times of a stage: beside the manifest the one file that differs between two runs of the same thing."""


@dataclass(frozen=True)
class MadeBy:
    """What decides a stage's result besides its inputs.

    Attributes:
        packages: distributions, whose versions count.
        rooms: of our own package: folders, and single modules of rooms in which the others have no say; what a folder
        counts without has a "-" before it.
        files: what the stage leaves at least; a folder without them is not a result.
    """

    packages: tuple[str, ...]
    rooms: tuple[str, ...]
    files: tuple[str, ...] = ()


_PACKAGES = ("rpsa", "torch", "transformers", "tokenizers", "numpy")
_DATA = ("datasets", "jinja2")
_GENERATION = ("vllm", "peft")
_GRADING = ("math-verify", "latex2sympy2_extended", "sympy")
_TRAINING = ("trl", "peft", "accelerate")

_LOADING = ("models", "checkpoints", "thought", "rows", "tiny", "safety_data")
_ASKING = ("generation", "chat", "prompts", *_LOADING)
_MEASURING = ("fisher", "sharding", "parameters", "reference")
_COMPARING = ("reasoning_loss", "divergence")
_ATTACKS = "evaluation/robustness"
_EVALUATING = ("answers", "evaluation", "-evaluation/command", f"-{_ATTACKS}", *_ASKING)
_LOSS = (*_COMPARING, "parameters", "sharding", "reference", "fisher/log_probs", "fisher/samples")
_TASKS = ("pipeline/stages", "pipeline/groundwork")
_CARD = ("training/card", "training/templates", "templates")
_TEXTS = ("*.py", "*.txt", "*.jinja", "*.css", "*.js")

MADE_BY: dict[Stage, MadeBy] = {
    "reference": MadeBy(
        (*_PACKAGES, *_DATA, *_GENERATION, *_GRADING),
        (*_TASKS, "reference", "answers", *_ASKING),
        ("traces.jsonl", "manifest.json"),
    ),
    "fisher": MadeBy(
        (*_PACKAGES, *_DATA, "peft", "accelerate"),
        (*_TASKS, "training/reasoning", "chat", *_MEASURING, *_LOADING),
        ("manifest.json",),
    ),
    "safety": MadeBy(
        (*_PACKAGES, *_DATA, *_GENERATION, *_GRADING),
        (*_TASKS, "self_data", "-self_data/order", *_EVALUATING),
        ("examples.jsonl", "rejected.jsonl", "responses.jsonl", "manifest.json"),
    ),
    "analyse": MadeBy(
        (*_PACKAGES, *_DATA, *_GENERATION, *_GRADING, "scipy", "matplotlib"),
        (
            *(*_TASKS, "pipeline/analyses", "analysis", "freezing/masks"),
            *("report/paper_figures", "report/drawing"),
            *(*_MEASURING, *_EVALUATING),
        ),
    ),
    "align": MadeBy(
        (*_PACKAGES, *_DATA, *_TRAINING),
        (
            # the text of a model card is not a result
            *(
                "pipeline/stages",
                "pipeline/groundwork",
                "pipeline/alignment",
                "training",
                *(f"-{module}" for module in _CARD),
            ),
            *("freezing", "alternatives", "chat", "self_data/stored", *_COMPARING, *_MEASURING, *_LOADING),
        ),
        ("log.json",),
    ),
    "evaluate": MadeBy(
        (*_PACKAGES, *_DATA, *_GENERATION, *_GRADING),
        (*_TASKS, *_LOSS, *_EVALUATING),
        ("responses.jsonl", "samples.jsonl", "results.json"),
    ),
    "robustness": MadeBy(
        (*_PACKAGES, *_DATA, *_GENERATION, *_GRADING),
        (
            *(*_TASKS, "alternatives/after_training", *_LOSS),
            *(room for room in _EVALUATING if room != f"-{_ATTACKS}"),
        ),
        ("responses.jsonl", "samples.jsonl", "results.json"),
    ),
    "report": MadeBy(
        ("rpsa", "numpy", "scipy", "matplotlib", "jinja2"),
        (
            *("pipeline/reporting", "report", "self_data/stored", "rows", "thought", *_CARD),
            *("evaluation/statistics", "evaluation/scores", "evaluation/results", "evaluation/original"),
            *("evaluation/quadrants", "evaluation/broken"),
            "reasoning_loss",
        ),
        ("results.json", "table.md", "index.html"),
    ),
}

RESPONDING = MadeBy((*_PACKAGES, *_DATA, *_GENERATION), ("generation", "chat", "models"))
"""What decides a response: others may grade it."""


def versions(made_by: MadeBy) -> dict[str, str]:
    """Installed versions, and Python's own without the last number."""
    return package_versions(made_by.packages) | {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}


def sources(made_by: MadeBy) -> dict[str, str]:
    """A digest of the code of each room; comments, docstrings and layout do not count."""
    left_out = tuple(room.removeprefix("-") for room in made_by.rooms if room.startswith("-"))
    return {room: _digest(room, left_out) for room in made_by.rooms if not room.startswith("-")}


@cache
def _digest(room: str, left_out: tuple[str, ...]) -> str:
    home = Path(__file__).parent
    folder, module = home / room, home / f"{room}.py"
    paths = [module] if module.is_file() else [p for kind in _TEXTS for p in folder.rglob(kind)]
    names = {path.relative_to(home).as_posix(): path for path in paths}
    kept = {name: path for name, path in names.items() if not _is_in(name.removesuffix(".py"), left_out)}
    assert kept, f"there is no room {room}"
    return sha256_of({name: _code(path) for name, path in kept.items()})[:16]


def _is_in(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}/") for room in rooms)


def _code(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # a string that is a statement does nothing
            node.body = [one for one in node.body if not _is_text(one)]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
