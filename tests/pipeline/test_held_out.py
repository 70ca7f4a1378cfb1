"""Held-out reasoning in a run: disjoint from D_ref, what stands on it and what does not, and a whole run with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.small_runs import RECIPE, small, unfinished
from rpsa.artifacts import read_json
from rpsa.errors import RPSAError
from rpsa.pipeline import run
from rpsa.pipeline.groundwork import HeldOutTask, held_out_problems, reference_problems
from rpsa.pipeline.stages import tasks_of
from rpsa.recipe.problems import SHIPPED, source_problem
from rpsa.recipe.sections import Reference
from rpsa.reference import Problem, ReferenceDataset, load_held_out, load_problems
from rpsa.tiny import FAMILIES, REFERENCE_FAMILIES, REFERENCES, reasoning_problems
from rpsa.tiny import held_out_problems as tiny_held_out_problems
from rpsa.tiny.families import FRAMES

WATCHING = ("train.eval_strategy=steps", "train.eval_steps=2", "safety.validation_share=0.2")


def question(problem: Problem) -> str:
    """Without its frame."""
    for frame in FRAMES:
        before, _, after = frame.partition("{}")
        if problem.prompt.startswith(before) and problem.prompt.endswith(after):
            return problem.prompt[len(before) : len(problem.prompt) - len(after)]
    raise AssertionError(problem.prompt)


@pytest.mark.parametrize("seed", [0, 42])
def test_held_out_problems_of_the_tiny_world_are_none_of_d_refs(seed: int) -> None:
    settings = Reference(problems="tiny", n=100, seed=seed, held_out=32)
    drawn, held = reference_problems("tiny", 100, seed), held_out_problems(settings)
    assert len({question(problem) for problem in held}) == len(held) == 32
    assert not {question(problem) for problem in drawn} & {question(problem) for problem in held}
    assert not {problem.id for problem in drawn} & {problem.id for problem in held}
    assert {problem.family for problem in held} == set(REFERENCE_FAMILIES) < set(FAMILIES)


@pytest.mark.parametrize("source", REFERENCES)
def test_reference_problems_are_of_the_families_that_their_name_says(source: str) -> None:
    settings = Reference(problems=source, n=18, seed=1, held_out=12)
    families = {"tiny": {"add", "chain"}, "tiny:all": set(FAMILIES)}.get(
        source, {source.removeprefix("tiny:")}
    )
    drawn, held = reference_problems(source, 18, 1), held_out_problems(settings)
    assert {problem.family for problem in drawn} == {problem.family for problem in held} == families
    assert not {question(problem) for problem in drawn} & {question(problem) for problem in held}


def test_recipes_know_the_sources_of_the_tiny_world() -> None:
    assert (
        set(SHIPPED["problems"]) == set(REFERENCES) == {"tiny", "tiny:all", *(f"tiny:{f}" for f in FAMILIES)}
    )
    assert reference_problems("tiny", 40, 7) == reasoning_problems(40, 7, "train", ["add", "chain"])
    assert source_problem("problems", "tiny:sorts") == "'tiny:sorts' is unknown; did you mean 'tiny:sort'?"


def test_a_question_that_is_drawn_again_is_not_held_out() -> None:
    drawn, held = (
        reasoning_problems(1000, 0, "train", ["sort"]),
        tiny_held_out_problems(1000, 0, 1000, ["sort"]),
    )
    assert len(held) == 1000
    assert not {question(problem) for problem in drawn} & {question(problem) for problem in held}


def test_held_out_problems_of_a_file_are_none_of_d_refs_as_far_as_there_are_any(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [{"id": i, "problem": f"What is {i}?", "answer": str(i)} for i in range(40)]
    rows += [{"id": 100 + i, "problem": f"What is {i}?", "answer": str(i)} for i in range(40)]  # each twice
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn, held = load_problems(path, 20, 3), load_held_out(path, 20, 3, 12)
    assert len({problem.prompt for problem in held}) == len(held) == 12
    assert not {problem.prompt for problem in drawn} & {problem.prompt for problem in held}
    assert load_held_out(path, 20, 3, 12) == held != load_held_out(path, 20, 4, 12)
    left = 40 - len({problem.prompt for problem in drawn})
    assert len(held_out_problems(Reference(problems=str(path), n=20, seed=3, held_out=99))) == left
    assert f"has {left} problems beside D_ref's, not 99" in caplog.text
    assert held_out_problems(Reference(problems=str(path), n=80, held_out=5)) == []
    assert "there is no reasoning loss" in caplog.text


def test_nothing_but_evaluation_stands_on_it_unless_the_best_step_does(recipe_file: Path) -> None:
    def inputs(*settings: str) -> dict[str, Any]:
        recipe = small(recipe_file, "matrix.methods=[fft+rehearsal]", *settings)
        for task in tasks_of(recipe, "reference"):
            task.folder.mkdir(parents=True, exist_ok=True)
            (task.folder / "stage.json").write_text(json.dumps(manifest | {"inputs_sha256": task.name}))
        [reference] = [t for t in tasks_of(recipe, "reference") if not isinstance(t, HeldOutTask)]
        [aligned] = tasks_of(recipe, "align")
        return {"reference": reference.inputs(), "align": aligned.inputs()}

    file = {"bytes": 0, "sha256": ""}
    manifest: dict[str, Any] = {"stage": "reference", "inputs": {}, "versions": {}, "sources": {}}
    manifest["files"] = {"x": file}
    without = inputs("reference.held_out=0")
    assert "held_out" not in without["reference"]["reference"]
    assert inputs("reference.held_out=32") == without
    watched = inputs("reference.held_out=0", *WATCHING)
    assert inputs("reference.held_out=32", *WATCHING) == watched
    keeping = (*WATCHING, "train.save_strategy=steps")
    by_both = inputs("reference.held_out=4", *keeping, "safety.keep_best=safety_and_reasoning")["align"]
    assert by_both["held_out"] == {"traces": "tiny:0 held out", "max_length": 4096}
    assert "held_out" not in inputs("reference.held_out=4", *keeping, "safety.keep_best=safety")["align"]


@pytest.mark.parametrize(
    ("settings", "there"),
    [
        ((), True),
        (("reference.held_out=0",), False),
        (("evaluate.tasks=[]",), False),
        (("evaluate.tasks=[]", *WATCHING), True),
        (("matrix.methods=[original, fft]",), True),
        (("matrix.methods=[original, fft]", "reference.problems=null"), False),
    ],
)
def test_a_recipe_with_problems_has_it_where_something_is_measured_on_it(
    recipe_file: Path, settings: tuple[str, ...], there: bool
) -> None:
    recipe = small(recipe_file, "reference.held_out=4", *settings)
    found = [task for task in tasks_of(recipe, "reference") if isinstance(task, HeldOutTask)]
    assert [task.place for task in found] == (["held-out/tiny-0"] if there else [])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("safety.keep_best=safety", "train.eval_strategy=epoch"), "set safety.validation_share"),
        (("safety.keep_best=safety", "safety.validation_share=0.2"), "set train.eval_strategy"),
        (("safety.keep_best=safety", *WATCHING), "take train.save_strategy out"),
        (
            (
                "safety.keep_best=safety",
                *WATCHING,
                "train.save_strategy=steps",
                "train.load_best_model_at_end=true",
            ),
            "train.load_best_model_at_end says what is best, too",
        ),
        (
            (
                "safety.keep_best=safety_and_reasoning",
                *WATCHING,
                "train.save_strategy=steps",
                "reference.held_out=0",
            ),
            "needs held-out reasoning; set reference.problems",
        ),
        (("safety.keep_best=reasoning",), "safety.keep_best: "),
    ],
)
def test_a_best_step_that_cannot_be_known_is_one_line(
    recipe_file: Path, settings: tuple[str, ...], says: str
) -> None:
    with pytest.raises(RPSAError) as refused:
        small(recipe_file, *settings)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def losses(folder: Path) -> dict[str, Any]:
    return {
        method: read_json(folder / "evaluate" / method / "results.json")["reasoning_loss"]
        for method in ("original/tiny-0", "fft/tiny-0/seed0", "lora+rpsa/tiny-0/seed0")
    }


@pytest.mark.integration
def test_a_whole_run_measures_what_training_does_to_reasoning(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE.replace("save_strategy: no", "save_strategy: steps"))
    settings = (
        "reference.held_out=8",
        "matrix.methods=[original, fft, lora+rpsa]",
        "train.learning_rate=5e-3",
    )
    settings += (*WATCHING, "train.save_steps=2", "safety.keep_best=safety_and_reasoning", "safety.n=40")
    recipe = small(file, *settings)
    run(recipe)
    found = losses(recipe.folder)
    traces = ReferenceDataset.load(recipe.folder / "held-out/tiny-0").traces
    assert len(traces) == 8
    for one in found.values():
        assert one["traces"] == len(one["per_trace"]) == 8
        assert one["tokens"] == sum(len(trace.response_ids) for trace in traces)
        assert one["nll_ci95"][0] <= one["nll"] <= one["nll_ci95"][1]
    original, fft, _ = found.values()
    assert original["kl"] == 0
    assert original["nll"] < fft["nll"]
    assert fft["kl"] > 1e-5
    # the model that is kept is the one that training measured last, at its best step
    history = read_json(recipe.folder / "align/fft/tiny-0/seed0/log.json")["history"]
    last = [entry for entry in history if "eval_reasoning_kl" in entry][-1]
    assert (last["eval_reasoning_nll"], last["eval_reasoning_kl"]) == pytest.approx((fft["nll"], fft["kl"]))
    scores = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    at = {e["step"]: e["eval_reasoning_nll"] for e in history[:-1] if "eval_reasoning_nll" in e}
    best = min(scores, key=lambda step: scores[step] + at[step])
    assert last["eval_reasoning_nll"] == at[best]
    card = (recipe.folder / "report/cards/fft/tiny-0/seed0/README.md").read_text()
    assert "Held-out reasoning of the untouched model, in nats per token" in card
    assert not [
        task for stage in ("reference", "align", "evaluate") for task in unfinished(tasks_of(recipe, stage))
    ]
    # where nothing is held out, evaluations are as they were
    without = small(file, *settings[:-4], "reference.held_out=0", "matrix.methods=[original]")
    [task] = tasks_of(without, "evaluate")
    assert "held_out" not in task.inputs()


@pytest.mark.integration
def test_a_file_without_a_problem_to_spare_has_no_reasoning_loss(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE)
    problems = tmp_path / "problems.jsonl"
    rows = [{"id": p.id, "prompt": p.prompt, "answer": p.answer} for p in reference_problems("tiny", 6, 0)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"reference.problems={problems}", "reference.n=6", "reference.held_out=3")
    recipe = small(file, *settings, "matrix.methods=[original, fft]", *WATCHING)
    run(recipe)
    assert read_json(recipe.folder / "held-out/tiny-0/manifest.json")["traces"] == 0
    assert read_json(recipe.folder / "evaluate/original/tiny-0/results.json")["reasoning_loss"] is None
    history = read_json(recipe.folder / "align/fft/tiny-0/seed0/log.json")["history"]
    assert not any("eval_reasoning_nll" in entry for entry in history)
