"""A recipe's study on this machine: access, memory, disk, endpoints, and all that `rpsa run` checks before it works."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rpsa.doctor.finding import Finding
from rpsa.doctor.hub import access_findings, cached_bytes, judges_of
from rpsa.doctor.machine import GIB, gpu_memory
from rpsa.errors import RPSAError
from rpsa.evaluation.judges import judge_model
from rpsa.evaluation.judges.policies import KEY_VARIABLES
from rpsa.http import read_key
from rpsa.plan.judging import judge_parameters
from rpsa.plan.planning import make_plan
from rpsa.plan.render import Plan
from rpsa.recipe.schema import Recipe

_SECONDS = 10.0
"""For an endpoint to answer."""


def study_findings(recipe: Recipe) -> Iterator[Finding]:
    """What a recipe needs, and whether it is there. Loads no weights, but data, configs and tokenizers."""
    cached = cached_bytes()
    yield from access_findings(recipe, cached)
    yield from plan_findings(recipe, cached)
    yield from endpoint_findings(recipe)
    yield _preflight(recipe)


def plan_findings(recipe: Recipe, cached: Mapping[tuple[str, str], int]) -> Iterator[Finding]:
    """Whether memory and disk suffice, by `rpsa plan` on the GPUs that there are, for what is not `cached`."""
    memory = gpu_memory()
    try:
        plan = make_plan(recipe, min(memory), range(1, len(memory) + 1)) if memory else make_plan(recipe)
    except RPSAError as error:
        yield Finding("Plan", "missing", str(error))
        return
    yield from _memory(recipe, plan, memory)
    yield from _disk(recipe, plan, cached)


def _memory(recipe: Recipe, plan: Plan, memory: list[float]) -> Iterator[Finding]:
    is_tiny = all(base.startswith("tiny:") for base in recipe.bases)
    if not memory:
        if not is_tiny and not recipe.train.get("use_cpu"):
            yield Finding(
                "Memory", "missing", "no GPU; set train.use_cpu=true if all of it is to run on CPUs"
            )
        return
    size = f"{len(memory)} × {min(memory):.0f} GiB"
    lacking = [said for said in plan.warnings if "fit" in said]
    for said in lacking:
        yield Finding("Memory", "missing", f"{said}, of {size}; `rpsa plan` shows what takes it")
    if not lacking:
        yield Finding("Memory", "ok", f"all stages fit on {size}")
    asked = (judge_model(name, settings) for _, name, settings in judges_of(recipe))
    judges = {model: judge_parameters(model) for model in asked if model}
    if sum(judges.values()) * 2 > min(memory) * GIB:
        yield Finding("Memory", "missing", f"the judges {', '.join(judges)} do not fit on one GPU together")


def _disk(recipe: Recipe, plan: Plan, cached: Mapping[tuple[str, str], int]) -> Iterator[Finding]:
    """The run's folder and the hub's cache, which may share a disk."""
    from huggingface_hub import constants

    wanted: dict[int, tuple[Path, int]] = {}
    download = sum(
        max(0, one.size - cached.get(("model", one.name.removeprefix("judge ")), 0))
        for one in plan.study.download
    )
    for place, size in (recipe.folder, plan.study.disk_bytes), (Path(constants.HF_HUB_CACHE), download):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        before = wanted.get(os.stat(there).st_dev, (there, 0))
        wanted[os.stat(there).st_dev] = (before[0], before[1] + size)
    for folder, size in wanted.values():
        free = shutil.disk_usage(folder).free
        said = f"{size / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB free"
        if size > free:
            said += "; free some, or set output_dir and HF_HOME to a larger disk"
        yield Finding(f"Disk of {folder}", "missing" if size > free else "ok", said)


def endpoint_findings(recipe: Recipe) -> Iterator[Finding]:
    """Whether each judge behind an endpoint is there."""
    seen = set()
    for key, _, settings in judges_of(recipe):
        url = settings.get("base_url")
        if url and (url, settings.get("model")) not in seen:
            seen.add((url, settings.get("model")))
            yield _endpoint(f"{key} at {url}", str(url), settings)


def _endpoint(about: str, url: str, settings: dict[str, Any]) -> Finding:
    """Asked for its models: an answer shows that it is there, and that it takes the key."""
    import httpx2

    try:
        key = read_key(KEY_VARIABLES)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx2.get(f"{url.rstrip('/')}/models", headers=headers, timeout=_SECONDS)
    except (RPSAError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        return Finding(about, "missing", f"does not answer: {error}")
    if answer.status_code in (401, 403):
        return Finding(about, "missing", f"refuses the key ({answer.status_code}): set {KEY_VARIABLES[0]}")
    if answer.status_code != 200:
        return Finding(about, "note", f"answers, but has no list of models ({answer.status_code})")
    try:
        models = [str(one["id"]) for one in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return Finding(about, "note", "answers, but its list of models cannot be read")
    if settings["model"] not in models:
        return Finding(about, "missing", f"has no model {settings['model']!r}, but {', '.join(models[:8])}")
    return Finding(about, "ok", f"serves {settings['model']}")


def _preflight(recipe: Recipe) -> Finding:
    from rpsa.pipeline.preflight import preflight

    try:
        preflight(recipe)
    except RPSAError as error:
        return Finding("Recipe", "missing", str(error))
    return Finding("Recipe", "ok", "its data, prompts, trainers and adapters are as they should be")
