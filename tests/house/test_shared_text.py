"""The start page of the documentation is made of sections of the README, with links of its own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INCLUDES = [
    (path, section)
    for path in sorted((ROOT / "docs").glob("*.md"))
    for section in re.findall(r'^--8<-- "README\.md:(\w+)"$', path.read_text(), re.MULTILINE)
]


def section(name: str) -> str:
    found = re.search(
        rf"<!-- --8<-- \[start:{name}\] -->\n(.*?)<!-- --8<-- \[end:{name}\] -->", README, re.DOTALL
    )
    assert found, name
    return found[1]


def definitions(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, re.MULTILINE))


def test_the_start_page_includes_the_readme() -> None:
    assert {name for path, name in INCLUDES if path.name == "index.md"} == {"intro", "demo"}


@pytest.mark.parametrize(("path", "name"), INCLUDES, ids=lambda value: getattr(value, "name", value))
def test_links_of_a_shared_section_lead_to_the_same_place_from_both(path: Path, name: str) -> None:
    text = section(name)
    assert not re.findall(r"\]\((?!https?:)", text), "a link written here works in one of the two places only"
    ours, theirs = definitions(README), definitions(path.read_text())
    for reference in re.findall(r"\]\[([\w-]+)\]", text):
        assert (ROOT / ours[reference]).resolve() == (path.parent / theirs[reference]).resolve()
        assert (ROOT / ours[reference]).is_file()
