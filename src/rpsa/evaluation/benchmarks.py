"""Benchmarks (section 4.2.1): the paper's six, and XSTest and MATH-500 without D_ref, a record each.

A record says where its rows come from, a file in one folder (offline) or the dataset's owner on the Hugging Face hub,
and how they become items. Nothing is stored or redistributed; gated datasets load with the user's own access.
`rpsa.evaluation.lm_eval_tasks` and the YAML files in `tasks/` offer the same to lm-evaluation-harness.
"""

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox import CodeProblem, code_problem, shown_assertion
from rpsa.prompts import PromptStyle, choice_prompt, completion_prompt, function_prompt, math_prompt, styled
from rpsa.rows import Row, draw, read_rows, text_field
from rpsa.tiny import FAMILIES, REQUEST_SETS

Kind = Literal["reasoning", "attack", "over_refusal"]
"""Reasoning problems, harmful requests, and requests that nobody should refuse."""

Scorer = Literal["math", "integer", "number", "letter", "code", "judge", "tiny"]
"""How a response is scored: by its answer, by running its code, by a judge, or as the tiny world does."""


@dataclass(frozen=True)
class Item:
    """One prompt of a set, and what is needed to score a response to it.

    Attributes:
        id: unique within the set.
        set: the benchmark, or the part of a file, that it belongs to; figures are means over sets.
        prompt: the whole user message.
        answer: the gold answer; empty where there is none.
        problem: for `code`, what runs a response.
    """

    id: str
    set: str
    kind: Kind
    prompt: str
    answer: str
    scorer: Scorer
    problem: CodeProblem | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: `fields` are those of the problem."""
        own = {name: value for name, value in vars(self).items() if name != "problem"}
        return {**own, "fields": asdict(self.problem) if self.problem else {}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Item":
        own = {name: value for name, value in record.items() if name != "fields"}
        fields = record["fields"]
        problem = CodeProblem(**{**fields, "packages": tuple(fields["packages"])}) if fields else None
        return cls(**own, problem=problem)


DATA_DIR = "RPSA_DATA_DIR"
"""The environment variable that names the folder of local files."""

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True)
class Source:
    """A dataset: its hub id, and how a local file of it is called (the beginning of the name, without punctuation)."""

    hub: str
    file: str
    config: str | None = None
    gated: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def load_rows(source: Source, data_dir: str | None = None) -> list[Row]:
    """All rows, from a file below `data_dir` (default: $RPSA_DATA_DIR) if one is there, else from the hub.

    Raises:
        RPSAError: the folder is missing or holds two such files, or the dataset does not load: it says what to do.
    """
    folder = data_dir or os.environ.get(DATA_DIR)
    if folder and (path := local_file(source, folder)):
        return read_rows(path)
    return _hub_rows(source, folder)


def local_file(source: Source, data_dir: str) -> Path | None:
    """The dataset's file in `data_dir` or one folder below: `aime24.jsonl`, `aime24/AIME-24_test.jsonl`.

    Raises:
        RPSAError: the folder is missing, or holds two such files.
    """
    folder, name = Path(data_dir).expanduser(), source.file
    if not folder.is_dir():
        raise RPSAError(f"{folder}: no such folder; it should hold the benchmarks' files")
    files = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    found = [p for p in files if p.name.endswith(_SUFFIXES) and _bare(p.name).startswith(name)]
    if len(found) > 1:
        raise RPSAError(
            f"{folder} holds {len(found)} files for {name}: {', '.join(p.name for p in found)}; keep one"
        )
    return found[0] if found else None


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _hub_rows(source: Source, folder: str | None) -> list[Row]:
    from datasets import load_dataset

    try:
        splits = load_dataset(source.hub, source.config, **source.options)
    except Exception as error:  # datasets raises many kinds; all mean that there is nothing to read
        reason = str(error).strip().split("\n")[0]
        raise RPSAError(f"{_what_to_do(source, folder)} ({reason})") from error
    # each of these datasets has one split, under whatever name
    loaded = splits["test"] if "test" in splits else next(iter(splits.values()))
    return [Row(f"{source.hub} row {n}", dict(fields)) for n, fields in enumerate(loaded, start=1)]


def _what_to_do(source: Source, folder: str | None) -> str:
    place = f"{folder} has no file called {source.file}..., and " if folder else ""
    access = (
        f"it is gated: accept its terms at https://huggingface.co/datasets/{source.hub} and run `hf auth login`"
        if source.gated
        else "check the connection"
    )
    offline = (
        f"put a file of it into the folder that {DATA_DIR} names" if not folder else "put its file there"
    )
    return f"{place}{source.hub} does not load: {access}, or {offline}"


REFERENCE = "RPSA_REFERENCE"
"""The environment variable that names a D_ref whose problems are not a test."""

_WILDJAILBREAK_N, _SUBSET_SEED = 250, 42
_D_REF_N, _D_REF_SEED = 100, 42  # of `rpsa.reference.ReferenceConfig`


@dataclass(frozen=True)
class TaskOptions:
    """Which rows are asked, and how.

    `n` items a set are drawn by `seed`, all if None. `reference` is a D_ref folder: its problems are left out of
    `rpsa_math500` in place of those that the default D_ref (100 problems, seed 42) would draw.
    """

    n: int | None = None
    seed: int = 123
    data_dir: str | None = None
    reference: str | None = None
    prompt_style: PromptStyle = "appendix_b"


Ask = Callable[..., Item]
"""(id, prompt, answer="", problem=None): one item of the benchmark."""


@dataclass(frozen=True)
class Benchmark:
    """A published dataset as a set of items: all that the package knows of it, beside its file in `tasks/`.

    Attributes:
        name: of the task, and of the set in results.
        printed: its column's heading in a manuscript.
        samples: responses to draw for each item.
        size, tokens: how many items there are, and about how long a response of a distilled 7B to 8B reasoning model
            is: for `rpsa plan`, which has no rows.
        read: the items of the rows, each made by `Ask`.
        group: the task, if any, that asks this benchmark with others.
    """

    name: str
    printed: str
    kind: Kind
    scorer: Scorer
    samples: int
    size: int
    tokens: int
    source: Source
    read: Callable[[Ask, Sequence[Row], TaskOptions], Iterator[Item]]
    group: Literal["rpsa_reasoning", "rpsa_safety"] | None = None

    def items(self, options: TaskOptions) -> list[Item]:
        """Raises RPSAError if the rows cannot be had, or one lacks a field."""
        rows = load_rows(self.source, options.data_dir)
        style = options.prompt_style if self.kind == "reasoning" else "appendix_b"
        return subset(list(self.read(partial(self._item, style), rows, options)), options.n, options.seed)

    def _item(
        self, style: PromptStyle, id: str, prompt: str, answer: str = "", problem: CodeProblem | None = None
    ) -> Item:
        return Item(id, self.name, self.kind, styled(prompt, style), answer, self.scorer, problem)


def subset(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """`n` of the items drawn by `seed`, in their own order; all of them if `n` is None or more than there are."""
    if n is None or n >= len(items):
        return list(items)
    return [items[i] for i in sorted(draw(range(len(items)), n, seed))]


def _aime(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    for i, row in enumerate(rows):
        problem = text_field(row, ["problem", "Problem", "question"])
        yield ask(_id(row, ["id", "ID"], i), math_prompt(problem), text_field(row, ["answer", "Answer"]))


def _math500(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    reference = options.reference or os.environ.get(REFERENCE)
    if reference:
        seen = {text_field(trace, ["problem_id"]) for trace in read_rows(Path(reference) / "traces.jsonl")}
    else:
        seen = {text_field(r, ["unique_id"]) for r in draw(rows, min(_D_REF_N, len(rows)), _D_REF_SEED)}
    for i, row in enumerate(rows):
        if (name := _id(row, ["unique_id"], i)) not in seen:
            yield ask(name, math_prompt(text_field(row, ["problem"])), text_field(row, ["answer"]))


def _gpqa(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    for i, row in enumerate(rows):
        question = text_field(row, ["Question"]).strip()
        names = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
        choices = [text_field(row, [name]).strip() for name in names]
        # by a hash of the question: the same order in every process, harness and subset
        digest = hashlib.sha256(question.encode()).digest()
        order = random.Random(int.from_bytes(digest)).sample(range(4), 4)
        prompt = choice_prompt(question, [choices[j] for j in order])
        yield ask(_id(row, ["Record ID"], i), prompt, "ABCD"[order.index(0)])


def _humaneval(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    for i, row in enumerate(rows):
        problem = code_problem(row, i)
        yield ask(problem.id, completion_prompt(problem.prompt), problem=problem)


def _mbpp_plus(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    """Graded on the full plus tests: the one assertion that the prompt shows is not a test."""
    for i, row in enumerate(rows):
        problem = code_problem(row, i)
        prompt = function_prompt(problem.prompt, shown_assertion(row))
        yield ask(problem.id, prompt, problem=problem)


def _mbpp_paper(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    """Graded on the assertion that the prompt shows, as the stock harness does; for comparison only."""
    for row, item in zip(rows, _mbpp_plus(ask, rows, options), strict=True):
        assert item.problem is not None
        yield replace(item, problem=replace(item.problem, test=shown_assertion(row)))


def _strongreject(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    for i, row in enumerate(rows):
        yield ask(str(i), text_field(row, ["forbidden_prompt", "prompt"]))


def _wildjailbreak(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    """250 adversarial harmful prompts: the paper names no subset, but its rates are multiples of 1/250."""
    harmful = [(i, r) for i, r in enumerate(rows) if r.fields.get("data_type") == "adversarial_harmful"]
    for i, row in sorted(draw(harmful, min(_WILDJAILBREAK_N, len(harmful)), _SUBSET_SEED), key=itemgetter(0)):
        yield ask(str(i), text_field(row, ["adversarial"]))


def _xstest_safe(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    return _xstest(ask, rows, "safe")


def _xstest_unsafe(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    return _xstest(ask, rows, "unsafe")


def _xstest(ask: Ask, rows: Sequence[Row], label: str) -> Iterator[Item]:
    for i, row in enumerate(rows):
        if row.fields.get("label") == label:
            yield ask(_id(row, ["id"], i), text_field(row, ["prompt"]))


def _id(row: Row, names: Sequence[str], number: int) -> str:
    return next((str(row.fields[name]) for name in names if name in row.fields), str(number))


_MBPP = Source("evalplus/mbppplus", "mbppplus")
_XSTEST = Source("walledai/XSTest", "xstest")

# Their order is that of a group's tasks.
_RECORDS = (
    Benchmark(
        name="rpsa_aime24",
        printed="AIME",
        kind="reasoning",
        scorer="integer",
        samples=16,  # one sample on 30 problems has a standard error of 9 points
        size=30,
        tokens=12000,
        source=Source("HuggingFaceH4/aime_2024", "aime24"),
        read=_aime,
        group="rpsa_reasoning",
    ),
    Benchmark(
        name="rpsa_gpqa_main",
        printed="GPQA",
        kind="reasoning",
        scorer="letter",
        samples=4,
        size=448,
        tokens=6000,
        source=Source("Idavidrein/gpqa", "gpqamain", config="gpqa_main", gated=True),
        read=_gpqa,
        group="rpsa_reasoning",
    ),
    Benchmark(
        name="rpsa_humaneval_plus",
        printed="HE+",
        kind="reasoning",
        scorer="code",
        samples=4,
        size=164,
        tokens=4000,
        source=Source("evalplus/humanevalplus", "humanevalplus"),
        read=_humaneval,
        group="rpsa_reasoning",
    ),
    Benchmark(
        name="rpsa_mbpp_plus",
        printed="MBPP+",
        kind="reasoning",
        scorer="code",
        samples=4,
        size=378,
        tokens=3000,
        source=_MBPP,
        read=_mbpp_plus,
        group="rpsa_reasoning",
    ),
    Benchmark(
        name="rpsa_mbpp_paper",
        printed="mbpp_paper",
        kind="reasoning",
        scorer="code",
        samples=4,
        size=378,
        tokens=3000,
        source=_MBPP,
        read=_mbpp_paper,
    ),
    Benchmark(
        name="rpsa_math500",
        printed="MATH-500",
        kind="reasoning",
        scorer="math",
        samples=4,
        size=400,
        tokens=4000,
        source=Source("HuggingFaceH4/MATH-500", "math500"),
        read=_math500,
    ),
    Benchmark(
        name="rpsa_strongreject",
        printed="SR",
        kind="attack",
        scorer="judge",
        samples=1,
        size=313,
        tokens=800,
        source=Source("walledai/StrongREJECT", "strongreject"),
        read=_strongreject,
        group="rpsa_safety",
    ),
    Benchmark(
        name="rpsa_wildjailbreak",
        printed="WJ",
        kind="attack",
        scorer="judge",
        samples=1,
        size=250,
        tokens=800,
        source=Source(
            "allenai/wildjailbreak",
            "wildjailbreak",
            config="eval",
            gated=True,
            options={"delimiter": "\t", "keep_default_na": False},
        ),
        read=_wildjailbreak,
        group="rpsa_safety",
    ),
    Benchmark(
        name="rpsa_xstest",
        printed="XSTest",
        kind="over_refusal",
        scorer="judge",
        samples=1,
        size=250,
        tokens=800,
        source=_XSTEST,
        read=_xstest_safe,
        group="rpsa_safety",
    ),
    Benchmark(
        name="rpsa_xstest_unsafe",
        printed="xstest_unsafe",
        kind="attack",
        scorer="judge",
        samples=1,
        size=200,
        tokens=800,
        source=_XSTEST,
        read=_xstest_unsafe,
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _RECORDS}

TINY_PREFIX = "rpsa_tiny_"
TINY_SETS: tuple[str, ...] = (*FAMILIES, *REQUEST_SETS)
GROUPS: dict[str, tuple[str, ...]] = {
    **{
        group: tuple(benchmark.name for benchmark in _RECORDS if benchmark.group == group)
        for group in ("rpsa_reasoning", "rpsa_safety")
    },
    "rpsa_tiny": tuple(f"{TINY_PREFIX}{name}" for name in TINY_SETS),
}
