"""`rpsa plan` against what is really there: live bytes of real runs, and the trainer's own count of steps."""

import copy
import dataclasses
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from packaging.version import Version
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers.command_line import invoke
from helpers.paths import RECIPES
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import Estimation, FisherConfig, estimate_fisher
from rpsa.fisher.log_probs import evaluation_mode
from rpsa.fisher.quantile import CPU_BLOCK
from rpsa.fisher.samples import read_samples
from rpsa.parameters import trainable_parameters
from rpsa.plan import make_plan
from rpsa.plan.dry_run import LiveBytes, Precision, Shape, build_model, fake_tensors, reasoning_peak
from rpsa.plan.layers import Skeleton
from rpsa.plan.memory import (
    AlignMemory,
    Freezing,
    Instead,
    Passes,
    StageMemory,
    align_memory,
    dry_passes,
    fisher_memory,
    generation_memory,
    warmup_memory,
)
from rpsa.plan.render import SingleGpuStage
from rpsa.plan.time import count_steps
from rpsa.recipe import load_recipe
from rpsa.recipe.problems import installed_names
from rpsa.reference import ReferenceDataset, Trace
from rpsa.training.alternatives import AlternativesConfig, AlternativesTrainer
from rpsa.training.config import RPSAConfig
from rpsa.training.reasoning import reasoning_backward, warm_up
from rpsa.training.trainer import RPSATrainer

TINY = ["matrix.bases=[tiny:0]"]
LORA = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
}
SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
# Wide, deep, and with a large vocabulary on tied weights: each has its peak at another place.
CONFIGS = {
    "wide": LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=704, num_hidden_layers=2, **SIZES,
        tie_word_embeddings=False,
    ),
    "deep": LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=8, **SIZES,
        tie_word_embeddings=False,
    ),
    "tied": Qwen2Config(
        vocab_size=8000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **SIZES,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
SHAPES = ["wide", pytest.param("deep", marks=pytest.mark.integration), "tied"]
SEQUENCES, LENGTH, THOUGHT = 2, 48, 96


def real_model(config: PreTrainedConfig, dtype: str, lora: bool) -> Any:
    torch.manual_seed(0)
    # a trainer writes into its model's config
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=getattr(torch, dtype))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at 0 it leaves A without a gradient, and half of the elements with F = 0
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def reference_dataset(vocabulary: int) -> ReferenceDataset:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocabulary, (4, THOUGHT), generator=generator).tolist()
    traces = [Trace(str(i), row[:8], row[8:], "x", "stop", None) for i, row in enumerate(rows)]
    return ReferenceDataset(traces, {"pad_token_id": 0})


def safety_dataset(vocabulary: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, vocabulary, (16, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 8 + row[8:] for row in rows]})


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from rpsa.tiny import tiny_model_dir

    return AutoTokenizer.from_pretrained(tiny_model_dir(0))


COMPACT = 0.6
"""k where training is compact."""


def weights_dtype(lora: bool, method: str, bf16: bool) -> str:
    return "bfloat16" if bf16 and (lora or method == "compact") else "float32"


class Between(TrainerCallback):
    """What compact training holds between two steps, and gives up in the end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.masters, self.optimizer = trainer, 0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(args, "compact", False):
            self.masters = size_of(self.trainer.freezer.masters.values())
            states = self.trainer.optimizer.optimizer.state.values()
            self.optimizer = size_of(t for state in states for t in state.values())


def live_run(
    config: PreTrainedConfig, *, lora: bool, method: str, bf16: bool, checkpointing: bool, folder: Path
) -> tuple[dict[str, int], int]:
    """Bytes of the real objects between two steps, by part; and the most that was alive, by counting."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": bf16, "activation_checkpointing": checkpointing,
        "per_device_train_batch_size": SEQUENCES, "max_steps": 3, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "weight_decay": 0.1,
    }  # fmt: skip
    settings = installed_names(settings, SFTConfig)
    model = real_model(config, weights_dtype(lora, method, bf16), lora)
    common: dict[str, Any] = {
        "train_dataset": safety_dataset(config.vocab_size),
        "processing_class": tokenizer(),
    }
    reference = reference_dataset(config.vocab_size)
    trainer: Any
    if method != "plain":
        estimate_fisher(model, reference.batches(2, None), FisherConfig(progress=False)).save(
            folder / "fisher"
        )
        fisher = FisherDiagonal.load(folder / "fisher")
        common |= {"fisher": fisher, "reference_dataset": reference}
    if method == "compact":
        args = RPSAConfig(**settings, frozen_ratio=COMPACT, compact=True)  # type: ignore[arg-type]
        trainer = RPSATrainer(model=model, args=args, **common)
    elif method == "rpsa":
        args = RPSAConfig(**settings, frozen_ratio="dynamic", every=1, window=2)
        trainer = RPSATrainer(model=model, args=args, **common)
    elif method != "plain":
        way = {"penalty": "fisher"} if method == "penalty" else {"projection": "agem"}
        trainer = AlternativesTrainer(model=model, args=AlternativesConfig(**settings, **way), **common)
    else:
        trainer = SFTTrainer(model=model, args=SFTConfig(**settings), **common)
    scores = list(fisher.scores.values()) if method != "plain" else []
    between = Between(trainer)
    trainer.add_callback(between)
    with LiveBytes([*model.parameters(), *model.buffers(), *scores]) as live:
        trainer.train()
    parts = {
        "weights": size_of([*model.parameters(), *model.buffers()]),
        "gradients": size_of(p for p in model.parameters() if p.requires_grad),
        "optimizer": size_of(
            t for state in trainer.optimizer.optimizer.state.values() for t in state.values()
        ),
    }
    if method == "penalty":
        parts["start"] = size_of(trainer.start.values())
        parts["Fisher"] = size_of(trainer.weight_penalty._weights.values())
        return parts, parts["weights"] + live.peak
    if method == "compact":
        parts |= {"gradients": between.masters, "masters": between.masters, "optimizer": between.optimizer}
    if method in ("rpsa", "compact"):
        freezer, audit = trainer.freezer, trainer.rpsa.audit
        parts["masks"] = size_of(b.packed for b in [*freezer._support.values(), *freezer.mask.values()])
        values = [*audit._initial.values(), *audit._opened.values.values()]
        parts["audit"] = size_of(values)
    return parts, parts["weights"] + live.peak


def size_of(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def planned_run(
    config: PreTrainedConfig, *, lora: bool, method: str, bf16: bool, checkpointing: bool
) -> StageMemory:
    shape = Shape(SEQUENCES, LENGTH)
    reference = Shape(SEQUENCES, THOUGHT) if method in ("rpsa", "agem") else None
    compact = 1 - COMPACT if method == "compact" else None
    freezing = Freezing(
        dynamic=method == "rpsa", raw_moments=False, gradient_only=False, audit=True, compact=compact
    )
    with fake_tensors():
        model = build_model(config, weights_dtype(lora, method, bf16), LORA if lora else None)
        precision = Precision(bf16, checkpointing)
        passes = dry_passes(Skeleton(model), shape, reference, precision, compact, accumulated=False)
        instead = Instead("fisher" if method == "penalty" else None, method == "agem")
        memory = align_memory(
            model,
            passes,
            "adamw_torch_fused",
            freezing if method in ("rpsa", "compact") else None,
            instead if method in ("penalty", "agem") else None,
        )
    return memory.on(1, "one GPU")


METHODS = ["plain", "rpsa", "compact", "penalty", "agem"]
QUICK = {("wide", False, method) for method in METHODS} | {
    ("wide", True, "rpsa"),
    ("deep", False, "plain"),
    ("tied", False, "rpsa"),
}


def trained() -> list[Any]:
    return [
        pytest.param(
            *case,
            marks=[] if case in QUICK else [pytest.mark.integration],
            id=f"{case[0]}-{'lora' if case[1] else 'full'}-{case[2]}",
        )
        for case in itertools.product(CONFIGS, [False, True], METHODS)
    ]


@pytest.mark.parametrize(("name", "lora", "method"), trained())
def test_training_memory_is_what_is_alive(
    name: str, lora: bool, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpsa.freezing.exact.KEPT_ON", ())  # as on a GPU, but in the blocks of a CPU
    for module in ("bits", "compact"):
        monkeypatch.setattr(f"rpsa.freezing.{module}.NUMPY_ON", ())
    monkeypatch.setattr("rpsa.plan.memory.DEVICE_BLOCK", CPU_BLOCK)
    how: dict[str, Any] = {"lora": lora, "method": method, "bf16": True, "checkpointing": name == "deep"}
    parts, peak = live_run(CONFIGS[name], folder=tmp_path, **how)
    planned = planned_run(CONFIGS[name], **how)
    print(
        f"{name} {how}: kept {sum(planned.kept.values())} of {sum(parts.values())}, {planned.total} of {peak}"
    )
    assert set(planned.kept) == set(parts)
    for part, size in parts.items():
        # tokens that D_ref lacks have F = 0 and train, so that compact training holds a little more than 1 - k
        assert planned.kept[part] == pytest.approx(size, rel=0.06 if method == "compact" else 0.02), part
    if Version(version("trl")) < Version("1.16"):  # whose loss the plan knows less exactly: docs/versions.md
        assert planned.total == pytest.approx(peak, rel=0.25)
    else:
        assert planned.total == pytest.approx(peak, rel=0.015 if method == "compact" else 0.01)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_memory_of_g_r_is_what_is_alive(lora: bool) -> None:
    """In a step it hides behind TRL's tiles, which are larger on a CPU than on a GPU: so by itself."""
    config = CONFIGS["tied"]
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(real_model(config, "bfloat16" if lora else "float32", lora))
    known = [*model.parameters(), *model.buffers()]
    batch = reference_dataset(config.vocab_size).rotating_batch(0, SEQUENCES, None)
    with LiveBytes(known) as live:
        reasoning_backward(model, batch, accelerator, SEQUENCES)
    AcceleratorState._reset_state(reset_partial_state=True)
    with fake_tensors():
        skeleton = build_model(config, "bfloat16" if lora else "float32", LORA if lora else None)
        planned = reasoning_peak(
            skeleton, Shape(SEQUENCES, THOUGHT), Precision(bf16=True, checkpointing=False)
        )
    print(f"g_R: {planned} of {live.peak}")
    assert planned == pytest.approx(live.peak, rel=0.07)  # which takes prompts for responses


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("name", SHAPES)
def test_fisher_memory_is_what_is_alive(name: str, checkpointing: bool) -> None:
    config = CONFIGS[name]
    model = real_model(config, "float32", lora=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    known = [*model.parameters(), *model.buffers()]
    data = read_samples(reference_dataset(config.vocab_size).batches(SEQUENCES, None))
    settings = FisherConfig(probes=2, progress=False)
    with LiveBytes(known) as live, evaluation_mode(model):
        # without the split-half overlap that follows, which is the CPU's work
        Estimation(model, trainable_parameters(model), data, settings).run()
    with fake_tensors():
        planned = fisher_memory(
            Skeleton(build_model(config, "float32")),
            Shape(SEQUENCES, THOUGHT),
            2,
            checkpointing=checkpointing,
        )
    print(f"{name} Fisher: {planned.total} of {size_of(known) + live.peak}")
    assert planned.kept["weights"] == size_of(known)
    assert planned.total == pytest.approx(size_of(known) + live.peak, rel=0.06)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("name", SHAPES)
def test_warmup_memory_is_what_is_alive(name: str, checkpointing: bool, dtype: str) -> None:
    config = CONFIGS[name]
    model = real_model(config, dtype, lora=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    known = [*model.parameters(), *model.buffers()]
    # of unequal length, as responses are: without padding attention has no mask, and keeps less
    rows = [[3] * THOUGHT, [4] * (THOUGHT - 1)]
    traces = [Trace(str(i), row[:1], row[1:], "x", "stop", None) for i, row in enumerate(rows)]
    reference = ReferenceDataset(traces, {"pad_token_id": 0})
    batches = [reference.rotating_batch(step, SEQUENCES, None) for step in range(3)]
    with LiveBytes(known) as live:
        warm_up(model, batches, 1e-3)
    with fake_tensors():
        skeleton = Skeleton(build_model(config, dtype, LORA))
        planned = warmup_memory(skeleton, Shape(SEQUENCES, THOUGHT), checkpointing=checkpointing)
    beside = planned.kept["optimizer"] + planned.work
    print(f"{name} warm-up: {beside} of {live.peak} beside the weights")
    assert planned.kept["weights"] == size_of(known)
    assert beside == pytest.approx(live.peak, rel=0.01)


@pytest.mark.integration
def test_a_warm_up_belongs_to_the_fisher_of_an_adapter() -> None:
    def stages(*settings: str) -> dict[str, SingleGpuStage]:
        overrides = [*TINY, "matrix.methods=[fft+rpsa, lora+rpsa]", "fisher.batch_size=8", *settings]
        plan = make_plan(load_recipe(RECIPES / "tiny" / "demo.yaml", overrides), gpus=(1,))
        return {stage.stage: stage for stage in plan.stages["tiny:0"]}

    without, warm, longer = stages(), stages("fisher.warmup_steps=1000"), stages("fisher.warmup_steps=3000")
    assert {name: stage for name, stage in warm.items() if name != "Fisher, LoRA"} == {
        name: stage for name, stage in without.items() if name != "Fisher, LoRA"
    }
    before, after = without["Fisher, LoRA"], warm["Fisher, LoRA"]
    assert after.memory.total >= before.memory.total
    for gpu, seconds in before.seconds.items():
        # a model as small as this takes as long as its kernels' launches, forward and backward
        assert after.seconds[gpu] - seconds == pytest.approx(1000 * 3 * 0.025)
        assert longer["Fisher, LoRA"].seconds[gpu] - seconds == pytest.approx(3000 * 3 * 0.025)
    # more sequences a batch than D_ref has: the Fisher takes them once, a step of the warm-up again
    large, many = stages("reference.n=2"), stages("reference.n=2", "fisher.warmup_steps=1")
    assert many["Fisher, LoRA"].memory.total > large["Fisher, LoRA"].memory.total
    assert "optimizer" in many["Fisher, LoRA"].memory.kept


def test_generation_memory_is_what_is_alive() -> None:
    config = CONFIGS["deep"]
    model = real_model(config, "float32", lora=False)
    known = [*model.parameters(), *model.buffers()]
    prompts, new = torch.full((4, 20), 7), 150
    with LiveBytes(known) as live, torch.inference_mode():
        model.generate(prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    with fake_tensors():
        planned = generation_memory(
            Skeleton(build_model(config, "float32")), Shape(4, 20 + new), config.vocab_size
        )
    print(f"generation: {planned.total} of {size_of(known) + live.peak}")
    # before transformers 5.20 it needs less than planned
    within = 0.02 if hasattr(transformers.TrainingArguments, "activation_checkpointing") else 0.08
    assert planned.total == pytest.approx(size_of(known) + live.peak, rel=within)


def test_what_is_kept_is_shared_out() -> None:
    freezing = Freezing(dynamic=True, raw_moments=False, gradient_only=False, audit=False)
    n = 1 << 30
    plain = AlignMemory(n, n, 4 * n, 4 * n, 1000, "adamw_torch_fused", Passes(5 * n, 7 * n), None)
    assert dict(plain.on(1, "one GPU").kept) == {"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}
    assert plain.on(1, "one GPU").work == n  # g_R is not measured
    rpsa = dataclasses.replace(plain, freezing=freezing)
    assert rpsa.on(1, "one GPU").kept["masks"] == n // 4
    assert rpsa.on(1, "one GPU").work == 4 * n + 12 * 1000  # the copy of the weights in a step
    assert rpsa.on(8, "DDP").total == rpsa.on(1, "one GPU").total + 4 * n
    sharded = dataclasses.replace(rpsa, passes=Passes(n, n, gathered=n // 2)).on(4, "FSDP2")
    assert dict(sharded.kept) == {
        "weights": n, "gradients": n, "optimizer": 2 * n, "masks": n // 16, "audit": 0
    }  # fmt: skip
    assert sharded.work == n + n // 16 + n // 2  # the pass, a quarter of the signs, what is gathered
    assert dataclasses.replace(plain, optimizer="sgd").on(1, "one GPU").kept["optimizer"] == 0
    constant = dataclasses.replace(freezing, dynamic=False, compact=0.5)
    compact = AlignMemory(n, n, 2 * n, 2 * n, 1000, "adamw_torch_fused", Passes(3 * n, 7 * n), constant)
    assert dict(compact.on(1, "one GPU").kept) == {
        "weights": 2 * n, "gradients": 2 * n, "optimizer": 4 * n, "masters": 2 * n, "masks": n // 8, "audit": 0
    }  # fmt: skip
    assert compact.on(1, "one GPU").work == n  # no copy of the weights
    assert compact.on(2, "DDP").kept["buckets"] == 4 * n


def test_a_stage_fits_with_room_to_spare() -> None:
    memory = StageMemory({"weights": 20 << 30}, 2 << 30)
    assert memory.fits(24.2)
    assert not memory.fits(24)


def test_live_bytes_counts_storages_once_and_until_they_are_freed() -> None:
    known = torch.ones(100)
    with LiveBytes([known]) as live:
        view = known.view(10, 10)
        assert live.now == 0
        first = view + 1
        second = first.t()
        assert (live.now, live.peak) == (400, 400)
        first = first[:5] * 2.0
        assert (live.now, live.peak) == (600, 600)  # `second` keeps all of the sum
        del second
        assert (live.now, live.peak) == (200, 600)


@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(2, 1, 3), (2, 3, 2), (7, 4, 1.5)])
def test_steps_are_the_trainers(batch: int, accumulation: int, epochs: float, tmp_path: Path) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, num_train_epochs=epochs, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=0.0,
    )  # fmt: skip
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    trainer = SFTTrainer(
        model=real_model(config, "float32", lora=False),
        args=args,
        train_dataset=safety_dataset(50),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert count_steps(args, 16, gpus=1).steps == trainer.state.max_steps == trainer.state.global_step


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path.name, marks=[] if path.stem == "demo" else [pytest.mark.integration])
        for path in sorted((RECIPES / "tiny").glob("*.yaml"))
    ],
)
def test_every_tiny_recipe_has_a_plan(recipe: str) -> None:
    checked = load_recipe(RECIPES / "tiny" / recipe, [*TINY, "sweeps={}"])
    plan = make_plan(checked, gpus=[1])
    methods = {cell.method for cell in checked.cells() if cell.paradigm != "none"}
    assert {method.method for method in plan.methods} == methods


def test_rehearsal_and_projection_cost_what_they_do(tmp_path: Path) -> None:
    """Steps as the trainer makes them: a quarter more rows and a reasoning gradient at every step."""
    recipe = load_recipe(
        RECIPES / "tiny" / "demo.yaml",
        [*TINY, "matrix.methods=[fft, fft+rehearsal, fft+agem, fft+nullspace]"],
    )
    plans = {method.method: method for method in make_plan(recipe, gpus=[1]).methods}
    plain, rehearsal, agem = (plans[name].layouts[0].steps for name in ("fft", "fft+rehearsal", "fft+agem"))
    assert plain is not None
    assert rehearsal is not None
    assert agem is not None
    assert plans["fft+rehearsal"].safety.examples == round(256 / 0.75)
    assert (plain.steps, rehearsal.steps) == (3 * 32, 3 * 43)
    assert (plain.measurements, rehearsal.measurements, agem.measurements) == (0, 0, 96)
    assert plans["fft"].measurement_cost is None
    assert plans["fft+agem"].measurement_cost is not None
    null_space = plans["fft+nullspace"]
    assert null_space.layouts[0].steps == plain
    assert null_space.measurement_cost is None
    assert null_space.layouts[0].memory.kept["start"] == 4 * null_space.trainable


def test_a_penalty_on_the_product_needs_the_whole_models_fisher() -> None:
    recipe = load_recipe(RECIPES / "tiny" / "demo.yaml", [*TINY, "matrix.methods=[lora+ewc_product]"])
    plan = make_plan(recipe, gpus=[1])
    assert [stage.stage for stage in plan.stages["tiny:0"] if "Fisher" in stage.stage] == ["Fisher, full"]
    [method] = plan.methods
    assert method.layouts[0].memory.kept["Fisher"] > 4 * method.trainable


def test_the_papers_own_setting_never_leaves_a_half(tmp_path: Path) -> None:
    args = RPSAConfig(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, num_train_epochs=3
    )
    steps = count_steps(args, 1000, gpus=4)
    assert (steps.sequences_per_step, steps.steps, steps.measurements) == (8, 375, 15)
    assert (steps.dynamic_from, steps.never_dynamic) == (500, True)
    assert not count_steps(args, 1336, gpus=4).never_dynamic  # 501 steps, the 501st is step 500
    assert count_steps(args, 1333, gpus=4).steps == 501
    args.max_steps = 500
    assert count_steps(args, 1000, gpus=4).never_dynamic
    constant = RPSAConfig(output_dir=str(tmp_path), use_cpu=True, frozen_ratio=0.6)
    assert count_steps(constant, 1000, 1).measurements == 0


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of Llama-3.1-8B, which the paper's DeepSeek-R1-Distill-Llama-8B has."""
    folder = tmp_path_factory.mktemp("llama-8b")
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.slow
def test_an_8b_model_is_trained_in_full_on_one_80_gib_gpu_if_training_is_compact(eight_billion: Path) -> None:
    recipe = load_recipe(
        RECIPES / "deepseek-r1-distill-llama-8b" / "fft+rpsa.yaml",
        [f"model.name={eight_billion}", "align.frozen_ratio=0.6", "align.compact=true"],
    )
    [method] = make_plan(recipe, gpu_memory=80, gpus=(1,)).methods
    [one] = method.layouts
    assert one.fits
    assert method.dtype == "auto"
    assert sum(one.memory.kept.values()) <= 8.6 * method.parameters


@pytest.mark.slow
def test_an_8b_model_on_80_gib(eight_billion: Path) -> None:
    recipe = load_recipe(
        RECIPES / "deepseek-r1-distill-llama-8b" / "fft+rpsa.yaml", [f"model.name={eight_billion}"]
    )
    plan = make_plan(recipe, gpu_memory=80, gpus=(1, 4))
    [method] = plan.methods
    assert method.parameters == method.trainable == 8_030_261_248
    one, four = method.layouts
    n = method.parameters
    assert [one.memory.kept[part] for part in ("gradients", "optimizer", "masks")] == [4 * n, 8 * n, n // 4]
    assert (one.fits, four.fits, four.sharding) == (False, True, "FSDP2")
    assert four.memory.kept["optimizer"] == 2 * n
    assert four.steps is not None
    assert (four.steps.steps, four.steps.never_dynamic) == (357, True)
    assert any("k stays at 0.5: 357 steps" in warning and "501 steps" in warning for warning in plan.warnings)
    assert method.measurement_cost == pytest.approx(4096 / 150)
    assert all(stage.fits for stage in plan.stages[str(eight_billion)])
    # keys and values in bf16 of one sequence as long as the model's context
    assert plan.stages[str(eight_billion)][0].memory.kept["KV cache"] == 2 * 32 * 8 * 128 * 2 * 131072


def test_the_tiny_plan_in_a_terminal_and_as_json() -> None:
    shown = invoke("plan", str(RECIPES / "tiny" / "demo.yaml"), *TINY, "--gpus", "1,2")
    assert shown.exit_code == 0, shown.output
    for words in ("Align, MiB of each GPU", "fft+rpsa", "lora+rpsa", "Fisher, LoRA", "estimates"):
        assert words in shown.stdout
    done = invoke("plan", str(RECIPES / "tiny" / "demo.yaml"), *TINY, "matrix.methods=[fft+rpsa]", "--json")
    plan = json.loads(done.stdout)
    assert plan["parameters"] == {"tiny:0": 363_552}
    [method] = plan["methods"]
    memory = method["layouts"][0]["memory"]
    assert memory["total"] == sum(memory["kept"].values()) + memory["work"]
    assert method["layouts"][0]["steps"]["steps"] == 96
    assert method["safety"]["known"]


def test_a_model_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke(
        "plan", str(RECIPES / "deepseek-r1-distill-qwen-7b" / "lora.yaml"), "model.name=nobody/nothing"
    )
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "`hf download nobody/nothing config.json`" in done.stderr
    for wrong in ("1,x", "0"):
        done = invoke("plan", str(RECIPES / "tiny" / "demo.yaml"), *TINY, "--gpus", wrong)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert "--gpus" in done.stderr
    with pytest.raises(RPSAError, match="gpu-memory"):
        make_plan(load_recipe(RECIPES / "tiny" / "demo.yaml"), gpu_memory=0)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (["safety.data=tiny:refusals"], True),
        (["safety.data=tiny:balanced"], False),
        (["safety.data=TianshengHuang/DirectRefusal", "safety.format=direct_refusal"], True),
        (["safety.data=UCSC-VLAA/STAR-1", "safety.format=star1"], False),
    ],
)
def test_training_on_refusals_alone_is_warned_of_once(settings: list[str], warned: bool) -> None:
    recipe = load_recipe(RECIPES / "tiny" / "demo.yaml", [*TINY, "matrix.methods=[fft, lora]", *settings])
    said = [text for text in make_plan(recipe, gpus=(1,)).warnings if "training example is a refusal" in text]
    assert [text.partition(":")[0] for text in said] == (["fft, lora"] if warned else [])


def test_unknown_data_leaves_the_steps_unknown(tmp_path: Path) -> None:
    recipe = load_recipe(
        RECIPES / "tiny" / "demo.yaml",
        [
            *TINY,
            "matrix.methods=[fft]",
            "safety.data=UWNSL/SafeChain",
            "safety.n=null",
            "safety.max_length=64",
        ],
    )
    plan = make_plan(recipe, gpus=(1,))
    assert plan.methods[0].layouts[0].steps is None
    assert any("set safety.n" in warning for warning in plan.warnings)
