"""Whether thoughts and the ends of responses reach the model: on its way through TRL data loses both without a word.

The chat templates of reasoning models delete thoughts, so that conversational data trains on bare answers; and
`SFTConfig`'s own `max_length`, 1024, cuts the end of the thought, the answer and EOS off longer responses.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl import SFTTrainer
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from rpsa.chat import format_of_response, read_thought
from rpsa.errors import RPSAError
from rpsa.thought import THINK, ThoughtFormat

log = logging.getLogger(__name__)

LOOKED_AT = 10_000
"""Rows, evenly spaced, that are looked at."""


@dataclass
class _Kept:
    """Counts of rows. `deleted` and `unfinished` are of those `with_thoughts`."""

    rows: int = 0
    with_thoughts: int = 0
    deleted: int = 0
    cut: int = 0
    unfinished: int = 0


def check_kept(trainer: Any, dataset: Any, formatting: Callable[[Any], str] | None = None) -> None:
    """Say in one line, with counts, what is lost of the `dataset` that an SFT trainer has been given.

    Nothing is said of another trainer's data, or of a stream.

    Raises RPSAError if every thought in the data is deleted, or cut before its end.
    """
    if not isinstance(trainer, SFTTrainer) or not hasattr(dataset, "__len__"):
        return
    tokenizer = _tokenizer_of(trainer)
    own = read_thought(tokenizer) if tokenizer.chat_template else THINK
    kept = _Kept()
    for number in range(0, len(dataset), max(1, -(-len(dataset) // LOOKED_AT))):
        row = dict(dataset[number])
        if formatting and "input_ids" not in row:
            row = {trainer.args.dataset_text_field: formatting(row)}
        _count(kept, trainer, own, row)
    lost = []
    if kept.deleted:
        lost.append(
            f"the chat template deletes the thoughts of {kept.deleted} of {kept.rows} examples: train on input_ids and "
            "labels (rpsa.training.safety_data.tokenize_safety_data)"
        )
    if kept.cut:
        lost.append(
            f"max_length {trainer.args.max_length} cuts {kept.cut} of {kept.rows} examples, {kept.unfinished} of them "
            "before the end of the thought: raise max_length"
        )
    if kept.with_thoughts and kept.deleted + kept.unfinished == kept.with_thoughts:
        raise RPSAError(f"no thought in the training data reaches the model: {'; '.join(lost)}")
    if lost and trainer.accelerator.is_main_process:
        log.warning("%s", "; ".join(lost))


def _count(kept: _Kept, trainer: Any, own: ThoughtFormat, row: Mapping[str, Any]) -> None:
    tokenizer = _tokenizer_of(trainer)
    text, thought, is_plain = _read(trainer, tokenizer, own, row)
    is_deleted = _bare(thought) not in _bare(text)
    kept.rows += 1
    kept.with_thoughts += bool(thought)
    kept.deleted += is_deleted
    left = _left(trainer.args, tokenizer, row, text, is_plain)
    if left is not None:
        kept.cut += 1
        kept.unfinished += not is_deleted and _bare(thought) not in _bare(left)


def _read(trainer: Any, tokenizer: Any, own: ThoughtFormat, row: Mapping[str, Any]) -> tuple[str, str, bool]:
    """What TRL makes of a row, the thought of its last response, and whether it is text to be tokenised as such."""
    if "input_ids" in row:
        text = tokenizer.decode(row["input_ids"])
        return text, _thought_in(text, own), False
    row = maybe_convert_to_chatml(row)
    if not is_conversational(row):
        text = row["prompt"] + row["completion"] if "prompt" in row else row[trainer.args.dataset_text_field]
        return text + (tokenizer.eos_token or ""), _thought_in(text, own), True
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    said = [message for message in messages if message["role"] == "assistant"]
    last = said[-1] if said else {}
    apart = next((last[key] for key in ("reasoning_content", "thinking") if last.get(key)), "")
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=trainer.chat_template,
        tokenize=False,
        **(row.get("chat_template_kwargs") or {}),
    )
    return text, apart or _thought_in(str(last.get("content") or ""), own), False


def _left(args: Any, tokenizer: Any, row: Mapping[str, Any], text: str, is_plain: bool) -> str | None:
    """What `max_length` leaves of a text; None if that is all of it. No text has more tokens than bytes, and BOS."""
    limit = args.max_length
    is_split = args.packing and args.packing_strategy != "bfd"  # the rest begins the next sequence
    is_prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if limit is None or is_split or is_prepared or len(text.encode()) < limit:
        return None
    ids = row.get("input_ids") or tokenizer(text, add_special_tokens=is_plain, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return None
    return str(tokenizer.decode(ids[:limit] if args.truncation_mode == "keep_start" else ids[-limit:]))


def _thought_in(text: str, own: ThoughtFormat) -> str:
    """What stands before the end of a thought; empty if none ends."""
    written = format_of_response(text, own)
    if written is None:
        return ""
    before, close, _ = text.rpartition(written.close.strip())
    return before.rpartition(written.open.strip())[2].strip() if close else ""


def _tokenizer_of(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _bare(text: str) -> str:
    return "".join(text.split())
