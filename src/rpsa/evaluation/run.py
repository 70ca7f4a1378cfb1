"""Evaluation: from a subject (a folder, a hub id, an adapter, a shipped base, a server) to `results.json`.

Each step goes on where it was stopped.

The forms of a sample, from a row to a number:

1. `Row` (`rpsa.rows`): what a file or a dataset on the hub holds.
2. `Item` (`benchmarks`): prompt, gold answer, scorer; with its `CodeProblem` where a program is to be written.
3. `Completion` (`rpsa.generation`): what the model wrote to the rendered prompt; a line of `responses.jsonl`.
4. `Response` (`scores`): item and completion, and what is read in it.
5. `Sample` (`scores`): a response with its score, and the judgement or verdict that this rests on; a line of
   `samples.jsonl`, and the same record there.
6. The rates of a set (`results.results_by_set`): its entry in `results.json`.
"""

import contextlib
import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import (
    appending,
    atomic_directory,
    atomic_write,
    read_json,
    reading_records,
    recover_lines,
    sha256_of,
    stable_json,
)
from rpsa.chat import read_thought, render_prompt
from rpsa.checkpoints import load_adapter
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import BENCHMARKS, Item, TaskOptions
from rpsa.evaluation.grading import Graders, graded
from rpsa.evaluation.items import load_tasks
from rpsa.evaluation.judges import (
    NO_ANSWER,
    CachedJudge,
    Judge,
    Judgement,
    can_see,
    check_judge,
    judge_model,
    judge_responses,
    judges_agree,
    make_judge,
)
from rpsa.evaluation.judges.classifiers import check_access
from rpsa.evaluation.original import HeldOut, measured_loss
from rpsa.evaluation.results import EvaluationResult, results_by_set
from rpsa.evaluation.scores import Response, Sample
from rpsa.generation import Completion, Generator, ResponseDecoder, Sampling, sample_id
from rpsa.generation.backends import BackendConfig, choose_backend, has_gpu, make_generator
from rpsa.generation.resumable import carry_over, generate_resumable, in_order
from rpsa.models import (
    free_memory,
    generating_backend,
    generation_dtype,
    identity,
    is_trained_in_4_bits,
    load_model,
    load_tokenizer,
    location,
    thought_of,
    vllm_engine,
)
from rpsa.progress import Progress
from rpsa.provenance import MADE_BY, RESPONDING, TIMING, MadeBy, sources, versions
from rpsa.recipe.problems import source_problem
from rpsa.recipe.sections import Evaluate, Model, Reference
from rpsa.thought import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rpsa.evaluation.sandbox import Sandbox

log = logging.getLogger(__name__)

RESPONSES = "responses.jsonl"
SAMPLES = "samples.jsonl"
RESULTS = "results.json"
JUDGEMENTS = "judgements"
REFUSAL = "refusal"
"""The judge that is always there."""


def check_graders(settings: Evaluate, items: Sequence[Item]) -> None:
    """Raises RPSAError if there is no such judge, setting or model of it, or programs have no sandbox."""
    judged = {item.kind for item in items if item.scorer == "judge"}
    judges = [("attack", settings.judge, settings.judge_settings)]
    judges.append(("over_refusal", settings.refusal_judge, settings.refusal_judge_settings))
    if settings.second_judge:
        judges.append(("attack", settings.second_judge, settings.second_judge_settings))
    if settings.thought_judge:
        if "thought" not in can_see(settings.thought_judge):
            raise RPSAError(
                f"evaluate.thought_judge: {settings.thought_judge} judges answers, not thoughts; take another"
            )
        judges.append(("attack", settings.thought_judge, settings.thought_judge_settings))
    for kind, name, given in judges:
        check_judge(name, given)
        model = judge_model(name, given)
        if model is not None and kind in judged:
            check_access(model, given.get("revision"))
    sandbox_for(items, settings)


def sandbox_for(items: Sequence[Item], settings: Evaluate) -> "Sandbox | None":
    """None where no item has a program to run."""
    if not any(item.scorer == "code" for item in items):
        return None
    from rpsa.evaluation.sandbox import best_sandbox

    return best_sandbox(accept_unsandboxed=settings.accept_unsandboxed)


def make_graders(settings: Evaluate, items: Sequence[Item], folder: Path) -> Graders:
    """A judge's model is loaded here, after the model under test is gone, and only if there is something to judge."""
    judged = {item.kind for item in items if item.scorer == "judge"}
    name, given = (settings.judge, settings.judge_settings) if "attack" in judged else (REFUSAL, {})
    refusal, own = (
        (settings.refusal_judge, settings.refusal_judge_settings)
        if "over_refusal" in judged
        else (REFUSAL, {})
    )
    judge, thought_judge = stored_judge(name, given, folder), None
    if "attack" in judged and no_thought_judge(settings) is None:
        of_thoughts = settings.thought_judge
        thought_judge = (
            stored_judge(of_thoughts, settings.thought_judge_settings, folder) if of_thoughts else judge
        )
    return Graders(judge, stored_judge(refusal, own, folder), thought_judge, sandbox_for(items, settings))


def no_thought_judge(settings: Evaluate) -> str | None:
    """Why no judge judges thoughts; None where one does."""
    if not settings.judge_thoughts:
        return "evaluate.judge_thoughts is false"
    name = settings.thought_judge or settings.judge
    if "thought" not in can_see(name):
        return f"the judge {name} judges answers, not thoughts; set evaluate.thought_judge to one that can"
    return None


def no_thought_verdicts(settings: Evaluate, items: Sequence[Item], thought: ThoughtFormat) -> str | None:
    """Why it is not known of some attacks whether the thought is safe; None where it is, or there are no attacks."""
    scorers = {item.scorer for item in items if item.kind == "attack"}
    if scorers and not thought.has_thoughts:
        return "the model has no thoughts"
    return no_thought_judge(settings) if "judge" in scorers else None


def stored_judge(name: str, settings: Mapping[str, Any], folder: Path) -> Judge:
    """A judge by name, whose judgements are kept in `folder`."""
    judge = make_judge(name, **settings)
    return judge if name == REFUSAL else CachedJudge(judge, folder / JUDGEMENTS / _code())


def carry_judgements_over(earlier: Sequence[Path], folder: Path) -> None:
    """Start a folder with the judgements of the first of `earlier` folders that has some of this code's."""
    own = folder / JUDGEMENTS / _code()
    stored = next((path for one in earlier if (path := one / JUDGEMENTS / _code()).is_dir()), None)
    if stored is not None and not own.exists():
        with atomic_directory(own, "identity.json") as new:
            shutil.copytree(stored, new, dirs_exist_ok=True)


def _code() -> str:
    """What reads a verdict out of what a judge says: judgements of other code are not taken for this one's."""
    return sources(MadeBy((), ("evaluation/judges",)))["evaluation/judges"]


def agreement(
    samples: Sequence[Sample], settings: Evaluate, folder: Path, thought: ThoughtFormat
) -> dict[str, Any] | None:
    """How far a second judge agrees with the first on what was judged of the answers to attacks."""
    judged = [
        sample
        for sample in samples
        if sample.kind == "attack" and sample.details.get("answer", {}).get("label", NO_ANSWER) != NO_ANSWER
    ]
    if settings.second_judge is None or not judged:
        return None
    second = stored_judge(settings.second_judge, settings.second_judge_settings, folder)
    found = dict(judge_responses(second, [(s.prompt, s.response) for s in judged], "answer", thought))
    first = [Judgement(**sample.details["answer"]) for sample in judged]
    other = [found[i] for i in range(len(judged))]
    if all(None in (a.score, b.score) for a, b in zip(first, other, strict=True)):
        return {"judge": dict(second.identity), "kappa": None, "n": 0, "left_out": len(judged)}
    return {"judge": dict(second.identity), **asdict(judges_agree(first, other))}


@dataclass(frozen=True)
class Subject:
    """The model under test.

    `identity` is what tells it from others; `make_generator` is called when a response is missing; `thought` None is
    as the chat template says. `load` loads the model itself, as it is where it generates, and is None where nobody here
    can. `rephrase` is how an attack asks (`rpsa.evaluation.robustness`); None: each item as it is.
    """

    identity: str
    tokenizer: "PreTrainedTokenizerBase"
    make_generator: Callable[[], Generator]
    thought: ThoughtFormat | None = None
    load: Callable[[], "PreTrainedModel"] | None = None
    rephrase: "Callable[[Questions], Questions] | None" = None


def evaluate(
    subject: Subject,
    settings: Evaluate,
    options: TaskOptions,
    folder: Path,
    progress: Progress | None = None,
    earlier: Sequence[Path] = (),
    held_out: HeldOut | None = None,
) -> EvaluationResult:
    """Fill `folder` with `responses.jsonl`, `samples.jsonl` and `results.json`; returns the last.

    With `held_out` the reasoning loss is measured, too.

    Responses that are stored there, or in the folders of `earlier` evaluations, are not asked for again: another
    judge costs no generation. Nor are judgements. Without `progress` a bar shows how long generation may take.

    Raises:
        RPSAError: a task cannot be loaded, the backend or the judge fails for good, or there is no sandbox.
    """
    started = time.perf_counter()
    items = check_evaluation(settings, options)
    wanted = questions(items, settings, subject.tokenizer, subject.thought)
    if subject.rephrase is not None:
        wanted = subject.rephrase(wanted)
    responses = _ask(subject, wanted, folder / RESPONSES, progress, earlier)
    free_memory()
    loss = measured_loss(subject.load, held_out)
    free_memory()  # the judge's model needs the GPU
    carry_judgements_over(earlier, folder)
    graders = make_graders(settings, items, folder)
    samples = _grade(responses, graders, folder, progress)
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    atomic_write(folder / SAMPLES, "".join(lines))
    result = EvaluationResult(
        sets=results_by_set(samples),
        samples=len(samples),
        model=subject.identity,
        thought=wanted.thought,
        settings=settings.model_dump(exclude={"batch_size"}),
        data_sha256=_data_hashes(items),
        judge=graders.judge.identity if any(item.scorer == "judge" for item in items) else "exact",
        refusal_judge=graders.refusal_judge.identity,
        thought_judge=_thought_judge(graders, items, wanted.thought),
        no_thought_verdicts=no_thought_verdicts(settings, items, wanted.thought),
        agreement=agreement(samples, settings, folder, wanted.thought),
        sandbox=str(graders.sandbox) if graders.sandbox else None,
        versions=versions(MADE_BY["evaluate"]),
        reasoning_loss=loss,
    )
    if result.no_thought_verdicts:
        log.info("Thoughts were not judged: %s", result.no_thought_verdicts)
    atomic_write(folder / RESULTS, stable_json(result.to_json()))
    atomic_write(folder / TIMING, stable_json({"seconds": time.perf_counter() - started}))
    return result


def _thought_judge(
    graders: Graders, items: Sequence[Item], thought: ThoughtFormat
) -> Mapping[str, Any] | str | None:
    attacks = {item.scorer for item in items if item.kind == "attack"}
    if not attacks or not thought.has_thoughts:
        return None
    if "judge" not in attacks:
        return "exact"
    return graders.thought_judge.identity if graders.thought_judge else None


def samples_of(item: Item, settings: Evaluate) -> int:
    """How many responses an item gets: greedy ones are all alike, so that one is enough."""
    if settings.temperature == 0:
        return 1
    if settings.samples is not None:
        return settings.samples
    return BENCHMARKS[item.set].samples if item.set in BENCHMARKS else 1


def check_evaluation(settings: Evaluate, options: TaskOptions) -> list[Item]:
    """The items, once all that can be known before hours of generation is in order.

    Raises:
        RPSAError: a task cannot be loaded, there is no such judge or setting of it, or programs have no sandbox.
    """
    items = load_tasks(settings.tasks, options)
    check_graders(settings, items)
    return items


@dataclass(frozen=True)
class Questions:
    """What a model is asked: for each response its item and number, its prompt as token ids, and its id.

    Where a prompt ends with the beginning of the response, `begun` has the number of its tokens, by position, and
    `decoder` reads them: they are part of the response.
    """

    asked: Sequence[tuple[Item, int]]
    prompts: Sequence[list[int]]
    ids: Sequence[str]
    sampling: Sampling
    thought: ThoughtFormat
    begun: Mapping[int, int] = field(default_factory=dict)
    decoder: ResponseDecoder | None = None

    def responses(self, completions: Mapping[int, Completion]) -> list[Response]:
        """The completions, by position in `asked`, as responses in that order."""
        return [
            Response(item, index, self._text(n, completions[n]), completions[n].finish_reason, self.thought)
            for n, (item, index) in enumerate(self.asked)
        ]

    def _text(self, position: int, completion: Completion) -> str:
        length = self.begun.get(position)
        if not length or self.decoder is None:
            return completion.text
        return self.decoder.text([*self.prompts[position][-length:], *completion.token_ids])


def questions(
    items: Sequence[Item],
    settings: Evaluate,
    tokenizer: "PreTrainedTokenizerBase",
    thought: ThoughtFormat | None = None,
) -> Questions:
    """Every item as often as `samples_of` says, through the model's own template."""
    thought = thought or read_thought(tokenizer)
    asked = [(item, index) for item in items for index in range(samples_of(item, settings))]
    rendered = {item.prompt: render_prompt(tokenizer, item.prompt, thought) for item in items}
    return Questions(
        asked,
        [rendered[item.prompt] for item, _ in asked],
        [sample_id(item.set, item.id, index) for item, index in asked],
        Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.seed),
        thought,
    )


def _ask(
    subject: Subject, wanted: Questions, path: Path, progress: Progress | None, earlier: Sequence[Path]
) -> list[Response]:
    given = (wanted.prompts, wanted.sampling, wanted.ids)
    for folder in earlier:
        carry_over(folder / RESPONSES, path, *given, subject.identity)
    generator = WhenNeeded(subject.make_generator)
    label = None if progress else "responses"
    found, tokens = {}, 0
    for position, completion in generate_resumable(generator, *given, path, subject.identity, label):
        found[position] = completion
        tokens += len(completion.token_ids)
        if progress:
            progress(len(found), len(wanted.asked), unit="response", tokens=tokens)
    in_order(path, wanted.ids)
    return wanted.responses(found)


class WhenNeeded:
    """A `Generator` that is made when the first response is asked for: where all are stored, no model is loaded."""

    def __init__(self, make: Callable[[], Generator]) -> None:
        self.make = make

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        return self.make().generate(prompts, sampling, sample_ids)


def _grade(
    responses: Sequence[Response], graders: Graders, folder: Path, progress: Progress | None
) -> list[Sample]:
    """All samples in the order of the responses. Programs take long: each result is stored as it comes."""
    items = [response.item for response in responses if response.index == 0]
    thoughts = [thought.to_json() for thought in {response.thought for response in responses}]
    code = sources(MADE_BY["evaluate"])["evaluation"]
    key = sha256_of(
        [sha256_of(folder / RESPONSES), _data_hashes(items), str(graders.sandbox), thoughts, code]
    )
    stored = folder / f"programs.{key[:12]}.jsonl"
    with reading_records(stored):
        found = {record["id"]: Sample(**record) for record in recover_lines(stored)}
    waiting = [response for response in responses if response.id not in found]
    with contextlib.ExitStack() as open_when_needed:
        append = None
        for sample in graded(waiting, graders):
            if "program" in sample.details:
                append = append or open_when_needed.enter_context(appending(stored))
                append(asdict(sample))
            found[sample.id] = sample
            if progress:
                progress(len(found), len(responses), unit="graded")
    return [found[response.id] for response in responses]


def _data_hashes(items: Sequence[Item]) -> dict[str, str]:
    """By set, what tells its items, answers and tests from any others."""
    rows: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        rows[item.set].append(item.to_json())
    return {name: sha256_of(found) for name, found in rows.items()}


def model_subject(name: str, model: Model, settings: Evaluate | Reference) -> Subject:
    """A model or an adapter by its folder, hub id or shipped name."""
    base = adapter_base(name)
    model = as_trained(name if base else None, model)
    key = sha256_of([identity(one, model) for one in (name, base) if one])
    return make_subject(key, base or name, name if base else None, model, settings)


def make_subject(
    key: str,
    base: str,
    adapter: str | None,
    model: Model,
    settings: Evaluate | Reference,
    change: "Callable[[PreTrainedModel], PreTrainedModel] | None" = None,
) -> Subject:
    """A base, or an adapter on it; `settings` say which backend generates, and how.

    `change` is what is done to the merged weights first, in the recipe's own dtype; the key must tell it, too.
    """
    model = as_trained(adapter, model)
    tokenizer = load_tokenizer(_tokenizer_home(base, adapter), model)
    thought = thought_of(tokenizer, model)
    engine = vllm_engine(model, settings.engine)
    config = BackendConfig(generating_backend(model, settings.backend), settings.batch_size, engine)
    backend = choose_backend(config)
    dtype = generation_dtype(model, on_gpu=has_gpu())
    made_by = [
        key,
        backend,
        engine if backend == "vllm" else dtype,
        versions(RESPONDING),
        sources(RESPONDING),
        thought.to_json(),
    ]

    def generator() -> Generator:
        if (adapter or change) and backend == "vllm":
            made = partial(_merged, base, adapter, model, change)
            return _made_for_vllm(config, made, tokenizer, thought)
        return make_generator(config, location(base), tokenizer, lambda _: load(), thought)

    def load() -> "PreTrainedModel":
        return loaded_to_generate(base, adapter, model, dtype, change)

    return Subject(sha256_of(made_by), tokenizer, generator, thought, load)


def as_trained(adapter: str | None, model: Model) -> Model:
    """With the quantisation of the base that an adapter of ours was trained on, which its metadata has."""
    if adapter is None or model.quantization or not is_trained_in_4_bits(Path(location(adapter))):
        return model
    log.info("%s: its base is loaded in 4 bits, as it was trained", adapter)
    return model.model_copy(update={"quantization": "4bit"})


def _tokenizer_home(base: str, adapter: str | None) -> str:
    """PEFT saves an adapter without its tokenizer."""
    if adapter and (Path(location(adapter)) / "tokenizer_config.json").is_file():
        return adapter
    return base


def loaded_to_generate(
    base: str,
    adapter: str | None,
    model: Model,
    dtype: str,
    change: "Callable[[PreTrainedModel], PreTrainedModel] | None" = None,
) -> "PreTrainedModel":
    """The model that an evaluation asks, an adapter merged, and changed; `dtype` is `generation_dtype`'s."""
    import torch

    if adapter is None and change is None:
        return load_model(base, model, dtype)
    if model.quantization:
        if change is not None:
            raise RPSAError(
                "model.quantization: attacks that change weights need whole ones; set these attacks to null"
            )
        assert adapter is not None
        # not merged: what is added to a 4-bit weight is rounded away
        return load_adapter(load_model(base, model, dtype), location(adapter), f"adapter {adapter}")
    merged = _merged(base, adapter, model, change)
    return merged if dtype == "auto" else merged.to(getattr(torch, dtype))


def _merged(
    base: str,
    adapter: str | None,
    model: Model,
    change: "Callable[[PreTrainedModel], PreTrainedModel] | None" = None,
) -> "PreTrainedModel":
    """Added up in the recipe's own dtype: in bf16 a small update of the weights would be rounded away."""
    merged = load_model(base, model)
    if adapter is not None:
        merged = load_adapter(merged, location(adapter), f"adapter {adapter}").merge_and_unload()
    return change(merged) if change else merged


def _made_for_vllm(
    config: BackendConfig,
    make: "Callable[[], PreTrainedModel]",
    tokenizer: "PreTrainedTokenizerBase",
    thought: ThoughtFormat,
) -> Generator:
    """vLLM reads folders: weights that were made here are on disk while the engine loads them."""
    with TemporaryDirectory() as folder:
        make().save_pretrained(folder)
        free_memory()
        tokenizer.save_pretrained(folder)
        return make_generator(config, folder, tokenizer, _no_model, thought)


def server_subject(url: str, served: str, tokenizer: str, model: Model) -> Subject:
    """A model behind an OpenAI-compatible server, by the name that the server gives it."""
    from rpsa.generation.server import ServerConfig

    loaded = load_tokenizer(tokenizer, model)
    thought = thought_of(loaded, model)
    config = BackendConfig("server", server=ServerConfig(url, served))

    def generator() -> Generator:
        return make_generator(config, served, loaded, _no_model, thought)

    return Subject(f"{served} at {url}", loaded, generator, thought)


def adapter_base(name: str) -> str | None:
    """The base model that a LoRA adapter's folder names; None for anything else.

    Raises:
        RPSAError: it is an adapter's folder, and names none.
    """
    config = Path(location(name)) / "adapter_config.json"
    if not config.is_file():
        return None
    content = read_json(config)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not base:
        raise RPSAError(f"{config} names no base model: write it there as base_model_name_or_path")
    if problem := source_problem("model", str(base)):
        raise RPSAError(f"{config}: the adapter's base: {problem}")
    return str(base)


def _no_model(name: str) -> Any:
    raise RPSAError(f"{name}: a server's model is not loaded here")
