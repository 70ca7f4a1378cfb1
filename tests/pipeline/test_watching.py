"""`rpsa report`: the report of a run as far as it is, again and while it is on."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.small_runs import small
from rpsa.cli import app
from rpsa.errors import RPSAError
from rpsa.pipeline import watching
from rpsa.pipeline.live import telling
from rpsa.pipeline.stages import tasks_of
from rpsa.pipeline.watching import report_again, watch_report


def test_a_report_is_written_again_from_the_runs_folder_alone(finished: Path, tmp_path: Path) -> None:
    page = (finished / "report" / "index.html").read_text()
    shutil.rmtree(finished / "report")
    moved = finished.rename(tmp_path / "elsewhere")
    said = CliRunner().invoke(app, ["report", str(moved)])
    assert said.exit_code == 0, said.output
    assert f"Report: {moved / 'report' / 'index.html'}" in said.stdout.replace("\n", "")
    assert "fft+rpsa" in said.stdout
    assert (moved / "report" / "index.html").read_text() == page
    assert (moved / "report" / "cards" / "fft" / "tiny-0" / "seed0" / "README.md").is_file()


def test_a_run_without_an_evaluation_has_no_report(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="no run is here"):
        report_again(tmp_path / "nowhere")
    given = small(measured.parent / "small.yaml").model_dump(mode="json", exclude_unset=True)
    (measured / "given.json").write_text(json.dumps(given))
    with pytest.raises(RPSAError, match="nothing is evaluated yet; original/tiny-0: no result"):
        report_again(measured)
    assert not (measured / "report").exists()


def test_a_watched_report_grows_with_the_run_and_ends_with_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "report")
    first, *_, last = tasks_of(small(finished.parent / "small.yaml"), "evaluate")
    aside = finished.parent / "aside"
    last.folder.rename(aside)
    looks: list[bool] = []

    def sleep(seconds: float) -> None:
        """What happens between two looks: nothing, then the last result comes, then the run ends."""
        assert seconds >= watching._EVERY
        looks.append((finished / "report" / "index.html").is_file())
        if len(looks) == 2:
            aside.rename(last.folder)
        if len(looks) == 3:
            running.__exit__(None, None, None)

    monkeypatch.setattr(watching.time, "sleep", sleep)
    running = telling(first)
    running.__enter__()
    watch_report(finished)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1].split(":")[0] for line in lines] == ["3 of 4 models", "4 of 4 models"]
    assert looks == [True] * 3
    assert "lora+rpsa" in (finished / "report" / "results.json").read_text()
