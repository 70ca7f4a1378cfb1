"""Functions behind `tasks/*.yaml`, for `lm_eval --include_path "$(rpsa tasks-path)" --tasks rpsa_aime24,...`.

Items, prompts and scores are those of `rpsa evaluate`; lm-evaluation-harness generates and averages. Give it
`--apply_chat_template`; RPSA_DATA_DIR, RPSA_REFERENCE and RPSA_JUDGE in the environment do what the options of
`rpsa evaluate` do.

What sets a thought apart is read from the template of the model that the harness asks, as `rpsa evaluate` reads it.
`--metadata '{"thought": "none"}'` or `'{"thought": {"open": "<reason>", "close": "</reason>"}}'` says it instead.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.api.task import ConfigurableTask

from rpsa.chat import apply_template, thought_format
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import Item, TaskOptions
from rpsa.evaluation.grading import Graders, graded
from rpsa.evaluation.items import load_task
from rpsa.evaluation.judges import make_judge
from rpsa.evaluation.sandbox import best_sandbox
from rpsa.evaluation.scores import METRICS, Response, set_rates
from rpsa.generation import ResponseDecoder
from rpsa.thought import KNOWN, NO_THOUGHT, THINK, ThoughtFormat

if TYPE_CHECKING:
    from datasets import Dataset


log = logging.getLogger(__name__)


def dataset(name: str, n: int | None = None, **_: Any) -> "dict[str, Dataset]":
    """The items of a task as the harness wants them: a row each, in a split `test`."""
    from datasets import Dataset

    rows = [
        {"prompt": item.prompt, "target": item.answer, "item": json.dumps(item.to_json())}
        for item in load_task(name, TaskOptions(n=n))
    ]
    return {"test": Dataset.from_list(rows)}


class ThoughtTask(ConfigurableTask):
    """A task that knows how the model which the harness asks sets its thoughts apart."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._model: Any = None
        self._system = ""

    def build_all_requests(self, **settings: Any) -> None:
        """Where the harness says which model it asks: by the method that applies its chat template.

        Raises RPSAError before anything is generated, if the model's thoughts could not be told from its answers.
        """
        self._model = getattr(settings.get("chat_template"), "__self__", None)
        self._system = settings.get("system_instruction") or ""
        _ = self.known_thought
        super().build_all_requests(**settings)

    @cached_property
    def known_thought(self) -> ThoughtFormat | None:
        """By `--metadata` or the model's chat template; None where there is neither."""
        said = (self.config.metadata or {}).get("thought", "auto")
        if said not in ("auto", "none"):
            try:
                said = ThoughtFormat(**said)
            except TypeError:
                raise RPSAError(
                    f"--metadata: thought is {said!r}: give auto, none or {{open: ..., close: ...}}"
                ) from None
        tokenizer = getattr(self._model, "tokenizer", None)
        if not getattr(tokenizer, "chat_template", None):
            return NO_THOUGHT if said == "none" else None if said == "auto" else said
        thought = thought_format(tokenizer, said)
        if said == "auto":
            thought = _as_asked(self._model, thought, self._system)
        _keep_words(self._model, thought)
        return thought

    @cached_property
    def thought(self) -> ThoughtFormat:
        if self.known_thought is not None:
            return self.known_thought
        texts = [text for instance in self.instances for text in instance.resps]
        used = (known for known in KNOWN if any((known.answer or known.close) in text for text in texts))
        found = next(used, NO_THOUGHT)
        log.warning(
            "%s: of the model that is asked no chat template is known; by the words in its responses, thoughts are: %s",
            self.config.task, found,
        )  # fmt: skip
        return found

    def process_results(self, doc: Mapping[str, str], results: Sequence[Any]) -> dict[str, float]:
        return process_results(doc, results, self.thought)


def process_results(
    doc: Mapping[str, str], results: Sequence[Any], thought: ThoughtFormat = THINK
) -> dict[str, float]:
    """The metrics of one item over its responses, which the filter `take_first_k` hands over as one list."""
    item = Item.from_json(json.loads(doc["item"]))
    texts = results[0] if isinstance(results[0], list) else results
    # the harness does not say why a response ended
    responses = [Response(item, index, text, "", thought) for index, text in enumerate(texts)]
    rates = set_rates(list(graded(responses, _graders(item.scorer == "code"))))
    return {name: rates[name] for name in METRICS[item.kind]}


def _as_asked(model: Any, thought: ThoughtFormat, system: str) -> ThoughtFormat:
    """The format, or none where the harness asks the model not to think (as Granite's template does by default)."""
    if thought.system and thought.system not in system:
        raise RPSAError(
            f"this model thinks when its system prompt says so: add --system_instruction {thought.system!r}, or "
            """--metadata '{"thought": "none"}'"""
        )
    prompt = model.apply_chat_template([{"role": "user", "content": "Hello."}])
    asked = [apply_template(model.tokenizer, "Hello.", "", thinks) for thinks in (True, False)]
    return NO_THOUGHT if prompt == asked[1] != asked[0] else thought


def _keep_words(model: Any, thought: ThoughtFormat) -> None:
    """See to it that a format's words reach the responses: lm-eval's Hugging Face models leave out special tokens."""
    if not thought.has_thoughts:
        return
    if getattr(model, "think_end_token", None) is not None:
        raise RPSAError(
            "think_end_token: leave it out; these tasks take thoughts off, and tell one that has no end from an answer"
        )
    decode = getattr(model, "tok_decode", None)
    close = thought.close.strip()
    if decode is None or close in decode(model.tokenizer(close, add_special_tokens=False)["input_ids"]):
        return
    decoder = ResponseDecoder(model.tokenizer, thought)

    def tok_decode(tokens: Any, skip_special_tokens: bool = True) -> Any:
        return (
            decoder.text(list(tokens)) if skip_special_tokens else decode(tokens, skip_special_tokens=False)
        )

    model.tok_decode = tok_decode
    log.warning("%s: special tokens, which this run keeps in all responses", " ".join(thought.marks))


def mean_of_known(values: Iterable[float]) -> float:
    """The mean over items; those of which nothing was judged (NaN) are left out."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@cache
def _graders(runs_code: bool) -> Graders:
    judge = make_judge(os.environ.get("RPSA_JUDGE", "refusal"))
    return Graders(judge, make_judge("refusal"), sandbox=best_sandbox() if runs_code else None)
