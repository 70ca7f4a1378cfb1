"""Trainers and kernels as recipe keys: what `rpsa run` does with them, and what is refused in one line before it."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_runs import copied, small, written
from rpsa.artifacts import AUDIT_FILE
from rpsa.checkpoints import load_adapter
from rpsa.errors import RPSAError
from rpsa.evaluation.run import as_trained, loaded_to_generate
from rpsa.models import load_model
from rpsa.pipeline import run
from rpsa.pipeline.alignment import training_arguments
from rpsa.pipeline.preflight import preflight
from rpsa.pipeline.publishing import publication
from rpsa.pipeline.stages import AlignTask, tasks_of
from rpsa.plan import make_plan
from rpsa.recipe.sections import Model
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


# Kernels


KERNELS = ("train.loss_type=chunked_nll", "train.packing=true", "model.attn_implementation=eager")


@pytest.mark.integration
def test_a_study_with_packed_rows_a_chunked_loss_and_an_attention_by_name(recipe_file: Path) -> None:
    folder = run(small(recipe_file, *KERNELS, TRAINED))
    found = audits(folder / "align")
    assert len(found) == 3
    assert all(one["frozen_elements_moved"] == 0 < one["frozen_element_steps_checked"] for one in found)
    log = json.loads((folder / "align/fft/tiny-0/seed0/log.json").read_text())
    assert log["steps"] < 4  # rows of several examples


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.packing=true", "train.packing_strategy=wrapped"], "packing_strategy: wrapped is not supported"),
        (["matrix.methods=[fft]", "train.packing=true", "train.packing_strategy=wrapped"], "wrapped is not supported"),
        (["train.use_liger_kernel=true"], "use_liger_kernel"),
        (["matrix.methods=[fft+rpsa]", "train.optim=lion_8bit"], "optim: lion_8bit is not supported"),
        (["model.attn_implementation=flash_attention_2"], "flash_attention_2 needs the package flash-attn and a GPU"),
        (["model.attn_implementation=kernels-community/flash-attn"], "needs the package kernels"),
        (["model.attn_implementation=spda"], "'spda' is unknown; did you mean 'sdpa'?"),
        (["model.quantization=8bit"], "model.quantization: '8bit' is not a valid value"),
        (["model.quantization=4bit"], "model.quantization: 4bit is for adapters; take fft out"),
        (
            ["model.quantization=4bit", "matrix.methods=[lora+ewc_product]"],
            "4bit: lora+ewc_product goes by the Fisher of the base's own weights",
        ),
        (
            ["model.quantization=4bit", "matrix.methods=[lora+rpsa]", "evaluate.backend=vllm"],
            "evaluate.backend: vllm would not run the 4-bit weights",
        ),
        (
            ["model.quantization=4bit", "matrix.methods=[lora+rpsa]", "robustness={harmful: tiny, benign: tiny}"],
            "robustness.finetune: changes weights",
        ),
    ],
)  # fmt: skip
def test_what_is_not_supported_or_not_installed_is_one_line(
    overrides: list[str], message: str, recipe_file: Path
) -> None:
    if "is not installed" in message or "needs the package" in message:
        package = message.split()[-1] if message.endswith("kernels") else "flash_attn"
        if find_spec(package):
            pytest.skip(f"{package} is installed")
    with pytest.raises(RPSAError) as error:
        preflight(small(recipe_file, *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


QLORA = ("model.quantization=4bit", "matrix.methods=[original, lora+rpsa]", "reference.held_out=2")


def test_without_bitsandbytes_four_bits_are_refused_at_once(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RPSAError, match="bitsandbytes is not installed") as error:
        preflight(small(recipe_file, *QLORA))
    assert "rpsa[qlora]" in str(error.value)


@pytest.mark.integration
def test_a_study_on_a_base_of_four_bits(recipe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = small(recipe_file, *QLORA)
    folder = run(recipe)
    [audit] = audits(folder / "align")
    assert audit["frozen_elements_moved"] == 0 < audit["frozen_element_steps_checked"]
    cell = folder / "align" / "lora+rpsa" / "tiny-0" / "seed0"
    metadata = json.loads((cell / "rpsa_metadata.json").read_text())
    assert metadata["base_model"]["quantization"] == "4bit"
    assert metadata["training"]["dtype"] == ["float32"]
    assert "in 4 bits (NF4, QLoRA)" in (cell / "README.md").read_text()
    whole = small(recipe_file, *QLORA[1:])
    assert metadata["training"]["parameters"] > sum(
        p.numel() for p in load_model("tiny:0", whole.model).parameters()
    )
    for task, other in zip(tasks_of(recipe, "reference"), tasks_of(whole, "reference"), strict=True):
        assert task.inputs()["model"]["quantization"] == "4bit"
        assert "quantization" not in other.inputs()["model"]
        assert not other.is_done()
    # what is asked in the end, with a recipe or without, is the adapter on the same base
    asked = [
        loaded_to_generate("tiny:0", str(cell), model, "float32")
        for model in (recipe.model, as_trained(str(cell), Model()))
    ]
    for model in asked:
        assert model.get_base_model().is_loaded_in_4bit
        assert "lora_A" in " ".join(name for name, _ in model.named_parameters())
    prompt = torch.arange(5, 25)[None]
    with torch.no_grad():
        first, second = (model(prompt).logits for model in asked)
        full = load_adapter(load_model("tiny:0", whole.model), str(cell), "adapter")(prompt).logits
    assert torch.equal(first, second)
    assert float((first - full).abs().max()) > 0.01
    with pytest.raises(RPSAError, match="leave --merge out"):
        publication(folder, "lora+rpsa/tiny-0/seed0", tmp_path / "out", merge=True)


def test_a_plan_says_what_it_does_not_know_of_four_bits(recipe_file: Path) -> None:
    warnings = make_plan(small(recipe_file, *QLORA), gpus=[1]).warnings
    assert any("model.quantization: the base is counted in its own dtype" in one for one in warnings)
