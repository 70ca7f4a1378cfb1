"""Section 4.2.1: the paper's six benchmarks, and XSTest and MATH-500 without D_ref.

Each is a name, where its rows come from, and how they become questions; `rpsa.evaluation.lm_eval_tasks` and the
YAML files in `tasks/` offer the same to lm-evaluation-harness.

One question to a model, and what kind of question it is.

Where a benchmark's rows come from: a file in one folder (offline), or the dataset's owner on the Hugging Face hub.

Nothing is stored or redistributed. Gated datasets load with the user's own access.
"""

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox import code_problem, shown_assertion
from rpsa.prompts import PromptStyle, choice_prompt, completion_prompt, function_prompt, math_prompt, styled
from rpsa.rows import Row, draw, read_rows, text_field
from rpsa.tiny import FAMILIES, REQUEST_SETS

Kind = Literal["reasoning", "attack", "over_refusal"]
"""Reasoning problems, harmful requests, and requests that nobody should refuse."""

Scorer = Literal["math", "integer", "letter", "code", "judge", "tiny"]
"""How a response is scored: by its answer, by running its code, by a judge, or as the tiny world does."""


@dataclass(frozen=True)
class Item:
    """One prompt of a set, and what is needed to score a response to it.

    Attributes:
        id: unique within the set.
        set: the benchmark, or the part of a file, that it belongs to; figures are means over sets.
        prompt: the whole user message.
        answer: the gold answer; empty where there is none.
        fields: for `code` those of a `rpsa.evaluation.sandbox.CodeProblem`.
    """

    id: str
    set: str
    kind: Kind
    prompt: str
    answer: str
    scorer: Scorer
    fields: Mapping[str, Any] = field(default_factory=dict)


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
"""The environment variable that names a D_ref whose problems are no test."""

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


class Question(NamedTuple):
    """What a row asks: the user message, the gold answer, and for code what runs it (`Item.fields`)."""

    id: str
    prompt: str
    answer: str = ""
    fields: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Benchmark:
    """A published dataset as a set of items: all that the package knows of it, beside its file in `tasks/`.

    Attributes:
        name: of the task, and of the set in results.
        printed: its column's heading in a manuscript.
        samples: responses to draw for each item.
        size, tokens: how many items there are, and about how long a response of a distilled 7B to 8B reasoning model
            is: for `rpsa plan`, which has no rows.
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
    questions: Callable[[Sequence[Row], TaskOptions], Iterable[Question]]
    group: Literal["rpsa_reasoning", "rpsa_safety"] | None = None

    def items(self, options: TaskOptions) -> list[Item]:
        """Raises RPSAError if the rows cannot be had, or one lacks a field."""
        questions = list(self.questions(load_rows(self.source, options.data_dir), options))
        style = options.prompt_style if self.kind == "reasoning" else "appendix_b"
        made = [
            Item(q.id, self.name, self.kind, styled(q.prompt, style), q.answer, self.scorer, q.fields)
            for q in questions
        ]
        return subset(made, options.n, options.seed)


def subset(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """`n` of the items drawn by `seed`, in their own order; all of them if `n` is None or more than there are."""
    if n is None or n >= len(items):
        return list(items)
    return [items[i] for i in sorted(draw(range(len(items)), n, seed))]


def _aime(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    for i, row in enumerate(rows):
        problem = text_field(row, ["problem", "Problem", "question"])
        yield Question(_id(row, ["id", "ID"], i), math_prompt(problem), text_field(row, ["answer", "Answer"]))


def _math500(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    reference = options.reference or os.environ.get(REFERENCE)
    if reference:
        seen = {text_field(trace, ["problem_id"]) for trace in read_rows(Path(reference) / "traces.jsonl")}
    else:
        seen = {text_field(r, ["unique_id"]) for r in draw(rows, min(_D_REF_N, len(rows)), _D_REF_SEED)}
    for i, row in enumerate(rows):
        if (name := _id(row, ["unique_id"], i)) not in seen:
            yield Question(name, math_prompt(text_field(row, ["problem"])), text_field(row, ["answer"]))


def _gpqa(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    for i, row in enumerate(rows):
        question = text_field(row, ["Question"]).strip()
        names = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
        choices = [text_field(row, [name]).strip() for name in names]
        # by a hash of the question: the same order in every process, harness and subset
        digest = hashlib.sha256(question.encode()).digest()
        order = random.Random(int.from_bytes(digest)).sample(range(4), 4)
        prompt = choice_prompt(question, [choices[j] for j in order])
        yield Question(_id(row, ["Record ID"], i), prompt, "ABCD"[order.index(0)])


def _humaneval(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    for i, row in enumerate(rows):
        problem = code_problem(row, i)
        yield Question(problem.id, completion_prompt(problem.prompt), fields=asdict(problem))


def _mbpp_plus(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    """Graded on the full plus tests: the one assertion that the prompt shows is no test."""
    for i, row in enumerate(rows):
        problem = code_problem(row, i)
        prompt = function_prompt(problem.prompt, shown_assertion(row))
        yield Question(problem.id, prompt, fields=asdict(problem))


def _mbpp_paper(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    """Graded on the assertion that the prompt shows, as the stock harness does; for comparison only."""
    for row, question in zip(rows, _mbpp_plus(rows, options), strict=True):
        yield question._replace(fields={**question.fields, "test": shown_assertion(row)})


def _strongreject(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    for i, row in enumerate(rows):
        yield Question(str(i), text_field(row, ["forbidden_prompt", "prompt"]))


def _wildjailbreak(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    """250 adversarial harmful prompts: the paper names no subset, but its rates are multiples of 1/250."""
    harmful = [(i, r) for i, r in enumerate(rows) if r.fields.get("data_type") == "adversarial_harmful"]
    for i, row in sorted(draw(harmful, min(_WILDJAILBREAK_N, len(harmful)), _SUBSET_SEED), key=itemgetter(0)):
        yield Question(str(i), text_field(row, ["adversarial"]))


def _xstest_safe(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    return _xstest(rows, "safe")


def _xstest_unsafe(rows: Sequence[Row], options: TaskOptions) -> Iterator[Question]:
    return _xstest(rows, "unsafe")


def _xstest(rows: Sequence[Row], label: str) -> Iterator[Question]:
    for i, row in enumerate(rows):
        if row.fields.get("label") == label:
            yield Question(_id(row, ["id"], i), text_field(row, ["prompt"]))


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
        questions=_aime,
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
        questions=_gpqa,
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
        questions=_humaneval,
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
        questions=_mbpp_plus,
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
        questions=_mbpp_paper,
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
        questions=_math500,
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
        questions=_strongreject,
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
        questions=_wildjailbreak,
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
        questions=_xstest_safe,
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
        questions=_xstest_unsafe,
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
