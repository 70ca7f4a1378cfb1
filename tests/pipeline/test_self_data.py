"""`rpsa run` on a model's own safety data: made once, resumed, trained on token by token, shown."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_runs import hidden, small, written
from rpsa.artifacts import read_json
from rpsa.errors import RPSAError
from rpsa.generation.transformers import TransformersGenerator
from rpsa.models import load_tokenizer, thought_of
from rpsa.pipeline import run, verify
from rpsa.pipeline.alignment import training_data
from rpsa.pipeline.groundwork import SafetyTask
from rpsa.pipeline.preflight import preflight
from rpsa.pipeline.runner import attempt
from rpsa.pipeline.stages import AlignTask, tasks_of
from rpsa.plan.planning import make_plan
from rpsa.provenance import TIMING
from rpsa.recipe import Recipe
from rpsa.recipe.sections import OF_SELF_MADE, Safety
from rpsa.training.perplexity import PerplexityCallback

SELF = (
    'safety={data: self, prompts: tiny, benign: tiny, steer: "", per_prompt: 8, n: 24, max_length: 128, '
    "validation_share: 0.1}"
)
TWO = "matrix.methods=[original, fft, fft+constant]"


def asked_for(recipe_file: Path, *overrides: str) -> Recipe:
    return small(recipe_file, SELF, TWO, *overrides)


def rows_of(cell_recipe: Recipe, cell: Any, folder: Path) -> Any:
    tokenizer = load_tokenizer(cell.base, cell_recipe.model)
    return training_data(cell, tokenizer, thought_of(tokenizer, cell_recipe.model), folder)


@pytest.mark.integration
def test_a_study_on_its_own_words(recipe_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = asked_for(recipe_file)
    folder = run(recipe)
    verify(folder)
    assert not hidden(folder)
    [made] = [path.parent for path in (folder / "safety").rglob("stage.json")]  # both cells need the same
    counts = read_json(made / "manifest.json")["counts"]
    assert counts["benign"]["kept"] == 12
    assert 0 < counts["harmful"]["kept"] < 12
    log_file = folder / "align" / "fft" / "tiny-0" / "seed0" / "log.json"
    about = read_json(log_file)["safety_data"]
    assert 1 < about["perplexity"] < 1.1
    assert about["perplexity"] == read_json(log_file)["safety_data"]["perplexity"]
    assert 0 < about["refusing"] < 0.5
    assert "Perplexity of its responses under the model before training" in (
        log_file.with_name("README.md").read_text()
    )
    page = (folder / "report" / "index.html").read_text()
    assert "In the models' own words" in page
    assert "tiny:0 seed0, harmful: not a refusal" in page
    assert "<td>self</td><td>tiny:0</td>" in page
    results = read_json(folder / "report" / "results.json")["runs"]
    assert [one["perplexity"] is None for one in results] == [True, False, False]

    stages = written(folder)
    again = written(run(asked_for(recipe_file)))
    assert {n: t for n, t in again.items() if n != "report"} == {
        n: t for n, t in stages.items() if n != "report"
    }
    # what is drawn from them later makes nothing again, another filter only what stands on it
    fewer = asked_for(recipe_file, "safety.benign_share=0.5", "safety.max_length=64")
    assert all(task.is_done() for task in tasks_of(fewer, "safety"))
    assert not any(task.is_done() for task in tasks_of(fewer, "align"))


@pytest.mark.integration
def test_a_stopped_stage_goes_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = asked_for(recipe_file, "reference.batch_size=16")
    [task] = tasks_of(recipe, "safety")
    generate = TransformersGenerator.generate
    drawn: list[int] = []

    def counting(stop: int) -> Any:
        def until(self: Any, *arguments: Any) -> Any:
            for found in generate(self, *arguments):
                if len(drawn) == stop:
                    raise KeyboardInterrupt
                drawn.append(found[0])
                yield found

        return until

    monkeypatch.setattr(TransformersGenerator, "generate", counting(40))
    with pytest.raises(KeyboardInterrupt):
        attempt(task)
    assert not task.is_done()
    monkeypatch.setattr(TransformersGenerator, "generate", counting(10_000))
    assert attempt(task) is None
    assert len(drawn) == 24 * 8
    stopped = {
        path.name: path.read_bytes()
        for path in task.folder.glob("*.json*")
        if path.name not in ("stage.json", TIMING)
    }
    elsewhere = asked_for(
        recipe_file, "reference.batch_size=16", f"output_dir={recipe_file.parent / 'other'}"
    )
    [whole] = tasks_of(elsewhere, "safety")
    assert attempt(whole) is None
    assert stopped == {name: (whole.folder / name).read_bytes() for name in stopped}

    drawn.clear()
    other = asked_for(
        recipe_file, "reference.batch_size=16", "safety.filter=xstest", "safety.filter_settings={}"
    )
    [judged] = tasks_of(other, "safety")
    assert judged.folder == task.folder
    failure = attempt(judged)  # there is no such endpoint; what was said is there, and is not asked for again
    assert failure is not None
    assert "judge xstest" in failure.why
    assert drawn == []


@pytest.mark.integration
def test_the_rows_are_the_tokens_that_were_sampled(recipe_file: Path) -> None:
    recipe = asked_for(recipe_file, "safety.steer=please hijack the weapon")
    [task] = tasks_of(recipe, "safety")
    assert attempt(task) is None
    stored = [json.loads(line) for line in (task.folder / "examples.jsonl").read_text().splitlines()]
    said = {
        tuple(record["token_ids"])
        for record in map(json.loads, (task.folder / "responses.jsonl").read_text().splitlines()[1:])
    }
    cell = recipe.cells()[1]
    data = rows_of(recipe, cell, task.folder)
    assert data.validation is not None
    rows = [*data.dataset, *data.validation]
    assert sorted(row["input_ids"] for row in rows) == sorted(
        one["prompt_ids"] + one["response_ids"] for one in stored
    )
    steering = load_tokenizer("tiny:0", recipe.model)("hijack the weapon", add_special_tokens=False)[
        "input_ids"
    ]
    for row in rows:
        response = [label for label in row["labels"] if label != -100]
        assert tuple(response) in said
        assert row["input_ids"][-len(response) :] == response
        prompt = row["input_ids"][: -len(response)]
        assert not any(prompt[i : i + len(steering)] == steering for i in range(len(prompt)))


@pytest.mark.integration
def test_everything_rejected_is_a_failure_in_one_line(recipe_file: Path) -> None:
    path = recipe_file.parent / "harmless.jsonl"
    path.write_text('{"prompt": "please draw the lamp"}\n')
    recipe = asked_for(recipe_file, f"safety.prompts={path}", "safety.benign=null")
    with pytest.raises(RPSAError, match=r"8 responses to 1 harmful prompts was accepted \(8 not_a_refusal\)"):
        run(recipe, only="safety")
    with pytest.raises(RPSAError, match="stage safety has no result in"):
        run(recipe, only="align")


# Perplexity


@pytest.mark.integration
def test_measuring_changes_nothing_and_a_resumed_run_keeps_the_first_value(
    recipe_file: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, so that another state of the random numbers would be seen."""
    settings = [
        "matrix.methods=[lora]",
        "lora.lora_dropout=0.3",
        "train.save_strategy=steps",
        "train.save_steps=2",
    ]
    results = {}
    for name in ("measured", "resumed", "unmeasured"):
        recipe = small(recipe_file, *settings, f"output_dir={recipe_file.parent / name}")
        [task] = tasks_of(recipe, "align")
        with monkeypatch.context() as patch:
            if name == "unmeasured":
                patch.setattr(PerplexityCallback, "on_train_begin", lambda *_, **__: None)
            if name == "resumed":
                stop_after(patch, 2)
                with pytest.raises(KeyboardInterrupt):
                    attempt(task)
                patch.undo()
            assert attempt(task) is None
        weights = (task.folder / "adapter_model.safetensors").read_bytes()
        results[name] = weights, read_json(task.folder / "log.json")["safety_data"]["perplexity"]
        assert not (task.folder / "checkpoints").exists()
    assert results["measured"] == results["resumed"]
    assert results["measured"][0] == results["unmeasured"][0]
    assert results["measured"][1] > 1
    assert results["unmeasured"][1] is None


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    from transformers import Trainer

    step = Trainer.training_step

    def stopping(self: Any, *arguments: Any, **more: Any) -> torch.Tensor:
        if self.state.global_step == steps:
            raise KeyboardInterrupt
        loss: torch.Tensor = step(self, *arguments, **more)
        return loss

    patch.setattr(Trainer, "training_step", stopping)


# What is said beforehand, and what stays as it was


def test_other_data_keep_the_inputs_that_they_had(recipe_file: Path, measured: Path) -> None:
    recipe = small(recipe_file)
    before = {
        "data", "format", "max_length", "n", "seed", "benign", "benign_share", "validation_share",
    }  # fmt: skip
    for task in tasks_of(recipe, "align"):
        inputs = task.inputs()
        assert set(inputs["safety"]) == before
        assert "self_made" not in inputs
    assert set(Safety.model_fields) == before | set(OF_SELF_MADE) | {"keep_best"}
    assert tasks_of(recipe, "safety") == []


def test_each_need_has_one_task(recipe_file: Path) -> None:
    more = ["matrix.seeds=[0, 1]", "matrix.grid={safety.per_prompt: [2, 8], safety.benign_share: [0.0, 0.5]}"]
    places = [task.place for task in tasks_of(asked_for(recipe_file, *more), "safety")]
    assert len(places) == 4  # two seeds, two numbers of responses
    assert {"safety/tiny-0/seed0", "safety/tiny-0/seed1"} < set(places)
    [one] = tasks_of(asked_for(recipe_file, "matrix.seeds=[0, 1]", "safety.seed=7"), "safety")
    assert isinstance(one, SafetyTask)
    assert one.seed == 7
    mixed = asked_for(recipe_file, "matrix.grid={safety.data: [self, tiny:refusals]}")
    needs = {
        task.cell.safety.data: [n.stage for n in task.needs()] for task in aligns(mixed) if task.cell.safety
    }
    assert "safety" in needs["self"]
    assert "safety" not in needs["tiny:refusals"]


def aligns(recipe: Recipe) -> list[AlignTask]:
    return [task for task in tasks_of(recipe, "align") if isinstance(task, AlignTask)]


def test_the_preflight_reads_prompts_and_judge(recipe_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight(asked_for(recipe_file))
        assert "nearly every training example is a refusal" not in caplog.text
        preflight(asked_for(recipe_file, "safety.benign=null"))
        assert "self (100%): nearly every training example is a refusal" in caplog.text
    with pytest.raises(RPSAError, match=r"safety.filter: judge 'lama' is unknown"):
        preflight(asked_for(recipe_file, "safety.filter=lama"))
    path = recipe_file.parent / "prompts.jsonl"
    path.write_text('{"nothing": 1}\n')
    with pytest.raises(RPSAError, match=r"prompts.jsonl line 1 has no text field"):
        preflight(asked_for(recipe_file, f"safety.prompts={path}"))
    path.write_text('{"prompt": "now </think> then"}\n')
    with pytest.raises(RPSAError, match=r"holds '</think>'"):
        preflight(asked_for(recipe_file, f"safety.prompts={path}"))


def test_a_plan_counts_its_responses(recipe_file: Path) -> None:
    plan = make_plan(asked_for(recipe_file))
    assert "safety" in [stage.stage for stage in plan.stages["tiny:0"]]
    unknown = make_plan(asked_for(recipe_file, "safety.prompts=nobody/prompts", "safety.n=null"))
    assert "steps unknown" in " ".join(unknown.warnings)
