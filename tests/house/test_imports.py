"""What `import rpsa` costs and what it offers."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import rpsa
from helpers.layers import LAYERS
from helpers.paths import ROOT

SOURCE = Path(rpsa.__file__).parent
HEAVY = {
    *("transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "lm_eval", "pydantic", "rich"),
    "jinja2",
}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_rpsa_imports_nothing_heavy() -> None:
    assert not modules_after("import rpsa") & (HEAVY | {"torch"})
    assert not modules_after("from rpsa import Freezer, FisherDiagonal, estimate_fisher") & HEAVY
    light = "from rpsa import safety_tax_interval, safety_tax_rate"
    assert not modules_after(light) & (HEAVY | {"torch", "numpy", "scipy"})
    assert not modules_after("import rpsa.evaluation.judges") & (HEAVY | {"torch"})


@pytest.mark.parametrize("name", rpsa.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(rpsa, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Frezer'"):
        rpsa.Frezer  # noqa: B018


def imports_of(path: Path, *, types: bool = True) -> set[str]:
    """Our own modules that a module imports, lazily or not; `types`: also in TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for name in found if (module := module_of(name))}


def module_of(name: str) -> str | None:
    """The module of ours that a dotted name is, or is in: `rpsa.chat.read_thought` is in `chat`."""
    parts = name.split(".")
    if parts[0] != "rpsa":
        return None
    for end in range(len(parts), 1, -1):
        place = SOURCE.joinpath(*parts[1:end])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return ".".join(parts[1:end])
    return "__init__"


def our_modules() -> dict[str, Path]:
    paths = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def test_every_form_of_import_is_seen(tmp_path: Path) -> None:
    forms = {
        "import rpsa.chat": {"chat"},
        "import rpsa.chat as talk": {"chat"},
        "from rpsa import chat": {"chat"},
        "from rpsa import Freezer": {"__init__"},
        "from rpsa.fisher import diagonal": {"fisher.diagonal"},
        "from rpsa.fisher.diagonal import FisherDiagonal": {"fisher.diagonal"},
        "def f():\n    from rpsa.recipe import Recipe": {"recipe"},
        "import torch": set(),
    }
    for text, expected in forms.items():
        path = tmp_path / "module.py"
        path.write_text(text)
        assert imports_of(path) == expected, text


def test_imports_only_go_down() -> None:
    """From a room to the rooms below it (tests/helpers/layers.py), whatever the form of the import."""
    for name, path in our_modules().items():
        room = name.split(".")[0]
        if room in ("__init__", "__main__"):
            continue
        level = next((i for i, rooms in enumerate(LAYERS) if room in rooms), None)
        assert level is not None, f"{name}: its room is in no layer"
        rooms = {module.split(".")[0] for module in imports_of(path, types=False)}
        # the package itself is a face: whoever asks it for a name may be asking for anything
        allowed = {room}.union(*LAYERS[:level]) | ({"__init__"} if room == "cli" else set())
        assert rooms <= allowed, f"{name} imports {sorted(rooms - allowed)}"


def test_no_modules_import_each_other() -> None:
    """Nor for their types, nor inside of functions, nor inside one room."""
    graph = {name: imports_of(path) - {name} for name, path in our_modules().items()}
    del graph["__init__"]  # the face of the package, which loads lazily
    left = {name: {other for other in others if other in graph} for name, others in graph.items()}
    while ends := {name for name, others in left.items() if not others}:
        left = {name: others - ends for name, others in left.items() if name not in ends}
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_no_two_modules_have_one_name() -> None:
    names = Counter(path.stem for path in SOURCE.rglob("*.py") if not path.stem.startswith("__"))
    assert {name for name, count in names.items() if count > 1} == set()


def test_no_two_classes_have_one_name() -> None:
    trees = (ast.parse(path.read_text()) for path in SOURCE.rglob("*.py"))
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert {name for name, count in names.items() if count > 1} == set()


def test_no_file_is_longer_than_its_idea() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in our_modules().items()}
    assert {name: lines for name, lines in lengths.items() if lines > 600} == {}


def test_no_test_imports_a_test() -> None:
    """What tests share is in tests/helpers or a fixture."""
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not tests & {part for name in names for part in name.split(".")}, path


@pytest.mark.parametrize("room", ["fisher", "freezing"])
def test_the_core_knows_torch_and_nothing_of_hugging_face(room: str) -> None:
    for path in (SOURCE / room).glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & HEAVY, path.name
