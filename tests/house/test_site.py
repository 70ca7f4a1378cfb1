"""The documentation: it builds, its links lead somewhere, and what it says of commands, settings and code is so."""

import ast
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin
from urllib.parse import unquote, urlsplit

import pytest
import typer
from pydantic_core import PydanticUndefined

from helpers.layers import LAYERS
from helpers.paths import DATA_DIR, ROOT
from helpers.real_format import missing_real_data, real_texts
from rpsa.cli import app
from rpsa.recipe import load_recipe
from rpsa.recipe.methods import WELL_KNOWN
from rpsa.recipe.schema import Recipe
from rpsa.recipe.sections import Alternatives, Section
from rpsa.training.config import RPSAArguments

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = {path.name: path.read_text() for path in (*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md")}


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


class Elements(HTMLParser):
    """Every element's ids, and what it points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag in ("script", "link", "img", "iframe"):
            self.loaded += [values[name] for name in ("href", "src") if name in values]


def test_every_link_and_image_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Elements(path.read_text()) for path in site.glob("*.html")}
    assert {path.stem for path in PAGES} <= {path.stem for path in pages}
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are from the root, wherever that is
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "data"):
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {"__skip"}, f"{path.name}: {link}"


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.glob("*.html"):
        for link in Elements(path.read_text()).loaded:
            parts = urlsplit(link)
            assert (parts.scheme, parts.netloc) == ("", ""), f"{path.name}: {link}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", path.read_text()), path.name


@pytest.mark.parametrize("name", TEXTS)
def test_links_between_files_of_the_repository_lead_somewhere(name: str) -> None:
    folder = DOCS if (DOCS / name).is_file() else ROOT
    prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    for target in re.findall(r"(?:\]\(|^\[[\w-]+\]: )([^)#\s]+)", prose, re.MULTILINE):
        assert "://" in target or (folder / target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_no_page_knows_the_machine_that_it_was_written_on(name: str) -> None:
    assert not re.findall(r"(?<![\w.])/(?:work|home|root|Users|tmp|mnt|workspace)/\S*", TEXTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_no_page_has_a_gap_that_was_to_be_filled(name: str) -> None:
    assert not re.findall(r"^(?:OUTPUT|TODO|TBD|FIXME)\b.*", TEXTS[name], re.MULTILINE)


@pytest.mark.skipif(bool(missing_real_data()), reason=str(missing_real_data()))
def test_no_prompt_of_a_benchmark_is_quoted() -> None:
    prompts = list(real_texts())
    for path in (DATA_DIR / "xstest").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            prompts += [row["prompt"] for row in csv.DictReader(file)]
    pages = {" ".join(runs) for text in TEXTS.values() for runs in shingles(text)}
    for prompt in prompts:
        assert not {" ".join(run) for run in shingles(prompt)} & pages, "a page quotes a benchmark"


def shingles(text: str, length: int = 8) -> Iterator[list[str]]:
    """Runs of eight words, those of a shorter text not among them."""
    words = re.findall(r"[a-z]+", text.lower())
    for start in range(len(words) - length + 1):
        yield words[start : start + length]


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """Every call of rpsa in a shell block, as the words that follow its name."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition(" > ")[0], comments=True)
            if "rpsa" in words and words[0] not in ("git", "cd"):
                yield words[words.index("rpsa") + 1 :]


CALLS = [call for text in TEXTS.values() for call in commands(text)]


def test_the_pages_show_every_command() -> None:
    group: Any = typer.main.get_command(app)
    assert {call[0] for call in CALLS} >= set(group.commands) - {"tasks-path", "tiny"}
    prose = "".join(TEXTS.values())
    assert set(re.findall(r"`rpsa ([a-z][a-z-]*)", prose)) <= set(group.commands)


def examples(group: Any, *above: str) -> Iterator[list[str]]:
    """The example at the end of each command's --help, as its words; a group has none of its own."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from examples(command, *above, name)
        else:
            words = shlex.split(command.epilog or "")
            assert words[: 3 + len(above)] == ["Example:", "rpsa", *above, name]
            yield words[2:]


EXAMPLES = list(examples(typer.main.get_command(app)))


@pytest.mark.parametrize("call", [*CALLS, *EXAMPLES], ids=lambda call: " ".join(call)[:70])
def test_every_command_parses(call: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    with group.make_context("rpsa", list(call)) as context:
        found, command, rest = group.resolve_command(context, [*call])
        assert command is not None
        command.make_context(found, rest, parent=context)


@pytest.mark.parametrize(
    "call", [call for call in CALLS if call[0] in ("run", "plan")], ids=lambda call: " ".join(call)[:70]
)
def test_every_recipe_and_override_is_accepted(call: list[str]) -> None:
    overrides = [word for word in call[2:] if re.match(r"[a-z_.]+=[^$]*$", word)]
    shipped = call[1].startswith("recipes/")
    recipe = ROOT / (call[1] if shipped else "recipes/tiny/demo.yaml")
    overrides = [word.replace("=recipes/", f"={ROOT}/recipes/") for word in overrides]
    if "smoke" not in call[1]:
        assert load_recipe(recipe, [*overrides, *([] if shipped else ["matrix.parallel=1"])]).cells()


# Python


def runnable(text: str) -> list[str]:
    return re.findall(r"<!-- runs -->\n```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if runnable(text)])
def test_the_blocks_that_claim_to_run_run_in_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType(name.removesuffix(".md"))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for block in runnable(TEXTS[name]):
        exec(compile(block, name, "exec"), module.__dict__)
    if name == "library.md":
        report = module.audit.report()
        assert report["frozen_elements_moved"] == 0
        assert sum(interval["end"] - interval["start"] for interval in report["intervals"]) == 12
        audited = [json.loads(path.read_text()) for path in tmp_path.glob("*/rpsa_audit.json")]
        assert [audit["frozen_elements_moved"] for audit in audited] == [0]


@pytest.mark.parametrize("name", TEXTS)
def test_every_python_block_is_python(name: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("name", ["paper-to-code.md", "maintain.md", "README.md"])
def test_every_file_that_a_page_names_is_there(name: str) -> None:
    places = (
        ROOT,
        ROOT / "src/rpsa",
        ROOT / "src",
        *(p.parent for p in (ROOT / "src/rpsa").rglob("__init__.py")),
    )
    named = re.findall(r"`((?:\w[\w-]*/)*\w+\.(?:py|toml|txt|yaml|md))`", TEXTS[name])
    assert len(named) > 10
    assert [file for file in named if not any((place / file).is_file() for place in places)] == []


# Settings


def tables(text: str) -> dict[str, dict[str, str]]:
    """The tables of a page by their heading: the field, and its default as it is written."""
    found: dict[str, dict[str, str]] = {}
    for heading, body in re.findall(r"^### `?([\w ]+)`?\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE):
        found[heading] = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", body, re.MULTILINE))
    return found


def written(value: Any) -> str:
    """A default as the tables write it."""
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, list) and value and isinstance(value[0], str):
        return ", ".join(map(written, value))
    if isinstance(value, Section):
        return str(value.model_dump(exclude_defaults=True))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def sections() -> dict[str, type[Section]]:
    found = {}
    for name, field in Recipe.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found[name] = kind
    return found


def test_the_tables_of_settings_are_the_schema() -> None:
    shown = tables(TEXTS["recipes.md"])
    for name, section in (sections() | {"alternatives": Alternatives}).items():
        if not section.model_fields:
            continue
        fields = section.model_fields
        assert shown[name] == {
            key: written(field.get_default(call_default_factory=True)) for key, field in fields.items()
        }, name
    plain = set(Recipe.model_fields) - set(sections()) - {"train", "lora"}
    assert set(shown["The file"]) == plain


def choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from (value for value in get_args(annotation) if isinstance(value, str))
    for inner in get_args(annotation):
        yield from choices(inner)


def test_every_choice_of_a_setting_is_on_the_page() -> None:
    for section in (*sections().values(), Alternatives):
        for field in section.model_fields.values():
            for choice in choices(field.annotation):
                assert f"`{choice}`" in TEXTS["recipes.md"], choice
    for name in WELL_KNOWN:
        assert f"`{name.rpartition('+')[2]}`" in TEXTS["recipes.md"], name


def test_the_table_of_decisions_names_settings_that_exist() -> None:
    from peft import LoraConfig
    from trl import SFTConfig

    known = {name: set(section.model_fields) for name, section in sections().items()}
    known |= {"train": set(SFTConfig.__dataclass_fields__), "lora": set(LoraConfig.__dataclass_fields__)}
    named = re.findall(r"`(\w+)\.(\w+)`( = [\w.\[\]]+)?", TEXTS["method.md"])
    assert len(named) > 40
    for section, field, default in named:
        assert field in known[section], f"{section}.{field}"
        if default and section in sections():
            value = sections()[section].model_fields[field].get_default(call_default_factory=True)
            assert default.removeprefix(" = ") == written(value).strip("`"), f"{section}.{field}"
    # all that can be set about the method is a decision
    decided = {(section, field) for section, field, _ in named}
    assert {field for field in known["align"] if ("align", field) not in decided} == set()
    assert known["align"] <= set(RPSAArguments.__dataclass_fields__)


def test_the_layers_on_the_page_are_those_that_the_imports_keep_to() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", TEXTS["maintain.md"], re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == LAYERS
