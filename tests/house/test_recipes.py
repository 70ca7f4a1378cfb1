"""The shipped recipes: each builds every object that it describes, and those of real models are Appendix A's."""

import dataclasses
from pathlib import Path

import pytest

from helpers.paths import RECIPES, fetched_prompts
from rpsa.fisher.estimators import FisherConfig
from rpsa.pipeline.alignment import training_arguments
from rpsa.pipeline.preflight import preflight
from rpsa.recipe import Cell, Recipe, load_recipe
from rpsa.reference import ReferenceConfig

ALL = sorted(
    path for path in RECIPES.rglob("*.yaml") if path.parent.name not in ("smoke", "accelerate", "base")
)
REAL = [path for path in ALL if path.parent.name not in ("tiny", "smollm2-135m")]
PAPER = [path for path in REAL if "7b" in path.parent.name or "8b" in path.parent.name]


@pytest.fixture(autouse=True)
def _fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def aligned(recipe: Recipe) -> list[Cell]:
    """The cells that train, with a bf16 that a machine without a GPU admits: on the CPU, all else as it is."""
    cells = [cell for cell in recipe.cells() if cell.paradigm != "none"]
    return [dataclasses.replace(cell, train={**cell.train, "use_cpu": True}) for cell in cells]


@pytest.mark.parametrize("path", ALL, ids=name)
def test_every_recipe_builds_what_it_describes(path: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    recipe = load_recipe(path)
    for cell in aligned(recipe):
        args = training_arguments(recipe, cell, tmp_path)
        assert args.learning_rate == cell.learning_rate
        if cell.paradigm == "lora":
            LoraConfig(task_type="CAUSAL_LM", **cell.lora)
    settings = recipe.fisher.model_dump(exclude={"warmup_steps", "batch_size", "activation_checkpointing"})
    FisherConfig(**settings)
    ReferenceConfig(max_new_tokens=recipe.reference.max_new_tokens)


@pytest.mark.parametrize("path", REAL, ids=name)
def test_hyper_parameters_are_those_of_appendix_a(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    for cell in aligned(recipe):
        args = training_arguments(recipe, cell, tmp_path)
        assert (args.learning_rate, args.num_train_epochs) == {"fft": (1e-5, 3), "lora": (1e-4, 6)}[
            cell.paradigm
        ]
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 1)
        assert (args.bf16, args.optim.value) == (True, "adamw_torch_fused")
        assert (args.weight_decay, args.max_grad_norm) == (1e-4, 1.0)
        assert (args.lr_scheduler_type.value, args.warmup_steps) == ("cosine", 100)
        assert (args.eval_strategy.value, args.eval_steps) == ("steps", 100)
        assert (args.save_strategy.value, args.save_steps) == ("steps", 100)
        assert (args.load_best_model_at_end, args.metric_for_best_model) == (True, "loss")
        assert (cell.seed, args.seed) == (42, 42)
        if cell.paradigm == "lora":
            assert dict(cell.lora) == {
                "r": 4,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "target_modules": ["gate_proj", "up_proj", "down_proj"],
            }
        if cell.method.endswith("rpsa"):
            assert (args.frozen_ratio, args.window, args.every, args.mask) == ("dynamic", 20, 25, "fisher")


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_data_and_sampling_are_those_of_section_4(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.reference.problems is not None:
        assert (recipe.reference.problems, recipe.reference.n) == ("HuggingFaceH4/MATH-500", 100)
    if path.parent.name == "qwen3-8b" or path.stem == "recommended":  # not the paper's
        assert (recipe.safety.data, recipe.safety.benign_share) == ("UCSC-VLAA/STAR-1", 0.45)
    else:
        assert (recipe.safety.data, recipe.safety.n) == ("TianshengHuang/DirectRefusal", 1000)
    assert (recipe.evaluate.temperature, recipe.evaluate.top_p) == (0.6, 0.95)
    paper = {"aime24", "gpqa_main", "humaneval_plus", "mbpp_plus", "strongreject", "wildjailbreak"}
    assert {f"rpsa_{task}" for task in paper} <= set(recipe.evaluate.tasks)


@pytest.mark.parametrize("path", REAL, ids=name)
def test_what_the_paper_fixes_is_written_out(path: Path) -> None:
    """A reader must see the paper's numbers in the recipe, not look for them in our defaults."""
    recipe = load_recipe(path)
    train = {"per_device_train_batch_size", "bf16", "optim", "weight_decay", "max_grad_norm", "warmup_steps"}
    assert train <= set(recipe.train)
    if any(cell.align for cell in recipe.cells()):
        assert {"frozen_ratio", "window", "every"} <= recipe.align.model_fields_set
        assert {"problems", "n", "seed"} <= recipe.reference.model_fields_set
    if any(cell.paradigm == "lora" for cell in recipe.cells()):
        assert {"r", "lora_alpha", "lora_dropout", "target_modules"} <= set(recipe.lora)


@pytest.mark.parametrize("folder", sorted({path.parent for path in PAPER}), ids=lambda f: f.name)
def test_the_recipes_of_a_model_share_what_they_have_in_common(folder: Path) -> None:
    """They write to one run folder: the same cell must mean the same run in each of them."""
    paths = [path for path in sorted(folder.glob("*.yaml")) if path.stem != "recommended"]
    recipes = [load_recipe(path) for path in paths]
    assert len({recipe.folder for recipe in recipes}) == 1
    assert all(recipe.evaluate == recipes[0].evaluate for recipe in recipes)
    seen: dict[str, Cell] = {}
    for cell in (cell for recipe in recipes for cell in recipe.cells()):
        assert seen.setdefault(cell.id, cell) == cell
    frozen = [recipe for recipe in recipes if any(cell.align for cell in recipe.cells())]
    assert all((r.reference, r.fisher) == (frozen[0].reference, frozen[0].fisher) for r in frozen)


def test_bf16_on_a_machine_without_a_gpu_is_refused_in_one_line() -> None:
    import torch

    from rpsa.errors import RPSAError

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RPSAError, match="bf16"):
        preflight(load_recipe(REAL[0]))
