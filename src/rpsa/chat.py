"""Chat templates: rendering through a model's own, with one BOS, one open thought, the thought kept.

Only the user turn goes through the template. The assistant turn is tokenised here, because templates of
reasoning models delete the thought from it, and a run on their output would train on the bare refusal.
What a thought looks like (`rpsa.thought`) is read from the template where it is not given.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rpsa.errors import RPSAError
from rpsa.thought import HARMONY, KNOWN, NO_THOUGHT, THINK, ThoughtFormat, opened_by, said_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100

# The switch of Llama-Nemotron, a system prompt. Other switches are variables of the template.
_SWITCH = "detailed thinking "


@dataclass(frozen=True)
class Example:
    """A training sequence: `labels[i]` is `input_ids[i]` on the response and -100 on the prompt, unshifted.

    `truncated` says that `max_length` cut the end off, the EOS at least.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def read_thought(tokenizer: "PreTrainedTokenizerBase") -> ThoughtFormat:
    """How the model that a tokenizer belongs to sets its thoughts apart, by its chat template.

    A template says so where it ends a prompt by opening a thought, writes a system prompt about it, or takes
    thoughts out of earlier turns. One that does nothing of the kind, or closes the thought at once, is that of a model
    without thoughts. A model that can think when asked to (Qwen3) thinks.

    Raises RPSAError if there is no chat template, or it fails.
    """
    template = _template(tokenizer)
    system = f"{_SWITCH}on" if _SWITCH in template else ""
    prompt = apply_template(tokenizer, "Hello.", system, thinks=True)
    found = opened_by(prompt)
    if found is None and not prompt.rstrip().endswith(tuple(known.close for known in KNOWN)):
        found = said_in(template + prompt)
    return replace(found, system=system) if found else NO_THOUGHT


def thought_format(
    tokenizer: "PreTrainedTokenizerBase", said: Literal["auto", "none"] | ThoughtFormat = "auto"
) -> ThoughtFormat:
    """The format that was said, made to fit the template; "auto" is `read_thought`'s.

    Raises RPSAError as `read_thought` does, and if the template contradicts what was said: it opens another thought,
    or one for a model that is to have none.
    """
    if said == "auto":
        return read_thought(tokenizer)
    template = _template(tokenizer)
    if said == "none":
        wanted = ThoughtFormat(system=f"{_SWITCH}off" if _SWITCH in template else "")
    else:
        known = next((one for one in KNOWN if one.is_like(said)), said)
        wanted = replace(known, system=said.system)
    opened = opened_by(apply_template(tokenizer, "Hello.", wanted.system, wanted.has_thoughts))
    if not wanted.has_thoughts and said_in(template) == HARMONY:
        opened = HARMONY  # its answers, too, are in a channel
    if opened is not None and not opened.is_like(wanted):
        raise RPSAError(
            f"thought: {wanted}, but by its chat template {tokenizer.name_or_path!r} writes {opened}: take auto, or "
            "give the system prompt that switches thoughts off, {system: ...}"
        )
    return wanted


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    thought: ThoughtFormat | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of the user turn and the generation prompt, ending with one open thought if the model has thoughts.

    A template that opens none (Qwen3 leaves that to the model) gets the opening appended. BOS is added only where
    the template writes none and the tokenizer puts one before plain text.

    Args:
        thought: the model's format; None: `read_thought`'s.
        earlier: turns before it, each what the user and what the assistant said; templates may take thoughts out.

    Raises RPSAError if the tokenizer has no chat template or no way to spell the opening, or if the prompt holds
    words of the format or BOS.
    """
    ids, _ = _open_prompt(tokenizer, prompt, thought or read_thought(tokenizer), earlier)
    return ids


def render_beginning(
    tokenizer: "PreTrainedTokenizerBase",
    thinking: str,
    answer: str | None = None,
    thought: ThoughtFormat | None = None,
) -> list[int]:
    """Token ids of a response's beginning, to stand behind `render_prompt`'s.

    It ends inside the thought, or with an `answer` after the thought was closed. A model without thoughts begins its
    answer with either.

    Raises RPSAError if the tokenizer cannot spell it.
    """
    thought = thought or read_thought(tokenizer)
    pieces = (thinking.strip(),) if answer is None else thought.pieces(thinking, answer)
    ids = _encode_pieces(tokenizer, *pieces)
    if not ids or _bare(_decode(tokenizer, ids)) != _bare("".join(pieces)):
        raise RPSAError(
            f"tokenizer {tokenizer.name_or_path!r} cannot spell {_short(' '.join(pieces).strip())}: give other words"
        )
    return ids


def render_example(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    response: str,
    max_length: int | None,
    thought: ThoughtFormat | None = None,
) -> Example:
    """A prompt and its whole response, as `split_response` reads it, and EOS.

    A response in another format than the model's is written in the model's; for a model without thoughts the thought
    is left out. `max_length` (tokens, prompt included; None for no limit) keeps the beginning. If the prompt alone
    fills it, no label is left. `thought` is as for `render_prompt`.

    Raises RPSAError as `render_prompt` and `split_response` do, if the response has no answer for a model without
    thoughts, if the tokenizer has no EOS, or if the labels do not decode to the thought, its end and the answer.
    """
    thought = thought or read_thought(tokenizer)
    prompt_ids, opening = _open_prompt(tokenizer, prompt, thought)
    split = split_response(response, thought)
    as_written = thought.split(response) == split
    before, close, after = (split[0], thought.close, split[1]) if as_written else thought.pieces(*split)
    if any(mark in before or mark in after for mark in thought.marks):
        raise RPSAError(f"response {_short(response)} has more than one thought: keep one")
    if not thought.has_thoughts and not after:
        raise RPSAError(f"response {_short(response)} has no answer, and the model has no thoughts")
    response_ids = _encode_pieces(tokenizer, before.removeprefix(opening), close, after)
    _check_response(tokenizer, response_ids, before + close + after)
    ids = [*prompt_ids, *response_ids, _eos(tokenizer)]
    labels = [IGNORED_LABEL] * len(prompt_ids) + ids[len(prompt_ids) :]
    truncated = max_length is not None and len(ids) > max_length
    return Example(ids[:max_length], labels[:max_length], truncated)


def split_response(response: str, thought: ThoughtFormat = THINK) -> tuple[str, str]:
    """Thought and answer of a response in the format given, in `<think>thought</think>answer`, or in a known format.

    The opening may be missing in the first two. For a model without thoughts the thought may be missing: it is empty
    then.

    Raises RPSAError if there is not exactly one thought.
    """
    written = format_of_response(response, thought)
    if written is None and not thought.has_thoughts:
        return "", response
    found = written and written.split(response)
    if found:
        return found
    if written is None or written.close.strip() not in response:
        close = (written or THINK).close.strip()
        raise RPSAError(f"response {_short(response)} has no {close}: give it with its thought")
    raise RPSAError(f"response {_short(response)} has more than one thought: keep one")


def format_of_response(response: str, thought: ThoughtFormat = THINK) -> ThoughtFormat | None:
    """The format that a response is written in, the one given before others; None if it shows no thought."""
    body = response.lstrip()
    known = [one for one in dict.fromkeys((thought, *KNOWN)) if one.has_thoughts]
    begun = [one for one in known if body.startswith(one.open.strip())]
    ended = [one for one in known if one.close.strip() in response]
    whole = [one for one in begun if one in ended]
    partly = [one for one in (*ended, *begun) if one in (thought, THINK)]
    return next(iter((*whole, *partly)), None)


def _open_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    thought: ThoughtFormat,
    earlier: Sequence[tuple[str, str]] = (),
) -> tuple[list[int], str]:
    """Prompt ids, and the whitespace that they already hold after the opening of the thought."""
    _check_prompt(tokenizer, prompt, thought)
    text = apply_template(tokenizer, prompt, thought.system, thought.has_thoughts, earlier)
    ids = _encode_pieces(tokenizer, text)
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in ids and tokenizer("")["input_ids"][:1] == [bos]:
        ids.insert(0, bos)
    if bos not in (None, tokenizer.eos_token_id) and ids[:2] == [bos, bos]:
        raise RPSAError(
            f"prompt {_short(prompt)} begins with 2 {tokenizer.bos_token!r}, not one: see to the chat template"
        )
    opening = thought.open.strip()
    space = text[len(text.rstrip()) :]
    if not text.rstrip().endswith(opening):
        ids += _encode_pieces(tokenizer, thought.open)
        space = thought.open[len(thought.open.rstrip()) :]
    if not _bare(_decode(tokenizer, ids)).endswith(_bare(opening)):
        raise RPSAError(f"tokenizer {tokenizer.name_or_path!r} cannot spell {opening!r}: add it as a token")
    return ids, space


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise RPSAError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template"
        )
    return str(tokenizer.get_chat_template())


def apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    system: str,
    thinks: bool,
    earlier: Sequence[tuple[str, str]] = (),
) -> str:
    """The template's text of a system prompt (empty: none), earlier turns, a user turn and the generation prompt.

    Raises RPSAError if there is no template, or it fails.
    """
    _template(tokenizer)
    turns = [{"role": "system", "content": system}] if system else []
    for asked, said in earlier:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    try:
        rendered = tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinks,  # Qwen3, GLM, SmolLM3, Nemotron 3, Gemma 4, ...
            thinking=thinks,  # Granite, DeepSeek-V3.1
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise RPSAError(f"the chat template of {tokenizer.name_or_path!r} failed: {error}") from error
    return str(rendered)


def _encode_pieces(tokenizer: "PreTrainedTokenizerBase", *pieces: str) -> list[int]:
    """Ids of each piece by itself, joined: no glued words in a word-level tokenizer, no new BPE merges."""
    return [
        i
        for piece in pieces
        if piece
        for i in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, thought: ThoughtFormat) -> None:
    """A word of the format, or BOS, would be the template's own once it is tokenised."""
    words = list(thought.marks)
    if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
        words.append(str(tokenizer.bos_token))
    if held := [word for word in words if word in prompt]:
        raise RPSAError(f"prompt {_short(prompt)} holds {held[0]!r}: take these words out of the prompt")


def _check_response(tokenizer: "PreTrainedTokenizerBase", ids: list[int], response: str) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and bos != tokenizer.eos_token_id and bos in ids:
        raise RPSAError(f"response {_short(response)} contains {tokenizer.bos_token!r}: take it out")
    if _bare(_decode(tokenizer, ids)) != _bare(response):
        raise RPSAError(
            f"response {_short(response)} does not survive tokenisation by {tokenizer.name_or_path!r}: "
            f"it decodes to {_short(_decode(tokenizer, ids))}"
        )


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise RPSAError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token: set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _bare(text: str) -> str:
    """What must survive: all but whitespace and Unicode composition, which tokenizers may normalise."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
