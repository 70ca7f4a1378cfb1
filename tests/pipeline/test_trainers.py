"""Trainers and kernels as recipe keys: what `rpsa run` does with them, and what is refused in one line before it."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.small_runs import copied, small, written
from rpsa.artifacts import AUDIT_FILE
from rpsa.errors import RPSAError
from rpsa.pipeline import run
from rpsa.pipeline.alignment import training_arguments
from rpsa.pipeline.preflight import preflight
from rpsa.pipeline.stages import AlignTask
from rpsa.plan import make_plan
from rpsa.training.preferences import RPSADPOConfig

DPO = ("train.trainer=dpo", "train.beta=0.3", "safety.data=tiny:balanced", "safety.validation_share=0.2")
TRAINED = "matrix.methods=[fft, fft+rpsa, fft+constant, lora+rpsa]"


def audits(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob(AUDIT_FILE))]


# DPO


@pytest.mark.integration
def test_a_study_on_pairs(recipe_file: Path, whole_run: Path) -> None:
    copied(whole_run, recipe_file.parent / "run", "reference", "fisher")
    folder = run(small(recipe_file, *DPO, TRAINED))
    assert {name.split("/")[1] for name in written(folder) if name.startswith("align")} == {
        *("fft", "fft+rpsa", "fft+constant", "lora+rpsa"),
    }
    found = audits(folder / "align")
    assert len(found) == 3
    assert all(one["frozen_elements_moved"] == 0 < one["frozen_element_steps_checked"] for one in found)
    for method in ("fft", "fft+rpsa", "lora+rpsa"):
        cell = folder / "align" / method / "tiny-0" / "seed0"
        assert "DPOTrainer (beta 0.3), 4 optimizer steps" in (cell / "README.md").read_text()
        assert not any(path.is_dir() for path in cell.iterdir())  # as DPO's other adapter would be
        log = json.loads((cell / "log.json").read_text())
        assert any("rewards/margins" in entry for entry in log["history"])
        assert log["safety_data"]["examples"] == 13
        assert 1 < log["safety_data"]["perplexity"] < 2
    assert (folder / "report" / "index.html").is_file()


def test_the_defaults_and_the_identity_of_dpo(recipe_file: Path, measured: Path) -> None:
    pairs = small(recipe_file, "train={trainer: dpo}", "matrix.methods=[fft+rpsa, lora]")
    assert {cell.method: cell.learning_rate for cell in pairs.cells()} == {"fft+rpsa": 1e-6, "lora": 1e-5}
    assert "trainer" not in pairs.cells()[0].train
    methods = "{fft: {}, dpo: {paradigm: fft, train: {trainer: dpo, beta: 0.2}}}"
    both = small(recipe_file, f"matrix.methods={methods}").cells()
    assert [cell.trainer for cell in both] == ["sft", "dpo"]
    recipe = small(recipe_file, *DPO)
    cell = next(cell for cell in recipe.cells() if cell.method == "fft+rpsa")
    made = training_arguments(recipe, cell, recipe.folder)
    assert isinstance(made, RPSADPOConfig)
    assert (made.beta, made.max_length, made.frozen_ratio) == (0.3, 128, "dynamic")
    assert AlignTask(recipe, cell).inputs()["trainer"] == "dpo"
    plain = small(recipe_file)
    assert "trainer" not in AlignTask(plain, plain.cells()[2]).inputs()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.trainer=dop"], "train.trainer: 'dop' is not a valid value; did you mean 'dpo'?"),
        (["train.trainer=grpo"], "train.trainer: grpo needs rewards, which a recipe has none of; in a script, put"),
        (["train.beta=0.1"], "train.beta: unknown key of SFTConfig"),
        ([*DPO, "train.packing=true"], "train.packing: unknown key of DPOConfig"),
        ([*DPO, "train.beta=high"], "train.beta: expected a number"),
        ([*DPO, "train.loss_type=[dpoo]"], "Unknown loss type"),
        ([*DPO, "safety.data=self", "safety.prompts=tiny"], "safety.data: self has no rejected responses"),
        ([*DPO, "safety.format=star1"], "safety.format: star1 is not of pairs"),
        ([*DPO, "matrix.methods=[fft+rehearsal]"], "fft+rehearsal: rehearsal_share: D_ref has no rejected"),
        (
            [*DPO, "safety.keep_best=safety_and_reasoning", "train.eval_strategy=epoch", "reference.held_out=2"],
            "safety_and_reasoning adds up nats per token",
        ),
        ([*DPO, "safety.data=harm.jsonl"], "harm.jsonl line 1 has no text field 'chosen'"),
        (
            ["matrix.methods={fft: {train: {packing: true}}, two: {paradigm: fft, train: {trainer: dpo}}}",
             "train.packing=true"],
            "train.packing: unknown key of DPOConfig, which trains two",
        ),
    ],
)  # fmt: skip
def test_what_is_no_dpo_is_one_line(
    overrides: list[str], message: str, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe_file.parent)
    Path("harm.jsonl").write_text('{"prompt": "p", "response": "<think> a </think> b"}\n')
    with pytest.raises(RPSAError) as error:
        preflight(small(recipe_file, *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_prices_both_responses_and_the_reference_model(recipe_file: Path) -> None:
    """Twice the sequences, a forward pass more, and in full fine-tuning the weights once more."""

    def align(*overrides: str) -> Any:
        recipe = small(recipe_file, "safety.data=tiny:balanced", "matrix.methods=[fft, lora]", *overrides)
        return {method.method: method for method in make_plan(recipe, gpus=[1]).methods}

    responses, pairs = align(), align("train.trainer=dpo")
    for method in ("fft", "lora"):
        one, two = (found[method].layouts[0].memory.kept for found in (responses, pairs))
        extra = one["weights"] if method == "fft" else None
        assert two.get("reference model") == extra
        assert {name: size for name, size in two.items() if name != "reference model"} == one
        assert pairs[method].safety.examples == responses[method].safety.examples
        assert 1.8 < pairs[method].safety.mean / responses[method].safety.mean < 2.2
        assert pairs[method].layouts[0].memory.work > responses[method].layouts[0].memory.work
    precomputed = align("train.trainer=dpo", "train.precompute_ref_log_probs=true")["fft"]
    assert "reference model" not in precomputed.layouts[0].memory.kept
