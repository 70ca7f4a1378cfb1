"""What differs between devices: compiled models, FSDP2 on one rank, 8-bit optimizers, huge tensors, waiting.

Run on the CPU here and by `make gpu` on a GPU; what no CPU can show is skipped here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.devices import DEVICE
from helpers.fisher_models import ragged_batch, relative_error, tiny_model
from helpers.freezing_models import GrowingRatio, audited, forward_backward, make_fisher, make_model
from helpers.ranks import free_port, run_ranks
from helpers.sharded import shard
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.fisher.quantile import Ranking
from rpsa.freezing.audit import Audit
from rpsa.freezing.bits import BitMask, know_counts
from rpsa.freezing.compact import CompactFreezer
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.ratio import ConflictRatio, ConstantRatio
from rpsa.parameters import trainable_parameters
from rpsa.sharding import full

pytestmark = pytest.mark.gpu

IS_GPU = DEVICE.type == "cuda"
needs_gpu = pytest.mark.skipif(not IS_GPU, reason="only a GPU shows it: `make gpu`")
BATCH = ragged_batch([(3, 7), (2, 4), (5, 1), (1, 9)])
SAFETY = ragged_batch([(2, 8), (3, 5)], seed=1)


def language_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    return model(**inputs).loss  # type: ignore[no-any-return]


def train(model: Any, freezer: Freezer, optimizer: Any, steps: int = 6) -> dict[str, Any]:
    audit = Audit(freezer)
    audit.open()
    trajectory = []
    for _ in range(steps):
        if freezer.reference_due:
            language_loss(model, BATCH).backward()
            freezer.capture_reference()
        language_loss(model, SAFETY).backward()
        measuring = freezer.reference_captured
        freezer.mask_gradients()
        if measuring:
            audit.next_interval()
        trajectory.append((freezer.conflict, freezer.frozen_ratio))
        freezer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    audit.close()
    return {"report": audit.report(), "trajectory": trajectory}


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **settings)


@pytest.mark.parametrize("kind", [Freezer, CompactFreezer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_is_frozen_exactly(kind: type[Freezer], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model: Any = tiny_model("llama").to(dtype)
    fisher = estimate_fisher(model, [BATCH], FisherConfig(progress=False))
    compiled = torch.compile(model, backend="inductor" if IS_GPU else "aot_eager")
    freezer = kind(compiled, fisher, ConstantRatio(0.6) if kind is CompactFreezer else GrowingRatio())
    optimizer = adamw(compiled)
    freezer.attach(optimizer)
    report = train(compiled, freezer, optimizer)["report"]
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 1000
    assert all(group["changed"] > 0 for group in report["drift"]["groups"].values())


def on_one_rank(shards: bool, port: int) -> dict[str, Any]:
    if shards:
        if IS_GPU:
            torch.cuda.set_device(0)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if IS_GPU else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=0,
            world_size=1,
        )
    model: Any = tiny_model("llama")
    model = shard(model) if shards else model
    fisher = estimate_fisher(model, [BATCH], FisherConfig(progress=False))
    freezer = Freezer(model, fisher, ConflictRatio(window=1, every=2))
    optimizer = adamw(model)
    freezer.attach(optimizer)
    found = train(model, freezer, optimizer)
    weights = {n: full(p).detach().clone() for n, p in trainable_parameters(model).items()}
    return found | {
        "sharded": freezer.sharded,
        "fisher": {n: full(s).cpu() for n, s in fisher.scores.items()},
        "weights": {n: w.cpu() for n, w in weights.items()},
    }


def test_one_rank_of_fsdp2_trains_what_one_process_trains(tmp_path: Path) -> None:
    [ours] = run_ranks(1, on_one_rank, tmp_path / "sharded", True, free_port())
    [expected] = run_ranks(1, on_one_rank, tmp_path / "plain", False, 0)
    assert (ours["sharded"], expected["sharded"]) == (True, False)
    assert relative_error(ours["fisher"], expected["fisher"]) < 1e-5
    assert [c for c, _ in ours["trajectory"]] == pytest.approx(
        [c for c, _ in expected["trajectory"]], abs=1e-3
    )
    assert relative_error(ours["weights"], expected["weights"]) < 1e-3
    for run in (ours, expected):
        assert run["report"]["frozen_elements_moved"] == 0
        assert run["report"]["frozen_element_steps_checked"] > 1000


@needs_gpu
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_optimizers_with_8_bit_states(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 1024), nn.Tanh(), nn.Linear(1024, 4)).to(DEVICE)
    freezer = Freezer(model, make_fisher(model), GrowingRatio())
    optimizer = getattr(bitsandbytes.optim, name)(model.parameters(), lr=0.01, weight_decay=0.1)
    freezer.attach(optimizer)
    report, _ = audited(model, freezer, optimizer)
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 10_000


@needs_gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    model = make_model()
    freezer = Freezer(model, make_fisher(model), ConstantRatio(0.6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    freezer.attach(optimizer)
    for step in range(3):
        forward_backward(model, step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step makes its tables
        try:
            freezer.mask_gradients()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()


@needs_gpu
def test_more_elements_than_an_int32_counts() -> None:
    """An embedding of Llama-3.1-405B has 2.1 billion; here one tensor has 2^31 + 9."""
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("wants 48 GiB of free GPU memory")
    n = (1 << 31) + 9
    scores = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    scores[-9:] = torch.arange(2.0, 11.0)
    ranking = Ranking([scores])
    assert ranking.nonzero == n
    assert ranking.value(n) == 10.0
    assert ranking.value(n - 8) == 2.0
    mask = BitMask.compare(scores, "greater", 1.0)
    assert int(mask.counts().sum()) == 9
    know_counts([mask])
    assert mask.select(scores).tolist() == list(range(2, 11))
    mask.clear_(scores)
    assert scores[-10:].tolist() == [1.0] + [0.0] * 9
    mask.scatter_(torch.full((9,), 5.0, device=DEVICE), into=scores)
    assert scores[-10:].tolist() == [1.0] + [5.0] * 9


@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_fisher_in_less_precision_ranks_alike(precision: Any) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    found = estimate_fisher(model, [BATCH], FisherConfig(progress=False, precision=precision))
    assert found.manifest["estimation"]["path"] == "hooked"
    assert found.manifest["estimation"]["overlap_with_fp32"]["0.6"] > 0.9
    exact = estimate_fisher(model, [BATCH], FisherConfig(progress=False))
    assert 0 < relative_error(found.scores, exact.scores) < 0.05
