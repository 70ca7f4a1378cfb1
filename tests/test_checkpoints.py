"""What is read from disk is read whole: no tensor is made up, none is left out, and a broken file is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers import trl_runs as t
from rpsa.artifacts import reading
from rpsa.checkpoints import load_adapter
from rpsa.cli import app
from rpsa.errors import RPSAError
from rpsa.evaluation.run import adapter_base
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.models import load_model, load_tokenizer
from rpsa.recipe.sections import Model
from rpsa.reference import ReferenceDataset, Trace
from rpsa.tiny import tiny_model_dir
from rpsa.training.callback import AUDIT_START

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
Damage = Callable[[Path], Any]


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        found = dict(load_file(folder / file))
        change(found)
        save_file(found, folder / file, metadata={"format": "pt"})

    return damage


def settings(file: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return damage


def cut(file: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(keep * len(content))])

    return damage


def replaced(file: str, text: str) -> Damage:
    return lambda folder: (folder / file).write_text(text)


def renamed(found: dict[str, torch.Tensor]) -> None:
    for name in list(found):
        found[f"module.{name}"] = found.pop(name)


UP = "model.layers.1.mlp.up_proj.weight"
MODELS: dict[str, tuple[Damage, str]] = {
    "a tensor is missing": (
        tensors(WEIGHTS, lambda found: found.pop(UP)),
        f"its checkpoint lacks '{UP}' .which would be random numbers.: it was",
    ),
    "names do not fit": (
        tensors(WEIGHTS, renamed),
        r"lacks 'lm_head.weight' and \d+ more .* and holds 'module.lm_head.weight' and \d+ more",
    ),
    "a tensor too many": (
        tensors(WEIGHTS, lambda found: found.update(more=torch.ones(2))),
        "its checkpoint holds 'more' .which would be left out.: it was",
    ),
    "fewer layers than stored": (settings("config.json", num_hidden_layers=1), "holds 'model.layers.1"),
    "more layers than stored": (settings("config.json", num_hidden_layers=9), "lacks 'model.layers.3"),
    "biases that are not stored": (settings("config.json", attention_bias=True), "lacks 'model.layers.0"),
    "another shape": (
        tensors(WEIGHTS, lambda found: found.update({"model.norm.weight": torch.ones(3)})),
        r"'model.norm.weight' is \(3,\), its config makes it \(\d+,\)",
    ),
    "cut off": (cut(WEIGHTS, 0.7), "a file of weights is damaged or cut off"),
    "cut off in the header": (cut(WEIGHTS, 0.0001), "a file of weights is damaged or cut off"),
    "empty": (cut(WEIGHTS, 0), "a file of weights is damaged or cut off"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot be loaded"),
    "a broken config": (replaced("config.json", "{"), "cannot be loaded"),
    "a config that is a list": (replaced("config.json", "[]"), "cannot be loaded"),
    "a config with text for a number": (settings("config.json", hidden_size="x"), "cannot be loaded"),
    "an unknown architecture": (settings("config.json", model_type="nonsense"), "cannot be loaded"),
}


def refused(said: str, action: Callable[[], Any]) -> None:
    with pytest.raises(RPSAError, match=said) as error:
        action()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_whole_or_refused(name: str, tmp_path: Path) -> None:
    damage, said = MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(0), folder)
    load_model(str(folder), Model())
    damage(folder)
    refused(f"model {folder}: .*{said}", lambda: load_model(str(folder), Model()))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    model = t.make_model(tied=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = load_model(str(tmp_path), Model())
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_old_checkpoints_hold_besides_is_no_misfit(tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(0), tmp_path / "model")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    tensors(WEIGHTS, lambda found: found.update(more))(tmp_path / "model")
    load_model(str(tmp_path / "model"), Model())


@pytest.mark.parametrize("name", ["vision_tower.layers.0.weight", "model.visual.weight", "score.weight"])
def test_a_part_beside_the_language_model_is_said_to_be_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_model_dir(0), tmp_path / "model")
    tensors(WEIGHTS, lambda found: found.update({name: torch.ones(2)}))(tmp_path / "model")
    load_model(str(tmp_path / "model"), Model())
    assert f"1 tensors of its checkpoint are left out, such as '{name}'" in caplog.text


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.o_proj.bias", "lm_head.bias"]
)
def test_a_part_of_the_language_model_that_has_no_place_is_refused(name: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(0), tmp_path / "model")
    tensors(WEIGHTS, lambda found: found.update({name: torch.ones(2)}))(tmp_path / "model")
    refused(f"holds '{name}'", lambda: load_model(str(tmp_path / "model"), Model()))


@pytest.mark.parametrize("broken", ["{", "", "[]"])
def test_a_broken_tokenizer_is_one_line(broken: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(0), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(broken)
    refused("its tokenizer: cannot be loaded", lambda: load_tokenizer(str(tmp_path / "model"), Model()))


DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
ADAPTERS: dict[str, tuple[Damage, str]] = {
    "a tensor is missing": (tensors(ADAPTER, lambda found: found.pop(DOWN)), "lacks 'base_model.*lora_A"),
    "of a deeper model": (
        tensors(
            ADAPTER, lambda found: found.update({DOWN.replace("layers.0", "layers.9"): found[DOWN].clone()})
        ),
        "holds 'base_model.model.model.layers.9",
    ),
    "names do not fit": (tensors(ADAPTER, renamed), "lacks 'base_model.* and holds 'module"),
    "another rank": (settings("adapter_config.json", r=4), "size mismatch|Error.* in loading state_dict"),
    "more targets than stored": (
        settings("adapter_config.json", target_modules=["up_proj", "down_proj", "gate_proj"]),
        "lacks '.*gate_proj",
    ),
    "targets that are not there": (
        settings("adapter_config.json", target_modules=["nothing"]),
        "cannot be loaded",
    ),
    "cut off": (cut(ADAPTER, 0.5), "damaged or cut off"),
    "gone": (lambda folder: (folder / ADAPTER).unlink(), "cannot be loaded"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "cannot be loaded"),
    "a broken config": (replaced("adapter_config.json", "{"), "cannot be loaded"),
    "an empty config": (replaced("adapter_config.json", "{}"), "cannot be loaded"),
}


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_model("tiny:0", Model()), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_read_whole_or_refused(name: str, saved_adapter: Path, tmp_path: Path) -> None:
    damage, said = ADAPTERS[name]
    folder = tmp_path / "adapter"
    shutil.copytree(saved_adapter, folder)
    damage(folder)
    base = load_model("tiny:0", Model())
    refused(f"adapter x: .*({said})", lambda: load_adapter(base, str(folder), "adapter x"))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_whole_adapter_is_what_was_saved(is_trainable: bool, saved_adapter: Path) -> None:
    loaded = load_adapter(load_model("tiny:0", Model()), str(saved_adapter), "x", is_trainable=is_trainable)
    stored = load_file(saved_adapter / ADAPTER)
    ours = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert len(ours) == len(stored)
    for name, parameter in ours.items():
        assert torch.equal(parameter, stored[name.replace(".default", "")])
        assert parameter.requires_grad == is_trainable


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_without_a_base_is_one_line(base: str | None, saved_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_adapter, tmp_path / "adapter")
    settings("adapter_config.json", base_model_name_or_path=base)(tmp_path / "adapter")
    refused("names no base model", lambda: adapter_base(str(tmp_path / "adapter")))
    command = [
        "evaluate",
        str(tmp_path / "adapter"),
        "--tasks",
        "rpsa_tiny_add",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "names no base model" in done.stderr
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    refused("adapter_config.json: not readable as JSON", lambda: adapter_base(str(tmp_path / "adapter")))


# Checkpoints of a run

RUNS: dict[str, tuple[Damage, str]] = {
    "a tensor is missing": (tensors(WEIGHTS, lambda found: found.pop("model.norm.weight")), "lacks 'model.norm"),
    "a tensor too many": (
        tensors(WEIGHTS, lambda found: found.update(more=torch.ones(2))), "holds 'more'"
    ),
    "weights cut off": (cut(WEIGHTS, 0.7), "damaged or cut off"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot be loaded"),
    "optimizer cut off": (cut("optimizer.pt", 0.5), "its optimizer: cannot be loaded"),
    "random state cut off": (cut("rng_state.pth", 0.5), "its random state: cannot be loaded"),
    "state cut off": (cut("trainer_state.json", 0.5), "cannot be loaded"),
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "cannot be loaded"),
    "start cut off": (cut(AUDIT_START, 0.5), "rpsa_audit_start.safetensors: cannot be loaded"),
    "nothing at all": (lambda folder: shutil.rmtree(folder), "cannot be loaded"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(pieces: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind, build in (("full", t.make_model), ("lora", t.make_lora)):
        folders[kind] = tmp_path_factory.mktemp(kind)
        t.rpsa_trainer(pieces, folders[kind], build, max_steps=3).train()
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_a_damaged_checkpoint_is_not_gone_on_from(
    name: str, pieces: SimpleNamespace, trained: dict[str, Path], tmp_path: Path
) -> None:
    damage, said = RUNS[name]
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(trained["full"] / "checkpoint-3", checkpoint)
    damage(checkpoint)
    trainer = t.rpsa_trainer(pieces, tmp_path / "out")
    refused(f"checkpoint .*{said}", lambda: trainer.train(resume_from_checkpoint=str(checkpoint)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tensors(ADAPTER, lambda found: found.pop(next(iter(found)))), "lacks 'base_model"),
        (tensors(ADAPTER, lambda found: found.update(more=torch.ones(2))), "holds 'more'"),
    ],
    ids=["missing", "too many"],
)
def test_a_damaged_adapter_is_not_gone_on_from(
    damage: Damage, said: str, pieces: SimpleNamespace, trained: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(trained["lora"] / "checkpoint-3", checkpoint)
    damage(checkpoint)
    trainer = t.rpsa_trainer(pieces, tmp_path / "out", t.make_lora)
    refused(said, lambda: trainer.train(resume_from_checkpoint=str(checkpoint)))


def test_a_tied_model_is_gone_on_with(pieces: SimpleNamespace, tmp_path: Path) -> None:
    def build() -> Any:
        return t.make_model(tied=True)

    pieces.fisher[build] = t.fisher_of(build(), pieces.reference)
    t.rpsa_trainer(pieces, tmp_path, build, max_steps=3).train()
    t.rpsa_trainer(pieces, tmp_path, build, max_steps=4).train(resume_from_checkpoint=True)
    refused(
        "no checkpoint here",
        lambda: t.rpsa_trainer(pieces, tmp_path / "none").train(resume_from_checkpoint=True),
    )


# Fishers and D_ref


@pytest.mark.parametrize(
    "damage",
    [
        cut("fisher.safetensors", 0.5),
        cut("fisher.safetensors", 0),
        cut("manifest.json", 0.5),
        replaced("manifest.json", "[]"),
        replaced("manifest.json", "{}"),
        replaced("manifest.json", "null"),
    ],
)
def test_a_damaged_fisher_is_one_line(damage: Damage, tmp_path: Path) -> None:
    FisherDiagonal({"a": torch.ones(3, 4)}).save(tmp_path)
    damage(tmp_path)
    refused(f"{tmp_path}.*: (cannot be loaded|not readable as JSON)", lambda: FisherDiagonal.load(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "{"),
        ("manifest.json", "[1]"),
        ("traces.jsonl", '{"problem_id": "a"}'),
        (
            "traces.jsonl",
            json.dumps(vars(Trace("a", [1], [2], "", "stop", None)) | {"response_ids": "2 3"}),
        ),
        ("traces.jsonl", json.dumps(vars(Trace("a", [1], [2], "", "stop", None)) | {"prompt_ids": [1.5]})),
        ("traces.jsonl", "nonsense"),
        ("traces.jsonl", ""),
    ],
)
def test_a_damaged_reference_is_one_line(file: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "traces.jsonl").write_text(json.dumps(vars(Trace("a", [1], [2], "", "stop", None))) + "\n")
    ReferenceDataset.load(tmp_path)
    (tmp_path / file).write_text(content)
    refused(str(tmp_path), lambda: ReferenceDataset.load(tmp_path))


@pytest.mark.parametrize(
    "error", [KeyError("x"), OSError(5, "no"), ValueError("a\nb"), ValueError(), Exception("c  d")]
)
def test_whatever_a_library_raises_is_one_line(error: Exception) -> None:
    def fail() -> None:
        with reading("model x"):
            raise error

    refused("model x: cannot be loaded: .", fail)
    with pytest.raises(KeyboardInterrupt), reading("model x"):
        raise KeyboardInterrupt
