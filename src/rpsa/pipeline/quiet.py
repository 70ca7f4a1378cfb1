"""Silence around the libraries."""

import warnings


def quiet() -> None:
    """Silence what libraries print about themselves; warnings of ours still come."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
