"""Serving: how long a server with continuous batching (vLLM) takes for many responses of unequal length.

A step of decoding gives each of the sequences at work one token, and takes the longest of three things: reading the
weights and all keys and values that are there, the operations, and what a step takes at the least. Sequences are
admitted in their order while there is room, in number (`max_num_seqs`) and in memory for their keys and values. Where
the memory runs out as they grow, the youngest gives way, and is read in again later. Prompts are computed in the step
in which they are admitted, beside what it reads. Between two such events nothing changes but the lengths: so the
events alone are counted, not the steps.

`tests/plan/test_serving.py` holds this to a batcher that goes token by token, in blocks, with random lengths.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

WAVE = 512
"""Requests that `rpsa.generation.vllm` hands over at a time: the next ones wait for the last of them."""
MAX_SEQUENCES = 256
UTILISATION = 0.9
"""vLLM's `gpu_memory_utilization`."""
_ACTIVATIONS = 2 << 30
STEP = 0.005
"""Seconds that a step takes at the least: scheduling, sampling, and kernels replayed as one graph."""
START_SECONDS = 90
"""From the start of an engine to its first token: weights are read, graphs captured."""
SPREAD = 0.7
"""Standard deviation of a response's length over its mean; lengths are log-normal, and cut at the limit."""
_ORDERS = 5


@dataclass(frozen=True)
class Server:
    """One engine, on one GPU or on several that share the model (`tensor_parallel_size`).

    `cache` holds so many tokens. A step reads `weights` bytes and `token_bytes` for each token in the cache at
    `bandwidth` bytes a second; a token takes `token_seconds` of computing.
    """

    cache: int
    weights: int
    token_bytes: int
    bandwidth: float
    token_seconds: float
    sequences: int = MAX_SEQUENCES

    def step(self, sequences: float, tokens: float) -> float:
        """Seconds of one step for so many sequences that have so many tokens in the cache."""
        reading = (self.weights + tokens * self.token_bytes) / self.bandwidth
        return max(STEP, reading, sequences * self.token_seconds)


@dataclass(frozen=True)
class Queued:
    """`new` tokens after a prompt of `prompt`."""

    prompt: int
    new: int


@dataclass(frozen=True)
class Served:
    """`tokens` generated in `seconds`; `at_once` sequences in a step on average."""

    seconds: float
    tokens: int
    steps: float

    @property
    def at_once(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def activations(weights: int) -> int:
    """Bytes of one step, and of CUDA graphs, beside weights and cache: an eighth of the weights, at most 2 GiB."""
    return min(_ACTIVATIONS, weights // 8)


def server(
    engine: Mapping[str, Any],
    gpu_memory: float,
    weights: int,
    token_bytes: int,
    bandwidth: float,
    token_seconds: float,
) -> Server:
    """The engine that a recipe's `engine` makes of GPUs with `gpu_memory` bytes; the rest is of one GPU, too."""
    parts = int(engine.get("tensor_parallel_size", 1))
    usable = parts * (
        gpu_memory * float(engine.get("gpu_memory_utilization", UTILISATION)) - activations(weights)
    )
    return Server(
        cache=max(0, int((usable - weights) // token_bytes)),
        weights=weights,
        token_bytes=token_bytes,
        bandwidth=bandwidth * parts,
        token_seconds=token_seconds / parts,
        sequences=int(engine.get("max_num_seqs", MAX_SEQUENCES)),
    )


def lengths(count: int, mean: int, limit: int, order: int = 0) -> list[int]:
    """`count` lengths that stand for the distribution, in one of many orders."""
    sigma = math.sqrt(math.log(1 + SPREAD**2))
    normal = NormalDist(math.log(mean) - sigma**2 / 2, sigma)
    drawn = (math.exp(normal.inv_cdf((n + 0.5) / count)) for n in range(count))
    found = [min(limit, max(1, round(length))) for length in drawn]
    random.Random(order).shuffle(found)
    return found


@dataclass(frozen=True)
class ResponseSet:
    """`count` requests with a prompt of `prompt` tokens, answered in `mean`, at most `limit`."""

    count: int
    prompt: int
    mean: int
    limit: int

    def requests(self, order: int = 0) -> list[Queued]:
        return [Queued(self.prompt, new) for new in lengths(self.count, self.mean, self.limit, order)]


def expected(asked: Sequence[ResponseSet], by: Server, wave: int | None = WAVE) -> Served:
    """The mean over some orders of each set's responses: where a long one comes last, all wait for it."""
    found = [
        served([request for one in asked for request in one.requests(order)], by, wave)
        for order in range(_ORDERS)
    ]
    return Served(
        sum(one.seconds for one in found) / _ORDERS,
        found[0].tokens,
        sum(one.steps for one in found) / _ORDERS,
    )


def served(requests: Sequence[Queued], by: Server, wave: int | None = WAVE) -> Served:
    """All of them, wave after wave (None: in one queue)."""
    parts = [_wave(part, by) for part in _waves(requests, wave)]
    return Served(
        sum(one.seconds for one in parts), sum(one.tokens for one in parts), sum(one.steps for one in parts)
    )


def _waves(requests: Sequence[Queued], wave: int | None) -> Iterator[Sequence[Queued]]:
    size = wave or len(requests) or 1
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


@dataclass(eq=False)
class _Sequence:
    """At work since step `since`, with so much `context` then; it ends with step `end`."""

    context: int
    since: int
    end: int
    is_running: bool = True


def _wave(requests: Sequence[Queued], by: Server) -> Served:
    waiting = deque((request.prompt, request.new) for request in requests)
    by_end: list[tuple[int, int, _Sequence]] = []
    by_age: list[_Sequence] = []  # the youngest last; those that have ended are passed over
    seconds, now, used, at_once, admitted, unread = 0.0, 0, 0, 0, 0, 0
    while waiting or at_once:
        while (
            waiting and at_once < by.sequences and (used + waiting[0][0] + at_once < by.cache or not at_once)
        ):
            context, left = waiting.popleft()
            one = _Sequence(context, now, now + left)
            heapq.heappush(by_end, (one.end, admitted, one))
            by_age.append(one)
            unread += context
            used, at_once, admitted = used + context, at_once + 1, admitted + 1
        while not by_end[0][2].is_running:
            heapq.heappop(by_end)
        count = min(by_end[0][0] - now, max(1, (by.cache - used) // at_once))
        step = by.step(at_once, used + at_once * count / 2)
        seconds += count * step + max(0.0, (unread + at_once) * by.token_seconds - step)
        unread = 0
        now += count
        used += at_once * count
        while by_end and (by_end[0][0] <= now or not by_end[0][2].is_running):
            one = heapq.heappop(by_end)[2]
            if one.is_running:
                one.is_running = False
                used, at_once = used - one.context - (now - one.since), at_once - 1
        while used + at_once > by.cache and at_once > 1:
            one = by_age.pop()
            if one.is_running:
                one.is_running = False
                held = one.context + now - one.since
                waiting.appendleft((held, one.end - now))
                used, at_once = used - held, at_once - 1
    return Served(seconds, sum(request.new for request in requests), now)
