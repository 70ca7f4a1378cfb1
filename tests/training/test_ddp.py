"""DDP through the trainer: two gloo ranks do what one process does, from one saved Fisher and the same batches."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.rank_runs import GLOBAL_BATCH, KINDS, RANKS, assert_same, save_fisher, train, weights_tolerance
from helpers.ranks import run_ranks

Case = tuple[str, str, int, bool]
"""Kind of model, dtype, gradient accumulation, activation checkpointing."""


def train_all(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    results = []
    for number, (kind, dtype, accumulation, checkpointing) in enumerate(cases):
        # one process takes the ranks' micro-batches in turn
        settings = {
            "per_device_train_batch_size": GLOBAL_BATCH // RANKS,
            "gradient_accumulation_steps": accumulation * (1 if "RANK" in os.environ else RANKS),
            "activation_checkpointing": checkpointing,
        }
        own = folder / f"{number}-{os.environ.get('WORLD_SIZE', '1')}"
        results.append(train(kind, dtype, own, folder / f"fisher-{kind}-{dtype}", settings))
    return results


ALL_CASES = list(itertools.product(KINDS, ["float32", "float64"], [1, 4], [False, True]))
CASES: list[Case] = [
    ("llama", "float32", 4, False),
    ("qwen2", "float64", 1, True),
    ("llama+lora", "float64", 4, True),
]


def compare(cases: list[Case], folder: Path) -> None:
    for kind, dtype in {(kind, dtype) for kind, dtype, *_ in cases}:
        save_fisher(kind, dtype, folder)
    [alone] = run_ranks(1, train_all, folder / "one", cases, folder)
    first, second = run_ranks(RANKS, train_all, folder / "two", cases, folder)
    for case, expected, ours, theirs in zip(cases, alone, first, second, strict=True):
        print("CASE", case)
        assert ours["engine"] == "DistributedDataParallel"
        assert ours["trajectory"] == theirs["trajectory"]  # c is not that of a rank's own data
        assert all(torch.equal(w, theirs["weights"][n]) for n, w in ours["weights"].items())
        assert_same(ours, expected, case[1], weights_tolerance(*case[:3]))
        assert ours["report"]["drift"]["groups"].keys() == expected["report"]["drift"]["groups"].keys()


@pytest.mark.parametrize(
    "cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.integration)], ids=["one", "others"]
)
def test_two_ranks_train_as_one_process(cases: list[Case], tmp_path: Path) -> None:
    compare(cases, tmp_path)


@pytest.mark.slow
def test_two_ranks_train_as_one_process_in_every_way(tmp_path: Path) -> None:
    compare([case for case in ALL_CASES if case not in CASES], tmp_path)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen2", "float64"), ("llama+lora", "float64"), ("llama", "float32")]
)
def test_a_checkpoint_of_four_ranks_goes_on_with_two(kind: str, dtype: str, tmp_path: Path) -> None:
    fisher = save_fisher(kind, dtype, tmp_path)
    saving = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = run_ranks(4, train, tmp_path / "four", kind, dtype, tmp_path / "run", fisher, saving)[0]
    resume = {"resume": str(tmp_path / "run" / "checkpoint-3"), "logging_steps": 2}
    first, second = run_ranks(2, train, tmp_path / "two", kind, dtype, tmp_path / "rest", fisher, resume)
    assert first["trajectory"] == second["trajectory"]
    assert len(first["report"]["trajectory"]) == 6
    assert first["logged"] == 3
    assert first["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert first["report"]["drift"]["since_step"] == 0
    for group, drift in whole["report"]["drift"]["groups"].items():
        assert first["report"]["drift"]["groups"][group]["relative"] == pytest.approx(
            drift["relative"], rel=1e-4
        )
    assert_same(first, whole, dtype)
