import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rpsa.artifacts import (
    atomic_directory,
    atomic_write,
    sha256_of,
    stable_json,
)
from rpsa.errors import RPSAError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out", "a") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert _names(tmp_path / "deep") == ["out"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", "a") as folder:
        (folder / "a").write_text("old")

    def interrupted() -> None:
        with atomic_directory(tmp_path / "out", "a") as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert _names(tmp_path) == ["out"]
    with atomic_directory(tmp_path / "out", "a") as folder:
        (folder / "b").write_text("new")
    assert _names(tmp_path / "out") == ["b"]
    assert _names(tmp_path) == ["out"]


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name, message in (
        ("home", "not written by this .a is missing."),
        ("file", "is a file, where a folder"),
    ):
        with pytest.raises(RPSAError, match=message), atomic_directory(tmp_path / name, "a"):
            pytest.fail("work has begun")
    assert (tmp_path / "home" / "letters").read_text() == (tmp_path / "file").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with atomic_directory(tmp_path / "link", "a") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "empty" / "a").read_text() == "1"
    assert _names(tmp_path) == ["empty", "file", "home", "link"]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    gone = tmp_path / f".out.{host}.{dead.pid}.aa.partial"
    alive = tmp_path / f".out.{host}.{os.getpid()}.aa.partial"
    elsewhere = tmp_path / f".out.not-{host}.{dead.pid}.aa.partial"
    for path in (gone, alive, elsewhere):
        path.mkdir()
        (path / "x").write_text("x")
    with atomic_directory(tmp_path / "out", "a"):
        pass
    assert _names(tmp_path) == sorted([alive.name, elsewhere.name, "out"])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.txt"
    atomic_write(target, "é")
    assert target.read_bytes() == "é".encode()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write(target, b"new")
    assert target.read_text() == "é"
    assert _names(tmp_path) == ["file.txt"]


def test_hashes_follow_content_alone(tmp_path: Path) -> None:
    assert sha256_of({"b": 1, "a": [1.5, None]}) == sha256_of({"a": [1.5, None], "b": 1})
    assert sha256_of({"a": 1}) != sha256_of({"a": 2})
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_text("x")
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two")
    (tmp_path / "two" / "sub" / "f").write_text("y")
    assert sha256_of(tmp_path / "one") != sha256_of(tmp_path / "two")
    assert stable_json({"b": 1, "a": 2}).index('"a"') < stable_json({"b": 1, "a": 2}).index('"b"')
