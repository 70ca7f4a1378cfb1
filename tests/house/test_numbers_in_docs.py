"""The figures in README, docs and recipes are those that `benchmarks/docs_numbers.py` writes."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NUMBERS = runpy.run_path(str(ROOT / "benchmarks" / "docs_numbers.py"))
PLANS = json.loads(NUMBERS["PLANS"].read_text())
README = (ROOT / "README.md").read_text()


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_every_text_that_shows_a_plan_shows_that_of_plans_json() -> None:
    for path, text in NUMBERS["texts"](PLANS).items():
        assert path.read_text() == text, f"{path}: run `python benchmarks/docs_numbers.py write`"


def test_every_recipe_of_a_real_model_says_what_it_needs() -> None:
    recipes = [
        path for model in NUMBERS["SHIPPED"] for path in (ROOT / "recipes" / model.folder).glob("*.yaml")
    ]
    assert len(recipes) == 19
    for path in recipes:
        assert (NUMBERS["MEMORY"] in path.read_text()) == (path.stem != "paper-study"), path


def test_the_page_shows_what_make_gpu_found_or_that_it_has_not_run() -> None:
    for path, text in NUMBERS["gpu"]().items():
        assert path.read_text() == text, "run `python benchmarks/docs_numbers.py gpu`"


@pytest.mark.slow
@pytest.mark.parametrize("model", NUMBERS["SHIPPED"], ids=lambda model: model.name)
def test_plans_json_is_what_rpsa_plan_says(model: Any) -> None:
    known = PLANS[model.name]
    with NUMBERS["configs"]():
        found = NUMBERS["planned"](model)
    assert found["parameters"] == known["parameters"]
    assert found.get("study") == known.get("study")
    for now, then in ((found, known), (found["recommended"], known["recommended"])):
        assert now["stages"] == pytest.approx(then["stages"], abs=0.2)
        assert now["align"].keys() == then["align"].keys()
        for method, layouts in now["align"].items():
            for gpus, (total, sharding, fits) in layouts.items():
                assert [sharding, fits] == then["align"][method][gpus][1:], (method, gpus)
                assert total == pytest.approx(then["align"][method][gpus][0], abs=0.2), (method, gpus)


def test_the_table_and_the_figure_of_the_demo_are_of_one_run() -> None:
    assert NUMBERS["of_figure"](ROOT / "docs" / "images" / "demo-scatter.png") in README


def test_results_repeats_what_other_pages_say() -> None:
    [audited] = re.findall(r"frozen elements moved in ([\d,]+) element-steps", README)
    assert f"0 elements in {audited} element-steps of the demo" in page("results.md")
    [audit] = re.findall(r"^([\d.]+%) of a run", page("benchmarks.md"), re.MULTILINE)
    assert f"the audit {audit} of a run" in page("results.md")
    [fisher] = re.findall(r"4 probes, hooked \| [\d.]+ \| ([\d.]+) \|", page("benchmarks.md"))
    assert f"The Fisher costs {float(fisher):.0f} times" in page("results.md")


def test_the_memory_of_compact_training_is_the_same_on_each_page() -> None:
    total = PLANS["DeepSeek-R1-Distill-Llama-8B"]["align"]["fft+compact"]["1"][0]
    assert f"takes {total:.0f} GiB according to" in page("method.md")
    [measured] = re.findall(r"compact, bf16 weights .*?\| ([\d.]+) \|", page("benchmarks.md"))
    assert f"at {float(measured):.1f} bytes per parameter" in page("plan.md")


def test_what_the_reviewers_asked_is_as_the_runs_that_were_kept() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "reviewers.py"))
    text = page("reviewers.md")
    assert script["page"](text, script["kept"]()) == text, "run `python benchmarks/reviewers.py write`"


@pytest.mark.parametrize("name", ["README.md", *sorted(path.name for path in (ROOT / "docs").glob("*.md"))])
def test_numbers_below_one_are_written_in_one_way(name: str) -> None:
    text = README if name == "README.md" else page(name)
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert not re.findall(r"(?<![\w.)\]])[+-]?\.\d+", prose)
