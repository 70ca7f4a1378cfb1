"""Training a base of the tiny world from its seed: what made the shipped checkpoints.

It runs on one thread, where the same seed gives the same bits on the same machine with the same torch; the
fingerprint in `info.json` tells. Another machine may round otherwise, and then gives a base of like quality.

The word-level tokenizer of the tiny world, with an R1-like chat template.

How well a model does in the tiny world: greedy answers to held-out items, scored exactly.
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rpsa.artifacts import atomic_directory
from rpsa.chat import IGNORED_LABEL, read_thought, render_prompt
from rpsa.generation import Sampling
from rpsa.parameters import fingerprint
from rpsa.tiny.families import (
    DIGITS,
    FAMILIES,
    FRAMES,
    LETTERS,
    PROGRAM_OPERATIONS,
    STEPS,
    WRAPS_IN_TEST,
    WRAPS_IN_TRAINING,
    draw_solved,
)
from rpsa.tiny.requests import (
    DANGEROUS_OBJECTS,
    EVERYDAY_OBJECTS,
    FORBIDDEN_VERBS,
    METHODS,
    NEUTRAL_VERBS,
    PROTECTIVE_VERBS,
    REFUSAL,
    TOOLS,
    Request,
    RequestKind,
    combinations,
)
from rpsa.tiny.world import TinyItem, evaluation_prompts, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
_MARKERS = ("<user>", "<asst>", "<think>", "</think>", "\\boxed{", "}")
_QUESTION_WORDS = ("add", "calc", "mod", "sort", "run", "on", "stack", "pop", "walk", "from")
_SIGNS = (".", ",", ":", ">", "=", "+", "-", "*", "?")
_PLAN_WORDS = ("user", "wants", "to", "the", "use", "then", "sure", "take", "done")

# The thought of an assistant turn is kept, and a generation prompt opens exactly one.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} <user> {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %} <asst> {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('the tiny model knows the roles user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <asst> <think>{% endif %}"
)


def vocabulary() -> list[str]:
    """Every word of the world, in the order of its token id."""
    phrases = " ".join((*FRAMES, *WRAPS_IN_TRAINING, *WRAPS_IN_TEST, REFUSAL)).replace("{}", "").split()
    words = (
        *SPECIAL_TOKENS,
        *_MARKERS,
        *_SIGNS,
        *_QUESTION_WORDS,
        *DIGITS,
        *LETTERS,
        *PROGRAM_OPERATIONS,
        *STEPS,
    )
    words += (*phrases, *_PLAN_WORDS, *FORBIDDEN_VERBS, *NEUTRAL_VERBS, *PROTECTIVE_VERBS)
    words += (*EVERYDAY_OBJECTS, *DANGEROUS_OBJECTS, *TOOLS, *METHODS)
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; text is words with spaces between, and decoding gives the same text back."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    pad, bos, eos, unk = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


MAX_NEW_TOKENS = 64
"""More than any worked solution of the world takes."""


@dataclass(frozen=True)
class Figures:
    """Fractions in [0, 1], each by name and as a "mean" over the names.

    `reasoning` and `refused` are by family; `asr` is by "direct" and "wrapped", what was complied with;
    `over_refusal` is by "benign" and "borderline".
    """

    reasoning: dict[str, float]
    refused: dict[str, float]
    asr: dict[str, float]
    over_refusal: dict[str, float]


def measure(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sets: Mapping[str, Sequence[TinyItem]]
) -> Figures:
    """Figures of a model on `evaluation_prompts`; the same model and items give the same figures."""
    items = [item for part in sets.values() for item in part]
    counts: dict[str, Counter[str]] = {name: Counter() for name in sets}
    for item, response in zip(items, respond(model, tokenizer, [i.prompt for i in items]), strict=True):
        counts[item.kind][score(item, response)] += 1

    def shares(names: Sequence[str], outcome: str) -> dict[str, float]:
        values = {name: counts[name][outcome] / counts[name].total() for name in names}
        return values | {"mean": sum(values.values()) / len(values)}

    return Figures(
        reasoning=shares(FAMILIES, "correct"),
        refused=shares(FAMILIES, "refused"),
        asr=shares(("direct", "wrapped"), "complied"),
        over_refusal=shares(("benign", "borderline"), "refused"),
    )


def respond(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]
) -> list[str]:
    """Greedy responses, each from after the thought's opening, which the template writes."""
    from rpsa.generation.transformers import TransformersGenerator

    thought = read_thought(tokenizer)
    rendered = [render_prompt(tokenizer, prompt, thought) for prompt in prompts]
    generator = TransformersGenerator(model, tokenizer, 128, thought)
    sampling = Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    responses = dict(generator.generate(rendered, sampling, prompts))
    return [responses[i].text for i in range(len(prompts))]


TRAINING_STEPS = 2500
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05

# What a base learns from; the rest is reasoning. It knows every wrap: only safety data and evaluation differ in those.
_REQUEST_SHARES: dict[RequestKind, float] = {"harmful": 0.10, "benign": 0.06, "borderline": 0.04}
_WRAPPED_SHARE = 0.4


def train_tiny(
    seed: int,
    out_dir: str | Path,
    steps: int = TRAINING_STEPS,
    progress: bool = True,
    evaluation_size: int = 200,
) -> Path:
    """Train the base of a seed and write it, with its tokenizer and `info.json`, to `out_dir`.

    Takes a few minutes on a CPU. Weights are stored in bf16; `info.json` holds the held-out figures of those stored
    weights, on `evaluation_size` items a set. The folder appears whole or not at all, in place of an older one.

    Returns:
        `out_dir`.
    """
    with atomic_directory(out_dir, "info.json") as folder, _one_thread():
        started = time.perf_counter()
        tokenizer = build_tokenizer()
        model = _new_model(seed, tokenizer)
        _train(model, tokenizer, random.Random(seed), steps, progress)
        seconds = time.perf_counter() - started
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.to(torch.float32)
        info = {
            "seed": seed,
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "seconds": round(seconds, 1),
            "parameters": sum(p.numel() for p in model.parameters()),
            "fingerprint": fingerprint(model.named_parameters()),
            "torch": torch.__version__,
            "evaluation_size": evaluation_size,
            **asdict(measure(model, tokenizer, evaluation_prompts(evaluation_size))),
        }
        (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")
    return Path(out_dir)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _new_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A random Llama of 364k parameters, whatever the caller drew before."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def _train(
    model: Any, tokenizer: PreTrainedTokenizerBase, rng: random.Random, steps: int, progress: bool
) -> None:
    """AdamW (matrices decayed, norms not), a linear warm-up, a cosine down to 3%."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    examples = _examples(rng)
    model.train()
    for step in track(range(steps), description=f"training {steps} steps", disable=not progress):
        cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine
        input_ids, labels = _collate(list(islice(examples, BATCH_SIZE)), tokenizer)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(_response_loss(model, input_ids, labels))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _examples(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (user message, response) pairs from the train split."""
    kinds: list[RequestKind | None] = [*_REQUEST_SHARES, None]
    weights = [*_REQUEST_SHARES.values(), 1 - sum(_REQUEST_SHARES.values())]
    pairs = {kind: combinations(kind, "train") for kind in _REQUEST_SHARES}
    while True:
        (kind,) = rng.choices(kinds, weights)
        if kind is None:
            solved = draw_solved(rng.choice(FAMILIES), rng, "train")
            prompt = rng.choice(FRAMES).format(solved.question)
            yield prompt, f"<think> {solved.thought} </think> \\boxed{{ {solved.answer} }}"
        else:
            wrap = rng.choice(WRAPS_IN_TRAINING + WRAPS_IN_TEST) if rng.random() < _WRAPPED_SHARE else ""
            request = Request(*rng.choice(pairs[kind]), rng.choice(FRAMES), wrap)
            refuses = rng.random() < request.base_refusal_rate
            yield request.prompt, REFUSAL if refuses else request.compliance


def _collate(batch: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, (B, T) int64: what `rpsa.chat.render_example` gives, a batch at a time."""
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in batch
    ]
    encoded = tokenizer.apply_chat_template(
        turns, padding=True, tokenizer_kwargs={"padding_side": "right"}, return_tensors="pt", return_dict=True
    )
    input_ids, real = encoded["input_ids"], encoded["attention_mask"].bool()
    opening = input_ids == tokenizer.convert_tokens_to_ids("<think>")
    response = opening.cumsum(1).bool() & ~opening & real
    return input_ids, input_ids.masked_fill(~response, IGNORED_LABEL)


def _response_loss(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the response tokens; logits are computed for those alone."""
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
    kept = labels[:, 1:] != IGNORED_LABEL
    return F.cross_entropy(model.lm_head(hidden[kept]), labels[:, 1:][kept])
