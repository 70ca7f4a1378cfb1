"""Shipped recipes: those that come with the package, by name, and copies of them to change; examples, too.

A recipe's name is the path below `recipes` without its ending, `tiny/demo`; that of any other file is its path below
`recipes` or `examples`. In a wheel they lie in the package, in a checkout beside `src`.
"""

import ast
import json
import re
from pathlib import Path

from rpsa.artifacts import atomic_write
from rpsa.errors import RPSAError
from rpsa.recipe.loading import as_yaml, read_raw
from rpsa.recipe.problems import did_you_mean

_PACKAGE = Path(__file__).parents[1]
_HOMES = (_PACKAGE, _PACKAGE.parents[1])
_PARTS = ("base", "accelerate")
"""Folders of what recipes are made of."""
_EXAMPLES = (".py", ".ipynb", ".sh", ".yaml")


def _home() -> Path:
    """What they lie below.

    Raises:
        RPSAError: the installation has none.
    """
    found = next((home for home in _HOMES if (home / "recipes/tiny/demo.yaml").is_file()), None)
    if found is None:
        raise RPSAError(f"{_HOMES[0]}: the recipes are missing from this installation; install rpsa again")
    return found


def recipes_folder() -> Path:
    """Where recipes lie. Raises RPSAError if the installation has none."""
    return _home() / "recipes"


def shipped_files() -> dict[str, Path]:
    """What is no recipe, by name: configs of accelerate, scripts, a notebook, files for clusters."""
    accelerate, examples = recipes_folder() / "accelerate", _home() / "examples"
    configs = {f"accelerate/{path.name}": path for path in sorted(accelerate.glob("*.yaml"))}
    paths = [path for path in sorted(examples.rglob("*")) if path.suffix in _EXAMPLES]
    return configs | {path.relative_to(examples).as_posix(): path for path in paths}


def shipped_recipes() -> dict[str, Path]:
    """Every recipe that can be run, by name, in a fixed order."""
    home = recipes_folder()
    paths = {path.relative_to(home).with_suffix("").as_posix(): path for path in sorted(home.rglob("*.yaml"))}
    return {name: path for name, path in paths.items() if name.partition("/")[0] not in _PARTS}


def shipped(name: str) -> Path:
    """The recipe or other file of a name.

    Raises:
        RPSAError: there is none.
    """
    known = shipped_recipes() | shipped_files()
    if name not in known:
        raise RPSAError(f"there is no recipe {name!r}{did_you_mean(name, known)}; see rpsa recipes")
    return known[name]


def said_of(path: Path) -> str:
    """The first sentence of what stands above a recipe, in a script or in a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".ipynb":
        said = "".join(json.loads(text)["cells"][0]["source"]).partition("\n")[2]
    else:
        said = " ".join(line.removeprefix("#").strip() for line in _head(text) if not line.startswith("#!"))
    return re.split(r"(?<=[.:?])\s", " ".join(said.split()), maxsplit=1)[0].rstrip(".:")


def copy_shipped(name: str, target: Path | None = None) -> Path:
    """Write a shipped recipe as one file that stands alone, with what it extends, and what is said above it.

    Any other file is copied as it is. Without a `target` it has the name of what is copied, here.

    Raises:
        RPSAError: there is none of that name, or there is a file already.
    """
    path = shipped(name)
    if target is None:
        target = Path(path.name if Path(name).suffix else f"{name.replace('/', '-')}.yaml")
    if target.exists():
        raise RPSAError(f"{target}: exists already; give another --out, or remove it")
    text = path.read_text(encoding="utf-8")
    if re.search(r"^extends:", text, re.MULTILINE) and name in shipped_recipes():
        text = "".join(f"{line}\n" for line in _head(text)) + as_yaml(read_raw(path))
    atomic_write(target, text)
    return target


def _head(text: str) -> list[str]:
    lines = text.splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def named_recipe(path: Path) -> Path:
    """A file as it is, or the shipped recipe of that name where there is no such file."""
    if path.exists() or path.suffix:
        return path
    return shipped_recipes().get(path.as_posix(), path)
