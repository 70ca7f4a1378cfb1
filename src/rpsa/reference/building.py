"""How D_ref is made: one response of the model's own to each problem, stored as it comes."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import appending, atomic_write, recover_lines, sha256_of, stable_json
from rpsa.chat import read_thought, render_prompt
from rpsa.generation import Completion, Generator, Sampling
from rpsa.reference.dataset import ReferenceDataset, Trace, trace_of
from rpsa.reference.problems import Problem, check_ids
from rpsa.rows import Row
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceConfig:
    """What D_ref is: `problems` and `seed` choose the problems (`load_problems`), the rest the responses."""

    problems: int = 100
    seed: int = 42
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32768
    only_correct: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_new_tokens, self.seed)


def build_reference(
    generator: Generator,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    config: ReferenceConfig,
    out_dir: str | Path,
    grade: Callable[[str, str], bool],
    identity: str = "",
    on_trace: Callable[[Trace], None] | None = None,
    thought: ThoughtFormat | None = None,
) -> ReferenceDataset:
    """Sample one response to each problem and store it in `out_dir` (`traces.jsonl`, `manifest.json`).

    Stopped at any point, it goes on where it was: every finished trace is on disk at once, in a partial file
    that belongs to these problems, this sampling and this `identity` (of the model: a path, a fingerprint).
    The two files appear whole, `manifest.json` last; where they are there already for the same request, they
    are loaded. `grade(response text, gold answer)` says what is correct; `on_trace` hears of each trace,
    those of the partial file first (for a progress bar). `thought` is the model's format, as for
    `rpsa.chat.render_prompt`. Traces with an empty response are dropped with a log line, and with `only_correct`
    wrong ones too; the manifest counts them.

    Raises RPSAError if two problems share an id, if no trace is left, or if the partial file is damaged.
    """
    check_ids(problems)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    thought = thought or read_thought(tokenizer)
    prompts = [render_prompt(tokenizer, problem.prompt, thought) for problem in problems]
    key = _key(problems, prompts, config, [identity, thought.to_json()])
    if _is_finished(folder, key, config):
        return ReferenceDataset.load(folder)
    partial = folder / f"traces.{key[:12]}.partial.jsonl"
    recovered = recover_lines(partial)
    traces_so_far = [
        trace_of(Row(f"{partial} line {n}", fields)) for n, fields in enumerate(recovered, start=1)
    ]
    done = {trace.problem_id: trace for trace in traces_so_far}
    for trace in done.values():
        if on_trace:
            on_trace(trace)
    missing = [i for i, problem in enumerate(problems) if problem.id not in done]
    completions = generator.generate(
        [prompts[i] for i in missing], config.sampling, [problems[i].id for i in missing]
    )
    with appending(partial) as append:
        for index, completion in completions:
            problem, prompt_ids = problems[missing[index]], prompts[missing[index]]
            trace = _new_trace(problem, prompt_ids, completion, grade)
            append(asdict(trace))
            done[problem.id] = trace
            if on_trace:
                on_trace(trace)
    traces = [done[problem.id] for problem in problems]
    origin = {"key": key, "identity": identity, "pad_token_id": tokenizer.pad_token_id}
    dataset = _finished(traces, config, origin | {"thought": thought.to_json()})
    dataset.manifest["problems_sha256"] = sha256_of([asdict(problem) for problem in problems])
    (folder / "manifest.json").unlink(missing_ok=True)  # an older one must not vouch for these traces
    atomic_write(folder / "traces.jsonl", "".join(json.dumps(asdict(t)) + "\n" for t in dataset.traces))
    atomic_write(folder / "manifest.json", stable_json(dataset.manifest))
    partial.unlink()
    return dataset


def _key(
    problems: Sequence[Problem], prompts: list[list[int]], config: ReferenceConfig, identity: Any
) -> str:
    return sha256_of([[asdict(problem) for problem in problems], prompts, asdict(config.sampling), identity])


def _is_finished(folder: Path, key: str, config: ReferenceConfig) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return bool(manifest["key"] == key and manifest["config"] == asdict(config))


def _new_trace(
    problem: Problem, prompt_ids: list[int], completion: Completion, grade: Callable[[str, str], bool]
) -> Trace:
    correct = grade(completion.text, problem.answer) if problem.answer else None
    return Trace(
        problem.id, prompt_ids, completion.token_ids, completion.text, completion.finish_reason, correct
    )


def _finished(traces: list[Trace], config: ReferenceConfig, origin: dict[str, Any]) -> ReferenceDataset:
    kept = []
    for trace in traces:
        if not trace.text:
            log.warning("D_ref: the response to %s is empty; dropped", trace.problem_id)
        elif not config.only_correct or trace.correct:
            kept.append(trace)
    manifest = {
        **origin,
        "config": asdict(config),
        "problems": len(traces),
        "traces": len(kept),
        "correct": sum(trace.correct is True for trace in kept),
        "truncated": sum(trace.finish_reason == "length" for trace in kept),
        "dropped_empty": sum(not trace.text for trace in traces),
        "dropped_wrong": sum(bool(trace.text) for trace in traces) - len(kept),
        "response_tokens": sum(len(trace.response_ids) for trace in kept),
    }
    return ReferenceDataset(kept, manifest)
