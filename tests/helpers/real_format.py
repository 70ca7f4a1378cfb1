"""A model in real formats: a Qwen2 with random weights, a BPE trained on the real files, R1's kind of template."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from helpers.paths import DATA_DIR

MATH500 = DATA_DIR / "math500" / "math500.jsonl"
AIME24 = DATA_DIR / "aime24" / "aime24.jsonl"
STAR1 = DATA_DIR / "star1" / "STAR-1.json"
STRONGREJECT = DATA_DIR / "strongreject" / "strongreject_dataset.csv"

# The thought of an assistant turn is deleted, and a generation prompt opens one, as DeepSeek-R1-Distill does it.
R1_STYLE_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}"
    "<|assistant|>{{ m.content.split('</think>') | last }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

# The model leaves the thought to open by itself, unless it is told not to think, as Qwen3 does it.
QWEN3_STYLE_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

_WORDS = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def missing_real_data() -> str | None:
    """Why tests on real files must be skipped; None if all files are there."""
    absent = [path for path in (MATH500, AIME24, STAR1, STRONGREJECT) if not path.is_file()]
    return f"real data not found: {', '.join(map(str, absent))}" if absent else None


def real_texts() -> Iterator[str]:
    """Problems, solutions, questions, chains of thought and requests of the real files."""
    for path in (MATH500, AIME24):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["problem"]
            yield row["solution"]
    for row in json.loads(STAR1.read_text(encoding="utf-8")):
        yield row["question"]
        yield row["response"]
    with STRONGREJECT.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["forbidden_prompt"]


def byte_level_tokenizer(
    texts: Iterator[str], vocab_size: int, template: str = R1_STYLE_TEMPLATE, bos: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; with `bos` it has one, and puts it before plain text as DeepSeek's tokenizers do."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", *(["<|begin|>"] if bos else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    markers = ["<|user|>", "<|assistant|>", "<|turn|>", "<think>", "</think>"]
    bpe.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in markers])
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", bpe.token_to_id("<|begin|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>" if bos else None,
        eos_token="<|end|>",
        unk_token="<|end|>",  # never needed; Qwen2's class would add one of its own on loading
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def small_qwen2(vocab_size: int, seed: int = 0, **changes: int) -> Qwen2ForCausalLM:
    """About 0.2M parameters at a vocabulary of 2,000, tied embeddings, grouped-query attention."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    config = Qwen2Config(vocab_size=vocab_size, **{**sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def build_real_format_model(out_dir: Path, vocab_size: int = 2000, seed: int = 0) -> Path:
    """Write such a model with its tokenizer to `out_dir`, to be loaded by AutoModel and AutoTokenizer."""
    tokenizer = byte_level_tokenizer(real_texts(), vocab_size)
    model = small_qwen2(len(tokenizer), seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir
