"""D_ref: reasoning problems and the model's own responses to them (section 3.1).

The responses are a sample from the model itself, so that squared gradients on them estimate its Fisher information;
wrong and truncated ones belong to that sample and are kept, flagged. Exact token ids are stored, because
retokenised text may differ from what the model emitted. One response to each problem is stored as it comes;
`ReferenceDataset` reads them, and has the batches that the Fisher and g_R see.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rpsa.artifacts import appending, atomic_write, read_json, reading, recover_lines, sha256_of, stable_json
from rpsa.chat import IGNORED_LABEL, read_thought, render_prompt
from rpsa.errors import RPSAError, check_type
from rpsa.generation import Completion, Generator, Sampling
from rpsa.prompts import PromptStyle, math_prompt, styled
from rpsa.rows import Row, draw, read_rows, text_field
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Problem:
    """`prompt` is the full user message; `answer` the gold answer, empty if unknown; `id` is unique."""

    id: str
    prompt: str
    answer: str
    family: str = ""


def load_problems(
    source: str | Path, n: int, seed: int, prompt_style: PromptStyle = "appendix_b"
) -> list[Problem]:
    """`n` problems drawn without replacement by `seed` from a file or a Hugging Face dataset (`id:split`).

    Rows have MATH-500's fields: `problem`, `answer`, `unique_id` (or `id`; else the row's number) and, if
    there, `subject` as the family; the user message is Appendix B's, to which `section_4` appends "Please
    think step by step.". A row with `prompt` in place of `problem` gives the user message as it is.

    Raises RPSAError if the source cannot be read, a field is missing, or it has fewer than `n` rows.
    """
    rows = read_rows(source, preferred_split="test")
    if n < 1 or n > len(rows):
        raise RPSAError(f"{source} has {len(rows)} problems: ask for 1 to {len(rows)}, not {n}")
    return [_problem(row, str(i), prompt_style) for i, row in draw(list(enumerate(rows)), n, seed)]


def load_held_out(
    source: str | Path, n: int, seed: int, held_out: int, prompt_style: PromptStyle = "appendix_b"
) -> list[Problem]:
    """`held_out` problems drawn by `seed` from those that `load_problems` leaves, or as many as there are.

    A problem that has the id or the prompt of another one comes once, and never if `load_problems` has drawn it.
    """
    drawn = load_problems(source, n, seed, prompt_style)
    ids, prompts = {problem.id for problem in drawn}, {problem.prompt for problem in drawn}
    left = []
    for number, row in enumerate(read_rows(source, preferred_split="test")):
        problem = _problem(row, str(number), prompt_style)
        if problem.id not in ids and problem.prompt not in prompts:
            left.append(problem)
            ids.add(problem.id)
            prompts.add(problem.prompt)
    return draw(left, min(held_out, len(left)), seed)


def _problem(row: Row, number: str, prompt_style: PromptStyle) -> Problem:
    if "problem" not in row.fields and "prompt" in row.fields:
        prompt = text_field(row, ["prompt"])
    else:
        prompt = styled(math_prompt(text_field(row, ["problem"])), prompt_style)
    identifier = next((row.fields[name] for name in ("unique_id", "id") if name in row.fields), number)
    return Problem(str(identifier), prompt, text_field(row, ["answer"]), str(row.fields.get("subject", "")))


def check_ids(problems: Sequence[Problem]) -> None:
    """Raises RPSAError if two problems share an id."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise RPSAError(f"two problems have the id {problem.id!r}: ids must be unique")
        seen.add(problem.id)


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """One problem's prompt and the model's response, as token ids; `correct` is None without a gold answer.

    `finish_reason` is "stop" (EOS, which `response_ids` include) or "length" (truncated).
    """

    problem_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    text: str
    finish_reason: str
    correct: bool | None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def labelled(self, max_length: int | None) -> tuple[list[int], list[int]]:
        """Its first `max_length` token ids (None: all), and their labels: the response's, -100 on the prompt."""
        ids = [*self.prompt_ids, *self.response_ids][:max_length]
        return ids, [IGNORED_LABEL] * len(self.prompt_ids) + ids[len(self.prompt_ids) :]


class ReferenceDataset:
    """D_ref: `traces` in the order of the problems, and a `manifest` of how they came about."""

    def __init__(self, traces: Sequence[Trace], manifest: Mapping[str, Any] | None = None) -> None:
        for number, trace in enumerate(traces):
            check_type(f"trace {number}", trace, Trace, "a Trace")
        if not traces:
            raise RPSAError("D_ref has no traces: every response was empty or filtered out")
        self.traces = list(traces)
        self.manifest = dict(manifest or {})
        self._reported: set[int] = set()

    @classmethod
    def load(cls, path_dir: str | Path) -> "ReferenceDataset":
        """Read what `build_reference` wrote. Raises RPSAError if it is missing or unfinished."""
        check_type("path_dir", path_dir, str | Path, "the folder of a D_ref")
        folder = Path(path_dir)
        if not (folder / "manifest.json").is_file() or not (folder / "traces.jsonl").is_file():
            raise RPSAError(f"{folder} holds no finished D_ref (traces.jsonl, manifest.json): build it first")
        traces = [trace_of(row) for row in read_rows(folder / "traces.jsonl")]
        with reading(f"D_ref {folder}"):
            return cls(traces, read_json(folder / "manifest.json"))

    def batches(self, batch_size: int, max_length: int | None) -> Iterator[dict[str, Any]]:
        """Every trace once, sorted by length, for `rpsa.fisher.estimators.estimate_fisher`.

        `max_length` (tokens, prompt included) keeps the beginning; what it cuts is logged, and a trace whose
        prompt fills it is left out. Each batch holds `input_ids`, `attention_mask` and `labels` (B, T) int64,
        right-padded, labels unshifted with -100 on prompt and padding, and `sample_ids`, the problem ids.
        """
        check_type("batch_size", batch_size, int, "a whole number")
        if batch_size < 1:
            raise RPSAError(f"batch_size is {batch_size}: give 1 or more")
        traces = sorted(
            self._usable(max_length), key=lambda trace: min(trace.length, max_length or trace.length)
        )
        for start in range(0, len(traces), batch_size):
            yield self._collate(traces[start : start + batch_size], max_length)

    def rotating_batch(self, step: int, size: int, max_length: int | None) -> dict[str, Any]:
        """The batch of g_R at measurement `step` (0, 1, 2, ...): the next `size` traces, wrapping round.

        A function of its arguments alone, so that a resumed run and every rank see the same batch. Form as in
        `batches`. Count measurements, not optimizer steps: with multiples of 25 some traces may never come.
        """
        traces = self._usable(max_length)
        window = [traces[(step * size + i) % len(traces)] for i in range(size)]
        return self._collate(window, max_length)

    def _usable(self, max_length: int | None) -> list[Trace]:
        """Traces with a response token left under `max_length`; logs once what that cuts."""
        if max_length is None:
            return self.traces
        check_type("max_length", max_length, int, "a whole number of tokens, or None")
        usable = [trace for trace in self.traces if len(trace.prompt_ids) < max_length]
        if max_length not in self._reported:
            self._reported.add(max_length)
            self._report_cut(max_length, len(self.traces) - len(usable))
        if not usable:
            raise RPSAError(
                f"reference max_length {max_length} leaves no response token of any trace: raise it"
            )
        return usable

    def _report_cut(self, max_length: int, dropped: int) -> None:
        cut = [trace.length - max_length for trace in self.traces if trace.length > max_length]
        if cut:
            log.warning(
                "reference max_length %d cuts %d of %d traces (%d of %d tokens); %d traces left out",
                max_length, len(cut), len(self.traces), sum(cut), sum(t.length for t in self.traces), dropped,
            )  # fmt: skip

    def _collate(self, traces: list[Trace], max_length: int | None) -> dict[str, Any]:
        ids, labels = zip(*(trace.labelled(max_length) for trace in traces), strict=True)
        batch = collated(ids, labels, self.manifest.get("pad_token_id") or 0)
        return batch | {"sample_ids": [trace.problem_id for trace in traces]}


def trace_of(row: Row) -> Trace:
    """A stored trace. Raises RPSAError, naming the row, if it is none."""
    try:
        trace = Trace(**row.fields)
    except TypeError as error:
        raise RPSAError(
            f"{row.where} is not a trace ({error}): delete the file and build D_ref again"
        ) from error
    for name in ("prompt_ids", "response_ids"):
        ids = getattr(trace, name)
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise RPSAError(f"{row.where} is not a trace: its {name} are not token ids; build D_ref again")
    return trace


def collated(ids: Sequence[list[int]], labels: Sequence[list[int]], pad: int = 0) -> dict[str, Any]:
    """`input_ids`, `attention_mask` and `labels` (B, T) int64 of some rows, right-padded; -100 on padding."""
    return {
        "input_ids": _right_padded(ids, pad),
        "attention_mask": _right_padded([[1] * len(row) for row in ids], 0),
        "labels": _right_padded(labels, IGNORED_LABEL),
    }


def _right_padded(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


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
        "graded": sum(trace.correct is not None for trace in kept),
        "correct": sum(trace.correct is True for trace in kept),
        "truncated": sum(trace.finish_reason == "length" for trace in kept),
        "dropped_empty": sum(not trace.text for trace in traces),
        "dropped_wrong": sum(bool(trace.text) for trace in traces) - len(kept),
        "response_tokens": sum(len(trace.response_ids) for trace in kept),
    }
    return ReferenceDataset(kept, manifest)


__all__ = [
    "Problem",
    "ReferenceConfig",
    "ReferenceDataset",
    "Trace",
    "build_reference",
    "load_held_out",
    "load_problems",
]
