"""Every recipe that README and docs show runs: on a tiny model, with files of this machine in place of hub ids."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.small_runs import RECIPE
from rpsa.pipeline import run
from rpsa.pipeline.bench import run_bench
from rpsa.recipe import load_recipe
from rpsa.recipe.loading import as_yaml, parse_yaml
from rpsa.tiny import evaluation_prompts, preference_examples, reasoning_problems, safety_examples

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(page.name, block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL), start=1)
]

INSTEAD = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "tiny:0",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "tiny:1",
    "Qwen/Qwen3-8B": "tiny:0",
    "HuggingFaceH4/MATH-500": "math500.jsonl",
    "UCSC-VLAA/STAR-1": "safety.jsonl",
    "UCSC-VLAA/STAR-benign-915": "benign.jsonl",
    "rpsa_aime24": "aime24.jsonl",
    "rpsa_strongreject": "strongreject.csv",
    "rpsa_xstest": "tiny",
    "star1": "auto",
    "strongreject": "direct",
    "xstest": "benign",
}
"""What stands for that which is not on this machine."""

SMALL = {
    "reference": {"n": 8, "held_out": 2, "max_new_tokens": 48, "batch_size": 8},
    "safety": {"n": 8, "max_length": 128},
    "train": {"max_steps": 2, "use_cpu": True, "bf16": False, "activation_checkpointing": False},
    "evaluate": {"n": 1, "temperature": 0.0, "max_new_tokens": 32},
}
"""What makes any recipe a matter of seconds; the last word is these settings'."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the pages name, of the tiny world."""
    monkeypatch.chdir(tmp_path)
    problems = [{"problem": p.prompt, "answer": p.answer} for p in reasoning_problems(20, 0)]
    examples = [vars(one) for one in safety_examples("balanced", 40, 0)]
    refusals = [one for one in examples if "sorry" in one["response"]]
    pairs = [
        {"prompt": one.prompt, "chosen": one.response, "rejected": one.rejected}
        for one in preference_examples("balanced", 40, 0)
    ]
    asked = evaluation_prompts(3)
    rows = {
        "math500.jsonl": problems,
        "aime24.jsonl": problems[:3],
        "safety.jsonl": refusals,
        "harmful.jsonl": refusals,
        "pairs.jsonl": [one for one in pairs if "sorry" in one["chosen"]],
        "benign-pairs.jsonl": [one for one in pairs if "sorry" not in one["chosen"]],
        "benign.jsonl": [one for one in examples if one not in refusals],
    }
    for name, found in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    (tmp_path / "strongreject.csv").write_text("\n".join(["prompt", *(i.prompt for i in asked["direct"])]))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


def on_this_machine(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("data") == "self":
            value = {**value, "steer": ""}  # the tiny world has no words for it
        return {on_this_machine(key): on_this_machine(one) for key, one in value.items()}
    if isinstance(value, list):
        return [on_this_machine(one) for one in value]
    if isinstance(value, str) and (value.startswith(("llama-guard", "qwen3guard", "wildguard"))):
        return "refusal"
    return INSTEAD.get(value, value) if isinstance(value, str) else value


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """As `extends` lays one recipe over another."""
    deeper = {
        key: merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **deeper}


@pytest.mark.integration
@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_a_recipe_on_a_page_runs(page: str, block: str, files: Path) -> None:
    if "quantization" in block:
        pytest.importorskip("bitsandbytes")
    shown = on_this_machine(parse_yaml(block, page))
    is_whole = "version" in shown or "extends" in shown
    if not is_whole:
        shown = merged(parse_yaml(RECIPE, page), shown)
    shown = merged(shown, copy.deepcopy(SMALL))
    shown["matrix"] = {**shown.get("matrix", {}), "seeds": [0]}
    if "extends" in shown:  # what that names
        shown["reference"]["problems"], shown["evaluate"]["tasks"] = "math500.jsonl", ["tiny"]
        shown["safety"]["data"], shown["evaluate"]["judge"] = "safety.jsonl", "refusal"
    if "robustness" in shown:  # words that the tiny models know, and few steps
        shown["robustness"]["prefill"] = {"thought": ["user wants to"], "answer": ["sure :"]}
        shown["robustness"]["finetune"] |= {"steps": [1, 2], "rows": 8}
        shown["robustness"]["direction"] = {"prompts": 8}
    if "bases" in shown["matrix"]:
        shown["matrix"]["bases"] = shown["matrix"]["bases"][:1]
    launch = shown.pop("launch", None)
    engines = {section: shown[section].pop("engine", None) for section in ("evaluate", "reference")}
    path = files / "recipes" / "mine" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(as_yaml(shown))
    recipe = load_recipe(path)
    if launch or any(engines.values()):  # several processes or GPUs: it is accepted
        more = [f"launch={json.dumps(launch)}"] if launch else []
        more += [f"{section}.engine={json.dumps(engine)}" for section, engine in engines.items() if engine]
        assert load_recipe(path, more).cells()
        return
    (run_bench if recipe.bench else run)(recipe)
    found = recipe.folder / ("bench/bench.html" if recipe.bench else "report/index.html")
    assert found.is_file()
