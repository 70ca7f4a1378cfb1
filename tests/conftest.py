from types import SimpleNamespace

import pytest

pytest.register_assert_rewrite("helpers")


@pytest.fixture(scope="module")
def pieces() -> SimpleNamespace:
    """What a trainer of a small random model is given."""
    from helpers import trl_runs

    return trl_runs.pieces()
