"""Judges of harmfulness and over-refusal behind one small interface; see docs/judges.md.

Which text of a response is judged is decided before a judge is asked (`judge_responses`), and a `CachedJudge`
around any judge keeps what it has paid for.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import reading
from rpsa.errors import RPSAError
from rpsa.evaluation.judges.judgement import (
    NO_ANSWER,
    UNPARSEABLE,
    Agreement,
    CachedJudge,
    Judge,
    Judgement,
    JudgementCounts,
    RefusalJudge,
    Sees,
    cohens_kappa,
    judge_responses,
    judge_texts,
    judged_text,
    judges_agree,
    tally,
)
from rpsa.thought import NO_THOUGHT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rpsa.evaluation.judges.classifiers import Classifier
    from rpsa.evaluation.judges.policies import Rubric
    from rpsa.generation import Generator

__all__ = [
    "NO_ANSWER",
    "UNPARSEABLE",
    "Agreement",
    "CachedJudge",
    "Judge",
    "Judgement",
    "JudgementCounts",
    "Sees",
    "can_see",
    "check_judge",
    "cohens_kappa",
    "judge_model",
    "judge_responses",
    "judge_texts",
    "judged_text",
    "judges_agree",
    "make_judge",
    "tally",
]


def make_judge(name: str, **settings: Any) -> Judge:
    """A judge by name.

    - `refusal`: no settings.
    - `llama-guard-3`, `llama-guard-4`, `wildguard`, `wildguard-refusal`, `harmbench`, `harmbench-mistral`,
      `qwen3guard`, `qwen3guard-loose`, `qwen3guard-refusal`, `granite-guardian`, `reasoningshield`: `model`,
      `revision`, `dtype`, `batch_size`; or `generator`, `tokenizer` and `backend` to run on another backend.
    - `strongreject-finetuned`, `shieldgemma`: `model`, `revision`, `dtype`, `batch_size`, `min_mass`.
    - `rubric` (StrongREJECT's), `xstest`, `policy`: `base_url`, `model`, `concurrency`, `request`, `retry`; of `policy`
      also `policy`, a file with one.

    Raises:
        RPSAError: there is no such judge or setting, or the model cannot be loaded.
    """
    check_judge(name, settings)
    return _MAKERS[name](**settings)


def check_judge(name: str, settings: Mapping[str, Any]) -> None:
    """What `make_judge` can refuse before it loads anything.

    Raises:
        RPSAError: there is no such judge or setting, or one is missing.
    """
    if name not in _MAKERS:
        raise RPSAError(f"judge {name!r} is unknown: choose from {', '.join(_MAKERS)}")
    maker = _MAKERS[name]
    try:
        inspect.signature(maker).bind(**settings)
    except TypeError as error:
        raise RPSAError(f"judge {name}: {error}; it takes {_settings_of(maker)}") from None
    if name in _ENDPOINTS:  # these load no model: their settings can be tried
        try:
            maker(**settings)
        except (TypeError, ValueError, AttributeError) as error:
            raise error if isinstance(error, RPSAError) else RPSAError(f"judge {name}: {error}") from None


def judge_model(name: str, settings: Mapping[str, Any]) -> str | None:
    """The model that a judge loads; None for one that loads none, or is given what has loaded it."""
    if name in ("refusal", *_ENDPOINTS) or settings.get("generator") is not None:
        return None
    from rpsa.evaluation.judges.classifiers import CLASSIFIERS
    from rpsa.evaluation.judges.probabilities import SHIELDGEMMA_MODEL, STRONGREJECT_MODEL

    asked = {"strongreject-finetuned": STRONGREJECT_MODEL, "shieldgemma": SHIELDGEMMA_MODEL}
    default = asked[name] if name in asked else CLASSIFIERS[name].model
    return str(settings.get("model") or default)


def can_see(name: str) -> tuple[str, ...]:
    """What of a response a judge of this name was made to judge: of "answer", "thought" and "trace"."""
    return _SEES.get(name, ("answer", "thought", "trace"))


# Whether a text refuses is no question of a thought; ReasoningShield's prompt calls what it judges one.
_SEES: dict[str, tuple[str, ...]] = {
    "refusal": ("answer",),
    "wildguard-refusal": ("answer",),
    "qwen3guard-refusal": ("answer",),
    "xstest": ("answer",),
    "reasoningshield": ("thought", "trace"),
}


def _classifier(name: str) -> Callable[..., Judge]:
    def make(
        *,
        model: str | None = None,
        revision: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 16,
        generator: "Generator | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        backend: str = "generator",
    ) -> Judge:
        from rpsa.evaluation.judges.classifiers import CLASSIFIERS, ClassifierJudge

        classifier: Classifier = CLASSIFIERS[name]
        model = model or classifier.model
        if generator is not None and tokenizer is not None:
            identity = {"id": model, "revision": revision, "backend": backend}
            return ClassifierJudge(classifier, generator, tokenizer, identity)
        if generator is not None or tokenizer is not None:
            raise RPSAError(f"judge {name}: give generator and tokenizer together")
        from rpsa.evaluation.judges.classifiers import load
        from rpsa.generation.transformers import TransformersGenerator

        loaded, tokenizer, identity = load(model, revision, dtype)
        return ClassifierJudge(
            classifier,
            TransformersGenerator(loaded, tokenizer, batch_size, NO_THOUGHT),
            tokenizer,
            identity,
        )

    return make


def _probability(judge: str, default: str) -> Callable[..., Judge]:
    def make(
        *,
        model: str | None = None,
        revision: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
        min_mass: float = 0.5,
    ) -> Judge:
        from rpsa.evaluation.judges import probabilities
        from rpsa.evaluation.judges.classifiers import load

        loaded = load(model or getattr(probabilities, default), revision, dtype)
        made: Judge = getattr(probabilities, judge)(*loaded, batch_size=batch_size, min_mass=min_mass)
        return made

    return make


def _chat(rubric: str) -> Callable[..., Judge]:
    def make(
        *, base_url: str, model: str, concurrency: int = 8, request: Any = None, retry: Any = None
    ) -> Judge:
        from rpsa.evaluation.judges import policies

        return _asked(getattr(policies, rubric), base_url, model, concurrency, request, retry)

    return make


def _policy(
    *,
    base_url: str,
    model: str,
    policy: str | None = None,
    concurrency: int = 8,
    request: Any = None,
    retry: Any = None,
) -> Judge:
    from rpsa.evaluation.judges.policies import policy_rubric

    text = None
    if policy is not None:
        with reading(f"judge policy: {policy}"):
            text = Path(policy).expanduser().read_text(encoding="utf-8")
    return _asked(policy_rubric(text), base_url, model, concurrency, request, retry)


def _asked(rubric: "Rubric", base_url: str, model: str, concurrency: int, request: Any, retry: Any) -> Judge:
    from rpsa.evaluation.judges.policies import ChatJudge
    from rpsa.http import Retry

    return ChatJudge(
        rubric,
        base_url=base_url,
        model=model,
        concurrency=concurrency,
        request=request,
        retry=Retry(**retry) if isinstance(retry, Mapping) else retry,
    )


_ENDPOINTS = ("rubric", "xstest", "policy")
_MAKERS: dict[str, Callable[..., Judge]] = {
    "refusal": RefusalJudge,
    "llama-guard-3": _classifier("llama-guard-3"),
    "llama-guard-4": _classifier("llama-guard-4"),
    "wildguard": _classifier("wildguard"),
    "wildguard-refusal": _classifier("wildguard-refusal"),
    "harmbench": _classifier("harmbench"),
    "harmbench-mistral": _classifier("harmbench-mistral"),
    "qwen3guard": _classifier("qwen3guard"),
    "qwen3guard-loose": _classifier("qwen3guard-loose"),
    "qwen3guard-refusal": _classifier("qwen3guard-refusal"),
    "granite-guardian": _classifier("granite-guardian"),
    "reasoningshield": _classifier("reasoningshield"),
    "shieldgemma": _probability("ShieldGemmaJudge", "SHIELDGEMMA_MODEL"),
    "strongreject-finetuned": _probability("StrongRejectJudge", "STRONGREJECT_MODEL"),
    "rubric": _chat("STRONGREJECT"),
    "xstest": _chat("XSTEST"),
    "policy": _policy,
}


def _settings_of(maker: Callable[..., Judge]) -> str:
    return ", ".join(inspect.signature(maker).parameters) or "no settings"
