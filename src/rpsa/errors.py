"""Errors: the one exception that reaches users, and what is wrong with a value's type, in one line."""

import inspect
import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class RPSAError(ValueError):
    """A mistake that the user can mend.

    The message is one line: what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.
    """


class Diverged(RPSAError):
    """A training run ended in weights that are not numbers. Another start with the same settings ends there, too."""


def check_type(name: str, value: Any, kind: Any, give: str) -> None:
    """Raise RPSAError unless `value` is of `kind`; `give` says what belongs there."""
    if not isinstance(value, kind):
        found = "None" if value is None else f"of type {type(value).__name__}"
        raise RPSAError(f"{name} is {found}: give {give}")


def check_fields(config: Any, prefix: str = "", of: type | None = None, but: str = "") -> None:
    """Raise RPSAError for the first field of a dataclass that has not the type of its annotation.

    What is annotated with more than numbers, text, lists of them, choices and None is not looked at. A truth value
    is not a number.

    Args:
        of: a base of the dataclass whose fields alone are meant, `but` for one.
    """
    hints = get_type_hints(type(config))
    for name in inspect.get_annotations(of) if of else hints:
        value, hint = getattr(config, name), hints[name]
        if name != but and not _fits(value, hint):
            choices = [
                str(one) for part in _parts(hint) if get_origin(part) is Literal for one in get_args(part)
            ]
            give = f"one of {', '.join(choices)}" if choices else _described(hint)
            raise RPSAError(f"{prefix}{name} is {value!r}: give {give}")


def refuse_text_for_numbers(config: Any) -> None:
    """Raise RPSAError for a dataclass's field that holds text, and by its annotation numbers or truth values only."""
    hints = get_type_hints(type(config))
    for name, hint in hints.items():
        if isinstance(getattr(config, name, None), str) and set(_parts(hint)) <= {
            int,
            float,
            bool,
            type(None),
        }:
            raise RPSAError(f"{name} is {getattr(config, name)!r}: give {_described(hint)}")


_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    type(None): "None",
}


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    parts = _parts(hint)
    if len(parts) > 1:
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) in (tuple, list):
        return isinstance(value, tuple | list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    return hint not in _WORDS or isinstance(value, hint)


def _described(hint: Any) -> str:
    words = [
        f"a tuple of {_WORDS[get_args(part)[0]].split(' ', 1)[-1]}s"
        if get_origin(part) in (tuple, list)
        else _WORDS[part]
        for part in _parts(hint)
    ]
    return " or ".join(words)
