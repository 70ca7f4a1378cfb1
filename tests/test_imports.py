"""What `import rpsa` costs and what it offers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rpsa

SOURCE = Path(rpsa.__file__).parent
HEAVY = {"transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "lm_eval", "pydantic", "rich"}


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


def imports_of(path: Path) -> set[str]:
    """First-party rooms that a module imports, lazily or not, outside of TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rpsa."):
            found.add(node.module.split(".")[1])
    return found


LAYERS = [
    {"errors", "text"},
    {"sharding"},
    {"parameters", "artifacts", "rows", "evaluation_mode", "prompts", "thought", "http"},
    {"fisher"},
    {"freezing", "alternatives"},
    {"chat", "answers", "checkpoints"},
    {"generation"},
    {"reference"},
    {"training"},
    {"tiny"},
    {"evaluation"},
    {"recipe"},
    {"analysis"},
    {"report"},
    {"pipeline"},
    {"plan"},
    {"cli"},
    {"__main__"},
]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_go_down(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    level = next(i for i, rooms in enumerate(LAYERS) if room in rooms)
    allowed = {room}.union(*LAYERS[:level])
    assert imports_of(path) <= allowed


@pytest.mark.parametrize("room", ["fisher", "freezing"])
def test_the_core_knows_torch_and_nothing_of_hugging_face(room: str) -> None:
    for path in (SOURCE / room).glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & HEAVY, path.name
