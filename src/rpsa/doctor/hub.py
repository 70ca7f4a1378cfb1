"""The hub: the repositories that a recipe reads from, and whether this machine may."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from rpsa.doctor.finding import Finding
from rpsa.evaluation.benchmarks import BENCHMARKS
from rpsa.evaluation.data import data_folder, local_file
from rpsa.evaluation.items import expanded
from rpsa.evaluation.judges import judge_model
from rpsa.models import location
from rpsa.recipe.problems import SHIPPED
from rpsa.recipe.schema import Recipe
from rpsa.rows import hub_dataset

_GATED = ("meta-llama/", "google/", "allenai/wildguard")
"""Judges: what their names begin with."""
_OURS = {source for sources in SHIPPED.values() for source in sources}


@dataclass(frozen=True)
class Repository:
    """`purpose`: what the recipe wants it for; `is_gated` as far as rpsa knows."""

    name: str
    kind: Literal["model", "dataset"]
    purpose: str
    is_gated: bool = False

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def repositories(recipe: Recipe) -> list[Repository]:
    """Each one once: models, judges, data, in the order in which a run comes to them; nothing that is a file here."""
    found: dict[tuple[str, str], Repository] = {}
    for one in chain(_models(recipe), _data(recipe), _benchmarks(recipe), _judges(recipe)):
        found.setdefault((one.kind, one.name), one)
    return list(found.values())


def _models(recipe: Recipe) -> Iterator[Repository]:
    for base in recipe.bases:
        if not Path(location(base)).is_dir():
            yield Repository(base, "model", "to align")


def _data(recipe: Recipe) -> Iterator[Repository]:
    under_attack = recipe.robustness
    asked = [
        ("reference.problems", recipe.reference.problems),
        *(
            (f"safety.{name}", getattr(cell.safety, name))
            for cell in recipe.cells()
            if cell.safety
            for name in ("data", "benign", "prompts")
        ),
        *(
            (f"robustness.{name}", getattr(under_attack, name))
            for name in ("harmful", "benign", "templates")
            if under_attack
        ),
    ]
    for purpose, source in asked:
        if source and source not in _OURS and (name := hub_dataset(source)):
            yield Repository(name, "dataset", purpose)


def _benchmarks(recipe: Recipe) -> Iterator[Repository]:
    folder = data_folder(recipe.data_dir)
    for name in expanded([*recipe.evaluate.tasks, *((recipe.robustness and recipe.robustness.tasks) or [])]):
        if not (benchmark := BENCHMARKS.get(name)):
            continue
        for source in filter(None, (benchmark.source, benchmark.also)):
            if not (folder and local_file(source, folder)):
                yield Repository(source.hub, "dataset", name, source.gated)


def _judges(recipe: Recipe) -> Iterator[Repository]:
    for purpose, name, settings in judges_of(recipe):
        model = judge_model(name, settings)
        if model and not Path(model).is_dir():
            yield Repository(model, "model", f"{purpose} ({name})", model.startswith(_GATED))


def judges_of(recipe: Recipe) -> Iterator[tuple[str, str, dict[str, object]]]:
    """The key of each judge that a recipe names, its name and its settings."""
    asked = recipe.evaluate
    if asked.tasks:
        for key in ("judge", "thought_judge", "second_judge", "refusal_judge"):
            if name := getattr(asked, key):
                yield f"evaluate.{key}", name, getattr(asked, f"{key}_settings")
    for cell in recipe.cells():
        if cell.safety and cell.safety.is_self_made:
            yield "safety.filter", cell.safety.filter, cell.safety.filter_settings


def access_findings(recipe: Recipe, cached: Mapping[tuple[str, str], int]) -> Iterator[Finding]:
    """Whether each repository can be read: the hub is asked, or without a network it must be `cached`."""
    wanted = repositories(recipe)
    if not wanted:
        yield Finding("Hugging Face hub", "ok", "not needed")
        return
    for one in wanted:
        yield _access(one, (one.kind, one.name) in cached)


def cached_bytes() -> dict[tuple[str, str], int]:
    """Of each repository in the hub's cache, by kind and name."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return {(one.repo_type, one.repo_id): one.size_on_disk for one in scan_cache_dir().repos}
    except CacheNotFound:
        return {}


def _access(one: Repository, is_cached: bool) -> Finding:
    from huggingface_hub import HfApi, errors

    about = f"{one.name} ({one.purpose})"
    try:
        HfApi().auth_check(one.name, repo_type=one.kind)
    except errors.GatedRepoError:
        return Finding(about, "missing", f"gated: accept its terms at {one.url}, and run `hf auth login`")
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = "is private, and the token is of somebody else, or there is no such"
        return Finding(about, "missing", f"{what} {one.kind} and no such file here: see {one.url}")
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # of the hub's own HTTP client
        if is_cached:
            return Finding(about, "ok", "in the cache; the hub does not answer")
        reason = " ".join(str(error).split()).partition(". ")[0]
        return Finding(about, "missing", f"not in the cache, and the hub does not answer: {reason}")
    return Finding(about, "ok", "in the cache" if is_cached else "to be downloaded")
