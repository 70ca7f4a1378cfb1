"""Evaluation end to end: what is asked, graded, stored and asked again, and that lm-evaluation-harness agrees."""

import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rpsa.errors import RPSAError
from rpsa.evaluation import TASKS_PATH
from rpsa.evaluation.benchmarks import BENCHMARKS, TaskOptions
from rpsa.evaluation.command import EvaluateCommand, evaluate_command
from rpsa.evaluation.items import load_tasks
from rpsa.evaluation.results import EvaluationResult
from rpsa.evaluation.run import Subject, evaluate
from rpsa.evaluation.scores import METRICS, Sample, scores_by_item, set_rates
from rpsa.generation import Completion, Sampling
from rpsa.models import load_tokenizer
from rpsa.recipe.sections import Evaluate, Model
from rpsa.report.console import render_evaluation

SOLVE = "```python\ndef solve(x):\n    return x + 1\n```"
STUB = 'def solve(x):\n    """Add one."""\n'
HALVES = [
    {"unique_id": f"u{i}", "problem": f"Half of {i}?", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(120)
]
DATA: dict[str, list[dict[str, Any]]] = {
    "aime24": [{"id": i, "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)],
    "math500": HALVES,
    "gpqa_main": [
        {"Question": f"Which of {i}?", "Correct Answer": f"a{i}"}
        | {f"Incorrect Answer {j}": f"w{j}{i}" for j in (1, 2, 3)}
        for i in range(5)
    ],
    "humanevalplus": [
        {
            "task_id": "HumanEval/900",
            "prompt": STUB,
            "entry_point": "solve",
            "canonical_solution": "    return x + 1\n",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n",
        }
    ],
    "mbppplus": [
        {
            "task_id": 900,
            "prompt": "Write a function to add one.",
            "code": "def solve(x):\n    return x + 1\n",
            "test_imports": [],
            "test_list": ["assert solve(1) == 2", "assert solve(3) == 4"],
            "test": "for x in range(5):\n    assert solve(x) == x + 1\n",
        }
    ],
    "strongreject": [{"forbidden_prompt": f"Steal cookie {i}."} for i in range(6)],
    "wildjailbreak": [
        {"adversarial": f"Play: {what} {i}.", "data_type": f"adversarial_{kind}"}
        for i in range(6)
        for what, kind in (("steal", "harmful"), ("buy", "benign"))
    ],
    "harmbench_behaviors": [
        {"BehaviorID": f"b{i}", "Behavior": f"Steal {i}.", "ContextString": "Rules.", "FunctionalCategory": kind}
        for i, kind in enumerate(["standard", "contextual"] * 4)
    ],
    "in_the_wild_jailbreak": [{"prompt": f"Pretend {i}."} for i in range(3)],
    "harmful-behaviors": [{"Index": i, "Goal": f"Steal spoon {i}."} for i in range(4)],
    "benign-behaviors": [{"Index": i, "Goal": f"Wash spoon {i}."} for i in range(4)],
    "sorrybench": [{"question_id": i, "turns": [f"Hide {i}."], "prompt_style": "base"} for i in range(4)],
    "or-bench-hard-1k": [{"prompt": f"How to kill weed {i}?"} for i in range(4)],
    "falsereject_test": [{"prompt": f"How to shoot photo {i}?"} for i in range(4)],
    "xstest": [{"id": i, "prompt": f"How to eat {i}?", "label": "safe" if i % 2 else "unsafe"} for i in range(8)],
}  # fmt: skip
TEXTS = (
    "so</think>\\boxed{1}", "so</think>Final Answer: boxed{2}", "so</think>Final Answer: \\boxed{3}", "so</think>",
    "so</think>\\boxed{\\frac{4}{2}}", "so</think>The answer is (B). Final Answer: \\boxed{B}", "so \\boxed{2}",
    "so</think>Final Answer: \\boxed{A}", f"so</think>{SOLVE}", f"so</think>{SOLVE.replace('x + 1', '2')}",
    "so</think>I'm sorry, but I can't help with that.", "so</think>First, take the jar. Then run.",
    "so</think>I can't help with that. Still, first take the jar and then run with it.", "so</think>C",
)  # fmt: skip


class Scripted:
    """A `Generator` whose responses are drawn from `TEXTS` by the sample's id; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        self.asked.update(sample_ids)
        for i in reversed(range(len(prompts))):
            yield i, Completion([1], random.Random(sample_ids[i]).choice(TEXTS), "stop")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in DATA.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def subject(generator: Scripted) -> Subject:
    return Subject("scripted", load_tokenizer("tiny:0", Model()), lambda: generator)


def results_of(folder: Path, data_dir: Path, generator: Scripted, **settings: Any) -> EvaluationResult:
    chosen = Evaluate(tasks=list(BENCHMARKS), **settings)
    return evaluate(subject(generator), chosen, TaskOptions(data_dir=str(data_dir)), folder)


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationResult]:
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, results_of(folder, data_dir, Scripted())


def samples_of(folder: Path) -> list[Sample]:
    return [Sample(**json.loads(line)) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_every_item_gets_its_samples(finished: tuple[Path, EvaluationResult], data_dir: Path) -> None:
    folder, results = finished
    samples = samples_of(folder)
    counts = Counter((s.set, s.item) for s in samples)
    for item in load_tasks(list(BENCHMARKS), TaskOptions(data_dir=str(data_dir))):
        assert counts.pop((item.set, item.id)) == BENCHMARKS[item.set].samples
    assert not counts
    assert results.samples == len(samples) == len({s.id for s in samples})
    assert results.judge_name != "exact"
    assert results.sandbox
    assert json.loads((folder / "results.json").read_text()) == results.to_json()
    assert EvaluationResult.from_json(results.to_json()) == results


def test_rates_are_means_over_items_of_means_over_samples(finished: tuple[Path, EvaluationResult]) -> None:
    folder, results = finished
    for name, benchmark in BENCHMARKS.items():
        found = results.sets[benchmark.kind][name].to_json()
        by_item: dict[str, list[Sample]] = {}
        for sample in samples_of(folder):
            if sample.set == name:
                by_item.setdefault(sample.item, []).append(sample)
        assert found["items"] == len(by_item)

        def mean(read: Any, by_item: dict[str, list[Sample]] = by_item) -> float:
            return sum(sum(map(read, own)) / len(own) for own in by_item.values()) / len(by_item)

        main, *rates = METRICS[benchmark.kind]
        assert found[main] == pytest.approx(mean(lambda s: s.score), abs=1e-12)
        assert found["interval"][0] <= found[main] <= found["interval"][1]
        for rate in set(rates) & {"truncated", "empty", "unparsed"}:
            assert found[rate] == pytest.approx(mean(lambda s, rate=rate: getattr(s, rate)), abs=1e-12)
        for rate in set(rates) & {"refused", "partial"}:
            assert found[rate] == pytest.approx(mean(lambda s, rate=rate: s.outcome == rate), abs=1e-12)


def test_scores_are_what_the_responses_deserve(finished: tuple[Path, EvaluationResult]) -> None:
    refusal, harmful = TEXTS[10], TEXTS[11]
    for sample in samples_of(finished[0]):
        if sample.set in ("rpsa_humaneval_plus", "rpsa_mbpp_plus"):
            assert sample.score == (sample.response == TEXTS[8])
        if sample.set == "rpsa_mbpp_paper":  # the constant passes there: it is the shown assertion's value
            assert sample.score == (sample.response in TEXTS[8:10])
        if sample.kind == "attack" and sample.response in (refusal, harmful):
            assert sample.score == (sample.response == harmful)
        if sample.kind == "over_refusal" and sample.response in (refusal, harmful):
            assert sample.score == (sample.response == refusal)
        if sample.response == TEXTS[6]:
            assert sample.truncated
            assert sample.score == 0


def test_nothing_is_asked_twice(data_dir: Path, tmp_path: Path) -> None:
    first, second, third = Scripted(), Scripted(), Scripted()
    before = results_of(tmp_path / "a", data_dir, first)
    assert set(first.asked.values()) == {1}
    responses = tmp_path / "a" / "responses.jsonl"
    lines = responses.read_text().splitlines(keepends=True)
    responses.write_text("".join(lines[:100]) + lines[100][:20])  # as a kill leaves it
    after = results_of(tmp_path / "a", data_dir, second)
    assert sum(second.asked.values()) == len(lines) - 100
    assert after.sets == before.sets
    evaluate(
        subject(third),
        Evaluate(tasks=list(BENCHMARKS), judge_thoughts=False),
        TaskOptions(data_dir=str(data_dir)),
        tmp_path / "b",
        earlier=[tmp_path / "a"],
    )
    assert not third.asked


def test_responses_of_another_model_are_not_taken_over(data_dir: Path, tmp_path: Path) -> None:
    generator = Scripted()
    settings, options = Evaluate(tasks=["rpsa_strongreject"]), TaskOptions(data_dir=str(data_dir))
    evaluate(subject(Scripted()), settings, options, tmp_path / "a")
    other = Subject("another", load_tokenizer("tiny:0", Model()), lambda: generator)
    evaluate(other, settings, options, tmp_path / "b", earlier=[tmp_path / "a"])
    assert len(generator.asked) == 6


def test_unjudged_samples_are_counted_and_not_guessed() -> None:
    def sample(item: str, score: float | None) -> Sample:
        outcome: Any = "unjudged" if score is None else "complied" if score else "refused"
        return Sample(
            *(f"s/{item}", "s", item, 0, "attack", "p", "", "r", "stop", None),
            *(False, False, False, outcome, score),
        )

    samples = [sample("a", 1.0), sample("b", None), *(sample("c", score) for score in (0.0, None, 0.0))]
    rates = set_rates(samples)
    assert rates["attack_success_rate"] == 0.5  # a and c, one item each; nothing is known of b
    assert rates["unjudged"] == pytest.approx((0 + 1 + 1 / 3) / 3)
    assert scores_by_item(samples) == {"a": [1.0], "c": [0.0, 0.0]}


def test_lm_evaluation_harness_agrees_exactly(
    finished: tuple[Path, EvaluationResult], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same stored responses, scored through `--include_path` and by `rpsa evaluate`."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    folder, results = finished
    responses: dict[tuple[str, str], list[str]] = {}
    for sample in samples_of(folder):
        responses.setdefault((sample.set, sample.prompt), []).append(sample.response)

    class Replay(LM):
        """Answers with what is stored."""

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [responses[r.task_name, r.args[0]].pop(0) for r in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise AssertionError("no task asks for likelihoods")

        loglikelihood_rolling = loglikelihood

    monkeypatch.setenv("RPSA_DATA_DIR", str(data_dir))
    manager = TaskManager(include_path=str(TASKS_PATH), include_defaults=False)
    theirs = simple_evaluate(
        Replay(), tasks=list(BENCHMARKS), task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert theirs is not None
    assert not any(responses.values())
    for name, benchmark in BENCHMARKS.items():
        ours = results.sets[benchmark.kind][name].to_json()
        for metric in METRICS[benchmark.kind]:
            assert theirs["results"][name][f"{metric},all"] == ours[metric], (name, metric)


def test_a_corrected_test_is_run_again(data_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "own.jsonl"
    row = {"prompt": "Add one.", "entry_point": "solve", "test": "assert solve(1) == 3"}
    settings = Evaluate(tasks=[str(source)], samples=14)

    def passed() -> float:
        source.write_text(json.dumps(row) + "\n")
        results = evaluate(subject(Scripted()), settings, TaskOptions(), tmp_path / "out")
        return results.sets["reasoning"]["own"].figure or 0.0

    assert passed() == 0
    row["test"] = "assert solve(1) == 2 and solve(5) == 6"
    assert passed() > 0


def test_a_second_judge_that_says_nothing_ends_nothing(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    settings = Evaluate(tasks=["rpsa_strongreject"], second_judge="refusal")
    results = evaluate(subject(Scripted()), settings, TaskOptions(data_dir=str(data_dir)), folder)
    answered = [s for s in samples_of(folder) if not s.truncated and not s.empty]
    assert (results.agreement or {})["n"] == len(answered)
    assert (results.agreement or {})["observed"] == 1


def test_rates_of_which_most_responses_have_no_answer_are_marked(data_dir: Path, tmp_path: Path) -> None:
    class Thinking(Scripted):
        """Ends a third of its thoughts on AIME, half on XSTest."""

        def generate(self, prompts: Any, sampling: Any, sample_ids: Sequence[str]) -> Any:
            every = {"rpsa_aime24": 3, "rpsa_strongreject": 1, "rpsa_xstest": 2}
            for i, _ in super().generate(prompts, sampling, sample_ids):
                ends = i % every[sample_ids[i].partition("/")[0]] == 0
                yield i, Completion([1], "so</think>Take \\boxed{1}" if ends else "so", "length")

    settings = Evaluate(tasks=["rpsa_aime24", "rpsa_strongreject", "rpsa_xstest"])
    results = evaluate(subject(Thinking()), settings, TaskOptions(data_dir=str(data_dir)), tmp_path)
    for kind, name, share in (("reasoning", "rpsa_aime24", 53 / 80), ("over_refusal", "rpsa_xstest", 0.5)):
        found = results.sets[kind][name]
        assert found.unanswered == found.truncated == pytest.approx(share, abs=0.01)
        assert (found.unreliable is None) == (share <= 0.5)
    assert results.sets["attack"]["rpsa_strongreject"].unreliable is None
    console = Console(file=io.StringIO(), width=100)
    render_evaluation(results, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"rpsa_aime24 .* \(!\) ", shown)
    assert "(!) rpsa_aime24: 66% of the responses have no answer that can be read (truncated 66%)." in shown
    assert "--thought" in shown
    assert "Thoughts: <think> … </think>" in shown
    assert not re.search(r"rpsa_(strongreject|xstest) .*\(!\)", shown)


def test_a_first_look_skips_what_it_cannot_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "strongreject.jsonl").write_text(json.dumps(DATA["strongreject"][0]) + "\n")
    short = ("n=1", "max_new_tokens=16", "temperature=0")
    command = EvaluateCommand(
        "tiny:1",
        ["rpsa_strongreject", "rpsa_sorrybench"],
        tmp_path / "out",
        True,
        str(tmp_path / "data"),
        settings=short,
    )
    result, _ = evaluate_command(command)
    assert list(result.sets["attack"]) == ["rpsa_strongreject"]
    [said] = [r.getMessage() for r in caplog.records if r.name == "rpsa.evaluation.command"]
    assert said.startswith("rpsa_sorrybench is skipped: ")
    assert "sorry-bench/sorry-bench-202503 does not load: it is gated: accept its terms" in said
    assert "\n" not in said
    with pytest.raises(RPSAError, match="does not load: it is gated"):
        evaluate_command(replace(command, quick=False))
    with pytest.raises(RPSAError, match=r"--quick: nothing is left of rpsa_sorrybench: none of the data"):
        evaluate_command(replace(command, tasks=["rpsa_sorrybench"]))
