"""The peak of a deep model from two shallow ones, against a dry run of all its layers: equal to the byte."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from rpsa.plan.dry_run import (
    Precision,
    Shape,
    build_model,
    cache_bytes,
    decoding_peak,
    fake_tensors,
    fisher_peak,
    reasoning_peak,
    sharded_peak,
    training_peak,
    warmup_peak,
)
from rpsa.plan.layers import SHALLOW, Skeleton, are_alike, with_layers

LORA = {"r": 4, "lora_dropout": 0.05, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
CONFIGS = {
    "deep": LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=9, **SIZES,
        tie_word_embeddings=False,
    ),
    "tied": Qwen2Config(
        vocab_size=8000, hidden_size=64, intermediate_size=128, num_hidden_layers=7, **SIZES,
        tie_word_embeddings=True,
    ),
    "normed": Qwen3Config(
        vocab_size=900, hidden_size=64, intermediate_size=128, num_hidden_layers=12, head_dim=16, **SIZES,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
SHAPE = Shape(2, 48)


def skeletons(config: PreTrainedConfig, dtype: str, lora: bool) -> tuple[Skeleton, Skeleton]:
    """Of all layers, and of a few."""

    def build(of: Any) -> Any:
        return build_model(of, dtype, LORA if lora else None)

    whole = build(config)
    return Skeleton(whole), Skeleton(whole, [build(with_layers(config, number)) for number in SHALLOW])


def dry_runs() -> Iterator[tuple[str, Callable[[Any], int]]]:
    for bf16, checkpointed in itertools.product([True, False], [True, False]):
        how = Precision(bf16, checkpointed)
        said = f"{'bf16' if bf16 else 'fp32'}, {'checkpointed' if checkpointed else 'stored'}"
        yield f"training, {said}", partial(training_peak, shape=SHAPE, precision=how)
        yield f"accumulated, {said}", partial(training_peak, shape=SHAPE, precision=how, accumulated=True)
        yield (
            f"compact, {said}",
            partial(training_peak, shape=SHAPE, precision=how, compact=0.4, accumulated=True),
        )
        yield f"reasoning, {said}", partial(reasoning_peak, shape=SHAPE, precision=how, accumulated=True)


PEAKS: dict[str, Callable[[Any], int]] = dict(dry_runs()) | {
    "sharded": lambda model: sharded_peak(model, SHAPE, Precision(True, True), training_peak),
    "Fisher": lambda model: fisher_peak(model, SHAPE, 2, checkpointing=False),
    "Fisher, checkpointed": lambda model: fisher_peak(model, SHAPE, 2, checkpointing=True),
    "warm-up": lambda model: warmup_peak(model, SHAPE, checkpointing=False),
    "decoding": lambda model: decoding_peak(model, SHAPE),
}
QUICK = ["training, bf16, checkpointed", "accumulated, bf16, stored", "Fisher, checkpointed", "decoding"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "name", ["deep", *(pytest.param(n, marks=pytest.mark.integration) for n in ("tied", "normed"))]
)
@pytest.mark.parametrize(
    "peak", [name if name in QUICK else pytest.param(name, marks=pytest.mark.integration) for name in PEAKS]
)
def test_the_peak_of_all_layers_is_that_of_a_few_extrapolated(peak: str, name: str, lora: bool) -> None:
    if lora and peak == "sharded":
        pytest.skip("an adapter is never sharded here")
    with fake_tensors():
        whole, few = skeletons(CONFIGS[name], "bfloat16" if lora else "float32", lora)
        assert are_alike(whole.model)
        assert few.peak(PEAKS[peak]) == whole.peak(PEAKS[peak])
        if peak == "decoding":
            assert few.size(lambda m: cache_bytes(m, SHAPE)) == whole.size(lambda m: cache_bytes(m, SHAPE))


def test_layers_that_differ_are_all_run() -> None:
    mixed = Gemma2Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=6, head_dim=8, **SIZES
    )
    with fake_tensors():
        assert not are_alike(build_model(mixed, "float32"))  # attention slides in every other layer
        assert not are_alike(build_model(with_layers(CONFIGS["deep"], 4), "float32"))
        adapted = {**LORA, "target_modules": ["up_proj"], "layers_to_transform": [1, 2]}
        assert not are_alike(build_model(CONFIGS["deep"], "float32", adapted))
