"""Where things lie: the checkout, its recipes, and the real data beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
DATA_DIR = ROOT.parent / "shared" / "data"
