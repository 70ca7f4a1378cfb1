"""Names in a recipe that stand for something outside it: models, problems, safety data, tasks, files."""

import re
from pathlib import Path

from rpsa.recipe.problems import did_you_mean

_BENCHMARKS = (
    *(
        "rpsa_aime24",
        "rpsa_gpqa_main",
        "rpsa_humaneval_plus",
        "rpsa_mbpp_plus",
        "rpsa_mbpp_paper",
        "rpsa_math500",
    ),
    *("rpsa_strongreject", "rpsa_wildjailbreak", "rpsa_xstest", "rpsa_xstest_unsafe"),
    *("rpsa_reasoning", "rpsa_safety", "rpsa_tiny"),
    *(f"rpsa_tiny_{name}" for name in ("add", "chain", "sort", "stack", "walk", "program")),
    *(f"rpsa_tiny_{name}" for name in ("direct", "wrapped", "benign", "borderline")),
)
# What comes with the package, by kind. Anything else is a file, a folder or a Hugging Face id.
SHIPPED = {
    "model": ("tiny:0", "tiny:1", "tiny:2"),
    "problems": ("tiny",),
    "safety": ("tiny:refusals", "tiny:balanced"),
    "task": ("tiny", *_BENCHMARKS),
}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE = (".json", ".jsonl", ".csv", ".gz", ".parquet", ".yaml", ".txt")


def source_problem(kind: str, source: str) -> str | None:
    """What is wrong with a source, or None. Asks the disk, never the network."""
    shipped = SHIPPED[kind]
    if not source.strip():
        return "empty; name one"
    if source in shipped:
        return None
    if Path(source).exists():
        is_ordinary = Path(source).is_file() or Path(source).is_dir()
        return None if is_ordinary else f"{source!r} is neither a file nor a folder"
    is_file = source.endswith(_FILE) or "/" in source
    if source.startswith("tiny") or (kind == "task" and not is_file):
        return f"{source!r} is unknown{did_you_mean(source, shipped)}"
    path = Path(source)
    inside_a_folder = path.parent != Path(".") and path.parent.exists()
    if kind == "task" or inside_a_folder or source.endswith(_FILE) or not _HUB_ID.fullmatch(source):
        return f"no such file or folder: {source!r}{_nearest(path)}"
    return None


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if folder != path.parent:
        return f"; there is no {path.parent}"
    hint = did_you_mean(path.name, (p.name for p in folder.iterdir()))
    return hint if "did you mean" in hint else ""
