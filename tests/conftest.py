import gc
from types import SimpleNamespace

import pytest

pytest.register_assert_rewrite("helpers")


def pytest_configure() -> None:
    import helpers.examples  # noqa: F401  (the profiles of hypothesis)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` one worker has all tests with ranks, and starts the server of their processes."""
    for item in items:
        if hasattr(getattr(item, "module", None), "run_ranks"):
            item.add_marker(pytest.mark.xdist_group("ranks"))


def pytest_collection_finish() -> None:
    """The million objects of the libraries are there to stay: garbage is looked for among the others alone.

    Every training run asks for a collection in the end, which would take longer than the training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def pieces() -> SimpleNamespace:
    """What a trainer of a small random model is given."""
    from helpers import trl_runs

    return trl_runs.pieces()
