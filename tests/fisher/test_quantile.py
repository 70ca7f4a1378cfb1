"""The threshold against torch.kthvalue, on inputs made to break radix passes."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.devices import DEVICE
from helpers.examples import examples
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.quantile import Ranking, order_statistic, threshold_rank

pytestmark = pytest.mark.gpu

RATIOS = [0.0, 0.01, 0.1, 0.3, 0.5, 0.6, 0.7, 0.9, 0.99, 1.0]


def kth_threshold(scores: list[torch.Tensor], k: str) -> float:
    values = torch.cat([s.flatten().double() for s in scores])
    values = values[values > 0]
    rank = max(1, len(values) - int(Fraction(k) * len(values)))
    return values.kthvalue(rank).values.item()


@st.composite
def score_tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    kind = draw(st.sampled_from(["uniform", "wide", "tied", "denormal", "zeros"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = []
    for size in draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)):
        uniform = torch.rand(size, generator=generator)
        tensors.append(
            {
                "uniform": uniform,
                "wide": torch.exp(uniform * 170 - 85),
                "tied": torch.randint(1, 4, (size,), generator=generator).float(),
                "denormal": uniform * 1e-40,
                "zeros": uniform * (uniform > 0.7),
            }[kind]
        )
    tensors[0][0] = 1e-12  # at least one value that is not zero
    return tensors


@examples(150)
@given(score_tensors(), st.sampled_from(RATIOS))
def test_threshold_is_kthvalue(tensors: list[torch.Tensor], k: float) -> None:
    fisher = FisherDiagonal({str(i): t.to(DEVICE) for i, t in enumerate(tensors)})
    assert fisher.threshold(k) == kth_threshold(tensors, repr(k))


@examples(50)
@given(score_tensors(), st.sampled_from(RATIOS))
def test_bf16_scores_have_an_exact_threshold_too(tensors: list[torch.Tensor], k: float) -> None:
    halves = [t.bfloat16() for t in tensors]
    fisher = FisherDiagonal({str(i): t.to(DEVICE) for i, t in enumerate(halves)})
    if fisher.nonzero:
        assert fisher.threshold(k) == kth_threshold(halves, repr(k))


def test_rank_reads_the_ratio_as_it_was_written() -> None:
    assert threshold_rank(100, 0.29) == 71  # 0.29 * 100 is 28.999999999999996 in binary
    assert threshold_rank(10, 0.7) == 3
    assert threshold_rank(10, 0.0) == 10
    assert threshold_rank(10, 1.0) == 1
    with pytest.raises(RPSAError, match="between 0 and 1"):
        threshold_rank(10, 1.1)


def test_extreme_ratios_freeze_nothing_and_all_but_the_minimum() -> None:
    fisher = FisherDiagonal({"a": torch.tensor([0.0, 1.0, 2.0, 3.0])})
    assert fisher.mask(0.0)["a"].tolist() == [True] * 4
    assert fisher.mask(1.0)["a"].tolist() == [True, True, False, False]


def test_a_million_values_match_a_sort() -> None:
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(1)).exp()
    assert order_statistic([values.to(DEVICE)], 600_000) == values.sort().values[599_999].item()


@examples(50)
@given(score_tensors(), st.sampled_from(RATIOS), st.booleans())
def test_histograms_on_a_device_find_the_same(tensors: list[torch.Tensor], k: float, half: bool) -> None:
    tensors = [(t.bfloat16() if half else t).to(DEVICE) for t in tensors]
    ranking = Ranking(tensors)
    if ranking.nonzero:
        rank = threshold_rank(ranking.nonzero, k)
        assert ranking._by_histograms(rank) == ranking.value(rank) == kth_threshold(tensors, repr(k))


@pytest.mark.parametrize("kind", ["spread", "equal", "mostly equal", "mostly zero", "two values"])
def test_a_sample_brackets_the_value_or_all_are_searched(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(1_500_000, generator=generator)  # enough for a sample to be drawn
    values = {
        "spread": values.exp(),
        "equal": torch.ones_like(values),
        "mostly equal": torch.where(values < 0.9, 0.5, values),
        "mostly zero": values * (values > 0.99),
        "two values": torch.where(values < 0.5, 1.0, 2.0),
    }[kind]
    ranking = Ranking([values[:1000], values[1000:]])
    ordered = values[values > 0].sort().values
    assert len(ranking._sample) > 1000
    for k in RATIOS:
        rank = threshold_rank(ranking.nonzero, k)
        assert ranking.value(rank) == ordered[rank - 1].item()
    ranking.__dict__["_sample"] = ranking._sample * 0.1  # a sample that misleads
    assert ranking.value(rank) == ordered[rank - 1].item()


def test_negative_zero_is_zero() -> None:
    values = torch.tensor([-0.0, 0.0, 1.0, 2.0], device=DEVICE)
    assert FisherDiagonal({"a": values}).threshold(0.5) == 1.0
    assert Ranking([values])._by_histograms(1) == 1.0


def test_nothing_to_rank_is_said() -> None:
    with pytest.raises(RPSAError, match="every Fisher score is zero"):
        FisherDiagonal({"a": torch.zeros(3)}).threshold(0.5)
