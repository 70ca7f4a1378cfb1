"""The shipped checkpoints, each a folder that `from_pretrained` loads, model and tokenizer."""

from pathlib import Path

from rpsa.errors import RPSAError

BASES = (0, 1, 2, 3, 4, 5)


def tiny_model_dir(base: int) -> Path:
    """The folder of a shipped base (0 to 5, the seed that it was trained from).

    Raises:
        RPSAError: there is no such base.
    """
    if base not in BASES:
        raise RPSAError(
            f"base: the tiny world ships {', '.join(map(str, BASES))}, not {base}; train others with `rpsa tiny train`"
        )
    return Path(__file__).parent / str(base)
