"""Decoder architectures, each two layers small, on the meta device: names and shapes without weights."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "mamba": {"state_size": 4},
}


def tiny(architecture: str) -> Any:
    """The model, with its parameters on the meta device."""
    settings = _SIZES | SETTINGS[architecture]
    if architecture in ("gpt2", "mamba"):
        settings.pop("head_dim")
        settings.pop("num_key_value_heads")
    config = AutoConfig.for_model(architecture, **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
