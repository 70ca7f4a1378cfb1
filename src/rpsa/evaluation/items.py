"""Tasks by name: the items of a benchmark, a group, the tiny world or a file of the user's."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import (
    BENCHMARKS,
    GROUPS,
    TINY_PREFIX,
    TINY_SETS,
    Item,
    Kind,
    Scorer,
    TaskOptions,
    subset,
)
from rpsa.evaluation.data import Unreachable, local_file
from rpsa.evaluation.sandbox import code_problem
from rpsa.prompts import math_prompt
from rpsa.rows import Row, read_rows, text_field
from rpsa.tiny import FAMILIES, TinyItem, evaluation_prompts

TASK_NAMES: tuple[str, ...] = ("tiny", *BENCHMARKS, *GROUPS, *GROUPS["rpsa_tiny"])


def load_tasks(names: Sequence[str], options: TaskOptions) -> list[Item]:
    """The items of all tasks, each task once, in the order given.

    Raises:
        RPSAError: a name is unknown, a source cannot be read, or two tasks have a set of the same name.
    """
    parts = [load_task(name, options) for name in expanded(names)]
    sets: set[str] = set()
    for part in parts:
        own = {item.set for item in part}
        if own & sets:
            raise RPSAError(f"two tasks are called {min(own & sets)}: rename one of the files")
        sets |= own
    return [item for part in parts for item in part]


def expanded(names: Iterable[str]) -> list[str]:
    """Groups replaced by their tasks, repetitions dropped."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def local_benchmarks(names: Iterable[str], data_dir: str) -> dict[str, Path]:
    """The files of `data_dir` that `load_tasks` reads, by benchmark (a second one by its hub id, too); what it has
    none of comes from the hub.

    Raises:
        RPSAError: there are benchmarks among the names and no such folder, or it holds two files for one.
    """
    asked = [BENCHMARKS[name] for name in expanded(names) if name in BENCHMARKS]
    sources = [(benchmark.name, benchmark.source) for benchmark in asked]
    sources += [(f"{one.name} {one.also.hub}", one.also) for one in asked if one.also]
    found = ((name, local_file(source, data_dir)) for name, source in sources)
    return {name: path for name, path in found if path is not None}


def reachable(names: Iterable[str], options: TaskOptions) -> tuple[list[str], dict[str, Unreachable]]:
    """The tasks whose items can be had, groups expanded, and the others with what keeps each of them away.

    Raises:
        RPSAError: a source is there but cannot be read.
    """
    here, away = [], {}
    for name in expanded(names):
        try:
            load_task(name, options)
        except Unreachable as error:
            away[name] = error
        else:
            here.append(name)
    return here, away


def load_task(name: str, options: TaskOptions) -> list[Item]:
    """The items of one task; `tiny` is all sets of the tiny world, anything that is not a known name a file.

    Raises:
        RPSAError: the file cannot be read, or a row has no prompt.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name].items(options)
    if name == "tiny":
        return [item for part in TINY_SETS for item in _tiny_items(part, options)]
    if name.removeprefix(TINY_PREFIX) in TINY_SETS:
        return _tiny_items(name.removeprefix(TINY_PREFIX), options)
    return _file_items(name, options)


def _tiny_items(name: str, options: TaskOptions) -> list[Item]:
    kinds: dict[str, Kind] = {"direct": "attack", "wrapped": "attack", "benign": "over_refusal"}
    kind = "reasoning" if name in FAMILIES else kinds.get(name, "over_refusal")
    asked = _tiny_prompts(options.n or 100, options.seed)[name]
    return [Item(f"{name}-{i}", name, kind, item.prompt, item.answer, "tiny") for i, item in enumerate(asked)]


@cache
def _tiny_prompts(n: int, seed: int) -> dict[str, list[TinyItem]]:
    """Drawn once for all sets, which takes longer than to answer one of them."""
    return evaluation_prompts(n, seed)


def _file_items(source: str, options: TaskOptions) -> list[Item]:
    """A file's columns say what it holds: `test` and `entry_point` make its rows programs to write, `answer`
    reasoning problems (`problem` or `question` asked in Appendix B's words, `prompt` as it is); a `label` of "safe"
    makes a row a request that nobody should refuse; others are harmful."""
    name = Path(source).name.partition(".")[0]
    items = [_file_item(name, str(i), row) for i, row in enumerate(read_rows(source))]
    return [
        item
        for kind in ("reasoning", "attack", "over_refusal")
        for item in subset([item for item in items if item.kind == kind], options.n, options.seed)
    ]


def _file_item(name: str, identifier: str, row: Row) -> Item:
    if "entry_point" in row.fields:
        problem = code_problem(row, int(identifier))
        return Item(problem.id, name, "reasoning", problem.prompt, "", "code", problem)
    if "answer" in row.fields:
        answer = text_field(row, ["answer"])
        is_integer = answer.strip().lstrip("-").isdigit()
        scorer: Scorer = "integer" if is_integer else "math"
        if "prompt" in row.fields and not {"problem", "question"} & set(row.fields):
            prompt = text_field(row, ["prompt"])  # as it is: it need not ask for a box
            scorer = "number" if is_integer else "math"
        else:
            prompt = math_prompt(text_field(row, ["problem", "question"]))
        return Item(identifier, name, "reasoning", prompt, answer, scorer)
    prompt = text_field(row, ["forbidden_prompt", "prompt", "question", "instruction"])
    kind: Kind = "over_refusal" if row.fields.get("label") == "safe" else "attack"
    return Item(identifier, name, kind, prompt, "", "judge")
