"""The server backend against a real server on the loopback with the tiny model, on good days and bad ones."""

import asyncio
import copy
import random
import socket
import threading
import time

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.completions_server import MODEL, PASSING_FAULTS, CompletionsServer
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.generation import Sampling, sample_id, sample_seed
from rpsa.generation.resumable import generate_resumable
from rpsa.generation.server import ServerConfig, ServerGenerator, _Work
from rpsa.generation.transformers import TransformersGenerator
from rpsa.tiny import reasoning_problems, tiny_model_dir

torch.set_num_threads(1)

TOKENIZER = AutoTokenizer.from_pretrained(tiny_model_dir(0))
MODEL_0 = AutoModelForCausalLM.from_pretrained(tiny_model_dir(0), dtype=torch.float32)
PROMPTS = [render_prompt(TOKENIZER, problem.prompt) for problem in reasoning_problems(24, 0, "test")]
IDS = [sample_id("tiny", i, 0) for i in range(len(PROMPTS))]
GREEDY = Sampling(temperature=0, max_new_tokens=40)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("RPSA_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def greedy():
    found = dict(TransformersGenerator(MODEL_0, TOKENIZER).generate(PROMPTS, GREEDY, IDS))
    assert len({tuple(c.token_ids) for c in found.values()}) > 15  # else a swap could go unseen
    return found


@pytest.fixture(scope="module")
def answers(greedy):
    """What the engine says, computed once, so that a time limit in a test is about the network alone."""
    with CompletionsServer(MODEL_0, TOKENIZER) as server:
        run(server)
        return server.answers


def server(answers=None, **options):
    made = CompletionsServer(MODEL_0, TOKENIZER, **options)
    made.answers = answers if answers is not None else {}
    return made


def generator(server, tokenizer=TOKENIZER, **options):
    options = {"model": MODEL, "backoff": 0.002, "max_in_flight": 8} | options
    return ServerGenerator(ServerConfig(server.url, **options), tokenizer)


def collect(iterator):
    """What is yielded, and the error at the end, if any. No index comes twice."""
    found, error = {}, None
    try:
        for index, completion in iterator:
            assert index not in found
            found[index] = completion
    except RPSAError as raised:
        error = raised
    return found, error


def run(server, sampling=GREEDY, tokenizer=TOKENIZER, **options):
    found, error = collect(generator(server, tokenizer, **options).generate(PROMPTS, sampling, IDS))
    assert error is None, error
    return found


def failure(server, **options):
    found, error = collect(generator(server, **options).generate(PROMPTS, GREEDY, IDS))
    assert error is not None
    assert "\n" not in str(error)
    return found, str(error)


def test_greedy_equals_the_transformers_backend(greedy):
    with server() as it:
        assert run(it) == greedy
        assert 1 < it.most_under_way <= 8
        assert run(it, max_in_flight=1) == greedy
        probes = [body for _, body, _ in it.requests if body["max_tokens"] == 1]
        assert len(probes) == 2
        assert len(it.requests) == 2 * (len(PROMPTS) + 1)


def test_each_sample_has_a_seed_of_its_own_that_order_does_not_change():
    sampling = Sampling(temperature=1.0, max_new_tokens=40, seed=5)
    with server() as it:
        found = run(it, sampling)
        backwards = dict(generator(it).generate(PROMPTS[::-1], sampling, IDS[::-1]))
        seeds = {tuple(body["prompt"]): body["seed"] for _, body, _ in it.requests}
    assert {tuple(p): sample_seed(5, i) for p, i in zip(PROMPTS, IDS, strict=True)} == seeds
    assert all(backwards[len(PROMPTS) - 1 - i] == found[i] for i in found)
    for i, completion in found.items():
        own = Sampling(1.0, 0.95, 40, sample_seed(5, IDS[i]))
        again = TransformersGenerator(MODEL_0, TOKENIZER).generate([PROMPTS[i]], own, ["of the server"])
        assert next(again)[1] == completion


@pytest.mark.parametrize("fault", PASSING_FAULTS, ids=str)
def test_a_passing_fault_loses_no_sample(fault, greedy, answers):
    hit = PROMPTS[3:5] if fault in ("slow", 429) else PROMPTS

    def once(prompt, attempt):
        return fault if attempt == 0 and prompt in hit else None

    with server(answers, fault=once) as it:
        assert run(it, timeout=1.0 if fault == "slow" else 60.0) == greedy
        assert len(it.requests) - len(hit) - len(PROMPTS) >= 1
        assert fault == "slow" or len(it.requests) == 1 + len(PROMPTS) + len(hit)


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_day(seed, greedy, answers):
    rng = random.Random(seed)
    faults = [f for f in PASSING_FAULTS if f not in ("slow", 429)]
    plan = {
        (*prompt, attempt): rng.choice(faults) for prompt in PROMPTS for attempt in range(rng.randrange(5))
    }
    with server(answers, fault=lambda prompt, attempt: plan.get((*prompt, attempt))) as it:
        assert run(it, max_in_flight=rng.randrange(1, 12)) == greedy
        assert len(it.requests) == 1 + len(PROMPTS) + len(plan)


def test_the_first_request_may_fail_too(greedy, answers):
    with server(answers) as it:
        it.probe_fault = [503, "drop", "garbage", None].__getitem__
        assert run(it) == greedy
        assert len(it.requests) == 4 + len(PROMPTS)


def test_a_server_that_restarts_in_between_is_waited_for(greedy, answers):
    with server(answers) as first:
        iterator = generator(first, max_in_flight=2, backoff=0.05).generate(PROMPTS, GREEDY, IDS)
        found = dict([next(iterator)])
        first.fault = lambda prompt, attempt: "drop"
    time.sleep(0.1)
    with server(answers, port=first.port):
        rest, error = collect(iterator)
    assert error is None
    assert not rest.keys() & found.keys()
    assert found | rest == greedy


@pytest.fixture
def waits(monkeypatch):
    """Every wait between two tries, which takes no time."""
    found = []

    async def wait(self, seconds):
        found.append(seconds)
        return self.failed.is_set()

    monkeypatch.setattr(_Work, "_stopped_within", wait)
    return found


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("86400", 600.0), ("soon", None), ("nan", None)])
def test_retry_after_is_obeyed_within_reason(asked, waited, greedy, answers, waits):
    with server(answers, fault=lambda prompt, attempt: 429 if attempt == 0 else None) as it:
        it.retry_after = asked
        found = dict(generator(it).generate(PROMPTS[:2], GREEDY, IDS[:2]))
    assert found == {0: greedy[0], 1: greedy[1]}
    assert waits == [waited] * 2 if waited else max(waits) < 1


def test_a_quota_that_is_used_up_is_not_asked_again(answers, waits):
    with server(answers, fault=lambda prompt, attempt: "quota") as it:
        _, message = failure(it, max_in_flight=1)
        assert len(it.requests) == 1 + 1  # the first of all asks for one token
    assert "HTTP 429 you have used it up; see to the account" in message
    assert waits == []


def test_when_the_retries_are_spent_what_is_done_has_been_yielded(greedy, answers, tmp_path):
    bad = PROMPTS[10]
    with server(answers, fault=lambda prompt, attempt: 500 if prompt == bad else None) as it:
        found, message = failure(it, retries=2, max_in_flight=2)
        assert it.attempts[(*bad, False)] == 3
        assert it.url in message
        assert (
            "gave up after 3 tries; the last: HTTP 500 busy (sample 'tiny/10/0'); see to the server"
            in message
        )
        assert set(range(10)) <= found.keys()
        assert 10 not in found
        assert all(greedy[i] == completion for i, completion in found.items())
        assert sum(1 for _, body, _ in it.requests if body["prompt"] != bad) - 1 == len(found)
        # the same through a file: the next run asks for the missing ones only
        path = tmp_path / "completions.jsonl"
        stopped, error = collect(
            generate_resumable(generator(it, retries=0, max_in_flight=2), PROMPTS, GREEDY, IDS, path)
        )
        assert error is not None
    with server(answers) as it:
        found, error = collect(generate_resumable(generator(it), PROMPTS, GREEDY, IDS, path))
        assert len(it.requests) == 1 + len(PROMPTS) - len(stopped)
    assert error is None
    assert found == greedy


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_refusal_in_between_stops_at_once(in_flight, greedy, answers):
    with server(answers, fault=lambda prompt, attempt: 400 if prompt == PROMPTS[6] else None) as it:
        found, message = failure(it, max_in_flight=in_flight)
        assert len(it.requests) == 1 + len(found) + 1
    assert "HTTP 400 no way" in message
    assert set(range(6)) <= found.keys()
    assert in_flight > 1 or len(found) == 6
    assert all(greedy[i] == completion for i, completion in found.items())


def test_what_no_retry_can_mend_is_one_line_after_one_request(answers, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    with server(answers, key="sesame") as it:
        monkeypatch.setenv("OPENAI_API_KEY", "open")
        _, message = failure(it)
        assert len(it.requests) == 1
        assert f"{it.url}, model 'tiny': HTTP 401 wrong key; set RPSA_API_KEY" in message
        monkeypatch.setenv("RPSA_API_KEY", "sesame\r\nX: y")
        assert "RPSA_API_KEY holds characters" in failure(it)[1]
        monkeypatch.setenv("RPSA_API_KEY", "sesame\n")
        assert len(run(it)) == len(PROMPTS)
        _, message = failure(it, model="other")
        assert "model 'other': HTTP 404 The model `other` does not exist.; check the URL" in message
        it.url = it.url.removesuffix("/v1")
        assert "HTTP 404" in failure(it)[1]
    assert "sesame" not in caplog.text
    assert "sesame" not in repr(generator(it).__dict__)


def test_nobody_there(waits):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    config = ServerConfig(f"http://127.0.0.1:{port}/v1", MODEL)
    found, error = collect(ServerGenerator(config, TOKENIZER).generate(PROMPTS, GREEDY, IDS))
    assert waits == []
    assert not found
    assert f"http://127.0.0.1:{port}/v1, model 'tiny': no server is there, no answer (Conn" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("speaks", ["text", "ids in"])
def test_a_server_that_gives_text_alone(speaks, greedy, answers, caplog):
    with server(answers, speaks=speaks) as it:
        found = run(it)
        assert caplog.messages == [f"{it.url} gives no token ids: responses are tokenised again here"]
        assert {type(body["prompt"]) for _, body, _ in it.requests[2:]} == {str if speaks == "text" else list}
    for i, completion in found.items():
        assert not completion.exact
        assert (completion.text, completion.finish_reason) == (greedy[i].text, greedy[i].finish_reason)
        assert completion.token_ids == greedy[i].token_ids  # this tokenizer splits text in one way only


def test_the_form_can_be_set(answers):
    with server(answers, speaks="text") as it:
        assert len(run(it, prompts_as="text")) == len(it.requests)
        assert "HTTP 400" in failure(it, prompts_as="token_ids")[1]


def test_a_prompt_that_text_would_change_is_refused(answers):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens([AddedToken("add 6", special=False)])
    split = [[*PROMPTS[0], *tokenizer("add")["input_ids"], *tokenizer("6")["input_ids"]]]
    with server(answers, speaks="text") as it:
        _, error = collect(generator(it, tokenizer).generate(split, GREEDY, ["x"]))
    assert "'x': its prompt as text would be read as other tokens" in str(error)


def test_a_server_that_hides_the_end_of_the_thought_is_refused(answers):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens([AddedToken("</think>", special=True)])
    with server(answers) as it:
        assert run(it, tokenizer=tokenizer)
    with server(answers, speaks="ids in") as it:
        _, error = collect(generator(it, tokenizer).generate(PROMPTS, GREEDY, IDS))
    assert "</think>" in str(error)


def test_a_server_with_another_tokenizer_is_refused(answers):
    with server(answers) as it:
        it.prompt_tokens = lambda prompt: len(prompt) + 1  # a second BOS, for instance
        found, message = failure(it)
        assert not found
        assert f"read a prompt of {len(PROMPTS[0])} tokens as {len(PROMPTS[0]) + 1}" in message


def test_leaving_early_drops_what_is_under_way(greedy, answers):
    with server(answers, fault=lambda prompt, attempt: "slow" if prompt != PROMPTS[0] else None) as it:
        iterator = generator(it).generate(PROMPTS, GREEDY, IDS)
        assert next(iterator) == (0, greedy[0])
        iterator.close()
        assert it.under_way > 0  # nobody has waited for the answers
    assert not [t for t in threading.enumerate() if t.name == "rpsa-generation"]


def test_works_inside_of_a_running_event_loop(greedy, answers):
    async def notebook():
        return run(it)

    with server(answers) as it:
        assert asyncio.run(notebook()) == greedy


def test_mistakes_in_the_settings(answers):
    for wrong in ("127.0.0.1:8000", "ftp://127.0.0.1/v1", "http:///v1", "http://host:80a/v1"):
        with pytest.raises(RPSAError, match="give one like"):
            ServerConfig(wrong, MODEL)
    with pytest.raises(RPSAError) as error:
        ServerConfig("http://me:sesame@127.0.0.1/v1", MODEL)
    assert "sesame" not in str(error.value)
    with pytest.raises(RPSAError, match="max_in_flight"):
        ServerConfig("http://127.0.0.1/v1", MODEL, max_in_flight=0)
    with pytest.raises(RPSAError, match="retries is -1: give at least 0"):
        ServerConfig("http://127.0.0.1/v1", MODEL, retries=-1)
    with server(answers) as it:
        assert list(generator(it).generate([], GREEDY, [])) == []
        with pytest.raises(RPSAError, match="24 prompts with 1 sample ids"):
            next(generator(it).generate(PROMPTS, GREEDY, ["x"]))
