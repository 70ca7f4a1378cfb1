"""Storage: what a study downloads, what it leaves on disk, and what is there beside it while something runs."""

from collections.abc import Sequence
from pathlib import Path

from rpsa.plan.bases import Base
from rpsa.plan.dry_run import torch_dtype
from rpsa.plan.judging import judge_parameters, judgings
from rpsa.plan.render import MethodPlan, SingleGpuStage
from rpsa.plan.time import ResponseTokens, evaluation_responses
from rpsa.plan.totals import Bytes
from rpsa.recipe.schema import Recipe

_BYTES_A_TOKEN = 20
"""Of a response on disk: its ids and its text, once as it came and once as it was graded."""


def downloads(recipe: Recipe, bases: Sequence[Base], evaluation: Sequence[ResponseTokens]) -> list[Bytes]:
    """Models as their owners store them. Data sets are some megabytes each."""
    found = []
    for base in bases:
        if base.name.startswith("tiny:") or (
            Path(base.name).is_dir() and any(Path(base.name).glob("*.safetensors"))
        ):
            continue
        dtype = torch_dtype(base.config, "auto")
        size = base.parameters * dtype.itemsize
        text = f"{base.parameters / 1e9:.2f}B parameters × {dtype.itemsize} bytes"
        found.append(Bytes(base.name, size, text))
    for model in dict.fromkeys(one.model for one in judgings(recipe.evaluate, evaluation) if one.model):
        parameters = judge_parameters(model)
        found.append(Bytes(f"judge {model}", 2 * parameters, f"{parameters / 1e9:.1f}B parameters × 2 bytes"))
    return found


def left_on_disk(base: Base, methods: Sequence[MethodPlan], stages: Sequence[SingleGpuStage]) -> list[Bytes]:
    """What a base's part of the study leaves on disk, and what is there beside it while something runs."""
    found = []
    for method in methods:
        each = method.saved_bytes
        text = f"{method.runs} × {_gigabytes(each)}"
        found.append(Bytes(f"{base.name}: {method.method}", method.runs * each, text))
    for stage in stages:
        if stage.scored:
            text = f"{stage.work.times} × {stage.scored / 1e6:,.0f}M scores × 4 bytes"
            found.append(Bytes(f"{base.name}: {stage.stage}", 4 * stage.scored * stage.work.times, text))
    tokens = sum(r.total for r in evaluation_responses(base.recipe.evaluate)) * len(base.cells)
    if tokens:
        text = f"{tokens / 1e6:.1f}M tokens × {_BYTES_A_TOKEN} bytes"
        found.append(Bytes(f"{base.name}: responses and samples", _BYTES_A_TOKEN * tokens, text))
    checkpoints = max(methods, key=lambda method: method.checkpoint_bytes, default=None)
    if checkpoints and checkpoints.checkpoint_bytes:
        number = checkpoints.checkpoints * (1 if base.recipe.launch else base.recipe.matrix.parallel)
        text = f"{number} × {_gigabytes(checkpoints.checkpoint_bytes)}, weights and optimizer, while it is trained"
        size = number * checkpoints.checkpoint_bytes
        found.append(Bytes(f"{base.name}: checkpoints of {checkpoints.method}", size, text, passing=True))
    if any(method.is_adapter for method in methods) and base.recipe.evaluate.backend != "transformers":
        size = base.parameters * torch_dtype(base.config, base.recipe.model.dtype).itemsize
        text = "an adapter merged, in model.dtype, while vLLM loads it"
        found.append(Bytes(f"{base.name}: merged model", size, text, passing=True))
    return found


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
