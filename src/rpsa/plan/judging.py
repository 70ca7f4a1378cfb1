"""Judging: what judges read and write of the evaluation's responses, and how long those take that are loaded here."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpsa.evaluation.judges import can_see, judge_model
from rpsa.evaluation.run import REFUSAL
from rpsa.plan.time import BANDWIDTH_SHARE, SECONDS_PER_PASS, Gpu, ResponseTokens, compute_seconds
from rpsa.plan.totals import Calls
from rpsa.recipe.sections import Evaluate, Safety

ANSWER_SHARE = 0.4
"""Of the tokens of a response to a request, what is the answer; the rest is the thought."""
_INSTRUCTION_TOKENS = 300
"""A judge's own prompt, and the request."""
_VERDICT_TOKENS = 8
_ENDPOINT_TOKENS = 150
"""What a judge writes that gives reasons."""
_BATCH = 16
_UNNAMED = 8e9
"""Parameters of a judge whose name does not say."""
_OTHERS = {"allenai/wildguard": 7.25e9, "qylu4156/strongreject-15k-v1": 2.5e9}


@dataclass(frozen=True)
class Judging:
    """One judge's part in the evaluation of one model. `model` is None behind an endpoint."""

    judge: str
    model: str | None
    texts: int
    tokens_in: int
    tokens_out: int
    batch: int

    @property
    def parameters(self) -> int:
        return judge_parameters(self.model or "")

    def seconds(self, gpu: Gpu) -> float:
        """Reading all texts, then a token at a time for a batch; 0 behind an endpoint."""
        if self.model is None:
            return 0.0
        reading = compute_seconds(2.0 * self.parameters * self.tokens_in, gpu, precision="bf16")
        step = max(SECONDS_PER_PASS, 2 * self.parameters / (gpu.bandwidth * BANDWIDTH_SHARE))
        return reading + self.tokens_out / self.batch * step

    def arithmetic(self, gpu: Gpu) -> str:
        return (
            f"judge {self.judge}: {self.texts:,} texts, 2 × {self.parameters / 1e9:.1f}B parameters × "
            f"{self.tokens_in / 1e6:.2f}M tokens read / ({gpu.bf16 / 1e12:.0f} TFLOP/s × 40%) + "
            f"{self.tokens_out:,} tokens written, {self.batch} at a time: {self.seconds(gpu) / 60:.1f} min"
        )


def judge_parameters(model: str) -> int:
    """By what a model's name says ("8B", "2b"), else as most judges have."""
    if model in _OTHERS:
        return int(_OTHERS[model])
    said = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![A-Za-z])", model.replace("-", " ").replace("_", " "))
    return int(float(said[-1]) * 1e9) if said else int(_UNNAMED)


def judgings(settings: Evaluate, responses: Sequence[ResponseTokens]) -> list[Judging]:
    """What the judges of a recipe do for one evaluated model; `refusal` takes no time."""
    return list(_judgings(settings, responses))


def own_judgings(safety: Safety, responses: ResponseTokens) -> list[Judging]:
    """What the filter of a model's own safety data reads."""
    return list(_judged(safety.filter, safety.filter_settings, [responses], [1.0]))


def _judgings(settings: Evaluate, responses: Sequence[ResponseTokens]) -> Iterator[Judging]:
    attacks = [one for one in responses if one.judged and one.kind == "attack"]
    refusals = [one for one in responses if one.judged and one.kind == "over_refusal"]
    answers, thoughts = [ANSWER_SHARE], [1 - ANSWER_SHARE]
    has_both = settings.judge_thoughts and not settings.thought_judge and "thought" in can_see(settings.judge)
    first = answers + (thoughts if has_both else [])
    yield from _judged(settings.judge, settings.judge_settings, attacks, first)
    if settings.judge_thoughts and settings.thought_judge:
        yield from _judged(settings.thought_judge, settings.thought_judge_settings, attacks, thoughts)
    if settings.second_judge:
        yield from _judged(settings.second_judge, settings.second_judge_settings, attacks, answers)
    yield from _judged(settings.refusal_judge, settings.refusal_judge_settings, refusals, answers)


def _judged(
    name: str, settings: Mapping[str, Any], responses: Sequence[ResponseTokens], shares: Sequence[float]
) -> Iterator[Judging]:
    """`shares`: of each response, what is judged in one text."""
    count = sum(one.count for one in responses)
    if name == REFUSAL or not count:
        return
    model = judge_model(name, settings)
    tokens = count * len(shares) * _INSTRUCTION_TOKENS + sum(
        round(share * one.total) for share in shares for one in responses
    )
    texts = count * len(shares)
    out = texts * (_ENDPOINT_TOKENS if model is None else _VERDICT_TOKENS)
    yield Judging(name, model, texts, tokens, out, int(settings.get("batch_size") or _BATCH))


def calls_of(judging: Judging, models: int) -> Calls:
    return Calls(
        judging.judge, judging.texts * models, judging.tokens_in * models, judging.tokens_out * models
    )
