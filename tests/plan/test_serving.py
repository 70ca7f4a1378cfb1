"""The plan's model of continuous batching against a batcher that goes token by token."""

import math
import random
from statistics import fmean, median

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.examples import examples
from rpsa.plan.serving import SPREAD, STEP, WAVE, Queued, ResponseSet, Server, expected, lengths, served

BLOCK = 16
BUDGET = 8192
"""Tokens that one step takes at most, of prompts and of sequences at work."""


def simulated(requests: list[Queued], by: Server, wave: int | None) -> float:
    """Seconds, step by step: a sequence holds whole blocks, and gives them up when another needs one."""
    seconds = 0.0
    size = wave or len(requests)
    for start in range(0, len(requests), size):
        waiting = [{"read": 0, "held": r.prompt, "left": r.new} for r in requests[start : start + size]]
        running: list[dict[str, int]] = []
        while waiting or running:
            decoding = [one for one in running if one["read"] == one["held"]]
            for one in decoding:
                one["held"] += 1
                one["read"] += 1
                one["left"] -= 1
            while sum(map(blocks, running)) > by.cache // BLOCK and len(running) > 1:
                youngest = running.pop()
                waiting.insert(0, youngest | {"read": 0})
            free, budget, read = by.cache // BLOCK - sum(map(blocks, running)), BUDGET - len(decoding), 0
            while waiting and len(running) < by.sequences and (blocks(waiting[0]) < free or not running):
                free -= blocks(waiting[0])
                running.append(waiting.pop(0))
            for one in running:
                part = min(one["held"] - one["read"], budget - read)
                one["read"] += part
                read += part
            reading = by.weights + by.token_bytes * sum(one["read"] for one in running)
            seconds += max(STEP, reading / by.bandwidth, (len(decoding) + read) * by.token_seconds)
            running = [one for one in running if one["left"] > 0]
    return seconds


def blocks(sequence: dict[str, int]) -> int:
    return math.ceil((sequence["held"] + 1) / BLOCK)


def drawn(count: int, mean: int, limit: int, seed: int) -> list[int]:
    """Log-normal lengths with this mean."""
    generator, sigma = random.Random(seed), math.sqrt(math.log(1 + SPREAD**2))
    found = (generator.lognormvariate(math.log(mean) - sigma**2 / 2, sigma) for _ in range(count))
    return [min(limit, max(1, round(length))) for length in found]


# weights and a token's keys and values of models of 1.5B, 8B and 32B in bf16, on three kinds of GPU
MODELS = {"1.5B": (3.1e9, 28672), "8B": (16.1e9, 131072), "32B": (65.5e9, 262144)}
KINDS = {"H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12), "4090": (1.01e12, 165e12)}


@st.composite
def servers(draw: st.DrawFn) -> Server:
    weights, token_bytes = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    bandwidth, operations = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    return Server(
        cache=draw(st.integers(4_000, 200_000)),
        weights=int(weights),
        token_bytes=token_bytes,
        bandwidth=bandwidth * 0.6,
        token_seconds=weights / (operations * 0.4),
        sequences=draw(st.sampled_from([16, 64, 256])),
    )


@examples(40)
@given(
    by=servers(),
    count=st.integers(1, 400),
    mean=st.integers(20, 300),
    prompt=st.integers(10, 400),
    wave=st.sampled_from([None, WAVE, 100]),
    seed=st.integers(0, 1000),
)
@example(  # prompts of which ten fit, read again and again: 10% short
    Server(4000, 3_100_000_000, 28672, 606e9, 4.6969696969696966e-05, 16), 20, 20, 377, None, 380
)
def test_the_time_is_that_of_a_simulated_batcher(
    by: Server, count: int, mean: int, prompt: int, wave: int | None, seed: int
) -> None:
    requests = [Queued(prompt, new) for new in drawn(count, mean, 4 * mean, seed)]
    planned, real = served(requests, by, wave).seconds, simulated(requests, by, wave)
    a_step = max(by.weights / by.bandwidth, STEP)  # one more or less is a fifth of a response of four tokens
    assert planned == pytest.approx(real, rel=0.2, abs=1.5 * a_step)


def test_the_time_is_mostly_much_nearer() -> None:
    """Worst is a cache that holds ten prompts: which of them gives way is chance, and it is read in twice."""
    generator, ratios = random.Random(0), []
    for seed in range(60):
        weights, token_bytes = MODELS[generator.choice(sorted(MODELS))]
        bandwidth, operations = KINDS[generator.choice(sorted(KINDS))]
        cache, sequences = generator.randint(4_000, 200_000), generator.choice([16, 64, 256])
        by = Server(cache, int(weights), token_bytes, bandwidth * 0.6, weights / operations / 0.4, sequences)
        new = drawn(generator.randint(20, 400), mean := generator.randint(20, 300), 4 * mean, seed)
        requests = [Queued(generator.randint(10, 400), length) for length in new]
        ratios.append(served(requests, by, None).seconds / simulated(requests, by, None))
    print(f"planned / simulated: {min(ratios):.3f} to {max(ratios):.3f}")
    assert median(ratios) == pytest.approx(1, abs=0.01)
    assert ratios == pytest.approx([1] * len(ratios), abs=0.1)


@pytest.mark.parametrize(("count", "mean", "wave"), [(100, 100, None), (400, 60, 100), (300, 150, WAVE)])
def test_lengths_that_are_expected_take_the_time_that_random_ones_take_on_average(
    count: int, mean: int, wave: int | None
) -> None:
    """Of 60 responses the longest alone varies by a fifth: so it is the mean of many draws."""
    weights, token_bytes = MODELS["8B"]
    by = Server(20_000, int(weights), token_bytes, 2e12, weights / 4e14, sequences=64)
    planned = expected([ResponseSet(count, 50, mean, 4 * mean)], by, wave).seconds
    draws = [drawn(count, mean, 4 * mean, seed) for seed in range(12)]
    real = fmean(simulated([Queued(50, new) for new in draw], by, wave) for draw in draws)
    print(f"expected / random: {planned / real:.3f}")
    assert planned == pytest.approx(real, rel=0.1)


def test_equal_requests_that_fit_take_their_steps() -> None:
    by = Server(cache=10_000, weights=10**9, token_bytes=1000, bandwidth=1e9, token_seconds=0.0)
    done = served([Queued(100, 50)] * 10, by)
    assert (done.steps, done.tokens, done.at_once) == (50, 500, 10)
    assert done.seconds == pytest.approx(50 * (1e9 + 1000 * 10 * 125) / 1e9)
    assert served([Queued(100, 50)] * 20, Server(10_000, 10**9, 0, 1e9, 0.0, sequences=10)).steps == 100


def test_lengths_have_the_mean_and_the_spread() -> None:
    found = lengths(2000, 1000, 10**6)
    mean = sum(found) / len(found)
    assert mean == pytest.approx(1000, rel=0.01)
    assert math.sqrt(sum((n - mean) ** 2 for n in found) / len(found)) == pytest.approx(
        1000 * SPREAD, rel=0.05
    )
    assert sum(found[:1000]) == pytest.approx(sum(found[1000:]), rel=0.05)
    assert max(lengths(100, 1000, 1500)) == 1500
    assert lengths(1, 30, 100) == [pytest.approx(24, abs=2)]
