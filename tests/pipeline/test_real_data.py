"""Every stage on real files: MATH-500, STAR-1, StrongREJECT, AIME; nothing but the weights is made up."""

import json
from pathlib import Path

import pytest

from helpers.paths import RECIPES
from helpers.real_format import AIME24, build_real_format_model, missing_real_data
from rpsa.pipeline import run, verify
from rpsa.recipe import load_recipe

RECIPE = RECIPES / "smoke" / "real-data.yaml"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(missing_real_data()), reason=str(missing_real_data())),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    build_real_format_model(folder / "model")
    settings = [
        f"data_dir={AIME24.parent.parent}",
        f"model.name={folder / 'model'}",
        f"output_dir={folder / 'run'}",
    ]
    return run(load_recipe(RECIPE, settings))


def test_the_reference_traces_are_the_models_own(finished: Path) -> None:
    [traces] = finished.glob("reference/*/traces.jsonl")
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["response_ids"] and row["finish_reason"] in ("stop", "length") for row in rows)
    manifest = json.loads((traces.parent / "manifest.json").read_text())
    assert manifest["config"]["temperature"] == 0.6


def test_freezing_was_exact_in_full_and_lora_training(finished: Path) -> None:
    audits = [json.loads(path.read_text()) for path in finished.glob("align/*/**/rpsa_audit.json")]
    assert len(audits) == 2
    for audit in audits:
        assert audit["frozen_elements_moved"] == 0
        assert audit["frozen_element_steps_checked"] > 0
        assert len(audit["trajectory"]) == 4


def test_thoughts_are_trained_on(finished: Path) -> None:
    [log, *_] = finished.glob("align/*/**/log.json")
    counts = json.loads(log.read_text())["safety_data"]
    assert counts["examples"] == 16
    assert counts["response_tokens"] > 16 * 100  # a STAR-1 thought is long; a refusal alone is not


def test_every_prompt_was_answered_and_scored(finished: Path) -> None:
    for samples in finished.glob("evaluate/*/**/samples.jsonl"):
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        assert [sum(row["kind"] == kind for row in rows) for kind in ("reasoning", "attack")] == [4, 4]


def test_the_report_is_honest_about_a_model_that_knows_nothing(finished: Path) -> None:
    results = json.loads((finished / "report" / "results.json").read_text())
    assert {run["method"] for run in results["runs"]} == {"original", "fft+rpsa", "lora+rpsa"}
    for result in results["runs"]:
        assert result["reasoning"] == {"aime24": 0.0, "mean": 0.0}
        assert "strongreject_dataset" in result["asr"]
        if result["method"] != "original":
            assert result["str"] is None
            assert result["reason"]
    verify(finished)
