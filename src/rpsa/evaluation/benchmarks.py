"""Section 4.2.1: the paper's six benchmarks, and XSTest and MATH-500 without D_ref.

Each is a name, where its rows come from, and how they become questions; `rpsa.evaluation.lm_eval_tasks` and the
YAML files in `tasks/` offer the same to lm-evaluation-harness.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from rpsa.evaluation.items import Item, Kind, Scorer
from rpsa.evaluation.sandbox import code_problem, shown_assertion
from rpsa.evaluation.sources import Source, load_rows
from rpsa.prompts import PromptStyle, choice_prompt, completion_prompt, function_prompt, math_prompt, styled
from rpsa.rows import Row, draw, read_rows, text_field
from rpsa.tiny import FAMILIES, REQUEST_SETS

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
    """A published dataset as a set of items. `samples`: responses to draw for each item."""

    name: str
    kind: Kind
    scorer: Scorer
    samples: int
    source: Source
    questions: Callable[[Sequence[Row], TaskOptions], Iterable[Question]]

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


_AIME = Source("HuggingFaceH4/aime_2024", "aime24")
_GPQA = Source("Idavidrein/gpqa", "gpqamain", config="gpqa_main", gated=True)
_HUMANEVAL = Source("evalplus/humanevalplus", "humanevalplus")
_MBPP = Source("evalplus/mbppplus", "mbppplus")
_MATH = Source("HuggingFaceH4/MATH-500", "math500")
_STRONGREJECT = Source("walledai/StrongREJECT", "strongreject")
_WILDJAILBREAK = Source(
    "allenai/wildjailbreak",
    "wildjailbreak",
    config="eval",
    gated=True,
    options={"delimiter": "\t", "keep_default_na": False},
)
_XSTEST = Source("walledai/XSTest", "xstest")

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        # one sample on 30 problems has a standard error of 9 points
        Benchmark("rpsa_aime24", "reasoning", "integer", 16, _AIME, _aime),
        Benchmark("rpsa_gpqa_main", "reasoning", "letter", 4, _GPQA, _gpqa),
        Benchmark("rpsa_humaneval_plus", "reasoning", "code", 4, _HUMANEVAL, _humaneval),
        Benchmark("rpsa_mbpp_plus", "reasoning", "code", 4, _MBPP, _mbpp_plus),
        Benchmark("rpsa_mbpp_paper", "reasoning", "code", 4, _MBPP, _mbpp_paper),
        Benchmark("rpsa_math500", "reasoning", "math", 4, _MATH, _math500),
        Benchmark("rpsa_strongreject", "attack", "judge", 1, _STRONGREJECT, _strongreject),
        Benchmark("rpsa_wildjailbreak", "attack", "judge", 1, _WILDJAILBREAK, _wildjailbreak),
        Benchmark("rpsa_xstest", "over_refusal", "judge", 1, _XSTEST, _xstest_safe),
        Benchmark("rpsa_xstest_unsafe", "attack", "judge", 1, _XSTEST, _xstest_unsafe),
    )
}

TINY_SETS: tuple[str, ...] = (*FAMILIES, *REQUEST_SETS)
GROUPS: dict[str, tuple[str, ...]] = {
    "rpsa_reasoning": ("rpsa_aime24", "rpsa_gpqa_main", "rpsa_humaneval_plus", "rpsa_mbpp_plus"),
    "rpsa_safety": ("rpsa_strongreject", "rpsa_wildjailbreak", "rpsa_xstest"),
    "rpsa_tiny": tuple(f"rpsa_tiny_{name}" for name in TINY_SETS),
}
