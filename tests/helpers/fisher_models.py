"""Tiny random models, ragged batches and the slow oracle that the Fisher tests share."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.devices import DEVICE
from rpsa.parameters import trainable_parameters

VOCABULARY = 23


def tiny_model(kind: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """`random_model`, where the tests run."""
    return random_model(kind, seed, **overrides).to(DEVICE)


def random_model(kind: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random Llama (untied), Qwen2 (tied, q/k/v biases) or Qwen3 (tied, q/k norms); GQA; default attention."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if kind == "llama":
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes | {"tie_word_embeddings": False} | overrides))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes | {"tie_word_embeddings": True} | overrides))
    else:
        config = Qwen3Config(**sizes | {"tie_word_embeddings": True, "head_dim": 4} | overrides)
        model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # constants at initialisation
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def with_lora(model: nn.Module, is_b_random: bool = True) -> nn.Module:
    """LoRA on every linear layer but the head; B = 0 unless `is_b_random`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    result: nn.Module = get_peft_model(model, config)
    if is_b_random:
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return result


def ragged_batch(lengths: Sequence[tuple[int, int]], seed: int = 0, padding: int = 0) -> dict[str, Any]:
    """Rows of (prompt length, response length), right-padded to the longest and `padding` further tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(sum(pair) for pair in lengths) + padding
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(len(lengths), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.long),
        "labels": torch.full((len(lengths), width), -100),
        "sample_ids": [f"problem-{seed}-{row}" for row in range(len(lengths))],
    }
    for row, (prompt, response) in enumerate(lengths):
        tokens = torch.randint(1, VOCABULARY, (prompt + response,), generator=generator)
        batch["input_ids"][row, : prompt + response] = tokens
        batch["attention_mask"][row, : prompt + response] = 1
        batch["labels"][row, prompt : prompt + response] = tokens[prompt:]
    return {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in batch.items()}


def rows_of(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    return {
        key: [value[row] for row in rows] if isinstance(value, list) else value[list(rows)]
        for key, value in batch.items()
    }


def token_gradients(model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """For each row {name: (|y|, *shape)}: one plain backward pass for each response token's log p, float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = trainable_parameters(model)
    result = []
    for tokens, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = int(mask.sum())
        gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for t in range(1, length):
            if labels[t] == -100:
                continue
            model.zero_grad(set_to_none=True)
            logits = model(input_ids=tokens[None, :length], use_cache=False).logits[0, t - 1]
            logits.log_softmax(-1)[labels[t]].backward()
            for name, parameter in parameters.items():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients[name].append(gradient.to_dense().clone())
        result.append({name: torch.stack(parts) for name, parts in gradients.items()})
    return result


def exact_fisher(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Eq. 4 as it stands."""
    rows = token_gradients(model, batch)
    return {name: sum(row[name].square().mean(0) for row in rows) / len(rows) for name in rows[0]}  # type: ignore[misc]


def relative_error(found: Any, expected: Any) -> float:
    """Relative Frobenius norm of the difference over all parameters; the names must be the same."""
    assert set(found) == set(expected)
    difference = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in expected)
    return float((difference / sum(float(expected[n].double().square().sum()) for n in expected)) ** 0.5)
