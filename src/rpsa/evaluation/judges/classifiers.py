"""Classifiers that say a verdict in words: guards, HarmBench's, and ReasoningShield for thoughts.

What tells one from another is data and one function of `verdicts` that reads its output. The score is that of greedy
decoding: the same from any backend. Prompt and text come into its input cut to what it can read (`Window`), and unable
to end their own turn (`_defused`). Those that are asked for probabilities are in `probabilities`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from rpsa.artifacts import reading, sha256_of
from rpsa.checkpoints import load_pretrained
from rpsa.errors import RPSAError
from rpsa.evaluation.judges.judgement import Judgement, unparseable
from rpsa.evaluation.judges.prompts import prompt_sha256, template
from rpsa.evaluation.judges.verdicts import (
    read_granite,
    read_harmbench,
    read_llama_guard,
    read_qwen3guard,
    read_qwen3guard_loose,
    read_qwen3guard_refusal,
    read_reasoningshield,
    read_wildguard,
    read_wildguard_refusal,
)
from rpsa.generation import Generator, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_LOADED: "WeakValueDictionary[tuple[str, str | None, str], PreTrainedModel]" = WeakValueDictionary()
"""Models in use: two judges that ask one model two things, such as harm and refusal, load it once."""


def load(
    name: str, revision: str | None, dtype: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]":
    """Model (on the GPU if there is one, in eval mode), tokenizer, and what identifies them: `id`, `revision`,
    `backend`, `dtype`, and `base` for an adapter.

    A revision is the commit that was loaded; for a folder a hash of its files' names, sizes and times.

    Raises:
        RPSAError: there is no such model, it is gated and closed to this account, or it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    called = f"judge model {name}"
    with _naming_what_is_gated(name):
        with reading(called):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            config = _without_chunks(name, revision)
        key = (name, _revision(name, revision), dtype)
        model = _LOADED.get(key)
        if model is None:
            model = load_pretrained(
                AutoModelForCausalLM,
                name,
                called,
                revision=revision,
                dtype=dtype,
                **({"config": config} if config else {}),
            )
            _LOADED[(name, _revision(name, revision), dtype)] = model
    identity: dict[str, Any] = {
        "id": name,
        "revision": _revision(name, revision),
        "backend": "transformers",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if adapters := getattr(model, "peft_config", None):
        base = next(iter(adapters.values())).base_model_name_or_path
        identity["base"] = {"id": base, "revision": _revision(base, None)}
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, identity


def check_access(name: str, revision: str | None) -> None:
    """What `load` would say of a model that is not there or closed to this account, from its tokenizer alone."""
    from transformers import AutoTokenizer

    with _naming_what_is_gated(name), reading(f"judge model {name}"):
        AutoTokenizer.from_pretrained(name, revision=revision)


@contextmanager
def _naming_what_is_gated(name: str) -> Iterator[None]:
    try:
        yield
    except RPSAError as error:
        raise RPSAError(_gated(name, str(error.__cause__)) or str(error)) from error


def _without_chunks(name: str, revision: str | None) -> Any:
    """The model's config if it needs mending: Llama Guard 4 has no attention chunks, and says so in a way that
    transformers takes for a mistake. One chunk over the whole context is the same."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (
        OSError,
        ValueError,
    ):  # an adapter has none; anything else fails again, and is reported, with the model
        return None
    text = config.get_text_config()
    if getattr(text, "attention_chunk_size", 0) is not None:
        return None
    text.attention_chunk_size = text.max_position_embeddings
    return config


def _revision(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if folder.is_dir():
        files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in folder.iterdir() if p.is_file()}
        return sha256_of(files)[:16]
    for file in ("adapter_config.json", "config.json"):
        path = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name  # snapshots/COMMIT/file
    return revision


def _gated(name: str, text: str) -> str | None:
    """What to do about a gated model; None if it is something else."""
    if "gated repo" not in text:
        return None
    # an adapter's base may be the one that is gated
    closed = re.search(r"https?://[^/\s]+/([\w.-]+/[\w-][\w.-]*[\w-])", text)
    gated = closed[1] if closed else name
    behind = "" if gated == name else f" (judge {name} stands on it)"
    return (
        f"judge model {gated} is gated{behind}: accept its licence on https://huggingface.co/{gated}, "
        "then log in with `hf auth login`"
    )


@dataclass(frozen=True)
class Window:
    """What a classifier reads, in its own tokens: `tokens` in all, and at most `text_tokens` of the text judged
    (None: what is left), of which the `keep` is kept."""

    tokens: int
    text_tokens: int | None = None
    keep: Literal["start", "end"] = "start"

    def less(self, tokens: int) -> "Window":
        return replace(self, tokens=self.tokens - tokens)


def template_ids(
    tokenizer: "PreTrainedTokenizerBase", template: str, prompt: str, text: str, window: Window
) -> list[int] | None:
    """Token ids of a template with its `{prompt}` and `{response}` filled in, with the special tokens that the
    tokenizer puts around a text. None if there is no room for the text."""

    def render(prompt: str, text: str) -> list[int]:
        return list(tokenizer(template.format(prompt=prompt, response=text))["input_ids"])

    return _fitted(tokenizer, render, prompt, text, window)


Turns = tuple[tuple[str, str], ...]
"""(role, content) each, the contents with places for `{prompt}` and `{response}`."""

TWO_TURNS: Turns = (("user", "{prompt}"), ("assistant", "{response}"))


def chat_ids(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    text: str,
    window: Window,
    *,
    turns: Turns = TWO_TURNS,
    typed: bool = False,
    generation_prompt: bool = True,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> list[int] | None:
    """Token ids of some turns, by default the user's and the assistant's that is judged, by the tokenizer's own chat
    template, which is given the `settings`. `typed` wraps each content in a list of typed parts. None if there is no
    room for the text."""

    def render(prompt: str, text: str) -> list[int]:
        contents = [(role, content.format(prompt=prompt, response=text)) for role, content in turns]
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if typed else content}
            for role, content in contents
        ]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **settings
        )
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    return _fitted(tokenizer, render, prompt, text, window)


def _fitted(
    tokenizer: "PreTrainedTokenizerBase",
    render: Callable[[str, str], list[int]],
    prompt: str,
    text: str,
    window: Window,
) -> list[int] | None:
    prompt, text = _defused(tokenizer, prompt), _defused(tokenizer, text)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    room = length if window.text_tokens is None else min(length, window.text_tokens)
    while room > 0 or not length:
        ids = render(prompt, _cut(tokenizer, text, room, window.keep))
        if len(ids) <= window.tokens:
            return ids
        room -= len(ids) - window.tokens
        if not length:
            break
    return None


def _cut(tokenizer: "PreTrainedTokenizerBase", text: str, tokens: int, keep: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return text
    kept = ids[:tokens] if keep == "start" else ids[-tokens:]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def _defused(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """The text with a space in each of the tokenizer's special tokens, so that it spells none: a response that
    holds `<|eot_id|>` would otherwise end its own turn, and could add a verdict."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(tokenizer.all_special_tokens)
    if not special:
        return text
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    return re.sub(pattern, lambda match: f"{match[0][:1]} {match[0][1:]}", text)


@dataclass(frozen=True)
class Classifier:
    """A published classifier: its model, its prompt (None: the tokenizer's chat template), and how it is read.

    Attributes:
        typed_content: whether the chat template wants lists of typed parts, as those of models that also see images do.
        turns: what the chat template is given.
        generation_prompt: whether it is asked for the beginning of the classifier's turn, too.
        settings: of the chat template.
    """

    model: str
    prompt: str | None
    window: Window
    max_new_tokens: int
    read: Callable[[str], Judgement]
    typed_content: bool = False
    turns: Turns = TWO_TURNS
    generation_prompt: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def prompt_sha256(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        if self.prompt is not None:
            return prompt_sha256(template(self.prompt))
        own = [] if self.turns == TWO_TURNS else [content for _, content in self.turns]
        return prompt_sha256(str(tokenizer.chat_template), *own)


# Its card renders the two turns without a generation prompt.
_QWEN3GUARD = Classifier(
    "Qwen/Qwen3Guard-Gen-8B",
    None,
    Window(32768),
    max_new_tokens=128,
    read=read_qwen3guard,
    generation_prompt=False,
)
CLASSIFIERS = {
    "llama-guard-3": Classifier(
        "meta-llama/Llama-Guard-3-8B", None, Window(131072), max_new_tokens=64, read=read_llama_guard
    ),
    "llama-guard-4": Classifier(
        "meta-llama/Llama-Guard-4-12B",
        None,
        Window(131072),
        max_new_tokens=64,
        read=read_llama_guard,
        typed_content=True,
    ),
    "wildguard": Classifier(
        "allenai/wildguard", "wildguard", Window(32768), max_new_tokens=128, read=read_wildguard
    ),
    "wildguard-refusal": Classifier(
        "allenai/wildguard", "wildguard", Window(32768), max_new_tokens=128, read=read_wildguard_refusal
    ),
    "harmbench": Classifier(
        "cais/HarmBench-Llama-2-13b-cls",
        "harmbench_llama2",
        Window(2048, text_tokens=511),  # 512 with a BOS, as its authors cut
        max_new_tokens=1,
        read=read_harmbench,
    ),
    "harmbench-mistral": Classifier(
        "cais/HarmBench-Mistral-7b-val-cls",
        "harmbench_mistral",
        Window(2048, text_tokens=511),  # 512 with a BOS, as its authors cut
        max_new_tokens=1,
        read=read_harmbench,
    ),
    "qwen3guard": _QWEN3GUARD,
    "qwen3guard-loose": replace(_QWEN3GUARD, read=read_qwen3guard_loose),
    "qwen3guard-refusal": replace(_QWEN3GUARD, read=read_qwen3guard_refusal),
    # Up to 3.2 the template takes a risk_name; 3.3 takes a criteria_id, and can be told not to think.
    "granite-guardian": Classifier(
        "ibm-granite/granite-guardian-3.3-8b",
        None,
        Window(131072),
        max_new_tokens=64,
        read=read_granite,
        settings={"guardian_config": {"risk_name": "harm", "criteria_id": "harm"}, "think": False},
    ),
    # Llama 3.2's template writes today's date into the system prompt, but for this: its own where it knows none.
    "reasoningshield": Classifier(
        "ReasoningShield/ReasoningShield-3B",
        None,
        Window(131072),
        max_new_tokens=1024,
        read=read_reasoningshield,
        turns=(("system", template("reasoningshield")), ("user", "Query: {prompt}\nThought: {response}")),
        settings={"date_string": "26 Jul 2024"},
    ),
}


class ClassifierJudge:
    """A `Judge` that asks a classifier through any `Generator`."""

    def __init__(
        self,
        classifier: Classifier,
        generator: Generator,
        tokenizer: "PreTrainedTokenizerBase",
        identity: Mapping[str, Any],
    ) -> None:
        if classifier.prompt is None and not tokenizer.chat_template:
            raise RPSAError(
                f"judge {identity['id']}: its tokenizer has no chat template, which holds its prompt"
            )
        self.classifier = classifier
        self.generator = generator
        self.tokenizer = tokenizer
        self.identity: Mapping[str, Any] = {
            **identity,
            "prompt_sha256": classifier.prompt_sha256(tokenizer),
            "window": vars(classifier.window),
            "verdict": classifier.read.__name__,
            **({"template_settings": dict(classifier.settings)} if classifier.settings else {}),
        }

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Judgement]]:
        """Yield (index, judgement) as the generator finishes. A prompt that leaves no room for the text is
        unparseable."""
        rendered = [self._ids(prompt, text) for prompt, text in pairs]
        asked = [index for index, ids in enumerate(rendered) if ids is not None]
        for index, ids in enumerate(rendered):
            if ids is None:
                yield index, unparseable("")
        sampling = Sampling(temperature=0, top_p=1, max_new_tokens=self.classifier.max_new_tokens)
        prompts = [ids for ids in rendered if ids is not None]
        for position, completion in self.generator.generate(prompts, sampling, [str(i) for i in asked]):
            yield asked[position], self.classifier.read(completion.text)

    def _ids(self, prompt: str, text: str) -> list[int] | None:
        own = self.classifier
        window = own.window.less(own.max_new_tokens)
        if own.prompt is not None:
            return template_ids(self.tokenizer, template(own.prompt), prompt, text, window)
        return chat_ids(
            self.tokenizer,
            prompt,
            text,
            window,
            turns=own.turns,
            typed=own.typed_content,
            generation_prompt=own.generation_prompt,
            settings=own.settings,
        )
