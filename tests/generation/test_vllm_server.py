"""The server that is started for data parallelism: its options, its beginning and its end.

vLLM is not here, so a stand-in takes its place at `python -m vllm.entrypoints.cli.main`: a real process that serves the
tiny model. tests/generation/test_vllm.py has vLLM itself.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.generation import Sampling
from rpsa.generation.backends import BackendConfig, make_generator
from rpsa.generation.transformers import TransformersGenerator
from rpsa.generation.vllm import VLLMServerGenerator, flags
from rpsa.tiny import reasoning_problems, tiny_model_dir

torch.set_num_threads(1)

FOLDER = str(tiny_model_dir(0))
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
PROMPTS = [render_prompt(TOKENIZER, problem.prompt) for problem in reasoning_problems(5, 0, "test")]
IDS = [f"problem {i}" for i in range(len(PROMPTS))]
GREEDY = Sampling(temperature=0, max_new_tokens=40)
ENGINE = {"data_parallel_size": 2, "dtype": "float32"}

STAND_IN = """
import argparse, os, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("serve")
parser.add_argument("model")
for name in ("host", "served-model-name", "dtype"):
    parser.add_argument("--" + name)
for name in ("port", "data-parallel-size"):
    parser.add_argument("--" + name, type=int)
arguments = parser.parse_args()
assert arguments.serve == "serve" and arguments.host == "127.0.0.1" and "VLLM_API_KEY" not in os.environ
pathlib.Path(os.environ["STAND_IN_PID"]).write_text(str(os.getpid()))
if arguments.data_parallel_size == 3:
    print("Traceback (most recent call last):", "ValueError: there are 2 GPUs", "terminating", sep="\\n")
    sys.exit(1)
if arguments.data_parallel_size == 4:
    import http.server
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", arguments.port), Ready).serve_forever()
from helpers import completions_server
from transformers import AutoModelForCausalLM, AutoTokenizer
completions_server.MODEL = arguments.served_model_name
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
with completions_server.CompletionsServer(model, tokenizer, port=arguments.port):
    time.sleep(600)
"""


@pytest.fixture
def pid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "vllm" / "entrypoints" / "cli"
    place.mkdir(parents=True)
    (place / "main.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "tests"), *sys.path]))
    monkeypatch.setenv("STAND_IN_PID", str(tmp_path / "pid"))
    monkeypatch.setenv("VLLM_API_KEY", "another server's")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    return tmp_path / "pid"


def is_alive(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def ends_within(seconds: float, pid_file: Path) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid_file) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid_file)


@pytest.mark.integration
def test_it_serves_and_ends_with_its_generator(pid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsa.generation.backends._is_installed", lambda package: True)
    generator = make_generator(BackendConfig("vllm", engine=ENGINE), FOLDER, TOKENIZER, lambda _: None)
    assert isinstance(generator, VLLMServerGenerator)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    expected = dict(TransformersGenerator(model, TOKENIZER).generate(PROMPTS, GREEDY, IDS))
    assert dict(generator.generate(PROMPTS, GREEDY, IDS)) == expected
    assert is_alive(pid_file)
    del generator
    gc.collect()
    assert ends_within(0, pid_file)


def test_a_server_that_does_not_start_is_one_line(pid_file: Path) -> None:
    with pytest.raises(RPSAError, match=r"ended with code 1: ValueError: there are 2 GPUs$"):
        VLLMServerGenerator(FOLDER, TOKENIZER, {"data_parallel_size": 3})
    with pytest.raises(
        RPSAError, match=r"ended with code 2: .*error: unrecognized arguments: --tensor-parallel 2"
    ):
        VLLMServerGenerator(FOLDER, TOKENIZER, {"tensor_parallel": 2})


@pytest.mark.integration
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_it_does_not_outlive_a_process_that_is_ended(pid_file: Path, sent: signal.Signals) -> None:
    program = (
        "import signal, time\n"
        "from transformers import AutoTokenizer\n"
        "from rpsa.generation.vllm import VLLMServerGenerator\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        f"tokenizer = AutoTokenizer.from_pretrained({FOLDER!r})\n"
        "generator = VLLMServerGenerator('tiny', tokenizer, {'data_parallel_size': 4})\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(sent)
        process.wait(30)
        assert ends_within(30, pid_file)
    finally:
        process.kill()


def test_arguments_are_options() -> None:
    engine = {
        "dtype": "auto",
        "max_model_len": 4096,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "compilation_config": {"mode": 0},
        "allowed_origins": ["a", "b"],
        "revision": None,
    }
    assert flags(engine) == [
        *("--dtype", "auto", "--max-model-len", "4096", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--compilation-config", '{"mode": 0}', "--allowed-origins", "a", "b"),
    ]
