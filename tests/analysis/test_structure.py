"""Layers and roles from names and shapes, for architectures as transformers builds them."""

from collections import defaultdict
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from helpers.architectures import SETTINGS, tiny
from rpsa.analysis.structure import roles
from rpsa.parameters import trainable_parameters


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in trainable_parameters(model).items()}


def matrices_by_kind(shapes: dict[str, tuple[int, ...]], **more: Any) -> dict[str, str]:
    found: dict[str, list[str]] = defaultdict(list)
    for role in roles(shapes, **more).values():
        if role.is_matrix and role.module not in found[role.kind]:
            found[role.kind].append(role.module)
    return {kind: " ".join(modules) for kind, modules in found.items()}


LLAMA = {
    "embedding": "embed_tokens",
    "attention": "q_proj k_proj v_proj o_proj",
    "mlp": "gate_proj up_proj down_proj",
    "head": "lm_head",
}
TIED = {kind: modules for kind, modules in LLAMA.items() if kind != "head"}
EXPECTED = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": TIED,
    "gemma3_text": TIED,
    "phi3": LLAMA | {"attention": "o_proj qkv_proj", "mlp": "gate_up_proj down_proj"},
    "gpt2": {"embedding": "wte wpe", "attention": "c_attn attn.c_proj", "mlp": "c_fc mlp.c_proj"},
    "gpt_neox": {
        "embedding": "embed_in",
        "attention": "query_key_value dense",
        "mlp": "dense_h_to_4h dense_4h_to_h",
        "head": "lm_head",
    },
    "opt": {
        "embedding": "embed_tokens embed_positions",
        "attention": "k_proj v_proj q_proj out_proj",
        "mlp": "fc1 fc2",
    },
    "mixtral": LLAMA | {"mlp": "gate gate_up_proj down_proj"},
    "qwen3_moe": LLAMA | {"mlp": "gate_up_proj down_proj gate"},
    "mamba": {"embedding": "embeddings", "other": "A_log conv1d in_proj x_proj dt_proj out_proj"},
}


@pytest.mark.parametrize("architecture", SETTINGS)
def test_every_architecture_is_understood(architecture: str) -> None:
    model = tiny(architecture)
    shapes = shapes_of(model)
    assert matrices_by_kind(shapes) == EXPECTED[architecture]
    found = roles(shapes)
    assert {role.layer for role in found.values()} == {None, 0, 1}
    for name, role in found.items():
        assert (role.layer is None) == (".0." not in name and ".1." not in name)
        # a norm is a vector; a bias is of its matrix's kind
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        assert (role.kind == "norm") == ("Norm" in owner), name
        weight = name.removesuffix("bias") + "weight"
        assert role.kind == found.get(weight, role).kind
    # the same module has the same name in all layers, and no other has it
    modules = defaultdict(set)
    for name, role in found.items():
        modules[role.module].add(name.replace(".0.", ".N.").replace(".1.", ".N."))
    assert all(len(names) == 1 for names in modules.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_where_names_tell_nothing_shapes_do(architecture: str) -> None:
    """Every module under a meaningless name: `model.layers.0.self_attn.q_proj` is `a.b.0.c.d`."""
    shapes = {
        name: shape
        for name, shape in shapes_of(tiny(architecture)).items()
        if not name.endswith("gate.weight")  # Mixtral's router is no part of an MLP by its shape
    }
    aliases: dict[str, str] = {}

    def alias(part: str) -> str:
        if part.isdigit() or part in ("weight", "bias"):
            return part
        return aliases.setdefault(part, f"x{len(aliases)}")

    renamed = {".".join(map(alias, name.split("."))): name for name in shapes}
    found = roles({new: shapes[old] for new, old in renamed.items()})
    expected = roles(shapes)
    for new, old in renamed.items():
        if old != "transformer.wpe.weight" and "embed_positions" not in old:
            assert (found[new].layer, found[new].kind) == (expected[old].layer, expected[old].kind), old


def test_classes_are_read_like_names() -> None:
    shapes = {"m.blocks.0.mix.a.weight": (6, 4), "m.blocks.0.mix.b.weight": (4, 5)}
    assert {role.kind for role in roles(shapes).values()} == {"attention"}
    other = {"m.blocks.0.mix": "GatedMLP", "m.blocks.0.mix.a": "Linear"}
    assert {role.kind for role in roles(shapes, other).values()} == {"mlp"}


def test_lora_parameters_belong_to_the_module_that_they_adapt() -> None:
    model = get_peft_model(tiny("opt"), LoraConfig(r=4, target_modules=["q_proj", "fc1", "fc2"]))
    found = roles(shapes_of(model))
    kinds = {(role.module, role.kind, role.layer) for role in found.values()}
    assert kinds == {
        (f"{module}.lora_{side}", kind, layer)
        for module, kind in (("q_proj", "attention"), ("fc1", "mlp"), ("fc2", "mlp"))
        for side in "AB"
        for layer in (0, 1)
    }


def test_experts_of_their_own_are_one_module_and_steps_of_a_sequence_are_not() -> None:
    shapes = {}
    for layer in range(2):
        for expert in range(3):
            shapes[f"layers.{layer}.moe.experts.{expert}.w1.weight"] = (8, 4)
            shapes[f"layers.{layer}.moe.experts.{expert}.w2.weight"] = (4, 8)
        shapes[f"layers.{layer}.ffn.0.weight"] = (8, 4)
        shapes[f"layers.{layer}.ffn.2.weight"] = (4, 8)
    assert matrices_by_kind(shapes) == {"mlp": "w1 w2 ffn.0 ffn.2"}


def test_the_layers_are_the_largest_of_several_stacks() -> None:
    shapes = {f"vision.encoder.layers.{i}.attn.qkv.weight": (6, 2) for i in range(9)}
    shapes |= {f"language.layers.{i}.self_attn.q_proj.weight": (20, 20) for i in range(2)}
    found = roles(shapes)
    assert {role.layer for name, role in found.items() if name.startswith("vision")} == {None}
    assert {role.layer for name, role in found.items() if name.startswith("language")} == {0, 1}


def test_a_model_without_layers_has_none() -> None:
    assert {role.layer for role in roles({"weight": (3, 4), "bias": (3,)}).values()} == {None}
