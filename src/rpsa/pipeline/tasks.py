"""Tasks: units of a run's work. Each fills one folder, and is done again only if what decides its result changes.

What the stages have in common is here; what each of them does, stands on and is decided by: `rpsa.pipeline.stages`.

A manifest, `stage.json`, vouches for a finished task. It holds what went in (`inputs`), the versions of the
packages and the digests of our own rooms that decide the result (`rpsa.provenance`), one hash over all three, which
is the result's identity, and size and hash of every file.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rpsa.artifacts import atomic_write, files_below, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.data import data_folder
from rpsa.evaluation.items import local_benchmarks
from rpsa.progress import Progress
from rpsa.provenance import MADE_BY, TIMING, Stage, sources, versions
from rpsa.recipe.problems import SHIPPED
from rpsa.recipe.schema import Recipe
from rpsa.recipe.sections import Evaluate

MANIFEST = "stage.json"
NO_RESULT = "no result"


def write_manifest(directory: Path, stage: Stage, inputs: Mapping[str, Any], place: str = "") -> None:
    """Write `stage.json` into a finished stage folder.

    Args:
        inputs: JSON-able: all that decides the result besides code.
        place: where in the run the folder belongs.

    Raises:
        RPSAError: the folder lacks what the stage leaves.
    """
    found = (
        [name for name in files_below(directory) if name not in (MANIFEST, TIMING)]
        if directory.is_dir()
        else []
    )
    missing = [name for name in MADE_BY[stage].files if name not in found]
    if missing or not found:
        raise RPSAError(
            f"{directory} lacks {missing[0] if missing else 'any file'}, so stage {stage} has no result: "
            "was it deleted while the run was on?"
        )
    manifest = {
        "stage": stage,
        "place": place,
        "inputs": dict(inputs),
        **_made_by_now(stage),
        "inputs_sha256": identity(stage, inputs),
        "files": {
            name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
            for name in found
        },
    }
    atomic_write(directory / MANIFEST, stable_json(manifest))


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The stage's manifest; None where there is none that can be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if _is_manifest(manifest) else None


def _is_manifest(value: Any) -> bool:
    kinds = {
        "stage": str,
        "inputs": dict,
        "versions": dict,
        "sources": dict,
        "inputs_sha256": str,
        "files": dict,
    }
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), kind) for key, kind in kinds.items())
        and bool(value["files"])
        and all(isinstance(one, dict) and {"bytes", "sha256"} <= set(one) for one in value["files"].values())
    )


def is_current(directory: Path, stage: Stage, inputs: Mapping[str, Any]) -> bool:
    """Whether `directory` holds this stage's result for these inputs, versions and sources, with no file missing."""
    return not outdated(directory, stage, inputs)


def outdated(directory: Path, stage: Stage, inputs: Mapping[str, Any]) -> list[str]:
    """Why a stage has to be done again, in a few words each; none where its result is up to date."""
    manifest = read_manifest(directory)
    if manifest is None or manifest["stage"] != stage:
        return [NO_RESULT]
    lost = [name for name, file in manifest["files"].items() if _size(directory / name) != file["bytes"]]
    lost += [name for name in MADE_BY[stage].files if name not in manifest["files"]]
    if lost:
        return [f"{lost[0]} is missing or cut off"]
    if identity(stage, inputs) in (manifest["inputs_sha256"], *manifest.get("kept_for", [])):
        return []
    given = json.loads(stable_json(dict(inputs)))
    before, now = manifest["inputs"], _made_by_now(stage)
    return [
        *(f"another {key}" for key in sorted({*before, *given}) if before.get(key) != given.get(key)),
        *_changed(manifest["versions"], now["versions"]),
        *(
            f"rpsa/{room} has changed"
            for room in now["sources"]
            if now["sources"][room] != manifest["sources"].get(room)
        ),
    ]


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"{name} {before.get(name, 'absent')} -> {now.get(name, 'absent')}"


def keep(directory: Path, stage: Stage, inputs: Mapping[str, Any]) -> None:
    """Let a result of other versions or sources stand as it is, if its inputs are these; the manifest says so."""
    manifest = read_manifest(directory)
    if manifest is None or manifest["inputs"] != json.loads(stable_json(dict(inputs))):
        return
    if is_current(directory, stage, inputs):
        return
    manifest["kept_for"] = [*manifest.get("kept_for", []), identity(stage, inputs)]
    atomic_write(directory / MANIFEST, stable_json(manifest))


def altered_files(directory: Path) -> list[str]:
    """One line for each file that is missing or no longer has the bytes that the stage wrote."""
    manifest = read_manifest(directory)
    if manifest is None:
        return [f"{directory / MANIFEST}: missing or unreadable"]
    problems = []
    for name, file in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif sha256_of(path) != file["sha256"]:
            problems.append(f"{path}: changed since the stage {manifest['stage']} wrote it")
    return problems


def _made_by_now(stage: Stage) -> dict[str, dict[str, str]]:
    return {"versions": versions(MADE_BY[stage]), "sources": sources(MADE_BY[stage])}


def identity(stage: Stage, inputs: Mapping[str, Any]) -> str:
    """What tells the result that a stage would have now from any other."""
    return _identity(stage, inputs, _made_by_now(stage))


def is_edited(directory: Path) -> bool:
    """Whether a manifest's inputs, versions or sources are not those that its hash was made of."""
    manifest = read_manifest(directory)
    if manifest is None:
        return False
    made_by = {key: manifest[key] for key in ("versions", "sources")}
    hashed: str = manifest["inputs_sha256"]
    return _identity(manifest["stage"], manifest["inputs"], made_by) != hashed


def _identity(stage: str, inputs: Mapping[str, Any], made_by: Mapping[str, Any]) -> str:
    return sha256_of({"stage": stage, "inputs": dict(inputs), **made_by})


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


@dataclass(frozen=True)
class Task(ABC):
    """One unit of work of a recipe's run."""

    recipe: Recipe

    stage: ClassVar[Stage]

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in what is printed."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Its folder within the run's."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Everything that decides the result: settings, models, data, and the results that it stands on.

        Raises:
            RPSAError: something that it stands on has not been run, or a file cannot be read.
        """

    @abstractmethod
    def run(self, folder: Path, progress: Progress) -> None:
        """Fill `folder`, which may hold what an interrupted run left."""

    def needs(self) -> "Sequence[Task]":
        """The tasks whose results this one takes."""
        return ()

    @property
    def title(self) -> str:
        """Stage and name; the stage alone where the name is that of a cell, beside whose name it is printed."""
        return f"{self.stage} {self.name}"

    @property
    def folder(self) -> Path:
        return self.recipe.folder / self.place

    @property
    def failure_file(self) -> Path:
        """Where it is kept why there is no result."""
        return self.folder.with_name(f".{self.folder.name}.failed")

    @property
    def live_file(self) -> Path:
        """Where it is kept how far it is, while it is done."""
        return self.folder.with_name(f".{self.folder.name}.live")

    @property
    def kind(self) -> str:
        """What it has in common with tasks that take about as long."""
        return self.stage

    def identity(self) -> str:
        """What tells the result that the task would have now from any other."""
        return identity(self.stage, self.inputs())

    def is_done(self) -> bool:
        """Whether the folder holds the result for the present inputs."""
        return is_current(self.folder, self.stage, self.inputs())

    def why_not(self) -> str | None:
        """Why the result is not what the recipe asks for, all that it stands on included; None if it is."""
        for needed in self.needs():
            if reason := needed.why_not():
                return f"{needed.stage} {needed.name}: {reason}"
        return ", ".join(outdated(self.folder, self.stage, self.inputs())) or None

    def result(self) -> str:
        """The identity of the finished result.

        Raises:
            RPSAError: it has not been run.
        """
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise RPSAError(
                f"stage {self.stage} has no result in {self.folder}: run the recipe without --only, or that stage first"
            )
        return str(manifest["inputs_sha256"])

    def unfinished_folder(self, key: str) -> Path:
        """Where a result grows; `key` is the identity that it will have."""
        return self.folder.with_name(f".{self.folder.name}.{key[:8]}.unfinished")

    def unfinished_folders(self) -> list[Path]:
        """All that has been begun and not finished, for whatever inputs."""
        pattern = re.compile(re.escape(f".{self.folder.name}.") + r"[0-9a-f]{8}\.unfinished")
        siblings = self.folder.parent.iterdir() if self.folder.parent.is_dir() else ()
        return sorted(path for path in siblings if pattern.fullmatch(path.name))

    def earlier_folders(self, folder: Path) -> list[Path]:
        """Where, beside `folder`, parts of the result may be that need not be made again."""
        return [one for one in (self.folder, *self.unfinished_folders()) if one != folder]


def source_identity(source: str, kind: str) -> Any:
    """What tells data from any other: its name, and of a file of the user's the content."""
    path = Path(source)
    if source in SHIPPED[kind] or not path.exists():
        return source
    return {"path": source, "sha256": sha256_of(path)}


def tasks_identity(tasks: Iterable[str], data_dir: str | None) -> list[Any]:
    """What evaluation tasks read: names, the user's own files and the benchmarks' files in `data_dir` by content.

    Without a `data_dir`, files are looked for in $RPSA_DATA_DIR.
    """
    tasks = list(tasks)
    folder = data_folder(data_dir)
    files = local_benchmarks(tasks, folder) if folder else {}
    return [
        *(source_identity(source, "task") for source in tasks),
        *({"benchmark": name, "sha256": sha256_of(path)} for name, path in files.items()),
    ]


def policies_identity(settings: Evaluate) -> dict[str, Any]:
    """The policies, by content, of judges that are given a file with one; no key where there is none."""
    own = [value for name, value in settings.model_dump().items() if name.endswith("judge_settings")]
    files = {Path(one["policy"]) for one in own if isinstance(one.get("policy"), str)}
    found = {str(path): sha256_of(path) for path in sorted(files) if path.is_file()}
    return {"policies": found} if found else {}


def task_options(recipe: Recipe, reference: Path | None = None) -> TaskOptions:
    """Which items an evaluation asks; `reference` is the D_ref whose problems are left out."""
    settings = recipe.evaluate
    folder = str(reference) if reference else None
    return TaskOptions(settings.n, settings.seed, recipe.data_dir, folder, settings.prompt_style)
