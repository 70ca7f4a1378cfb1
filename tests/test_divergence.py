"""Divergence against its definition in float64, and against autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.devices import DEVICE
from rpsa import divergence
from rpsa.divergence import OriginalLogits, forward_kl, squared_distance

pytestmark = pytest.mark.gpu

ROWS, VOCABULARY = 7, 11


def _case(seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before, after = (
        torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * scale for _ in range(2)
    )
    rows = torch.randperm(ROWS, generator=generator)[:4]
    return before.to(DEVICE), after.to(DEVICE), rows.to(DEVICE)


def _reference_kl(before: torch.Tensor, after: torch.Tensor, top: int | None) -> torch.Tensor:
    """Tokens that are not among the `top` of `before` count as one."""
    divergences = []
    for p_logits, q_logits in zip(before, after, strict=True):
        p, q = p_logits.softmax(0), q_logits.softmax(0)
        kept = p_logits.topk(top or len(p)).indices
        parts = (p[kept] * (p[kept] / q[kept]).log()).sum()
        others = torch.ones_like(p, dtype=torch.bool).index_fill(0, kept, False)
        if others.any():
            parts = parts + p[others].sum() * (p[others].sum() / q[others].sum()).log()
        divergences.append(parts)
    return torch.stack(divergences)


@given(seed=st.integers(0, 2**31), top=st.sampled_from([None, 1, 3, VOCABULARY - 1, VOCABULARY, 64]))
def test_forward_kl_and_its_gradient_are_the_definition(seed: int, top: int | None) -> None:
    before, after, rows = _case(seed)
    expected_logits = after.clone().requires_grad_()
    expected = _reference_kl(
        before[rows], expected_logits[rows], None if top is None or top > VOCABULARY else top
    )
    expected.square().sum().backward()

    logits = after.float().requires_grad_()
    found = forward_kl(OriginalLogits.of(before.float(), rows, top), logits, rows)
    found.square().sum().backward()

    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert logits.grad is not None
    assert expected_logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected_logits.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top", [None, 3])
def test_no_divergence_and_no_gradient_from_itself(top: int | None) -> None:
    before, _, rows = _case(0)
    logits = before.float().requires_grad_()
    found = forward_kl(OriginalLogits.of(logits, rows, top), logits, rows)
    found.sum().backward()
    assert found.abs().max() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_few_tokens_never_diverge_more_than_all() -> None:
    before, after, rows = (part.float() if part.is_floating_point() else part for part in _case(1))
    exact = forward_kl(OriginalLogits.of(before, rows, None), after, rows)
    for top in range(1, VOCABULARY):
        coarse = forward_kl(OriginalLogits.of(before, rows, top), after, rows)
        assert (coarse <= exact + 1e-6).all()
        assert (coarse >= -1e-6).all()


def test_extreme_logits_stay_finite() -> None:
    rows = torch.arange(2)
    before = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]])
    after = torch.tensor([[300.0, 0.0, -300.0], [-300.0, 300.0, 0.0]], requires_grad=True)
    for top in (None, 1, 2):
        found = forward_kl(OriginalLogits.of(before, rows, top), after, rows)
        [gradient] = torch.autograd.grad(found.sum(), after)
        assert found.isfinite().all()
        assert gradient.isfinite().all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, rows = (part.float() if part.is_floating_point() else part for part in _case(2))
    whole = forward_kl(OriginalLogits.of(before, rows, 3), after, rows)
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(forward_kl(OriginalLogits.of(before, rows, 3), after, rows), whole)


def test_parts_join_to_the_whole() -> None:
    before, _, rows = _case(3)
    whole = OriginalLogits.of(before.float(), rows, 3)
    joined = OriginalLogits.joined([whole[:1], whole[1:]])
    assert len(joined) == len(rows)
    assert all(torch.equal(a, b) for a, b in zip(vars(joined).values(), vars(whole).values(), strict=True))


def test_squared_distance_is_that_of_the_logits_that_were_kept() -> None:
    before, after, rows = (part.float() if part.is_floating_point() else part for part in _case(4))
    full = squared_distance(OriginalLogits.of(before, rows, None), after, rows)
    torch.testing.assert_close(full, (before[rows] - after[rows]).square().mean(1))
    original = OriginalLogits.of(before, rows, 3)
    expected = torch.stack(
        [
            (before[row] - after[row])[ids].square().mean()
            for row, ids in zip(rows, original.ids_NK, strict=True)
        ]
    )
    torch.testing.assert_close(squared_distance(original, after, rows), expected)
