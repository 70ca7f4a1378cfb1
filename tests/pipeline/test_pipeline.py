"""`rpsa run` on the tiny model: what is run again and what is not, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback

from helpers.command_line import invoke
from helpers.small_runs import RECIPE, RPSA, copied, hidden, leave, small, unfinished, wait_for, written
from rpsa.artifacts import AUDIT_FILE
from rpsa.errors import RPSAError
from rpsa.evaluation.run import loaded_to_generate
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.generation.transformers import TransformersGenerator
from rpsa.models import add_adapter, generation_dtype, load_model, vllm_engine
from rpsa.pipeline import run, verify
from rpsa.pipeline.alignment import starting_model
from rpsa.pipeline.preflight import preflight
from rpsa.pipeline.stages import AlignTask, tasks_of
from rpsa.recipe import load_recipe
from rpsa.recipe.sections import Model
from rpsa.tiny import tiny_model_dir


def test_a_run_is_complete_and_is_not_repeated(recipe_file: Path, finished: Path) -> None:
    folder = finished
    stages = written(folder)
    assert {name.split("/")[0] for name in stages} == {"reference", "fisher", "align", "evaluate", "report"}
    assert len([name for name in stages if name.startswith("fisher")]) == 2  # full, and LoRA's own
    assert not hidden(folder)
    verify(folder)

    results = json.loads((folder / "report" / "results.json").read_text())
    for result in results["runs"]:
        assert set(result["asr"]) == {"direct", "wrapped", "mean"}
        assert set(result["over_refusal"]) == {"benign", "borderline"}
        assert (result["lr"] is None) == (result["str"] is None and result["method"] == "original")
    assert {row["method"] for row in results["summary"]} == {"original", "fft", "fft+rpsa", "lora+rpsa"}
    for name in ("index.html", "table.md", "table.tex", "scatter.png", "trajectories.png"):
        assert (folder / "report" / name).stat().st_size > 0
    cards = sorted((folder / "report" / "cards").rglob("README.md"))
    assert [card.parent.parent.parent.name for card in cards] == ["fft", "fft+rpsa", "lora+rpsa"]
    for card in cards:
        text = card.read_text()
        assert "| In percent | This model | Untouched |" in text
        assert "Judge: `exact`. 20 responses." in text
        assert "Not measured" not in text
    page = (folder / "report" / "index.html").read_text()
    assert "exact comparison" in page
    evaluated = json.loads((folder / "evaluate" / "original" / "tiny-0" / "results.json").read_text())
    assert all(digest in page for digest in evaluated["data_sha256"].values())

    again = written(run(small(recipe_file)))
    assert {n: t for n, t in again.items() if n != "report"} == {
        n: t for n, t in stages.items() if n != "report"
    }

    changed = written(run(small(recipe_file, "align.window=1")))
    repeated = {name for name, time_ in changed.items() if time_ != stages[name]}
    assert repeated == {
        "report",
        *(
            f"{stage}/{method}/tiny-0/seed0"
            for stage in ("align", "evaluate")
            for method in ("fft+rpsa", "lora+rpsa")
        ),
    }


def test_an_analysis_of_no_fisher_is_said_beforehand(
    recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    preflight(small(recipe_file, "matrix.methods=[original, fft]", "analysis.fisher_map=[0.6]"))
    assert "there is nothing to analyse" in caplog.text


STUDY = """
matrix: {methods: [original, fft, fft+constant, fft+per_sequence], bases: ["tiny:0"], seeds: [0], parallel: 1}
sweeps:
  rank: {methods: [lora+constant], over: {lora.r: [1, 2]}}
analysis:
  fisher_map: [0.6]
  perturb: {fractions: [0.01], factors: [0.5], selections: [fisher, random], draws: 2}
"""


@pytest.mark.integration
def test_a_study_has_sweeps_and_analyses_of_its_fishers(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().partition("matrix:")[0] + STUDY)
    folder = run(small(recipe_file))
    stages = set(written(folder))
    assert {"analyse/fisher-map", "analyse/perturb/tiny-0"} <= stages
    fishers = {name.rpartition("/")[2] for name in stages if name.startswith("fisher/")}
    assert [name for name in fishers if name == "full" or name.startswith("full-per_sequence-")] != ["full"]
    assert len(fishers) == 4  # the recipe's own, that of per_sequence, and one for each rank
    for rank in (1, 2):
        assert f"evaluate/sweep-rank/lora+constant/tiny-0/seed0,r={rank}" in stages
    perturbed = json.loads((folder / "analyse" / "perturb" / "tiny-0" / "results.json").read_text())
    assert {effect["selection"] for effect in perturbed["effects"]} >= {"fisher", "random"}
    results = json.loads((folder / "report" / "results.json").read_text())
    assert {run["method"] for run in results["runs"]} >= {
        "original",
        "fft",
        "fft+constant",
        "fft+per_sequence",
    }


@pytest.mark.usefixtures("measured")
def test_data_that_are_refusals_alone_are_warned_of_once(
    recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(data: str) -> list[str]:
        caplog.clear()
        preflight(small(recipe_file, f"safety.data={data}", "matrix.methods=[fft, lora]"))
        return [text for text in caplog.messages if "is a refusal" in text]

    [line] = said("tiny:refusals")
    assert line.startswith("tiny:refusals (100%): nearly every training example is a refusal.")
    assert said("tiny:balanced") == []


def test_a_recipe_without_tasks_trains_and_says_that_nothing_was_measured(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(small(recipe_file, "evaluate.tasks=[]", "matrix.methods=[fft+rpsa]"))
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"No report: evaluate.tasks names nothing, so nothing was measured. Models: {folder}/align" in shown
    )
    assert (folder / "align" / "fft+rpsa" / "tiny-0" / "seed0" / "model.safetensors").is_file()
    assert not (folder / "evaluate").exists()
    assert not (folder / "report").exists()


def test_a_changed_file_is_found(finished: Path) -> None:
    verify(finished)
    samples = next(finished.glob("evaluate/fft/**/samples.jsonl"))
    samples.write_text(samples.read_text().replace("refused", "complied", 1))
    with pytest.raises(RPSAError, match=r"samples\.jsonl: changed since the stage evaluate wrote it"):
        verify(finished)


def test_only_one_stage(recipe_file: Path) -> None:
    with pytest.raises(
        RPSAError, match=r"stage reference has no result in .*: run the recipe without --only"
    ):
        run(small(recipe_file), only="fisher")
    folder = run(small(recipe_file), only="reference")
    assert {name.split("/")[0] for name in written(folder)} == {"reference"}
    with pytest.raises(RPSAError, match=r"there is no stage 'aligne'; did you mean 'align'\?"):
        run(small(recipe_file), only="aligne")


@pytest.mark.usefixtures("measured")
def test_plain_lora_and_rpsa_start_from_the_same_adapter(recipe_file: Path) -> None:
    recipe = small(recipe_file, "matrix.methods=[lora, lora+rpsa]")
    run(recipe, only="reference")
    run(recipe, only="fisher")
    plain, rpsa = (
        starting_model(recipe, cell, AlignTask(recipe, cell).groundwork) for cell in recipe.cells()
    )
    for (name, a), (other, b) in zip(plain.named_parameters(), rpsa.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    [cell, _] = recipe.cells()
    other_seed = add_adapter(load_model("tiny:0", recipe.model), cell.__class__(**{**vars(cell), "seed": 7}))
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.parameters(), other_seed.parameters(), strict=True)
    )


def test_a_warmed_up_adapter_has_a_fisher_in_a_and_is_where_alignment_starts(
    recipe_file: Path, whole_run: Path
) -> None:
    fishers, starts = {}, {}
    for steps in (0, 3):
        settings = [f"output_dir={recipe_file.parent / str(steps)}", f"fisher.warmup_steps={steps}"]
        recipe = load_recipe(recipe_file, [*settings, "matrix.methods=[lora+rpsa]"])
        copied(whole_run, recipe.folder, "reference")
        folder = run(recipe, only="fisher")
        [fisher] = (folder / "fisher" / "tiny-0").iterdir()
        [cell] = recipe.cells()
        fishers[steps] = FisherDiagonal.load(fisher)
        starts[steps] = starting_model(recipe, cell, AlignTask(recipe, cell).groundwork)
    for name, scores in fishers[3].scores.items():
        assert (scores > 0).any()
        assert "lora_B" in name or not fishers[0].scores[name].any()
    adapters = [dict(start.named_parameters()) for start in starts.values()]
    for name, before in adapters[0].items():
        assert torch.equal(before, adapters[1][name]) == ("lora_" not in name)
    fishers[3].check_weights(starts[3])
    with pytest.raises(RPSAError):
        fishers[3].check_weights(starts[0])


@pytest.mark.usefixtures("measured")
def test_the_saved_model_loads_anywhere_and_frozen_weights_are_the_bases(recipe_file: Path) -> None:
    methods = "matrix.methods=[original, fft+rpsa]"
    folder = run(small(recipe_file, methods, "align.frozen_ratio=0.9"), only="align")
    aligned = AutoModelForCausalLM.from_pretrained(
        folder / "align" / "fft+rpsa" / "tiny-0" / "seed0", dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
    same = sum(
        int((a == b).sum()) for a, b in zip(aligned.parameters(), base.parameters(), strict=True)
    ) / sum(p.numel() for p in base.parameters())
    assert 0.5 < same < 1


def start(recipe_file: Path, *overrides: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*RPSA, "run", str(recipe_file), f"output_dir={recipe_file.parent / 'run'}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.integration
@pytest.mark.parametrize("parallel", [1, 2])
def test_ctrl_c_leaves_nothing_half_written_and_the_run_goes_on(recipe_file: Path, parallel: int) -> None:
    folder = recipe_file.parent / "run"
    settings = [
        "train.num_train_epochs=3",
        "matrix.methods=[original, fft+rpsa]",
        f"matrix.parallel={parallel}",
    ]
    process = start(recipe_file, *settings)
    wait_for(folder, "align/*/*/.*.unfinished", process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: interrupted")
    for stage in folder.glob("align/*/*/seed*"):
        assert (stage / "stage.json").is_file()
    before = written(folder)
    run(small(recipe_file, *settings))
    after = written(folder)
    assert all(after[name] == time_ for name, time_ in before.items())
    assert not hidden(folder)


class Terminated(TrainerCallback):
    """SIGTERM in the midst of the second step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "method",
    [
        "fft+rpsa",
        pytest.param("fft", marks=pytest.mark.integration),
        pytest.param("fft+l2sp", marks=pytest.mark.integration),
    ],
)
def test_sigterm_keeps_a_checkpoint_and_is_no_success(
    method: str, recipe_file: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = measured, [f"matrix.methods=[{method}]", "train.logging_steps=3"]
    whole = copied(folder, recipe_file.parent / "whole", "reference", "fisher")
    run(small(recipe_file, *settings, f"output_dir={whole}"), only="align")
    listening = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [Terminated])
        with pytest.raises(KeyboardInterrupt, match=r"stopped at step 2 of 4; its checkpoint is kept"):
            run(small(recipe_file, *settings), only="align")
    assert signal.getsignal(signal.SIGTERM) == listening
    assert not list(folder.glob("align/*/*/seed*/stage.json"))
    run(small(recipe_file, *settings), only="align")
    for name in ("log.json", "rpsa_metadata.json", "model.safetensors", AUDIT_FILE):
        [ours], [theirs] = ([*of.glob(f"align/*/*/seed*/{name}")] or [None] for of in (folder, whole))
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert without_times(ours) == without_times(theirs)


def without_times(path: Path) -> Any:
    if path.suffix != ".json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    content.pop("seconds", None)
    for entry in content.get("history", []):
        for key in [key for key in entry if key.endswith(("_runtime", "_per_second"))]:
            del entry[key]
    return content


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("method", ["fft", "fft+rpsa"])
def test_a_run_that_diverges_is_one_line_and_no_model(method: str, recipe_file: Path) -> None:
    diverging = ["train.learning_rate=1e30", "train.logging_nan_inf_filter=false", "train.logging_steps=1"]
    settings = [f"matrix.methods=[{method}]", "align.frozen_ratio=0.1", *diverging]
    for _ in range(2):
        with pytest.raises(
            RPSAError, match=r"diverged: after \d steps .* .first at step \d.; lower"
        ) as error:
            run(small(recipe_file, *settings), only="align")
        assert "\n" not in str(error.value)
    assert not list((recipe_file.parent / "run").glob("align/*/*/seed*"))


def test_a_killed_evaluation_goes_on_sample_by_sample(recipe_file: Path) -> None:
    folder = recipe_file.parent / "run"
    settings = ["matrix.methods=[original]", "evaluate.n=20", "evaluate.batch_size=4"]
    process = start(recipe_file, *settings)
    wait_for(folder, "evaluate/*/.*.unfinished/responses.jsonl", process)
    [responses] = folder.glob("evaluate/*/.*.unfinished/responses.jsonl")
    while len(responses.read_text().splitlines()) < 8:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    stored = responses.read_text().rpartition("\n")[0].splitlines()
    assert len(stored) < 200, "the run ended before it was killed"
    mark = '"finish_reason": "stop"'
    stored = [line.replace(mark, '"finish_reason": "length"') for line in stored]  # nobody would say so again
    responses.write_text("\n".join(stored) + '\n{"id": "torn')
    run(small(recipe_file, *settings), only="evaluate")
    [finished] = folder.glob("evaluate/*/*/responses.jsonl")
    lines = finished.read_text().splitlines()
    assert set(stored) <= set(lines)
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
    assert len({row["id"] for row in rows}) == len(rows) == 200
    samples = finished.with_name("samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in samples} == {row["id"] for row in rows}


@pytest.mark.usefixtures("finished")
def test_another_statistic_costs_no_generation(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersGenerator, "generate", lambda *_: pytest.fail("asked again"))
    run(small(recipe_file, "matrix.methods=[original]", "evaluate.judge_thoughts=false"), only="evaluate")
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        run(small(recipe_file, "matrix.methods=[original]", "evaluate.max_new_tokens=47"), only="evaluate")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "evaluate.judge=lama-guard-3",
            "judge 'lama-guard-3' is unknown: choose from refusal, llama-guard-3",
        ),
        ("evaluate.judge=rubric", "judge rubric: missing a required"),
        ("evaluate.tasks=[tiny,rpsa_gpqa_main]", "Idavidrein/gpqa does not load: it is gated"),
    ],
)
def test_what_evaluation_lacks_is_known_before_anything_runs(
    recipe_file: Path, setting: str, message: str
) -> None:
    with pytest.raises(RPSAError, match=message):
        run(small(recipe_file, setting))
    assert not list((recipe_file.parent / "run").glob("reference/*"))


def test_benchmark_files_that_a_stage_reads_are_among_its_inputs(recipe_file: Path) -> None:
    data = recipe_file.parent / "data"
    data.mkdir()
    aime = data / "AIME-24.jsonl"
    aime.write_text('{"id": "1", "problem": "What is 1 + 1?", "answer": "2"}\n')
    recipe = small(
        recipe_file,
        f"data_dir={data}",
        "evaluate.tasks=[tiny, rpsa_aime24]",
        "analysis.perturb={draws: 1}",
        "matrix.methods=[original, fft+rpsa]",
    )
    [fisher] = tasks_of(recipe, "fisher")
    leave(fisher)
    tasks = [tasks_of(recipe, "evaluate")[0], *tasks_of(recipe, "analyse")]
    assert [task.stage for task in tasks] == ["evaluate", "analyse"]
    for task in tasks:
        leave(task)
    (data / "strongreject.csv").write_text("forbidden_prompt\nno task reads this\n")
    assert unfinished(tasks) == []
    aime.write_text('{"id": "1", "problem": "What is 1 + 1?", "answer": "3"}\n')
    assert unfinished(tasks) == tasks


def test_benign_examples_are_among_the_inputs_of_alignment(recipe_file: Path) -> None:
    benign = recipe_file.parent / "benign.jsonl"
    benign.write_text('{"prompt": "a", "response": "<think>b</think>c"}\n')
    settings = ("matrix.methods=[fft]", f"safety.benign={benign}")
    mixed, plain = small(recipe_file, *settings, "safety.benign_share=0.05"), small(recipe_file, *settings)
    before = [tasks_of(recipe, "align")[0].inputs() for recipe in (mixed, plain)]
    benign.write_text('{"prompt": "a", "response": "<think>b</think>d"}\n')
    after = [tasks_of(recipe, "align")[0].inputs() for recipe in (mixed, plain)]
    assert after[0] != before[0]
    assert after[1] == before[1]  # a share of 0 reads no file


def test_a_run_without_files_of_its_own_keeps_its_inputs(recipe_file: Path) -> None:
    """Folders of runs from before such files counted stay up to date."""
    recipe = small(recipe_file, "matrix.methods=[fft]")
    [aligned] = tasks_of(recipe, "align")
    assert set(aligned.inputs()) == {
        *("model", "paradigm", "seed", "train", "lora", "align", "safety", "data", "fisher")
    }
    for tasks, given in (
        ("[tiny]", ()),
        ("[tiny]", (f"data_dir={recipe_file.parent}",)),
        ("[rpsa_aime24]", ()),
    ):
        recipe = small(recipe_file, f"evaluate.tasks={tasks}", "matrix.methods=[original]", *given)
        inputs = tasks_of(recipe, "evaluate")[0].inputs()
        assert inputs["data"] == list(recipe.evaluate.tasks)
        assert set(inputs) == {"model", "evaluate", "data", "data_dir", "reference"}


def test_a_judges_policy_counts_by_its_content(recipe_file: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.txt"
    judge = f"evaluate.second_judge_settings={{base_url: 'http://h/v1', model: m, policy: {policy}}}"
    recipe = small(recipe_file, "matrix.methods=[original]", "evaluate.second_judge=policy", judge)
    seen = []
    for text in ("No cookies.", "No cakes.", "No cookies."):
        policy.write_text(text)
        seen.append(tasks_of(recipe, "evaluate")[0].inputs()["policies"])
    assert seen[0] == seen[2] != seen[1]
    assert list(seen[0]) == [str(policy)]


def refused(recipe_file: Path, *overrides: str) -> str:
    """What `rpsa run` says as it ends with a mistake of the user's."""
    done = invoke("run", str(recipe_file), f"output_dir={recipe_file.parent / 'run'}", *overrides)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2
    return str(done.stderr)


def test_a_mistake_in_the_data_is_one_line(recipe_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "response": "<think>b</think>c"}\n{"prompt": "d"}\n')
    settings = [f"safety.data={broken}", "safety.n=null", "matrix.methods=[original, fft]"]
    errors = refused(recipe_file, *settings)
    assert f"{broken} line 2 has no text field 'response'" in errors


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.optim=lion_8bit", "fft+rpsa/tiny-0/seed0: optim: lion_8bit is not supported"),
        ("train.load_best_model_at_end=true train.save_strategy=steps", "fft/tiny-0/seed0: train: "),
    ],
)
def test_what_training_refuses_is_known_before_anything_runs(
    recipe_file: Path, setting: str, message: str
) -> None:
    methods = "[fft+rpsa]" if "optim" in setting else "[fft, fft+rpsa]"
    assert message in refused(recipe_file, *setting.split(), f"matrix.methods={methods}")
    assert not list((recipe_file.parent / "run").glob("reference/*"))


def test_a_model_that_is_not_there_is_one_line(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refused(recipe_file, f"matrix.bases=[{tmp_path / 'empty'}]")


@pytest.mark.parametrize(
    ("settings", "on_gpu", "expected"),
    [
        ({}, True, "bfloat16"),
        ({}, False, "float32"),
        ({"dtype": "auto"}, False, "auto"),
        ({"dtype": "float32"}, True, "bfloat16"),
        ({"generation_dtype": "float16"}, True, "float16"),
        ({"generation_dtype": "bfloat16"}, False, "bfloat16"),
    ],
)
def test_the_weights_that_generate(settings: dict[str, Any], on_gpu: bool, expected: str) -> None:
    model = Model(**settings)
    assert generation_dtype(model, on_gpu=on_gpu) == expected
    if on_gpu:
        assert vllm_engine(model, {})["dtype"] == expected
        assert vllm_engine(model, {"dtype": "float32"})["dtype"] == "float32"


def test_an_adapter_is_added_in_the_recipes_dtype_before_it_is_rounded(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE)
    model = add_adapter(load_model("tiny:0", Model()), small(recipe, "matrix.methods=[lora+rpsa]").cells()[0])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    whole = model.merge_and_unload().state_dict()
    loaded = loaded_to_generate("tiny:0", str(tmp_path / "adapter"), Model(), "bfloat16").state_dict()
    assert {weight.dtype for weight in loaded.values()} == {torch.bfloat16}
    assert all(torch.equal(weight.bfloat16(), loaded[name]) for name, weight in whole.items())
