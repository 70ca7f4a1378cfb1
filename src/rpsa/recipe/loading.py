"""Loading of recipes: from a file and the command line's overrides to a checked `Recipe`.

YAML is read without its traps: duplicate keys are errors, `1e-3` is a number, `no` and `on` are words. What must
not get into a recipe, which is stored with every result and shown in every report, is refused: secrets, and what is
neither text nor a number.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rpsa.artifacts import atomic_write, folder_name
from rpsa.errors import RPSAError
from rpsa.recipe.checks import recipe_problems
from rpsa.recipe.problems import did_you_mean, validation_problems
from rpsa.recipe.schema import Recipe
from rpsa.text import SECRET_IN_QUERY


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core scalars in place of YAML 1.1's."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [c if c != "\0" else "" for c in _first]
    )
# PyYAML's own constructor reads 010 as octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document. Raises `RPSAError` as `where:line: what`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise RPSAError(f"{where}:{line}: {problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # numbers of thousands of digits among them
        raise RPSAError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RPSAError(f"{where}: not readable as YAML: nested too deeply") from error


_MOST_VALUES = 100_000  # a few aliases of YAML can stand for billions
_SECRET_KEY = re.compile(
    r"(?:hub|hf|push_to_hub|auth|use_auth|access|api|bearer|wandb|id)?_?token|.*api_?key|.*passw(?:or)?d|.*secret"
    r"|.*credentials?|authorization|.*(?:private|secret|access|account|auth|wandb|ssh|gpg)[_-]?key",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    rf"://[^/\s]*@|{SECRET_IN_QUERY}"
    r"|\b(?:hf_|sk-|gh[oprsu]_|github_pat_|glpat-|gsk_|xai-|nvapi-|pplx-|xox[abprs]-|AIza)[A-Za-z0-9_-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[A-Za-z0-9_-]{8,}\.eyJ|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:Bearer|Basic) [A-Za-z0-9._~+/-]{16,}"
)
"""As those who give them out write them: Hugging Face, OpenAI, GitHub, GitLab, Groq, xAI, NVIDIA, Slack, Google, AWS"""


def hygiene_problems(raw: dict[str, Any]) -> Iterator[str]:
    """One `path: problem` line for each value that has no place in a recipe; a secret itself is not repeated."""
    for number, (path, value) in enumerate(_values(raw, "", 0)):
        if number > _MOST_VALUES:
            yield f"{path.partition('.')[0]}: more than {_MOST_VALUES:,} values; does it contain itself?"
            return
        key = path.rpartition(".")[2]
        if _SECRET_VALUE.search(path):
            yield f"{path.partition('.')[0]}: one of its keys is a secret, which is not written into a recipe"
        elif _is_odd(path) or (isinstance(value, str) and _is_odd(value)):
            yield f"{path!a}: holds a control character"
        elif _is_secret(key, value):
            yield (
                f"{path}: a secret is not written into a recipe, which is stored with every result: "
                f"set {_variable(path)} in the environment"
            )
        elif not isinstance(value, str | bool | int | float | None):
            yield f"{path}: is {type(value).__name__}; a recipe holds text, numbers, lists and mappings"


def _values(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """All values that are not lists or mappings, with their paths."""
    if depth > 50:
        yield path, object()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, path, depth + 1)
    else:
        yield path, value


def _is_odd(text: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _is_secret(key: str, value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    return bool(_SECRET_KEY.fullmatch(key) or _SECRET_VALUE.search(value))


def _variable(path: str) -> str:
    if "judge" in path:
        return "RPSA_JUDGE_API_KEY"
    return "HF_TOKEN" if "train." in path or path.endswith("hf_token") else "it"


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), first: Callable[[Recipe], None] | None = None
) -> Recipe:
    """Read a recipe, put `section.key=value` overrides in, and check all of it, the files it names included.

    `first` is called before the settings of TRL and PEFT are checked, which takes seconds to import.

    Raises `RPSAError` with one line: the file, the field's path, what is wrong, the nearest valid name or value.
    """
    path = Path(path)
    origins = _Origins(path.name)
    raw = _read_extended(path, path.name, origins)
    for override in overrides:
        _override(raw, override)
        origins.replace(override.partition("=")[0].strip(), None, path.name)
    if problem := next(hygiene_problems(raw), None):
        raise _as_error(origins, [problem])
    raw = _interpolate(raw, raw.get("data_dir"), origins, "")
    # `report:` with nothing below it means the section's defaults.
    return _checked({key: value for key, value in raw.items() if value is not None}, origins, first)


def _checked(
    raw: dict[str, Any], origins: "_Origins", first: Callable[[Recipe], None] | None = None
) -> Recipe:
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _as_error(origins, validation_problems(error, Recipe)) from None
    if first:
        first(recipe)
    if problems := list(recipe_problems(recipe)):
        raise _as_error(origins, problems)
    return recipe


def load_sweep(
    path: Path | str, over: Sequence[str], overrides: Sequence[str] = (), folder: Path | None = None
) -> Recipe:
    """A recipe with a section `sweeps` in place of its matrix: its methods at every value of some settings.

    The untouched model stays in the matrix, since the Safety Tax Rate compares with it. What the recipe's own
    `matrix.grid` varies is varied still.

    Args:
        over: `section.key=value,value` or `section.key=[value, value]`.
        folder: where the run writes; default: `sweeps/RECIPE/KEYS`.

    Raises:
        RPSAError: as `load_recipe`; or a setting cannot be read, or comes twice.
    """
    path = Path(path)
    recipe = load_recipe(path, overrides)
    axes = {**recipe.matrix.grid, **parse_over(over, overrides)}
    name = "-".join(key.rpartition(".")[2] for key in axes)
    folder = folder or Path("sweeps") / folder_name(path.stem) / name
    methods = {
        key: one.model_dump(mode="json", exclude_unset=True) for key, one in recipe.matrix.methods.items()
    }
    untouched = {key: one for key, one in methods.items() if one["paradigm"] == "none"}
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    raw["matrix"] = raw.get("matrix", {}) | {"methods": untouched or {"original": {}}, "grid": {}}
    trained = {key: one for key, one in methods.items() if key not in untouched}
    raw["sweeps"] = raw.get("sweeps", {}) | {name: {"methods": trained, "over": axes}}
    raw["output_dir"] = str(folder)
    origins = _Origins(path.name)
    if problem := next(hygiene_problems(raw), None):
        raise _as_error(origins, [problem])
    return _checked(raw, origins)


def parse_over(over: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The swept settings in the order written.

    Raises:
        RPSAError: one cannot be read, or comes twice.
    """
    axes: dict[str, list[Any]] = {}
    fixed = {setting.partition("=")[0].strip() for setting in overrides}
    for setting in over:
        key, _, text = (part.strip() for part in setting.partition("="))
        if not key or not text:
            raise RPSAError(f"--over {setting}: write it as section.key=value,value")
        if key in axes:
            raise RPSAError(f"--over {setting}: {key} is swept already; give all its values at once")
        if key in fixed:
            raise RPSAError(f"--over {setting}: {key} is set for all points, too; leave one of the two out")
        values = parse_yaml(text if text.startswith("[") else f"[{text}]", f"--over {key}")
        if not values:
            raise RPSAError(f"--over {key}: give at least one value")
        axes[key] = values
    return axes


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML that `load_recipe` reads back as it is; defaults are left out."""
    atomic_write(path, as_yaml(recipe.model_dump(mode="json", exclude_unset=True)))


def as_yaml(raw: dict[str, Any]) -> str:
    """As `parse_yaml` reads it."""
    text: str = yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_raw(path: Path) -> dict[str, Any]:
    """What a recipe and those that it extends say, laid over each other and not checked."""
    return _read_extended(path, path.name, _Origins(path.name))


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would read as a number, or as another kind of value."""


def _quoted_where_needed(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        is_plain = yaml.load(text, _Loader) == text
    except yaml.YAMLError:
        is_plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _quoted_where_needed)


class _Origins:
    """Which file each setting of a recipe stands in, by its dotted path, where a recipe extends another."""

    def __init__(self, main: str) -> None:
        self.main = main
        self._files: dict[str, str] = {}

    def replace(self, path: str, value: Any, file: str) -> None:
        """What `path` held is gone; it and all below it now stand in `file`."""
        self._files = {at: name for at, name in self._files.items() if not f"{at}.".startswith(f"{path}.")}
        self._add(path, value, file)

    def merge(self, path: str, file: str) -> None:
        """`file` has something to say about the mapping at `path`; what it holds stays where it is."""
        self._files[path] = file

    def _add(self, path: str, value: Any, file: str) -> None:
        self._files[path] = file
        for key, item in value.items() if isinstance(value, dict) else ():
            self._add(f"{path}.{key}", item, file)

    def __getitem__(self, path: str) -> str:
        while path and path not in self._files:
            path = path.rpartition(".")[0]
        return self._files.get(path, self.main)


def _read_extended(
    path: Path, name: str, origins: _Origins, above: tuple[tuple[Path, str], ...] = ()
) -> dict[str, Any]:
    """A file laid over the one that it `extends`, if any, and so on down the chain.

    `name` is what messages call the file; `above` are the files that led here, with their names.
    """
    raw = parse_yaml(_read(path, above[-1][1] if above else None), name)
    if not isinstance(raw, dict):
        raise RPSAError(
            f"{name}: expected a mapping with keys such as {', '.join(list(Recipe.model_fields)[:5])}"
        )
    base = raw.pop("extends", None)
    if base is None and not above:
        return raw
    if problem := next(hygiene_problems(raw), None):
        raise RPSAError(f"{name}: {problem}")
    if base is None:
        return _lay_over({}, raw, origins, name)
    if not isinstance(base, str) or not base:
        raise RPSAError(f"{name}: extends: expected the path of another recipe, not {base!r}")
    chain = (*above, (path.resolve(), name))
    base_path, base_name = path.parent / base, os.path.normpath(Path(name).parent / base)
    if base_path.resolve() in (file for file, _ in chain):
        circle = " -> ".join([*(one for _, one in chain), base_name])
        raise RPSAError(f"{name}: extends: a recipe cannot extend itself: {circle}")
    return _lay_over(_read_extended(base_path, base_name, origins, chain), raw, origins, name)


def _lay_over(
    below: dict[str, Any], above: dict[str, Any], origins: _Origins, name: str, at: str = ""
) -> dict[str, Any]:
    """`above` over `below`: mappings are merged, all else is replaced, and null removes what is below."""
    merged = dict(below)
    for key, value in above.items():
        path, under = f"{at}.{key}" if at else key, below.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            origins.merge(path, name)
            merged[key] = _lay_over(under, value, origins, name, path)
            continue
        origins.replace(path, value, name)
        merged[key] = value
        if value is None and under is not None:
            del merged[key]
    return merged


def _read(path: Path, extended_by: str | None) -> str:
    who = f"{extended_by}: extends: {os.path.normpath(path)}" if extended_by else str(path)
    if path.is_dir():
        recipes = ", ".join(sorted(p.name for p in path.glob("*.yaml"))) or "no .yaml file"
        raise RPSAError(f"{who}: is a folder, not a recipe; it holds {recipes}")
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RPSAError(
            f"{who}: no such recipe{did_you_mean(path.name, siblings) if siblings else ''}"
        ) from None
    except UnicodeDecodeError as error:
        raise RPSAError(f"{who}: not a text file in UTF-8 (byte {error.start})") from None


def _as_error(origins: _Origins, problems: list[str]) -> RPSAError:
    """The first of `path: problem` lines with the file that it is about; the others name theirs where it is another."""
    files = [origins[problem.partition(": ")[0]] for problem in problems]
    others = [
        problem if file == files[0] else f"{file}: {problem}"
        for file, problem in zip(files[1:], problems[1:], strict=True)
    ]
    rest = f" ({len(others)} more: {'; '.join(others)})" if others else ""
    return RPSAError(f"{files[0]}: {problems[0]}{rest}")


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RPSAError(f"{key!r}: write an override as section.key=value")
    if parts == ["extends"]:
        raise RPSAError("extends: stands in a recipe's file, not on the command line")
    value = parse_yaml(text, key)
    matrix = raw.get("matrix")
    if isinstance(matrix, dict):
        if parts[:2] == ["matrix", "grid"] and len(parts) > 2:
            parts = ["matrix", "grid", ".".join(parts[2:])]
        if isinstance(matrix.get("methods"), list) and len(parts) > 2:
            matrix["methods"] = dict.fromkeys(matrix["methods"])
        _make_way(matrix, parts)
    place = raw
    for part in parts[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise RPSAError(f"{key.strip()!r}: {part!r} is not a section of the recipe")
    place[parts[-1]] = value


def _make_way(matrix: dict[str, Any], parts: list[str]) -> None:
    """Take a setting of the command line out of the places of the recipe that would win over it."""
    if parts[0] not in ("train", "lora", "align", "safety") or len(parts) != 2:
        return
    section, key = parts
    grid = matrix.get("grid")
    if isinstance(grid, dict):
        grid.pop(f"{section}.{key}", None)
    paradigms = matrix.get("paradigms")
    for own in paradigms.values() if isinstance(paradigms, dict) else ():
        if isinstance(own, dict) and isinstance(own.get(section), dict):
            own[section].pop(key, None)


def _interpolate(value: Any, data_dir: Any, origins: _Origins, path: str) -> Any:
    if isinstance(value, dict):
        below = f"{path}." if path else ""
        return {key: _interpolate(item, data_dir, origins, f"{below}{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, data_dir, origins, path) for item in value]
    if isinstance(value, str):
        for variable in re.findall(r"\$\{(.*?)\}", value):
            name = origins[path]
            if variable != "data_dir":
                raise RPSAError(f"{name}: ${{{variable}}} is unknown; the only variable is ${{data_dir}}")
            if not isinstance(data_dir, str):
                raise RPSAError(f"{name}: data_dir: missing, and {value!r} needs it; set data_dir=FOLDER")
            value = value.replace("${data_dir}", data_dir)
    return value
