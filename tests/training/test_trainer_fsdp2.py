"""The trainer and the Fisher stage under accelerate's FSDP2: its code as it is, told that a CPU can be sharded on."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.rank_runs import assert_same, make_model, make_trainer, reference, save_fisher, train
from helpers.ranks import run_ranks
from helpers.sharded import shard_on_cpus
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.models import sharded
from rpsa.parameters import trainable_parameters
from rpsa.pipeline.alignment import save_whole
from rpsa.sharding import full, is_sharded
from rpsa.training.perplexity import PerplexityCallback

CASES = [("llama", "float32"), ("qwen2", "float64"), ("llama+lora", "float64")]
SETTINGS = {"gradient_accumulation_steps": 2}


def train_sharded(cases: list[tuple[str, str]], folder: Path, resume: Path | None) -> list[dict[str, Any]]:
    shard_on_cpus()
    results = []
    for kind, dtype in cases:
        fisher = folder.parent / f"fisher-{kind}-{dtype}"
        saving = {"save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(kind, dtype, folder / kind, fisher, **SETTINGS, **saving)
        trainer.train(resume_from_checkpoint=str(resume / kind / "checkpoint-3") if resume else None)
        save_whole(trainer, folder / kind / "final")
        parameters = trainable_parameters(trainer.accelerator.unwrap_model(trainer.model))
        results.append(
            {
                "is_sharded": is_sharded(parameters),
                "trajectory": trainer.rpsa.trajectory,
                "report": trainer.rpsa.report(),
                "weights": {n: full(p).detach().clone() for n, p in parameters.items()},
            }
        )
    return results


def train_alone(cases: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    return [
        train(kind, dtype, folder / kind, folder.parent / f"fisher-{kind}-{dtype}", SETTINGS)
        for kind, dtype in cases
    ]


@pytest.mark.parametrize(
    "cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.integration)], ids=["one", "others"]
)
def test_two_ranks_train_as_one_process_and_resume(cases: list[tuple[str, str]], tmp_path: Path) -> None:
    for kind, dtype in cases:
        save_fisher(kind, dtype, tmp_path)
    [alone] = run_ranks(1, train_alone, tmp_path / "ranks-1", cases, tmp_path / "one")
    whole, other = run_ranks(2, train_sharded, tmp_path / "ranks-2", cases, tmp_path / "two", None)
    resumed = run_ranks(2, train_sharded, tmp_path / "ranks-3", cases, tmp_path / "three", tmp_path / "two")[
        0
    ]
    for number, (kind, dtype) in enumerate(cases):
        assert whole[number]["is_sharded"]
        assert whole[number]["trajectory"] == other[number]["trajectory"]
        assert_same(whole[number], alone[number], dtype)
        assert_same(resumed[number], whole[number], dtype)
        assert sum(i["end"] - i["start"] for i in resumed[number]["report"]["intervals"]) == 6
        final = tmp_path / "two" / kind / "final"
        assert (final / "rpsa_audit.json").is_file()
        weights = trainable_parameters(saved_model(kind, dtype, final))
        for name, weight in whole[number]["weights"].items():
            assert torch.equal(weights[name], weight), name


def train_measured(folder: Path, fisher: Path, is_measured: bool, is_sharded: bool) -> dict[str, Any]:
    if is_sharded:
        shard_on_cpus()
    trainer = make_trainer("llama", "float64", folder, fisher)
    perplexity = PerplexityCallback(trainer, trainer.train_dataset, folder / "perplexity.json")
    if is_measured:
        trainer.add_callback(perplexity)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {n: full(p).detach().clone() for n, p in trainable_parameters(model).items()}
    return {"perplexity": perplexity.value, "weights": weights}


@pytest.mark.integration
def test_perplexity_is_that_of_one_process_and_changes_nothing(tmp_path: Path) -> None:
    fisher = save_fisher("llama", "float64", tmp_path)

    def trained(name: str, ranks: int, is_measured: bool) -> dict[str, Any]:
        given = (tmp_path / name, fisher, is_measured, ranks > 1)
        return run_ranks(ranks, train_measured, tmp_path / f"ranks-{name}", *given)[0]

    one, two, unmeasured = trained("one", 1, True), trained("two", 2, True), trained("unmeasured", 2, False)
    assert one["perplexity"] > 1
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-9)
    assert unmeasured["perplexity"] is None
    for name, weight in unmeasured["weights"].items():
        assert torch.equal(two["weights"][name], weight), name


def saved_model(kind: str, dtype: str, folder: Path) -> Any:
    """As Hugging Face loads it."""
    base, _, adapter = kind.partition("+")
    if adapter:
        model = make_model(base, getattr(torch, dtype))
        return PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False).to(
            getattr(torch, dtype)
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def fisher_sharded(kind: str, folder: Path) -> bool:
    from accelerate import PartialState

    shard_on_cpus()
    PartialState(cpu=True)
    model = sharded(make_model(kind))
    fisher = estimate_fisher(model, reference().batches(4, None), FisherConfig(progress=False))
    fisher.save(folder)
    return is_sharded(fisher.scores)


@pytest.mark.parametrize("kind", ["llama", pytest.param("llama+lora", marks=pytest.mark.integration)])
def test_the_fisher_stage(kind: str, tmp_path: Path) -> None:
    expected = FisherDiagonal.load(save_fisher(kind, "float32", tmp_path))
    assert all(run_ranks(2, fisher_sharded, tmp_path / "ranks", kind, tmp_path / "fisher"))
    found = FisherDiagonal.load(tmp_path / "fisher")
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm()
    assert found.manifest["adapter_fingerprint"] == expected.manifest["adapter_fingerprint"]
    assert found.manifest["fingerprint"] == expected.manifest["fingerprint"]


def refused(variable: str, value: str) -> str:
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", variable: value}
    try:
        make_trainer("llama", "float32", Path("nowhere"), Path("nowhere"))
    except RPSAError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "FSDP1 is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "tensor parallelism is not supported"),
    ],
)
def test_what_a_launcher_has_set_up_is_refused(
    variable: str, value: str, message: str, tmp_path: Path
) -> None:
    [found] = run_ranks(1, refused, tmp_path, variable, value)
    assert found.startswith(message)
    assert "\n" not in found
