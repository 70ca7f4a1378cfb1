"""Tasks: units of a run's work. Each fills one folder, and is done again only if what decides its result changes.

What the stages have in common is here; what each of them does, stands on and is decided by: `rpsa.pipeline.stages`.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rpsa.artifacts import sha256_of
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import DATA_DIR, TaskOptions
from rpsa.evaluation.items import local_benchmarks
from rpsa.pipeline.manifests import identity, is_current, outdated, read_manifest
from rpsa.progress import Progress
from rpsa.provenance import Stage
from rpsa.recipe.problems import SHIPPED
from rpsa.recipe.schema import Recipe


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
    folder = data_dir or os.environ.get(DATA_DIR)
    files = local_benchmarks(tasks, folder) if folder else {}
    return [
        *(source_identity(source, "task") for source in tasks),
        *({"benchmark": name, "sha256": sha256_of(path)} for name, path in files.items()),
    ]


def task_options(recipe: Recipe, reference: Path | None = None) -> TaskOptions:
    """Which items an evaluation asks; `reference` is the D_ref whose problems are left out."""
    settings = recipe.evaluate
    folder = str(reference) if reference else None
    return TaskOptions(settings.n, settings.seed, recipe.data_dir, folder, settings.prompt_style)
