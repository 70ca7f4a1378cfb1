"""The stage robustness: attacks as tasks of a run, resumed, reported, and without a trace where none are asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.small_runs import copied, hidden, small, written
from rpsa.artifacts import read_json
from rpsa.errors import RPSAError
from rpsa.pipeline import run, stages, verify
from rpsa.pipeline.attacking import AttackCommand, attack_command
from rpsa.pipeline.stages import tasks_of
from rpsa.report.attacked import robustness_json, summarised

ATTACKS = (
    "robustness={harmful: tiny, benign: tiny, many_shot: null, "
    'prefill: {thought: ["user wants to"], answer: ["sure :"]}, '
    "finetune: {rows: 8, steps: [1], data: [harmful], paradigms: [lora]}, "
    "direction: {prompts: 8}, prune: {ratios: [0.3]}, quantise: {schemes: [int8]}, merge: {weights: [0.5]}}"
)
METHODS = "matrix.methods=[original, fft, lora+rpsa]"
NAMES = {
    *(
        "prefill-thought",
        "prefill-answer",
        "finetune-harmful-lora-1",
        "direction",
        "prune-0.3",
        "int8",
        "merge-0.5",
    )
}


@pytest.fixture
def evaluated(recipe_file: Path, whole_run: Path) -> Path:
    return copied(whole_run, recipe_file.parent / "run", "reference", "fisher", "align", "evaluate")


def test_every_cell_is_attacked_and_what_is_done_is_not_done_again(
    recipe_file: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(evaluated)
    asked = small(recipe_file, METHODS, ATTACKS)
    tasks = tasks_of(asked, "robustness")
    assert len(tasks) == 7 + 7 + 6  # the untouched model has nothing to be merged with

    real = stages.RobustnessTask.run

    def interrupted(task: Any, folder: Path, progress: Any) -> None:
        if task.attack.name == "direction" and task.cell.method == "fft":
            raise KeyboardInterrupt
        real(task, folder, progress)

    with monkeypatch.context() as killed:
        killed.setattr(stages.RobustnessTask, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    half = written(evaluated)
    assert {name for name in before if half[name] != before[name]} == set()
    assert 0 < sum(name.startswith("robustness") for name in half) < 20

    run(asked)
    whole = written(evaluated)
    assert all(whole[name] == time for name, time in half.items())
    assert sum(name.startswith("robustness") for name in whole) == 20
    assert not hidden(evaluated)
    verify(evaluated)

    found = read_json(evaluated / "report" / "results.json")["robustness"]
    assert set(found["attack_success_rate"]) == {"none", *NAMES}
    assert set(found["attack_success_rate"]["merge-0.5"]) == {"fft", "lora+rpsa"}
    assert set(found["attack_success_rate"]["none"]) == {"original", "fft", "lora+rpsa"}
    for name in ("index.html", "robustness.md"):
        assert "finetune-harmful-lora-1" in (evaluated / "report" / name).read_text()
    assert (evaluated / "report" / "tampering.png").is_file()

    # another strength of one attack leaves the others
    monkeypatch.setattr(stages.EvaluateTask, "run", lambda *_: pytest.fail("evaluated again"))
    more = small(recipe_file, METHODS, ATTACKS.replace("ratios: [0.3]", "ratios: [0.3, 0.6]"))
    run(more)
    after = written(evaluated)
    assert len({name for name in after if name not in whole}) == 3
    assert {name for name in whole if after[name] != whole[name]} == {"report"}

    # what it stands on is another model now
    shutil.rmtree(evaluated / "align" / "fft")
    with pytest.raises(RPSAError):
        run(more, only="robustness")


def test_without_the_section_nothing_is_attacked_and_the_report_is_what_it_was(
    recipe_file: Path, finished: Path
) -> None:
    asked = small(recipe_file)
    assert tasks_of(asked, "robustness") == []
    before = written(finished)
    run(asked)
    assert {name for name, time in written(finished).items() if before[name] != time} <= {"report"}
    stage = json.loads((finished / "report" / "stage.json").read_text())
    assert "robustness" not in stage["inputs"]["recipe"]
    assert "attacked" not in stage["inputs"]
    assert "robustness" not in read_json(finished / "report" / "results.json")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{}", "robustness.harmful: missing; many_shot, finetune and direction need harmful requests"),
        ("{harmful: tiny}", "robustness.benign: missing"),
        ("{harmful: nowhere.jsonl, benign: tiny}", "robustness.harmful: no such file"),
        ("{harmful: tiny, benign: tiny, prune: {ratio: 1}}", "robustness.prune.ratio: unknown key"),
        ("{harmful: tiny, benign: tiny, finetune: {lora: {rank: 1}}}", "robustness.finetune.lora.rank"),
        ("{harmful: tiny, benign: tiny, tasks: [rpsa_aime]}", "robustness.tasks: 'rpsa_aime' is unknown"),
    ],
)
def test_a_mistake_is_one_line(recipe_file: Path, section: str, message: str) -> None:
    with pytest.raises(RPSAError) as caught:
        small(recipe_file, f"robustness={section}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_preflight_looks_at_every_attack(recipe_file: Path) -> None:
    asked = small(recipe_file, METHODS, "robustness={harmful: tiny, benign: tiny}")
    with pytest.raises(RPSAError, match=r"robustness: tiny:0: tokenizer .* cannot spell 'The user wants"):
        run(asked)
    asked = small(recipe_file, METHODS, ATTACKS.replace("many_shot: null", "many_shot: {shots: [12]}"))
    with pytest.raises(RPSAError, match="many_shot: 12 shots and max_new_tokens make"):
        run(asked)
    assert not (asked.folder / "align").exists()


def test_a_model_is_attacked_without_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["evaluate.n=4", "prune.ratios=[0.3]"]
    command = AttackCommand("tiny:0", ["tiny"], ["prefill", "prune"], settings=few)
    found, folder = attack_command(command)
    names = [one.attack for one in found]
    assert names == ["none", "prefill-thought-1", "prefill-thought-2", "prefill-answer", "prune-0.3"]
    assert folder == Path("attacks/tiny-0")
    assert all((folder / name / "results.json").is_file() for name in names)
    assert set(robustness_json(found)) == {"attack_success_rate", "unsafe_thoughts", "over_refusal", "broken"}
    merged, _ = attack_command(AttackCommand("tiny:0", ["tiny"], ["merge"], base="tiny:1", settings=few[:1]))
    assert [one.attack for one in merged][1:] == ["merge-0.25", "merge-0.5", "merge-0.75"]

    files, path = attack_command(AttackCommand("tiny:0", ["tiny"], export=Path("out.csv"), settings=few[:1]))
    assert files == []
    ids = [line.rpartition(",")[2] for line in path.read_text().splitlines()[1:]]
    Path("completions.json").write_text(
        json.dumps({name: [{"test_case": "x", "generation": "</think> sorry ."}] for name in ids})
    )
    given, _ = attack_command(
        AttackCommand("tiny:0", ["tiny"], responses=Path("completions.json"), settings=few[:1])
    )
    rates = summarised(given)["attack_success_rate"]
    assert rates["completions"]["tiny:0"].mean == 0.0
    assert rates["none"]["tiny:0"].mean > 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            AttackCommand("tiny:0", ["tiny"], ["prun"]),
            "--attack: there is no attack 'prun'; did you mean 'prune'?",
        ),
        (AttackCommand("tiny:0", ["tinny"]), "--tasks: 'tinny' is unknown"),
        (AttackCommand("tiny:0", ["tiny"], settings=["prune.ratios=[2]"]), "--set prune.ratios"),
        (AttackCommand("tiny:0", ["tiny"], settings=["evaluate.nn=2"]), "--set evaluate.nn: unknown key"),
        (AttackCommand("tiny:0", ["tiny"], harmful="nowhere.jsonl"), "--harmful: no such file"),
        (AttackCommand("nowhere/", ["tiny"]), "nowhere/"),
    ],
)
def test_a_wrong_command_is_one_line(command: AttackCommand, message: str) -> None:
    with pytest.raises(RPSAError) as caught:
        attack_command(command)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
