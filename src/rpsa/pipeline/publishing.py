"""Publishing: an aligned model of a run as a folder for others, with the card that has its results."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpsa.artifacts import LOG_FILE, atomic_directory, atomic_write, read_json
from rpsa.errors import RPSAError
from rpsa.pipeline.tasks import MANIFEST, altered_files
from rpsa.provenance import TIMING
from rpsa.recipe.problems import did_you_mean
from rpsa.training.card import CARD, write_merged_card

_OURS = (MANIFEST, TIMING, LOG_FILE)
"""What a run keeps beside the weights for itself."""

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Publication:
    """A model of a run that can be published.

    Attributes:
        folder: of the model in the run.
        card: the model card: the run's with results, if there is a report, else what training wrote.
        files: what goes with it as it is; without them the adapter is merged into its base.
    """

    folder: Path
    card: Path
    files: tuple[Path, ...]

    @property
    def has_results(self) -> bool:
        return self.card.parent != self.folder

    def described(self) -> list[str]:
        """What `write` would do, a line each."""
        sizes = [f"{path.name}, {path.stat().st_size / 1e6:,.1f} MB" for path in self.files]
        lines = sizes or [f"the adapter of {self.folder}, merged into its base"]
        return [*lines, f"{CARD}, {'with' if self.has_results else 'without'} results, from {self.card}"]

    def write(self, out: Path) -> None:
        """Fill `out`; a folder appears whole or not at all."""
        text = self.card.read_text(encoding="utf-8")
        with atomic_directory(out, CARD) as new:
            if not self.files:
                _write_merged(self.folder, new)
                write_merged_card(new, self.folder, text)
                return
            for path in self.files:
                shutil.copy2(path, new / path.name)
            atomic_write(new / CARD, text)


def publication(run: Path, cell: str, out: Path, *, merge: bool = False) -> Publication:
    """What is to be published of a run, checked, with nothing written yet.

    Args:
        cell: the model's folder below the run's `align`.
        merge: of a LoRA adapter, write the model with the adapter merged into it, in the base's own dtype.

    Raises:
        RPSAError: there is no such model, its files have changed since they were written, it cannot be merged, or
            `out` is there already.
    """
    from rpsa.models import is_trained_in_4_bits

    folder = run / "align" / cell
    if not (folder / MANIFEST).is_file():
        known = [
            one.parent.relative_to(run / "align").as_posix()
            for one in sorted((run / "align").rglob(MANIFEST))
        ]
        listed = f"; it has {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}" if known else ""
        raise RPSAError(f"{run}: has no model {cell!r}{did_you_mean(cell, known)}{listed}")
    if changed := altered_files(folder):
        raise RPSAError(f"{changed[0]}; publish a model that is as it was measured")
    if merge and not (folder / _ADAPTER_CONFIG).is_file():
        raise RPSAError(f"{folder}: is no adapter, so there is nothing to merge; leave --merge out")
    if merge and is_trained_in_4_bits(folder):
        raise RPSAError(
            f"{folder}: was trained and measured on a base in 4 bits; merged into whole weights it is another model: "
            "leave --merge out"
        )
    if out.exists():
        raise RPSAError(f"{out}: exists already; give another --out, or remove it")
    measured = run / "report" / "cards" / cell / CARD
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (*_OURS, CARD)]
    return Publication(
        folder, measured if measured.is_file() else folder / CARD, () if merge else tuple(files)
    )


def _write_merged(folder: Path, new: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    from rpsa.checkpoints import load_adapter
    from rpsa.models import load_model, quiet
    from rpsa.recipe.sections import Model

    quiet()
    name = read_json(folder / _ADAPTER_CONFIG)["base_model_name_or_path"]
    base = load_model(name, Model(), "auto")
    dtype = base.dtype
    loaded: Any = load_adapter(
        base.float(), str(folder), f"adapter {folder}"
    )  # rounded once, when it is whole
    assert isinstance(loaded, PeftModel)
    loaded.merge_and_unload(safe_merge=True).to(dtype).save_pretrained(new)
    AutoTokenizer.from_pretrained(folder).save_pretrained(new)


def check_push(repository: str) -> None:
    """What can be known before a folder is uploaded, without asking the hub.

    Raises:
        RPSAError: the name is none, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RPSAError(f"--push {repository}: {str(error).rstrip('.')}") from error
    if "/" not in repository:
        raise RPSAError(f"--push {repository}: give OWNER/NAME")
    if not get_token():
        raise RPSAError(f"--push {repository}: there is no token for the hub; run `hf auth login`")


def push_model(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a published folder to the Hugging Face hub, with the token of the environment; returns its address.

    Raises:
        RPSAError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RPSAError(f"{repository}: {str(error).strip().partition(chr(10))[0]}") from error
    return str(url)
