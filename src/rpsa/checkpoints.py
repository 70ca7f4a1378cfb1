"""Models and adapters read whole, or refused: libraries fill what a checkpoint lacks with random numbers, and go on."""

from collections.abc import Iterable
from typing import Any

from rpsa.artifacts import reading
from rpsa.errors import RPSAError


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
    refuse_misfits(called, info["missing_keys"], info["unexpected_keys"])
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise RPSAError(
            f"{called}: the checkpoint's {name!r} is {tuple(stored)}, its config makes it {tuple(wanted)}"
        )
    return model


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
