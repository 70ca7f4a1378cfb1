"""Configs: whether the models' are on this machine, found out before anything is imported that takes seconds."""

from pathlib import Path

from rpsa.errors import RPSAError
from rpsa.recipe.schema import Recipe


def check_configs(recipe: Recipe) -> None:
    """Fetch the config of each base of a recipe that is neither shipped nor a folder.

    Raises:
        RPSAError: one is not here and cannot be fetched.
    """
    for name in recipe.bases:
        if name.startswith("tiny:") or Path(name).is_dir():
            continue
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(name, "config.json", revision=recipe.model.revision)
        except (OSError, ValueError) as error:
            raise missing(name) from error


def missing(name: str) -> RPSAError:
    return RPSAError(
        f"model {name}: its config is not on this machine and cannot be fetched; run "
        f"`hf download {name} config.json` where there is a network, or name a folder with that file "
        f"(model.name=FOLDER)"
    )
