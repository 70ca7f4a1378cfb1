"""Mistakes in a recipe, each as one line: the field's path, what is wrong, the nearest valid name or value.

Pydantic's errors in our own words; values that TRL's and PEFT's config classes do not admit; and sources, names that
stand for something outside of a recipe (models, problems, safety data, tasks, files), of which there is none.
"""

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

_BEFORE = {  # by today's name the one before transformers 5.20
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def installed_names(settings: Mapping[str, Any], config: type) -> dict[str, Any]:
    """`settings` with today's names replaced by older ones where the dataclass `config` has only those."""
    known = {field.name for field in fields(config)}
    return {_BEFORE.get(key, key) if key not in known else key: value for key, value in settings.items()}


# What people call a setting, where no likeness of letters would find it.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
    "max_seq_length": "max_length",
    "gradient_clipping": "max_grad_norm",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
}
_GONE = {
    "judge_traces": "gone; thoughts are judged by themselves, beside the answers, unless judge_thoughts is false",
}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the valid names where none is near."""
    names = list(valid)
    if (other := _OTHER_NAMES.get(name)) in names:
        return f"; did you mean '{other}'?"
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; valid: {', '.join(names)}" if len(names) <= 12 else ""


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One `path: problem` line for each error that pydantic found in a `model`."""
    return [f"{_path(e['loc'])}: {_problem(dict(e), model)}" for e in error.errors(include_url=False)]


def dataclass_problems(path: str, values: Mapping[str, Any], config: type) -> Iterator[str]:
    """The keys of `values` that are not fields of the dataclass `config`, and values that its types do not admit."""
    hints = get_type_hints(config)
    known = [field.name for field in fields(config)]
    for key, value in values.items():
        if key not in known:
            yield f"{path}.{key}: unknown key of {config.__name__}{did_you_mean(key, known)}"
        elif not _admits(hints[key], value):
            yield f"{path}.{key}: {_wrong_value(hints[key], value)}"


def _path(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "recipe"


def _problem(error: dict[str, Any], model: type[BaseModel]) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden" and error["loc"] == ("alternatives",):
        return "not a section; a method has them: matrix.methods.NAME.alternatives"
    if kind == "extra_forbidden" and error["loc"][-1] in _GONE:
        return _GONE[error["loc"][-1]]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(error['loc'][-1]), _keys_at(model, error['loc'][:-1]))}"
    if kind == "missing":
        return "missing"
    if kind == "literal_error":
        valid = re.findall(r"'([^']+)'", context["expected"]) or [context["expected"]]
        hint = did_you_mean(value, valid) if isinstance(value, str) else f"; valid: {', '.join(valid)}"
        return f"{value!r} is not a valid value{hint}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return _out_of_bounds(value, f"{words} {_number(context[key])}", _field_at(model, error["loc"]))
    if kind == "string_pattern_mismatch":
        return f"{value!r} does not match {context['pattern']}"
    if kind == "too_short":
        return "empty; name at least one"
    if kind == "finite_number":
        return f"{value!r} is not a finite number"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, not {value!r}"
    return str(error["msg"])


def _out_of_bounds(value: Any, bound: str, field: FieldInfo | None) -> str:
    limits = {
        name: getattr(m, name)
        for m in (field.metadata if field else ())
        for name in ("ge", "le")
        if hasattr(m, name)
    }
    if len(limits) == 2:
        return f"{value!r} is not between {_number(limits['ge'])} and {_number(limits['le'])}"
    return f"{value!r} is not {bound}"


def _number(bound: Any) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    found: Any = model
    for part in loc:
        found = _inside(found, part)
    return list(found.model_fields) if _is_model(found) else []


def _field_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> FieldInfo | None:
    found: Any = model
    for part in loc[:-1]:
        found = _inside(found, part)
    return found.model_fields.get(str(loc[-1])) if _is_model(found) else None


def _inside(annotation: Any, part: int | str) -> Any:
    """What type lies at `part` of a model, a mapping or a list; None for anything else."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(part))
        annotation = field.annotation if field else None
    elif get_args(annotation):
        annotation = get_args(annotation)[-1]
    options = [option for option in get_args(annotation) if option is not types.NoneType]
    return options[0] if _is_union(annotation) else annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _admits(hint: Any, value: Any) -> bool:
    try:
        _admitting(hint).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@cache
def _admitting(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_as_written(hint))


def _as_written(hint: Any) -> Any:
    """The type of what YAML can say: an enum is one of its values, a config class a mapping."""
    if _is_union(hint):
        options = get_args(hint)
        # `SchedulerType | str` means one of the enum's values, written as text.
        has_enum = any(isinstance(option, type) and issubclass(option, Enum) for option in options)
        return Union[tuple(_as_written(o) for o in options if not (has_enum and o is str))]  # noqa: UP007
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Literal[tuple(member.value for member in hint)]
    if get_origin(hint) is list:
        return list[_as_written(get_args(hint)[0])]  # type: ignore[misc]
    if get_origin(hint) is Literal or hint in (Any, None, types.NoneType, float, int, bool, str, list):
        return hint
    return dict


def _wrong_value(hint: Any, value: Any) -> str:
    names = list(_choices(hint))
    if names and isinstance(value, str):
        return f"{value!r} is not a valid value{did_you_mean(value, names)}"
    return f"expected {' or '.join(dict.fromkeys(_words(hint)))}, not {value!r}"


def _choices(hint: Any) -> Iterator[str]:
    if isinstance(hint, type) and issubclass(hint, Enum):
        yield from (str(member.value) for member in hint)
    elif get_origin(hint) is Literal:
        yield from (str(option) for option in get_args(hint))
    elif _is_union(hint):
        for option in get_args(hint):
            yield from _choices(option)


def _words(hint: Any) -> Iterator[str]:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if _is_union(hint):
        for option in get_args(hint):
            yield from _words(option)
    elif hint in (None, types.NoneType):
        yield "null"
    elif hint in simple:
        yield simple[hint]
    elif get_origin(hint) is list or hint is list:
        yield "a list"
    elif get_origin(hint) is Literal:
        yield ", ".join(repr(option) for option in get_args(hint))
    else:
        yield "a mapping"


_TASKS = Path(__file__).parents[1] / "evaluation" / "tasks"  # a file for each, and for each group
_TINY_PROBLEMS = ("add", "chain", "sort", "program", "stack", "walk", "all")  # the tiny world loads torch
# What comes with the package, by kind. Anything else is a file, a folder or a Hugging Face id.
SHIPPED = {
    "model": tuple(f"tiny:{base}" for base in range(6)),
    "problems": ("tiny", *(f"tiny:{part}" for part in _TINY_PROBLEMS)),
    "safety": ("tiny:refusals", "tiny:balanced", "tiny:answers", "self"),
    "prompts": ("tiny",),
    "rows": ("tiny",),
    "task": ("tiny", *sorted(path.stem for path in _TASKS.glob("*.yaml"))),
}
FETCHED = ("smollm2",)
"""Folders that `rpsa fetch` makes, under the names that recipes have for them."""
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_DATASET = re.compile(_HUB_ID.pattern + r"(:\w[\w.%:+\[\]-]*)?")
"""As `rpsa.rows.read_rows` takes it: with a split, of which there may be a part."""
_FILE = (".json", ".jsonl", ".csv", ".gz", ".parquet", ".yaml", ".txt")


def source_problem(kind: str, source: str) -> str | None:
    """What is wrong with a source, or None. Asks the disk, never the network."""
    shipped = SHIPPED[kind]
    if not source.strip():
        return "empty; name one"
    if source in shipped:
        return None
    if Path(source).exists():
        is_ordinary = Path(source).is_file() or Path(source).is_dir()
        return None if is_ordinary else f"{source!r} is neither a file nor a folder"
    is_file = source.endswith(_FILE) or "/" in source
    if Path(source).parts[0] in FETCHED:
        return f"{source!r} is not here; rpsa fetch {Path(source).parts[0]} makes it"
    if source.startswith("tiny") or (kind == "task" and not is_file):
        return f"{source!r} is unknown{did_you_mean(source, shipped)}"
    path = Path(source)
    inside_a_folder = path.parent != Path(".") and path.parent.exists()
    hub = _HUB_ID if kind == "model" else _DATASET
    if kind == "task" or inside_a_folder or source.endswith(_FILE) or not hub.fullmatch(source):
        return f"no such file or folder: {source!r}{_nearest(path)}"
    return None


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if folder != path.parent:
        return f"; there is no {path.parent}"
    hint = did_you_mean(path.name, (p.name for p in folder.iterdir()))
    return hint if "did you mean" in hint else ""
