"""Benchmarks (section 4.2.1): the paper's six, MATH-500 without D_ref, and more sets of requests, a record each.

A record says where its rows come from, a file in one folder (offline) or the dataset's owner on the Hugging Face hub,
and how they become items. Nothing is stored or redistributed; gated datasets load with the user's own access.
`rpsa.evaluation.lm_eval_tasks` and the YAML files in `tasks/` offer the same to lm-evaluation-harness.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, get_args

from rpsa.errors import RPSAError
from rpsa.evaluation.data import Source, load_rows
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


Group = Literal["rpsa_reasoning", "rpsa_safety", "rpsa_harm", "rpsa_over_refusal"]
"""Tasks that ask several benchmarks; the first two are the paper's."""


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
        also: a second source, which `read` loads by itself.
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
    group: Group | None = None
    also: Source | None = None

    def items(self, options: TaskOptions) -> list[Item]:
        """Raises RPSAError if the rows cannot be had, one lacks a field, or none is of this benchmark."""
        rows = load_rows(self.source, options.data_dir)
        style = options.prompt_style if self.kind == "reasoning" else "appendix_b"
        found = list(self.read(partial(self._item, style), rows, options))
        if not found:
            place = rows[0].where if rows else self.source.hub
            raise RPSAError(
                f"{self.name}: none of the {len(rows)} rows is one of its items (the first: {place})"
            )
        return subset(found, options.n, options.seed)

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


def _wildjailbreak_benign(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    for i, row in enumerate(rows):
        if text_field(row, ["data_type"]) == "adversarial_benign":
            yield ask(str(i), text_field(row, ["adversarial"]))


def _prompts(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    for i, row in enumerate(rows):
        yield ask(str(i), text_field(row, ["prompt"]))


def _jailbreakbench(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    """`Goal`, with a capital: AdvBench's file, of the same name, has a `goal`."""
    for i, row in enumerate(rows):
        yield ask(_id(row, ["Index"], i), text_field(row, ["Goal"]))


def _sorrybench(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    """The 440 base requests; the other 20 styles are mutations of them (ciphers, translations, role play)."""
    for i, row in enumerate(rows):
        if text_field(row, ["prompt_style"]) == "base":
            turns = row.fields.get("turns")
            if not (isinstance(turns, list) and turns and isinstance(turns[0], str)):
                raise RPSAError(f"{row.where} has no list of texts 'turns'")
            yield ask(_id(row, ["question_id"], i), turns[0])


def _harmbench_standard(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    for i, row in enumerate(rows):
        if _category(row) == "standard":
            yield ask(_id(row, ["BehaviorID"], i), text_field(row, _BEHAVIOUR))


def _harmbench_contextual(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    """A context, a line, and what is asked of it: as HarmBench's direct requests put it."""
    for i, row in enumerate(rows):
        if _category(row) == "contextual":
            context = text_field(row, ["ContextString", "context"])
            behaviour = text_field(row, _BEHAVIOUR)
            yield ask(_id(row, ["BehaviorID"], i), f"{context}\n\n---\n\n{behaviour}")


def _harmbench_wrapped(ask: Ask, rows: Sequence[Row], options: TaskOptions) -> Iterator[Item]:
    """Each standard behaviour after a jailbreak that people wrote, drawn for it: as HarmBench's human jailbreaks.

    HarmBench's own 114 are code in its repository; these are of the collection that they come from.
    """
    templates = [text_field(row, ["prompt"]) for row in load_rows(_JAILBREAKS, options.data_dir)]
    for item in _harmbench_standard(ask, rows, options):
        # by a hash of the behaviour: the same one in every process, file and subset
        digest = hashlib.sha256(item.prompt.encode()).digest()
        template = random.Random(int.from_bytes(digest)).choice(templates)
        yield ask(item.id, f"{template}\n\n{item.prompt}")


_BEHAVIOUR = ["Behavior", "prompt"]


def _category(row: Row) -> str:
    """Of a row of the owner's file; the hub has a config for each category instead, and no such column."""
    if "FunctionalCategory" in row.fields:
        return text_field(row, ["FunctionalCategory"])
    return "contextual" if row.fields.get("context") else "standard"


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


_JBB = "JailbreakBench/JBB-Behaviors"
_MBPP = Source("evalplus/mbppplus", "mbppplus")
_XSTEST = Source("walledai/XSTest", "xstest")
_WILDJAILBREAK = Source(
    "allenai/wildjailbreak",
    "wildjailbreak",
    config="eval",
    gated=True,
    options={"delimiter": "\t", "keep_default_na": False},
)
# The owners' file (centerforaisafety/HarmBench, data/behavior_datasets) is on GitHub; this mirror asks to be logged in.
# Its third category, copyright, is scored by hashes of texts and by no judge, so that it is not asked here.
_HARMBENCH = Source("walledai/HarmBench", "harmbenchbehaviors", config="standard", gated=True)
_JAILBREAKS = Source(
    "TrustAIRLab/in-the-wild-jailbreak-prompts", "inthewildjailbreak", config="jailbreak_2023_12_25"
)

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
        source=_WILDJAILBREAK,
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
    Benchmark(
        name="rpsa_harmbench",
        printed="HB",
        kind="attack",
        scorer="judge",
        samples=1,
        size=200,
        tokens=800,
        source=_HARMBENCH,
        read=_harmbench_standard,
        group="rpsa_harm",
    ),
    Benchmark(
        name="rpsa_harmbench_contextual",
        printed="HB-ctx",
        kind="attack",
        scorer="judge",
        samples=1,
        size=100,
        tokens=800,
        source=replace(_HARMBENCH, config="contextual"),
        read=_harmbench_contextual,
        group="rpsa_harm",
    ),
    Benchmark(
        name="rpsa_harmbench_wrapped",
        printed="HB-jb",
        kind="attack",
        scorer="judge",
        samples=1,
        size=200,
        tokens=800,
        source=_HARMBENCH,
        read=_harmbench_wrapped,
        also=_JAILBREAKS,
        group="rpsa_harm",
    ),
    Benchmark(
        name="rpsa_jailbreakbench",
        printed="JBB",
        kind="attack",
        scorer="judge",
        samples=1,
        size=100,
        tokens=800,
        source=Source(_JBB, "harmfulbehaviors", config="behaviors", split="harmful"),
        read=_jailbreakbench,
        group="rpsa_harm",
    ),
    Benchmark(
        name="rpsa_sorrybench",
        printed="SORRY",
        kind="attack",
        scorer="judge",
        samples=1,
        size=440,
        tokens=800,
        source=Source("sorry-bench/sorry-bench-202503", "sorrybench", gated=True),
        read=_sorrybench,
        group="rpsa_harm",
    ),
    Benchmark(
        name="rpsa_jailbreakbench_benign",
        printed="JBB-b",
        kind="over_refusal",
        scorer="judge",
        samples=1,
        size=100,
        tokens=800,
        source=Source(_JBB, "benignbehaviors", config="behaviors", split="benign"),
        read=_jailbreakbench,
        group="rpsa_over_refusal",
    ),
    Benchmark(
        name="rpsa_wildjailbreak_benign",
        printed="WJ-b",
        kind="over_refusal",
        scorer="judge",
        samples=1,
        size=210,
        tokens=800,
        source=_WILDJAILBREAK,
        read=_wildjailbreak_benign,
        group="rpsa_over_refusal",
    ),
    Benchmark(
        name="rpsa_orbench_hard",
        printed="OR-hard",
        kind="over_refusal",
        scorer="judge",
        samples=1,
        size=1319,
        tokens=800,
        source=Source("bench-llm/or-bench", "orbenchhard", config="or-bench-hard-1k"),
        read=_prompts,
        group="rpsa_over_refusal",
    ),
    Benchmark(
        name="rpsa_falsereject",
        printed="FalseReject",
        kind="over_refusal",
        scorer="judge",
        samples=1,
        size=1187,
        tokens=800,
        source=Source(
            "AmazonScience/FalseReject", "falserejecttest", options={"data_files": {"test": "test.jsonl"}}
        ),
        read=_prompts,
        group="rpsa_over_refusal",
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _RECORDS}

TINY_PREFIX = "rpsa_tiny_"
TINY_SETS: tuple[str, ...] = (*FAMILIES, *REQUEST_SETS)
GROUPS: dict[str, tuple[str, ...]] = {
    **{
        group: tuple(benchmark.name for benchmark in _RECORDS if benchmark.group == group)
        for group in get_args(Group)
    },
    "rpsa_tiny": tuple(f"{TINY_PREFIX}{name}" for name in TINY_SETS),
}
