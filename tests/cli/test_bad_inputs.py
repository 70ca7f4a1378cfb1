"""Bad files, recipes and command lines: each is one line, before any work is done, and nobody's files are touched."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers.small_runs import RECIPE
from rpsa.cli import app
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.rows import read_rows
from rpsa.tiny import tiny_model_dir

GOOD = '{"prompt": "a", "response": "<think>b</think>c"}\n'
TOKEN = "hf_" + "a" * 30
FILES: dict[str, str | bytes] = {
    "small.yaml": RECIPE,
    "deep.yaml": "a: " + "[" * 5000,
    "digits.yaml": "a: " + "9" * 5000,
    "self.yaml": "a: &a [*a]",
    "billions.yaml": "a: &a ["
    + "x," * 50
    + "]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 50)}]\n" for a, b in ("ab", "bc", "cd", "de")),
    "python.yaml": "a: !!python/object/apply:os.system [echo]",
    "set.yaml": RECIPE.replace("report_to: none", "report_to: none\n  lr_scheduler_kwargs: {a: !!set {x}}"),
    "nul.yaml": b"a: \x00",
    "deep.jsonl": GOOD + "[" * 100_000,
    "digits.jsonl": GOOD + '{"prompt": ' + "9" * 5000 + "}",
    "torn.jsonl": GOOD + GOOD[:20],
    "number.json": "[1, 2]",
    "empty.jsonl": "",
    "latin.jsonl": b'{"prompt": "caf\xe9"}',
    "utf16.jsonl": GOOD.encode("utf-16"),
    "ragged.csv": "prompt,response\na,<think>b</think>c,d\n",
    "twice.csv": "prompt,prompt\na,b\n",
    "quote.csv": 'prompt,response\n"a,b\n',
    "cut.jsonl.gz": gzip.compress(GOOD.encode() * 1000)[:-20],
    "damaged.jsonl.gz": gzip.compress(os.urandom(20_000))[:9000] + b"\0" * 9000,
    "plain.jsonl.gz": GOOD,
    "no_thought.jsonl": '{"prompt": "a", "response": "c"}\n',
    "two_thoughts.jsonl": '{"prompt": "a", "response": "<think>b</think>c</think>d"}\n',
    "null.jsonl": '{"prompt": null, "response": "<think>b</think>c"}\n',
    "reasoning.jsonl": '{"problem": "1 + 1 ?", "answer": "2"}\n',
    "attacks.jsonl": '{"prompt": "a"}\n',
    "same_ids.jsonl": '{"problem": "1 + 1 ?", "answer": "2", "id": 1}\n' * 12,
    "no_tests.jsonl": '{"prompt": "def f(x):", "entry_point": "f"}\n',
    "notes.txt": "years of work",
}


def changed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


UP = "model.layers.1.mlp.up_proj.weight"
MODELS: dict[str, Callable[[Path], None]] = {
    "lacking": changed(lambda w: {k: v for k, v in w.items() if k != UP}),
    "renamed": changed(lambda w: {k.replace("model.layers", "model.blocks"): v for k, v in w.items()}),
    "reshaped": changed(lambda w: {k: v[:1].clone() if k == UP else v for k, v in w.items()}),
    "deeper": config(num_hidden_layers=5),
    "cut": cut("model.safetensors", 5000),
    "hollow": cut("model.safetensors", 0),
    "no_json": write("config.json", "{"),
    "list": write("config.json", "[]"),
    "unheard": config(model_type="nonesuch"),
    "bert": write("config.json", '{"model_type": "bert"}'),
    "tokenless": write("tokenizer.json", "{"),
    "torn_template": write("chat_template.jinja", "{% for x in %}"),
    "no_template": lambda folder: (folder / "chat_template.jinja").unlink(),
}
ADAPTERS: dict[str, Any] = {
    "no_base": {"peft_type": "LORA", "base_model_name_or_path": None},
    "gone_base": {"peft_type": "LORA", "base_model_name_or_path": "/nowhere/model"},
    "weightless": {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny:0",
        "r": 4,
        "target_modules": ["up_proj"],
    },
    "listed": [1],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name, content in FILES.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name, spoil in MODELS.items():
        spoil(Path(shutil.copytree(tiny_model_dir(0), folder / name)))
    for name, adapter in ADAPTERS.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(adapter))
    FisherDiagonal({"a": torch.ones(3)}).save(folder / "fisher")
    shutil.copytree(folder / "fisher", folder / "cut_fisher")
    cut("fisher.safetensors", 20)(folder / "cut_fisher")
    shutil.copytree(folder / "fisher", folder / "torn_fisher")
    cut("manifest.json", 30)(folder / "torn_fisher")
    (folder / "two" / "aime24").mkdir(parents=True)
    for name in ("aime24.jsonl", "aime24/AIME-24.jsonl"):
        (folder / "two" / name).write_text('{"problem": "1", "answer": "1"}\n')
    (folder / "audits").mkdir()
    (folder / "audits" / "rpsa_audit.json").write_text('{"intervals": 3}')
    return folder


def run(*settings: str) -> list[str]:
    return ["run", "small.yaml", "output_dir=run", *settings]


def fft(*settings: str) -> list[str]:
    return run("matrix.methods=[original, fft]", *settings)


def data(name: str) -> list[str]:
    return fft(f"safety.data={name}", "safety.n=null")


def model(name: str) -> list[str]:
    return fft(f"matrix.bases=[{name}]")


RUBRIC = "evaluate.judge_settings={{base_url: {}, model: m}}"
CASES: list[tuple[list[str], str]] = [
    # recipes
    (["run", "smal.yaml"], "no such recipe; did you mean 'small.yaml'?"),
    (["run", "small.yaml/x.yaml"], "no such recipe"),
    (["run", "deep.yaml"], "deep.yaml: not readable as YAML: nested too deeply"),
    (["run", "digits.yaml"], "digits.yaml: not readable as YAML"),
    (["run", "self.yaml"], "self.yaml: a: is object"),
    (["run", "billions.yaml"], "more than 100,000 values"),
    (["run", "python.yaml"], "could not determine a constructor for the tag"),
    (["run", "set.yaml"], "train.lr_scheduler_kwargs.a: is set; a recipe holds text, numbers"),
    (["run", "nul.yaml"], "nul.yaml: not readable as YAML"),
    (run('matrix.methods={"a\\e[31m": {paradigm: fft}}'), "holds a control character"),
    (run("matrix.seeds=[4294967296]"), "matrix.seeds.0: 4294967296 is not at most 4294967295"),
    (run("fisher.seed=-1"), "fisher.seed: -1 is not between 0 and 4294967295"),
    (run("train.data_seed=-1"), "train.data_seed: -1 is not between"),
    (run("matrix.methods={x: 3}"), "matrix.methods.x: expected a mapping, not 3"),
    (run("name.x=1"), "'name' is not a section"),
    (run("evaluate.tasks=['']"), "evaluate.tasks: empty; name one"),
    # secrets
    (run(f"train.hub_token={TOKEN}"), "train.hub_token: a secret is not written into a recipe"),
    (run(f"matrix.methods.fft.train.hub_token={TOKEN}"), "hub_token: a secret is not written"),
    (run(f"matrix.grid.train.hub_token=[{TOKEN}]"), "hub_token: a secret is not written"),
    (run(f"name.hub_token={TOKEN}"), "'name' is not a section"),
    (run("evaluate.judge=rubric", "evaluate.judge_settings.api_key=abc"), "set RPSA_JUDGE_API_KEY"),
    (run("evaluate.judge=rubric", RUBRIC.format("'https://me:pw@h/v1'")), "a secret is not written"),
    (run("reference.engine.hf_token=x"), "reference.engine.hf_token: a secret"),
    (run("safety.data=https://me:pw@host/x.jsonl"), "safety.data: a secret"),
    (run("name=github_pat_" + "a" * 30), "name: a secret"),
    (run("name=AKIA" + "A" * 16), "name: a secret"),
    (run("data_dir=https://h/x?X-Amz-Signature=abc"), "data_dir: a secret"),
    (run("evaluate.engine.aws_secret_access_key=abc"), "aws_secret_access_key: a secret"),
    (run("evaluate.engine.env={X: 'Bearer " + "a" * 30 + "'}"), "evaluate.engine.env.X: a secret"),
    (run(f"matrix.methods={{{TOKEN}: {{paradigm: fft}}}}"), "matrix: one of its keys is a secret"),
    (
        ["evaluate", "https://h/v1?api_key=abc"],
        "https://h/v1?api_key=***: put the key into RPSA_API_KEY",
    ),
    (["evaluate", "https://me:pw@host/v1"], "https://***@host/v1: put the key into RPSA_API_KEY"),
    (
        ["evaluate", "tiny:0", "--tasks", "tiny", "--set", "judge_settings.api_key=abc"],
        "a secret is not written",
    ),
    (["sweep", "small.yaml", "--over", f"train.hub_token={TOKEN},b"], "a secret is not written"),
    # what training refuses
    (fft("train.adam_beta1=1.5"), "Invalid beta parameter at index 0: 1.5"),
    (fft("train.adam_epsilon=-1"), "Invalid epsilon value"),
    (fft("train.optim=galore_adamw"), "galore"),
    (fft("train.optim_args=foo"), "train: adamw_torch_fused: "),
    (fft("train.lr_scheduler_kwargs={nonesuch: 1}"), "unexpected keyword argument 'nonesuch'"),
    (fft("train.lr_scheduler_type=reduce_lr_on_plateau"), "requires an eval strategy"),
    (fft("train.report_to=[nonesuch]"), "nonesuch is not supported"),
    (fft("train.eval_strategy=steps"), "safety.validation_share holds nothing out"),
    (fft("train.dataloader_num_workers=-1"), "train.dataloader_num_workers: -1 is not at least 0"),
    (fft("train.eval_on_start=true"), "eval_on_start, and safety.validation_share holds nothing out"),
    (fft("train.assistant_only_loss=true"), "train: TRL refuses it: You set `assistant_only_loss=True`"),
    (fft("train.eos_token=nope"), "train: TRL refuses it: The specified `eos_token`"),
    (fft("train.save_strategy=best"), "train: TRL refuses it: `args.metric_for_best_model` must be provided"),
    (fft("train.use_liger_kernel=true"), "use_liger_kernel: liger-kernel is not installed"),
    (fft("train.fsdp=full_shard"), "train.fsdp: set launch.config instead"),
    (run("matrix.methods=[lora]", "lora.lora_dropout=2"), "dropout probability has to be between 0 and 1"),
    (run("matrix.methods=[lora]", "lora.layers_to_transform=[99]"), "not found in the base model"),
    (
        run("matrix.methods=[lora]", 'lora.rank_pattern={"(": 3}'),
        "lora: PEFT refuses it: error: missing ), unterminated",
    ),
    (run("fisher.scope=nonesuch"), "fisher.scope 'nonesuch' matches no trainable parameter"),
    (
        run("matrix.methods=[lora+rpsa]", "fisher.scope=up_proj.weight"),
        "fisher.scope 'up_proj.weight' matches no trainable parameter (there is 'base_model.",
    ),
    # data
    *(
        (data(name), f"{name}{said}")
        for name, said in {
            "deep.jsonl": " line 2 is not valid JSON: nested too deeply",
            "digits.jsonl": " line 2 is not valid JSON",
            "torn.jsonl": " line 2 is not valid JSON",
            "number.json": " row 1 is int, not an object",
            "empty.jsonl": " is empty",
            "latin.jsonl": " cannot be read",
            "utf16.jsonl": " cannot be read",
            "ragged.csv": " row 1 has 3 fields, the header 2",
            "twice.csv": " has two columns called 'prompt'",
            "quote.csv": " is not a readable table",
            "cut.jsonl.gz": " cannot be read",
            "damaged.jsonl.gz": " cannot be read",
            "plain.jsonl.gz": " cannot be read",
            "no_thought.jsonl": " line 1: response 'c' has no </think>",
            "two_thoughts.jsonl": " line 1: response",
            "null.jsonl": " line 1 has no text field 'prompt'",
        }.items()
    ),
    (data("/dev/zero"), "'/dev/zero' is neither a file nor a folder"),
    (fft("safety.n=100000000"), "ask for fewer examples"),
    (run("reference.n=100000000"), "ask for 100,000 at most"),
    (fft("evaluate.n=100000000"), "ask for 100,000 at most"),
    (fft("safety.max_length=3"), "max_length 3 leaves nothing of 16 examples"),
    (fft("safety.validation_share=0.9", "safety.n=1"), "cannot hold out"),
    (fft("safety.benign=no_thought.jsonl", "safety.benign_share=0.5"), "no_thought.jsonl line 1"),
    (run("matrix.methods=[fft+rpsa]", "reference.problems=same_ids.jsonl"), "two problems have the id '1'"),
    (run("matrix.methods=[fft+rpsa]", "reference.problems=attacks.jsonl"), "ask for 1 to 1, not 8"),
    (fft("evaluate.tasks=[reasoning.jsonl]"), "no task has harmful requests"),
    (fft("evaluate.tasks=[attacks.jsonl]"), "no task has reasoning problems"),
    (fft("evaluate.tasks=[no_tests.jsonl]"), "no_tests.jsonl line 1 has no text field 'test'"),
    (fft("evaluate.tasks=[tiny, rpsa_tiny_add]"), "two tasks are called add"),
    (fft("evaluate.tasks=[rpsa_aime24, attacks.jsonl]", "data_dir=two"), "two holds 2 files for aime24"),
    (fft("evaluate.tasks=[rpsa_gpqa_main, attacks.jsonl]"), "it is gated: accept its terms"),
    # judges
    (fft("evaluate.tasks=[reasoning.jsonl, attacks.jsonl]", "evaluate.judge=llama-guard-3"), "judge model "),
    (fft("evaluate.judge=rubric", RUBRIC.format(3)), "judge rubric: "),
    (fft("evaluate.judge=rubric", RUBRIC.format("ftp://h/v1")), "judge: base_url is 'ftp://h/v1'"),
    (fft("evaluate.judge=rubric", RUBRIC.format("http://h/v1, concurrency: 0")), "concurrency is 0"),
    (fft("evaluate.judge=rubric", RUBRIC.format("http://h/v1, retry: {tris: 1}")), "judge rubric: "),
    # models
    (
        model("lacking"),
        f"model lacking: its checkpoint lacks '{UP}' (which would be random numbers)",
    ),
    (model("renamed"), "and holds 'model.blocks.0."),
    (model("reshaped"), f"the checkpoint's '{UP}' is (1, 96), its config makes it (256, 96)"),
    (model("deeper"), "its checkpoint lacks 'model.layers.3"),
    (model("cut"), "cut/model.safetensors: cannot be loaded: a file of weights is damaged or cut off"),
    (model("hollow"), "hollow/model.safetensors: cannot be loaded: a file of weights is damaged or cut off"),
    (model("no_json"), "model no_json: "),
    (model("list"), "model list: "),
    (model("unheard"), "model type `nonesuch`"),
    (model("bert"), "model bert: its checkpoint lacks "),
    (model("tokenless"), "its tokenizer: cannot be loaded"),
    (model("torn_template"), "the chat template of 'torn_template' failed"),
    (model("no_template"), "has no chat template"),
    (model(".."), "model ..: "),
    (["evaluate", "lacking", "--tasks", "tiny", "--set", "n=1"], f"its checkpoint lacks '{UP}'"),
    (["evaluate", "no_base", "--tasks", "tiny"], "no_base/adapter_config.json names no base model"),
    (["evaluate", "gone_base", "--tasks", "tiny"], "the adapter's base: no such file or folder"),
    (["evaluate", "weightless", "--tasks", "tiny", "--set", "n=1"], "adapter weightless: cannot be loaded"),
    (["evaluate", "listed", "--tasks", "tiny"], "listed/adapter_config.json names no base model"),
    # commands
    (["evaluate", "tiny:0", "--tasks", ""], "--tasks: empty; name one"),
    (["evaluate", "tiny:0", "--tasks", "tiny", "--set", "judge.x=1"], "'judge' is not a section"),
    (["evaluate", "tiny:0", "--tasks", "tiny", "--reference", "two"], "--reference two: holds no D_ref"),
    (["sweep", "small.yaml", "--over", "lora.r=[]"], "--over lora.r: give at least one value"),
    (["plan", "small.yaml", "--gpu-memory", "nan"], "--gpu-memory is GiB greater than 0"),
    (
        ["fisher-map", "cut_fisher", "--out", "map"],
        "Fisher cut_fisher: cannot be loaded: a file of weights is damaged or cut off",
    ),
    (["plan", "small.yaml", "matrix.bases=[no_json]"], "model no_json: its config cannot be loaded: "),
    (["fisher-map", "torn_fisher", "--out", "map"], "torn_fisher/manifest.json: not readable as JSON"),
    (
        ["perturb", "tiny:0", "fisher", "--tasks", "tiny", "--n", "1", "--out", "p"],
        "this Fisher does not fit the model",
    ),
    (
        ["perturb", "tiny:0", "fisher", "--tasks", "tiny", "--out", "p", "--factors", "nan"],
        "factor nan is not a finite",
    ),
    (["tiny", "train", "--seed", "1", "--out", "notes.txt", "--steps", "1"], "notes.txt is a file"),
    (
        ["tiny", "train", "--seed", "1", "--out", ".", "--steps", "1"],
        "holds files that were not written by this",
    ),
    (["verify", "fisher"], "no run here"),
    (["audit", "audits"], "rpsa_audit.json is damaged or of another version"),
]


def sizes(folder: Path) -> dict[Path, int]:
    """Of all files but locks and a run's own recipe."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.stat().st_size for path in files if path.parent.name != "run"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    CASES,
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_a_bad_input_is_one_line_before_any_work(
    world: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(world)
    before = sizes(world)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    for secret in (TOKEN, "me:pw", "abc"):
        assert secret not in result.output or secret not in " ".join(arguments)
    assert not list((world / "run").rglob("stage.json"))
    assert sizes(world) == before
    assert (world / "notes.txt").read_text() == "years of work"


def test_there_are_sixty() -> None:
    assert len(CASES) >= 60


def test_a_field_of_a_table_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text(f"prompt,response\na,{'x' * 500_000}\n")
    [row] = read_rows(path)
    assert len(row.fields["response"]) == 500_000
