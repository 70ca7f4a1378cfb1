"""Where things lie: the checkout, its recipes, and the real data beside it."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
DATA_DIR = ROOT.parent / "shared" / "data"


def fetched_prompts(folder: Path) -> None:
    """Put what `rpsa fetch smollm2` makes into a folder, but for the model: the recipes of SmolLM2 name it."""
    (folder / "smollm2" / "prompts").mkdir(parents=True)
    for path in (RECIPES / "smollm2-135m").glob("*.jsonl"):
        shutil.copy(path, folder / "smollm2" / "prompts")
