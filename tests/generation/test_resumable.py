"""Generation that is killed and goes on ends with exactly what an undisturbed run gives."""

import json
import logging
import multiprocessing
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.generation import Completion, Sampling, sample_id
from rpsa.generation.resumable import Pace, generate_resumable, track
from rpsa.generation.transformers import TransformersGenerator
from rpsa.tiny import reasoning_problems, tiny_model_dir

torch.set_num_threads(1)

TOKENIZER = AutoTokenizer.from_pretrained(tiny_model_dir(0))
MODEL = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
PROMPTS = [render_prompt(TOKENIZER, problem.prompt) for problem in reasoning_problems(40, 0, "test")]
IDS = [sample_id("tiny", i, 0) for i in range(len(PROMPTS))]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=60, seed=3)


class Counting:
    """The transformers backend, counting what it is asked for."""

    def __init__(self, batch_size=20):
        self.asked, self.backend = [], TransformersGenerator(MODEL, TOKENIZER, batch_size)

    def generate(self, prompts, sampling, sample_ids):
        self.asked += sample_ids
        return self.backend.generate(prompts, sampling, sample_ids)


def resume(path, generator=None, prompts=PROMPTS, sampling=SAMPLING, ids=IDS, **options):
    pairs = list(generate_resumable(generator or Counting(), prompts, sampling, ids, path, **options))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "completions.jsonl"
    found = resume(path)
    assert found == dict(Counting().generate(PROMPTS, SAMPLING, IDS))
    return found, path.read_bytes()


def records(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(seed, undisturbed, tmp_path):
    found, content = undisturbed
    path, rng = tmp_path / "completions.jsonl", random.Random(seed)
    process = multiprocessing.get_context("fork").Process
    sizes, killed = [0], 0
    while sizes[-1] < 0.7 * len(content):
        child = process(target=resume, args=(path, Counting(batch_size=3)))
        child.start()
        goal = sizes[-1] + rng.randrange(len(content) // 4)
        while child.is_alive() and (path.stat().st_size if path.exists() else 0) <= goal:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.03)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        sizes.append(path.stat().st_size if path.exists() else 0)
        assert len(sizes) < 40
    assert killed >= 4
    done = records(path)
    rest = Counting()
    assert resume(path, rest) == found
    assert set(rest.asked) == set(IDS) - set(done)
    assert sorted(records(path)) == sorted(IDS)
    assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())


def test_a_line_torn_anywhere_is_made_again(undisturbed, tmp_path):
    found, content = undisturbed
    rng, header = random.Random(0), content.index(b"\n") + 1
    for cut in [0, 1, header - 1, header, len(content) - 1, *(rng.randrange(len(content)) for _ in range(5))]:
        path = tmp_path / "completions.jsonl"
        path.write_bytes(content[:cut])
        rest = Counting()
        assert resume(path, rest) == found
        assert len(rest.asked) == len(IDS) - max(0, content[:cut].count(b"\n") - 1)
        assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())


def test_nothing_is_mixed_in(undisturbed, tmp_path):
    content = undisturbed[1]
    path = tmp_path / "completions.jsonl"
    path.write_bytes(content)
    others = [[*PROMPTS[0], 5], *PROMPTS[1:]]
    for options, message in [
        ({"sampling": replace(SAMPLING, seed=4)}, "made with sampling .*'seed': 3.* not .*'seed': 4"),
        ({"sampling": replace(SAMPLING, top_p=0.9)}, "sampling"),
        ({"identity": "another model"}, "made with identity '', not 'another model'"),
        ({"prompts": others}, "answers another prompt \\('tiny/0/0'\\)"),
        ({"ids": [IDS[1], *IDS[1:]]}, "two samples have the id 'tiny/1/0'"),
        ({"ids": IDS[1:]}, "40 prompts with 39 sample ids"),
    ]:
        generator = Counting()
        with pytest.raises(RPSAError, match=message) as error:
            resume(path, generator, **options)
        assert "\n" not in str(error.value)
        assert not generator.asked
        assert path.read_bytes() == content
    path.write_bytes(content + content.splitlines(keepends=True)[-1])
    with pytest.raises(RPSAError, match="line 42 repeats"):
        resume(path)
    path.write_text('{"prompt": "something else"}\n')
    with pytest.raises(RPSAError, match="does not hold completions"):
        resume(path)
    assert path.read_text() == '{"prompt": "something else"}\n'


def test_samples_that_are_not_asked_for_stay_in_the_file(undisturbed, tmp_path):
    path, generator = tmp_path / "completions.jsonl", Counting()
    path.write_bytes(undisturbed[1])
    found = resume(path, generator, prompts=PROMPTS[1:], ids=IDS[1:])
    assert len(found) == len(IDS) - 1
    assert not generator.asked
    assert path.read_bytes() == undisturbed[1]


def test_samples_can_be_added(undisturbed, tmp_path):
    path, first = tmp_path / "deeper" / "completions.jsonl", Counting()
    resume(path, first, prompts=PROMPTS[10:], ids=IDS[10:])
    more = Counting()
    assert resume(path, more) == undisturbed[0]
    assert sorted(first.asked + more.asked) == sorted(IDS)


COMPLETION = Completion([1] * 50, "text", "stop")


def test_pace():
    now = [100.0]
    pace = Pace(total=12, done=2, clock=lambda: now[0])
    assert str(pace) == "2/12, 0 tokens/s, ? left"
    now[0] += 5
    for _ in range(4):
        pace.add(COMPLETION)
    assert str(pace) == "6/12, 40 tokens/s, 0:08 left"  # 6 responses of 50 tokens at 40 tokens/s: 7.5 s
    now[0] += 3 * 3600 - 5
    assert str(pace) == "6/12, 0 tokens/s, 4:30:00 left"


def test_without_a_terminal_there_is_a_line_now_and_then(caplog):
    caplog.set_level(logging.INFO)
    now = [0.0]

    def completions():
        for i in range(8):
            now[0] += 25
            yield i, COMPLETION

    pairs = list(track(completions(), 10, "aime24", done=2, clock=lambda: now[0]))
    assert pairs == [(i, COMPLETION) for i in range(8)]
    assert caplog.messages == [
        "aime24: 5/10, 2 tokens/s, 2:05 left",
        "aime24: 8/10, 2 tokens/s, 0:50 left",
        "aime24: 10/10, 2 tokens/s, 0:00 left",
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert list(track(iter([(0, COMPLETION), (1, COMPLETION)]), 3, "aime24", done=1))
    shown = capsys.readouterr().err
    assert "aime24" in shown
    assert "3/3" in shown
    assert not caplog.messages


def test_progress_of_a_resumed_run(undisturbed, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b"".join(undisturbed[1].splitlines(keepends=True)[:31]))
    resume(path, label="tiny")
    assert caplog.messages[-1].startswith("tiny: 40/40, ")
