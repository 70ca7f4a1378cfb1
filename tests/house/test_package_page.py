"""What a page of a package index shows of the README: nothing on it may be relative."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from markdown_it import MarkdownIt

from helpers.paths import ROOT

URL = "https://code.example/owner/rpsa"


@pytest.fixture
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(hook: ModuleType) -> dict[str, object]:
    metadata: dict[str, object] = {"version": "1.2.3"}
    hook.Address(str(ROOT), {}).update(metadata)
    return metadata


def test_with_an_address_every_link_is_absolute_and_leads_to_a_file(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPSA_URL", f"{URL}/")
    metadata = filled(hook)
    text = metadata["readme"]["text"]  # type: ignore[index]
    page = MarkdownIt("commonmark").enable("table").render(text)
    targets = re.findall(r'(?:href|src)="([^"]*)"', page)
    ours = [target.removeprefix(URL) for target in targets if target.startswith(URL)]
    assert len(ours) > 15
    assert all(target.startswith("https://") for target in targets)
    for target in ours:
        kind, tag, path = re.fullmatch(r"/(\w+)/([^/]+)/([^#]+)(?:#.*)?", target).groups()  # type: ignore[union-attr]
        assert tag == "v1.2.3"
        assert kind == ("raw" if path.endswith(".png") else "blob")
        assert Path(ROOT, path).is_file(), target
    assert f"git clone {URL} rpsa" in text
    assert metadata["urls"]["Source"] == URL  # type: ignore[index]


def test_without_an_address_nothing_is_made_up(hook: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPSA_URL", raising=False)
    metadata = filled(hook)
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()  # type: ignore[index]
    assert "urls" not in metadata
