"""Checkpoints read whole, or refused: libraries fill what is missing with random numbers, and go on."""

import logging
from collections.abc import Iterable
from typing import Any

from rpsa.artifacts import reading
from rpsa.errors import RPSAError

log = logging.getLogger(__name__)


def load_pretrained(auto: Any, location: str, called: str, **settings: Any) -> Any:
    """`auto.from_pretrained(location, **settings)`, of a class such as `AutoModelForCausalLM`.

    Args:
        called: what messages call it: "model tiny:0".

    Raises:
        RPSAError: there is no such model, it cannot be read, or its tensors are not those of its config.
    """
    with reading(called):
        model, info = auto.from_pretrained(
            location, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    aside = {name for name in info["unexpected_keys"] if not info["missing_keys"] and _is_aside(name, model)}
    if aside:
        log.warning(
            "%s: %d tensors of its checkpoint are left out, such as %r: parts that its language model does not have",
            called,
            len(aside),
            min(aside),
        )
    refuse_misfits(called, info["missing_keys"], info["unexpected_keys"] - aside)
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise RPSAError(
            f"{called}: the checkpoint's {name!r} is {tuple(stored)}, its config makes it {tuple(wanted)}"
        )
    return model


def _is_aside(name: str, model: Any) -> bool:
    """Whether a tensor without a place belongs to another part than the language model: a vision tower, a value head.

    In a numbered layer of the model, or in a module that it has, it says that the config is not the checkpoint's.
    """
    module, *parts = model, *name.split(".")
    for part in parts[:-1]:
        if part.isdecimal():
            return False
        module = getattr(module, part, None)
        if module is None:
            return True
    return False


def load_adapter(model: Any, location: str, called: str, *, is_trainable: bool = False) -> Any:
    """A PEFT adapter on its base.

    Raises:
        RPSAError: there is no adapter, it cannot be read, or its tensors are not those that it has on this base.
    """
    from peft import PeftModel

    with reading(called):
        with_adapter = PeftModel.from_pretrained(model, location, is_trainable=is_trainable)
    check_adapter(with_adapter, location, called)
    return with_adapter


def check_adapter(model: Any, location: str, called: str) -> None:
    """Load the active adapter's weights, which are in the model already, once more: PEFT then tells what did not fit.

    Raises:
        RPSAError: as `load_adapter`.
    """
    adapter = model.active_adapters[0]
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    with reading(called):
        result = model.load_adapter(location, adapter, is_trainable=trainable)
    refuse_misfits(called, result.missing_keys, result.unexpected_keys)


def refuse_misfits(called: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise RPSAError, naming the first of each, unless there are none."""
    lists = {
        ("lacks", "random numbers"): sorted(missing),
        ("holds", "left out"): sorted(unexpected),
    }
    said = [
        f"{verb} {names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''} (which would be {fate})"
        for (verb, fate), names in lists.items()
        if names
    ]
    if said:
        raise RPSAError(
            f"{called}: its checkpoint {' and '.join(said)}: it was cut off, or is another architecture's; fetch or "
            "save it again"
        )
