"""Stages in several processes: `rpsa run` with a `launch` section, `accelerate launch -m rpsa`, and a killed rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM

from helpers.launched import workers_of
from helpers.paths import RECIPES
from helpers.ranks import free_port
from helpers.small_runs import hidden, written
from rpsa.errors import RPSAError
from rpsa.pipeline import launch, run, verify
from rpsa.pipeline.alignment import CHECKPOINTS
from rpsa.recipe import Recipe, load_recipe
from rpsa.recipe.sections import Launch
from rpsa.sharding import refuse_engines, refuse_model
from rpsa.training.trainer import AUDIT_FILE

CONFIGS = RECIPES / "accelerate"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
METHODS = "matrix.methods=[fft+rpsa, lora+rpsa]"


def small(recipe_file: Path, *overrides: str) -> Recipe:
    return load_recipe(recipe_file, [f"output_dir={recipe_file.parent / 'run'}", METHODS, *overrides])


def trajectory(folder: Path, method: str) -> list[dict[str, float]]:
    audit = json.loads((folder / "align" / method / "tiny-0" / "seed0" / AUDIT_FILE).read_text())
    assert audit["frozen_elements_moved"] == 0
    return list(audit["trajectory"])


@pytest.mark.usefixtures("measured")
def test_two_processes_train(recipe_file: Path) -> None:
    folder = run(small(recipe_file, "matrix.methods=[fft+rpsa]", "launch.num_processes=2"), only="align")
    assert not hidden(folder)
    assert [entry["step"] for entry in trajectory(folder, "fft+rpsa")] == [0, 1]
    model = folder / "align" / "fft+rpsa" / "tiny-0" / "seed0"
    assert json.loads((model / "log.json").read_text())["processes"] == 2
    AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.integration
def test_two_processes_leave_what_one_leaves(recipe_file: Path) -> None:
    """The same global batch; the Fisher is reduced from the ranks, so that tau may differ by a rounding."""
    same = "lora.lora_dropout=0.0"
    for stage in ("reference", "fisher", "align"):
        alone = run(small(recipe_file, "matrix.methods=[lora+rpsa]", same), only=stage)
    expected = trajectory(alone, "lora+rpsa")

    halved = "train.per_device_train_batch_size=2"
    other = f"output_dir={recipe_file.parent / 'launched'}"
    folder = run(small(recipe_file, "launch.num_processes=2", halved, same, other))
    verify(folder)
    assert not hidden(folder)
    for found, one in zip(trajectory(folder, "lora+rpsa"), expected, strict=True):
        assert found["tau"] == pytest.approx(one["tau"], rel=1e-4)
        assert found["c"] == pytest.approx(one["c"], abs=1e-3)
    for method in ("fft+rpsa", "lora+rpsa"):
        log = json.loads((folder / "align" / method / "tiny-0" / "seed0" / "log.json").read_text())
        one = json.loads((alone / "align" / "lora+rpsa" / "tiny-0" / "seed0" / "log.json").read_text())
        assert log["processes"] == 2
        # of the base, whatever is trained then
        assert log["safety_data"]["perplexity"] == pytest.approx(one["safety_data"]["perplexity"], rel=1e-5)
    AutoModelForCausalLM.from_pretrained(folder / "align" / "fft+rpsa" / "tiny-0" / "seed0")
    stages = written(folder)
    again = written(run(small(recipe_file, "launch.num_processes=2", halved, same, other)))
    assert {n: t for n, t in again.items() if n != "report"} == {
        n: t for n, t in stages.items() if n != "report"
    }


@pytest.mark.integration
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(recipe_file: Path) -> None:
    folder = recipe_file.parent / "run"
    settings = [
        "matrix.methods=[fft+rpsa]",
        "launch.num_processes=2",
        *("train.save_strategy=steps", "train.save_steps=2", "train.num_train_epochs=20"),
    ]
    run(small(recipe_file, *settings), only="reference")
    run(small(recipe_file, "matrix.methods=[fft+rpsa]"), only="fisher")
    command = [sys.executable, "-m", "rpsa", "run", str(recipe_file), f"output_dir={folder}", *settings]
    process = subprocess.Popen(
        [*command, "--only", "align"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + 900
        while not list(folder.glob(f"align/*/*/.*.unfinished/{CHECKPOINTS}/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 2, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: align fft+rpsa/tiny-0/seed0: rank 1 was ended by SIGKILL, and the others")
    assert "Traceback" not in errors
    checkpoints = list(folder.glob(f"align/*/*/.*.unfinished/{CHECKPOINTS}/checkpoint-*"))
    assert checkpoints

    run(small(recipe_file, *settings))
    found = trajectory(folder, "fft+rpsa")
    assert [entry["step"] for entry in found] == list(range(40))
    verify(folder)


@pytest.mark.integration
def test_a_mistake_in_launched_processes_is_one_line(recipe_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "response": "<think>b</think>c"}\n{"prompt": "d"}\n')
    settings = [f"safety.data={broken}", "safety.n=null", "matrix.methods=[fft]", "launch.num_processes=2"]
    done = subprocess.run(
        [sys.executable, "-m", "rpsa", "run", str(recipe_file), f"output_dir={tmp_path / 'run'}", *settings],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=900,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: fft/tiny-0/seed0: {broken} line 2 has no text field 'response'")


@pytest.mark.slow
def test_accelerate_launch_by_hand(recipe_file: Path) -> None:
    settings = [f"output_dir={recipe_file.parent / 'run'}", "matrix.methods=[fft+rpsa]"]
    run(load_recipe(recipe_file, settings), only="reference")

    def launched(*only: str) -> "subprocess.CompletedProcess[str]":
        started = [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ]
        ours = ["-m", "rpsa", "run", str(recipe_file), *settings, *only]
        return subprocess.run(
            [sys.executable, "-m", *started, *ours], capture_output=True, text=True, env=ENVIRONMENT
        )

    refused = launched()
    assert refused.returncode != 0
    assert refused.stderr.count("error: several processes do the stages fisher and align only") == 1
    for stage in ("fisher", "align"):
        done = launched("--only", stage)
        assert done.returncode == 0, done.stderr
    assert len(trajectory(recipe_file.parent / "run", "fft+rpsa")) > 0
    run(load_recipe(recipe_file, settings))


@pytest.mark.slow
def test_two_machines_fill_one_folder(recipe_file: Path) -> None:
    """Each is a launcher with one process, on the loopback; what they share is the folder."""
    settings = [f"output_dir={recipe_file.parent / 'run'}", METHODS]
    run(load_recipe(recipe_file, settings), only="reference")
    there = [
        "main_process_ip=127.0.0.1",
        f"main_process_port={free_port()}",
        "num_machines=2",
        "num_processes=2",
    ]
    command = [sys.executable, "-m", "rpsa", "run", str(recipe_file), *settings]
    for stage in ("fisher", "align"):
        machines = [
            subprocess.Popen(
                [
                    *command,
                    "--only",
                    stage,
                    *(f"launch.{setting}" for setting in [*there, f"machine_rank={number}"]),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
            for number in range(2)
        ]
        errors = [machine.communicate(timeout=900)[1] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], errors
    assert len(trajectory(recipe_file.parent / "run", "fft+rpsa")) == 2
    log = recipe_file.parent / "run" / "align" / "lora+rpsa" / "tiny-0" / "seed0" / "log.json"
    assert json.loads(log.read_text())["processes"] == 2
    verify(run(load_recipe(recipe_file, settings)))


# The recipe's section, the shipped configs


def test_what_is_launched_is_the_same_recipe(recipe_file: Path) -> None:
    more = ["launch.num_processes=2", "matrix.grid.align.window=[2, 3]", "align.every=4"]
    recipe = small(recipe_file, *more, "matrix.methods=[original, fft+constant, lora+rpsa]")
    copy = recipe_file.parent / launch.GIVEN
    copy.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    assert load_recipe(copy).cells() == recipe.cells()
    assert load_recipe(copy).folder == recipe.folder


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_accelerate_configs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(path))
    name, _, count = path.stem.partition("-")
    assert config.num_processes == {"2x8": 16}.get(count) or int(count)
    assert config.num_machines == (2 if count == "2x8" else 1)
    assert config.distributed_type.value == {"gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    section = Launch(config=str(path))
    refuse_engines(launch._environment(section))
    arguments = launch_command_parser().parse_args([*launch.options(section), "script.py"])
    validated, _, _ = _validate_launch_command(arguments)
    assert validated.mixed_precision == "bf16"
    assert bool(validated.use_fsdp) == (name == "fsdp2")
    assert bool(validated.multi_gpu) == (name == "ddp")
    if name == "fsdp2":
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils.launch import prepare_multi_gpu_env

        validated.main_process_port = 0  # the shipped port may be in use here
        for variable, value in prepare_multi_gpu_env(validated).items():
            if variable.startswith("FSDP_"):
                monkeypatch.setenv(variable, value)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert "SHARDED_STATE_DICT" in str(plugin.state_dict_type)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}", "DeepSpeed is not supported"),
        ("distributed_type: MEGATRON_LM\nmegatron_lm_config: {}", "Megatron-LM is not supported"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "FSDP1 is not supported"),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n"
            "parallelism_config: {parallelism_config_tp_size: 2}",
            "tensor parallelism is not supported",
        ),
        ("distributed_type: [", "no accelerate config"),
    ],
)
def test_what_cannot_be_launched_is_one_line(
    config: str, message: str, recipe_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "accelerate.yaml"
    rest = "compute_environment: LOCAL_MACHINE\nmixed_precision: 'no'\nnum_processes: 2\nuse_cpu: false\ndebug: false\n"
    path.write_text(rest + config + "\n")
    with pytest.raises(RPSAError, match=message) as error:
        run(small(recipe_file, f"launch.config={path}"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("launch={}", "launch: name config"),
        ("launch.config=nowhere.yaml", "launch.config: no such file: 'nowhere.yaml'"),
        ("launch.num_processes=0", "launch.num_processes: 0 is not at least 1|not greater than 0"),
        ("launch.processes=2", "launch.processes: unknown key; did you mean 'num_processes'"),
    ],
)
def test_mistakes_in_the_section(setting: str, message: str, recipe_file: Path) -> None:
    with pytest.raises(RPSAError, match=message):
        small(recipe_file, setting)


def test_workers_and_launched_processes_exclude_each_other(recipe_file: Path) -> None:
    with pytest.raises(RPSAError, match=r"matrix\.parallel: cannot be more than 1 beside launch"):
        small(recipe_file, "launch.num_processes=2", "matrix.parallel=2")


def test_the_second_machine_does_launched_stages_only(recipe_file: Path) -> None:
    with pytest.raises(RPSAError, match="machine 1 does the stages fisher and align only"):
        run(small(recipe_file, "launch.num_processes=2", "launch.machine_rank=1"))


def test_options_of_the_launcher() -> None:
    plain = launch.options(Launch(num_processes=2))
    assert plain[-4:] == ["--main_process_port", "0", "--num_processes", "2"]
    assert "--multi_gpu" in plain
    second = Launch(config="a.yaml", machine_rank=1, main_process_ip="10.0.0.1")
    assert launch.options(second) == [
        *("--config_file", "a.yaml", "--machine_rank", "1"),
        *("--main_process_ip", "10.0.0.1"),
    ]


def test_quantised_weights_are_not_fine_tuned_in_full() -> None:
    model: Any = torch.nn.Linear(2, 2)
    model.is_quantized = True
    with pytest.raises(RPSAError, match="quantised base weights cannot be fine-tuned in full"):
        refuse_model(model, has_adapter=False)
    refuse_model(model, has_adapter=True)
