"""Which neighbours fit into one environment with rpsa: what uv resolves, into versions.json and docs/versions.md.

    python benchmarks/versions.py          asks the package index (uv on the PATH, a minute)
    python benchmarks/versions.py write    the table from versions.json alone

The newest release of each is resolved together with rpsa, for Linux and Python 3.12. Nothing is installed.
`tests/house/test_versions.py` holds the table to the file, and the file to the bounds in pyproject.toml.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("versions.json")
PAGE = ROOT / "docs" / "versions.md"
NEIGHBOURS = {
    "unsloth": "Unsloth",
    "vllm": "vLLM",
    "lm-eval": "lm-evaluation-harness",
    "axolotl": "axolotl",
    "verl": "verl",
    "llamafactory": "LLaMA-Factory",
}
SHOWN = ("trl", "transformers", "torch", "huggingface-hub", "datasets", "accelerate", "peft")
START, END = "<!-- versions.py -->\n", "<!-- end of versions.py -->"


def bounds() -> dict[str, str]:
    """What rpsa asks for of what is shown."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(one) for one in project["dependencies"]]
    return {name: str(one.specifier) for one in asked if (name := one.name.replace("_", "-")) in SHOWN}


def resolve(*requirements: str, alone: bool = False) -> dict[str, str] | None:
    """The versions of what would be installed, or of `requirements` `alone`; None if they do not fit together."""
    done = subprocess.run(
        [
            *("uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate"),
            *("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"),
            *(["--no-deps"] if alone else []),
        ],
        input="\n".join(requirements),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode != 0 and "No solution found" not in done.stderr:
        raise SystemExit(done.stderr)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE)) if done.returncode == 0 else None


def look() -> dict[str, Any]:
    """Each neighbour's newest release: with rpsa, or, where that cannot be, what it brings by itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, Any] = {}
    for name in NEIGHBOURS:
        version = (resolve(name, alone=True) or {})[name]
        one = f"{name}=={version}"
        together = resolve(one, *project["dependencies"])
        versions = together or resolve(one) or {}
        found[name] = {
            "version": version,
            "resolves": together is not None,
            "versions": {package: versions[package] for package in SHOWN if package in versions},
        }
    return {"bounds": bounds(), "neighbours": found}


def why_not(versions: dict[str, str], asked: dict[str, str]) -> str:
    """What a neighbour brings that rpsa cannot use."""
    bad = [
        f"{package} {versions[package]}"
        for package, bound in asked.items()
        if package in versions and not Requirement(package + bound).specifier.contains(versions[package])
    ]
    return f"no: it brings {', '.join(bad)}"


def table(kept: dict[str, Any]) -> str:
    heads = ["", "With rpsa", *SHOWN[:3]]
    rows = [["rpsa asks for", "", *(kept["bounds"][package] for package in SHOWN[:3])]]
    for name, one in kept["neighbours"].items():
        verdict = "yes" if one["resolves"] else why_not(one["versions"], kept["bounds"])
        shown = [one["versions"].get(package, "–") for package in SHOWN[:3]]
        rows.append([f"{NEIGHBOURS[name]} {one['version']}", verdict, *shown])
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def page(kept: dict[str, Any]) -> str:
    """The page with its table."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    return f"{before}{START}{table(kept)}{END}{rest.partition(END)[2]}"


def main() -> None:
    if sys.argv[1:] != ["write"]:
        KEPT.write_text(json.dumps(look(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(KEPT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
