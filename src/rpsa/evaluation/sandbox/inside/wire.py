"""Values as text and back, so that a solution and its tests share no object.

Only plain data crosses: what comes out of `decode` is made of the built-in types themselves (or numpy's arrays,
`collections`, `decimal`, `fractions`, `datetime`), whatever class went in, so its `==` is Python's own. What has
no plain form arrives as `Opaque`. Nothing that is decoded is ever called, imported by name, or unpickled.
"""

import base64
import itertools
import json
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

_LONGEST_ITERATOR = 1_000_000
_SMALLEST, _LARGEST = -(1 << 63), (1 << 63) - 1  # decimal text of long integers takes quadratic time
_PLAIN = {type(None), bool, float, str}
_NESTING = {list, dict}
_NUMPY_TYPE = re.compile(r"[<>|=][biufcSUMm]\d+(?:\[\w+\])?")


class Opaque:
    """Stands for an object that has no plain form; equal to itself alone."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"<{self.type_name} object>"


def dumps(value: Any) -> bytes:
    """One line of ASCII JSON with its line break. Raises RecursionError for what is nested too deeply."""
    return json.dumps(encode(value), separators=(",", ":")).encode() + b"\n"


def loads(line: bytes) -> Any:
    """What `dumps` was given. Raises ValueError for anything that `dumps` does not write."""
    try:
        return decode(json.loads(line))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"no value on the wire: {type(error).__name__}") from error


def encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if _SMALLEST <= value <= _LARGEST else {"int": hex(value)}
    if kind is list:
        return _items(value)
    if kind.__module__ == "numpy":
        return _encode_numpy(value)
    for base, tag, form in _FORMS:
        if isinstance(value, base):
            return {tag: form(value)}
    if isinstance(value, Iterator):
        return {"iterator": _items(itertools.islice(value, _LONGEST_ITERATOR))}
    for module, name, tag, form in _LIBRARY_FORMS:  # only if loaded: else no such object can be there
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            return {tag: form(value)}
    return {"opaque": f"{kind.__module__}.{kind.__qualname__}"}


def decode(value: Any) -> Any:
    if type(value) is list:
        return value if _NESTING.isdisjoint(map(type, value)) else [decode(item) for item in value]
    if type(value) is dict:
        [(tag, content)] = value.items()
        return _MAKE[tag](content)
    return value


def _items(values: Any) -> list[Any]:
    items = list(values)
    kinds = set(map(type, items))  # long flat lists are common, and need no look at each item
    if kinds <= _PLAIN or (kinds == {int} and min(items) >= _SMALLEST and max(items) <= _LARGEST):
        return items
    return [encode(item) for item in items]


def _pairs(values: Any) -> list[Any]:
    return [[encode(key), encode(item)] for key, item in values.items()]


def _base64(value: Any) -> str:
    return base64.b64encode(bytes(value)).decode()


def _encode_numpy(value: Any) -> Any:
    numpy = sys.modules["numpy"]
    if not isinstance(value, numpy.ndarray | numpy.generic):
        return {"opaque": f"numpy.{type(value).__name__}"}
    shape = list(value.shape) if isinstance(value, numpy.ndarray) else None
    if value.dtype.hasobject:
        return {"objects": [shape, _items(value.ravel().tolist())]}
    if not _NUMPY_TYPE.fullmatch(value.dtype.str):
        return {"opaque": f"numpy array of {value.dtype}"}
    return {"numpy": [value.dtype.str, shape, _base64(value.tobytes())]}


def _decode_numpy(content: Any) -> Any:
    import numpy

    dtype, shape, data = content
    if not _NUMPY_TYPE.fullmatch(dtype):
        raise ValueError(f"no such numpy type: {dtype[:40]}")
    array = numpy.frombuffer(base64.b64decode(data), dtype=dtype).copy()
    return array[0] if shape is None else array.reshape(shape)


def _decode_objects(content: Any) -> Any:
    import numpy

    shape, items = content
    array = numpy.empty(len(items), dtype=object)
    array[:] = decode(items)
    return array.reshape(shape)


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)


def _fraction(parts: Any) -> Any:
    from fractions import Fraction

    return Fraction(int(parts[0], 16), int(parts[1], 16))


def _date(parts: Any) -> Any:
    import datetime

    name, content = parts
    if name == "timedelta":
        return datetime.timedelta(*content)
    if name not in ("date", "datetime", "time"):
        raise ValueError("no such date type")
    return getattr(datetime, name).fromisoformat(content)


def _timedelta(value: Any) -> Any:
    return ["timedelta", [value.days, value.seconds, value.microseconds]]


# Subclasses before what they derive from; subclasses that are not named here arrive as their base.
_FORMS: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (int, "int", lambda value: hex(int.__index__(value))),
    (float, "float", lambda value: float.__float__(value)),
    (str, "str", lambda value: str.__str__(value)),
    (list, "list", _items),
    (tuple, "tuple", _items),
    (set, "set", _items),
    (frozenset, "frozenset", _items),
    (Counter, "Counter", _pairs),
    (OrderedDict, "OrderedDict", _pairs),
    (defaultdict, "defaultdict", _pairs),
    (dict, "dict", _pairs),
    (deque, "deque", _items),
    (bytes, "bytes", _base64),
    (bytearray, "bytearray", _base64),
    (complex, "complex", lambda value: [value.real, value.imag]),
    (range, "range", lambda value: _items([value.start, value.stop, value.step])),
    (slice, "slice", lambda value: _items([value.start, value.stop, value.step])),
    (type({}.keys()), "keys", _items),
    (type({}.values()), "values", _items),
    (type({}.items()), "items", lambda value: _pairs(dict(value))),
    (type(...), "ellipsis", lambda value: None),
]
_LIBRARY_FORMS: list[tuple[str, str, str, Callable[[Any], Any]]] = [
    ("decimal", "Decimal", "decimal", str),
    ("fractions", "Fraction", "fraction", lambda value: [hex(value.numerator), hex(value.denominator)]),
    ("datetime", "datetime", "date", lambda value: ["datetime", value.isoformat()]),
    ("datetime", "date", "date", lambda value: ["date", value.isoformat()]),
    ("datetime", "time", "date", lambda value: ["time", value.isoformat()]),
    ("datetime", "timedelta", "date", _timedelta),
]


def _dict(pairs: Any) -> dict[Any, Any]:
    return {decode(key): decode(item) for key, item in pairs}


_MAKE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "str": str,
    "list": decode,
    "tuple": lambda items: tuple(decode(items)),
    "set": lambda items: set(decode(items)),
    "frozenset": lambda items: frozenset(decode(items)),
    "Counter": lambda pairs: Counter(_dict(pairs)),
    "OrderedDict": lambda pairs: OrderedDict(_dict(pairs)),
    "defaultdict": lambda pairs: defaultdict(None, _dict(pairs)),
    "dict": _dict,
    "deque": lambda items: deque(decode(items)),
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*decode(parts)),
    "slice": lambda parts: slice(*decode(parts)),
    "keys": lambda items: dict.fromkeys(decode(items)).keys(),
    "values": lambda items: dict(enumerate(decode(items))).values(),
    "items": lambda pairs: _dict(pairs).items(),
    "ellipsis": lambda _: ...,
    "iterator": lambda items: iter(decode(items)),
    "numpy": _decode_numpy,
    "objects": _decode_objects,
    "decimal": _decimal,
    "fraction": _fraction,
    "date": _date,
    "opaque": lambda name: Opaque(str(name)[:100]),
}
