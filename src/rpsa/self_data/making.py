"""Making safety data of the model's own: responses sampled one by one to disk, filtered, and stored.

The folder has `responses.jsonl` (everything that was said, with which a stopped run goes on and another filter costs
no generation), `examples.jsonl` (what is to be trained on), `rejected.jsonl` (the rest, and why) and `manifest.json`.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rpsa.artifacts import atomic_write, stable_json
from rpsa.chat import read_thought, render_prompt
from rpsa.errors import RPSAError
from rpsa.evaluation.judges import check_judge, judge_model
from rpsa.evaluation.judges.classifiers import check_access
from rpsa.evaluation.run import (
    REFUSAL,
    RESPONSES,
    Subject,
    WhenNeeded,
    carry_judgements_over,
    stored_judge,
)
from rpsa.generation import Sampling, sample_id
from rpsa.generation.resumable import carry_over, generate_resumable, in_order
from rpsa.models import free_memory
from rpsa.progress import Progress
from rpsa.recipe.sections import Reference, Safety
from rpsa.self_data.offers import (
    Asked,
    Offer,
    SafetyFilter,
    counted,
    filtered,
    kept_of,
    sees_thoughts,
    steered,
)
from rpsa.self_data.stored import EXAMPLES, KINDS, MANIFEST, REJECTED
from rpsa.thought import ThoughtFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelfDataConfig:
    """How the model's own safety data are made.

    Attributes:
        sampling: of the responses.
        steer: see `rpsa.self_data.offers.steered`.
        per_prompt: responses to each request; greedy ones are all alike, so that one is enough.
        filter: the judge of refusals, by name; `filter_settings` are its settings.
    """

    sampling: Sampling
    steer: str | None = None
    per_prompt: int = 4
    filter: str = REFUSAL
    filter_settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, safety: Safety, sampled: Reference, seed: int) -> "SelfDataConfig":
        """As two sections of a recipe say, drawn with a seed of its own."""
        return cls(
            Sampling(sampled.temperature, sampled.top_p, sampled.max_new_tokens, seed),
            safety.steer,
            safety.per_prompt,
            safety.filter,
            safety.filter_settings,
        )

    @property
    def samples(self) -> int:
        return 1 if self.sampling.temperature == 0 else self.per_prompt


def check_filter(name: str, settings: Mapping[str, Any], said: str = "safety.filter") -> None:
    """Raises RPSAError, naming where it was `said`, if there is no such judge, setting or model of it."""
    try:
        check_judge(name, settings)
        if (model := judge_model(name, settings)) is not None:
            check_access(model, settings.get("revision"))
    except RPSAError as error:
        raise RPSAError(f"{said}: {error}") from error


def rendered(
    asked: Sequence[Asked], steer: str | None, tokenizer: Any, thought: ThoughtFormat
) -> list[tuple[list[int], list[int]]]:
    """For each request the token ids that the model answers, and those that it is trained on, without the steering.

    Raises:
        RPSAError: a prompt does not fit the model's template.
    """
    return [
        (
            render_prompt(tokenizer, steered(one, steer), thought),
            render_prompt(tokenizer, one.prompt, thought),
        )
        for one in asked
    ]


def make_self_data(
    subject: Subject,
    asked: Sequence[Asked],
    config: SelfDataConfig,
    folder: Path,
    progress: Progress | None = None,
    earlier: Sequence[Path] = (),
) -> dict[str, Any]:
    """Fill `folder`; returns the manifest. What is there, or in `earlier` folders, is not asked for again.

    Without `progress` a bar shows how long generation may take.

    Raises:
        RPSAError: a prompt does not fit the model's template, the backend or the judge fails, or nothing of a kind
            was accepted.
    """
    _warn_of_both(asked)
    thought = subject.thought or read_thought(subject.tokenizer)
    prompts = rendered(asked, config.steer, subject.tokenizer, thought)
    folder.mkdir(parents=True, exist_ok=True)
    offers = _offers(
        subject, asked, [steered_ids for steered_ids, _ in prompts], config, folder, progress, earlier
    )
    free_memory()  # the judge's model needs the GPU
    carry_judgements_over(earlier, folder)
    judge = stored_judge(config.filter, config.filter_settings, folder)
    offers = filtered(offers, SafetyFilter(judge, sees_thoughts(config.filter)), thought)
    manifest = {
        "counts": counted(offers),
        "filter": dict(judge.identity),
        "model": subject.identity,
        "per_prompt": config.samples,
        "sampling": asdict(config.sampling),
        "steer": config.steer,
        "thought": thought.to_json(),
    }
    plain = {one: ids for one, (_, ids) in zip(asked, prompts, strict=True)}
    (folder / MANIFEST).unlink(missing_ok=True)  # an older one must not vouch for these
    _write(folder / EXAMPLES, (_example(offer, plain[offer.asked], thought) for offer in kept_of(offers)))
    _write(folder / REJECTED, (_rejected(offer) for offer in offers if offer.reason is not None))
    atomic_write(folder / MANIFEST, stable_json(manifest))
    return manifest


def _warn_of_both(asked: Sequence[Asked]) -> None:
    kinds = [{one.prompt for one in asked if one.kind == kind} for kind in KINDS]
    if both := kinds[0] & kinds[1]:
        log.warning("%d prompts are among the harmful and among the benign ones", len(both))


def _offers(
    subject: Subject,
    asked: Sequence[Asked],
    prompts: Sequence[list[int]],
    config: SelfDataConfig,
    folder: Path,
    progress: Progress | None,
    earlier: Sequence[Path],
) -> list[Offer]:
    """Every response, in the order of the requests."""
    numbers = {kind: iter(range(len(asked))) for kind in KINDS}
    names = [(one.kind, next(numbers[one.kind])) for one in asked]
    wanted = [(n, index) for n in range(len(asked)) for index in range(config.samples)]
    ids = [sample_id(names[n][0], names[n][1], index) for n, index in wanted]
    given = ([prompts[n] for n, _ in wanted], config.sampling, ids)
    path = folder / RESPONSES
    for one in earlier:
        carry_over(one / RESPONSES, path, *given, subject.identity)
    found, tokens = {}, 0
    generator, label = WhenNeeded(subject.make_generator), None if progress else "responses"
    for position, completion in generate_resumable(generator, *given, path, subject.identity, label):
        found[position] = completion
        tokens += len(completion.token_ids)
        if progress:
            progress(len(found), len(wanted), unit="response", tokens=tokens)
    in_order(path, ids)
    return [Offer(asked[n], index, found[i]) for i, (n, index) in enumerate(wanted)]


def _example(offer: Offer, prompt_ids: list[int], thought: ThoughtFormat) -> dict[str, Any]:
    response = _with_opening(offer.completion.text, thought)
    return {
        "kind": offer.asked.kind,
        "prompt": offer.asked.prompt,
        "response": response,
        "messages": [
            {"role": "user", "content": offer.asked.prompt},
            {"role": "assistant", "content": response},
        ],
        "prompt_ids": prompt_ids,
        "response_ids": offer.completion.token_ids,
        "exact": offer.completion.exact,
    }


def _rejected(offer: Offer) -> dict[str, Any]:
    asked, completion = offer.asked, offer.completion
    return {
        "kind": asked.kind,
        "prompt": asked.prompt,
        "response": completion.text,
        "index": offer.index,
        "reason": offer.reason,
    }


def _with_opening(text: str, thought: ThoughtFormat) -> str:
    """The response as it would stand alone: the prompt's end has opened its thought."""
    return text if text.lstrip().startswith(thought.open.strip()) else thought.open + text


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
