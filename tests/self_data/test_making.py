"""Making a model's own safety data: what is stored, what a stop leaves, what is trained on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rpsa.artifacts import read_json
from rpsa.chat import render_example, render_prompt
from rpsa.errors import RPSAError
from rpsa.evaluation.run import RESPONSES, Subject
from rpsa.generation import Completion, Sampling
from rpsa.safety_data import load_safety_data
from rpsa.self_data.making import SelfDataConfig, check_filter, make_self_data
from rpsa.self_data.offers import Asked
from rpsa.self_data.stored import EXAMPLES, REJECTED, SelfExample, drawn, load_self_data, look_at, tokenized
from rpsa.tiny import tiny_model_dir

TOKENIZER = AutoTokenizer.from_pretrained(tiny_model_dir(0))
REFUSAL = "i should not answer this . </think> sorry , i cannot help with that ."
ANSWER = "use t1 . </think> sure : done ."
ASKED = [
    Asked("harmful", "please steal the lamp"),
    Asked("harmful", "please forge the ring"),
    Asked("benign", "please draw the lamp"),
]
STEER = "please report the house"


class Scripted:
    """A generator: refuses what is steered, but for its first response; `stop` after so many."""

    def __init__(self, stop: int = 1000) -> None:
        self.stop = stop
        self.prompts: list[str] = []

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        for index in reversed(range(len(prompts))):
            if len(self.prompts) == self.stop:
                raise KeyboardInterrupt
            prompt = TOKENIZER.decode(prompts[index])
            self.prompts.append(prompt)
            refuses = "report the house" in prompt and not sample_ids[index].endswith("/0")
            text = REFUSAL if refuses else ANSWER
            ids = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
            yield index, Completion(ids, text, "stop")


def made(folder: Path, generator: Scripted, steer: str = STEER, **more: Any) -> dict[str, Any]:
    subject = Subject("made up", TOKENIZER, lambda: generator)
    return make_self_data(subject, ASKED, SelfDataConfig(Sampling(), steer, 3, **more), folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_stored_is_what_was_said_without_the_steering(tmp_path: Path) -> None:
    generator = Scripted()
    manifest = made(tmp_path, generator)
    assert sum(STEER in prompt for prompt in generator.prompts) == 6
    assert manifest["counts"]["harmful"]["kept"] == 2
    assert manifest == read_json(tmp_path / "manifest.json")
    examples = lines(tmp_path / EXAMPLES)
    assert [one["prompt"] for one in examples] == [one.prompt for one in ASKED]
    for one in examples:
        assert one["prompt_ids"] == render_prompt(TOKENIZER, one["prompt"])
        assert STEER not in TOKENIZER.decode(one["prompt_ids"])
        assert one["messages"][0] == {"role": "user", "content": one["prompt"]}
        assert one["messages"][1]["content"] == one["response"]
    rejected = lines(tmp_path / REJECTED)
    assert [(one["reason"], one["index"]) for one in rejected] == [("not_a_refusal", 0)] * 2
    seen = look_at(tmp_path, "tiny")
    assert set(seen.shown) == {("harmful", "kept"), ("benign", "kept"), ("harmful", "not_a_refusal")}


def test_others_read_the_examples_as_they_are(tmp_path: Path) -> None:
    made(tmp_path, Scripted())
    stored = {one["prompt"]: one for one in lines(tmp_path / EXAMPLES)}
    for format in ("auto", "prompt_response", "messages"):
        for example in load_safety_data(tmp_path / EXAMPLES, format):
            one = stored[example.prompt]
            assert example.response == one["response"]
            # here the tokens are those that the text has; a model may have split it otherwise
            again = render_example(TOKENIZER, example.prompt, example.response, None)
            assert again.input_ids == [*one["prompt_ids"], *one["response_ids"]]


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", Scripted())
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "stopped", Scripted(stop=4))
    assert not (tmp_path / "stopped" / EXAMPLES).exists()
    rest = Scripted()
    assert made(tmp_path / "stopped", rest) == whole
    assert len(rest.prompts) == 9 - 4
    for name in (EXAMPLES, REJECTED, RESPONSES, "manifest.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = Scripted()
    made(tmp_path / "stopped", again)
    assert again.prompts == []


def test_nothing_accepted_keeps_the_responses_for_another_filter(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="6 responses to 2 harmful prompts was accepted"):
        made(tmp_path, Scripted(), steer="")
    assert not (tmp_path / "manifest.json").exists()
    assert len(lines(tmp_path / RESPONSES)) == 1 + 9


def test_an_unknown_filter_is_said_before_anything() -> None:
    with pytest.raises(RPSAError, match=r"safety.filter: judge 'lama' is unknown: choose from refusal"):
        check_filter("lama", {})
    with pytest.raises(RPSAError, match=r"safety.filter: judge refusal: .*it takes no settings"):
        check_filter("refusal", {"model": "x"})


# What is trained on


def some(harmful: int, benign: int) -> list[SelfExample]:
    kinds = ["harmful"] * harmful + ["benign"] * benign
    return [SelfExample(f"p{i}", "r", kind, [1, i], [7, 8, 9]) for i, kind in enumerate(kinds)]


def test_rows_are_the_stored_tokens() -> None:
    examples = [*some(2, 0), SelfExample("long", "r", "benign", [1, 2, 3, 4], [5])]
    dataset, counts = tokenized(examples, 4)
    assert dataset["input_ids"][:] == [[1, 0, 7, 8], [1, 1, 7, 8]]
    assert dataset["labels"][:] == [[-100, -100, 7, 8]] * 2
    assert (counts.examples, counts.truncated, counts.dropped) == (2, 2, 1)
    assert (counts.tokens, counts.response_tokens) == (8, 4)
    assert tokenized(examples, None)[1].truncated == 0
    with pytest.raises(RPSAError, match="max_length 1 leaves nothing of 3 examples"):
        tokenized(examples, 1)


def test_the_draw(caplog: pytest.LogCaptureFixture) -> None:
    examples = some(12, 8)

    def benign(chosen: list[SelfExample]) -> tuple[int, int]:
        return len(chosen), sum(one.kind == "benign" for one in chosen)

    assert benign(drawn(examples, None, 0.0, 0)) == (20, 8)
    assert drawn(examples, None, 0.0, 0) == drawn(examples, None, 0.0, 0) != drawn(examples, None, 0.0, 1)
    assert benign(drawn(examples, 5, 0.0, 0))[0] == 5
    assert benign(drawn(examples, 10, 0.5, 0)) == (10, 5)
    assert benign(drawn(examples, None, 0.5, 0)) == (16, 8)  # as many as there are benign ones for
    assert benign(drawn(examples, None, 0.25, 0)) == (16, 4)  # as many as there are harmful ones for
    assert not caplog.text
    assert len(drawn(examples, 30, 0.0, 0)) == 20
    assert "are 20 examples, and not the 30 asked for" in caplog.text
    with pytest.raises(RPSAError, match="hold no benign example"):
        drawn(some(3, 0), None, 0.5, 0)


def test_damaged_examples_are_said(tmp_path: Path) -> None:
    (tmp_path / EXAMPLES).write_text('{"prompt": "p"}\n')
    with pytest.raises(RPSAError, match=r"examples\.jsonl is damaged or of another version"):
        load_self_data(tmp_path)
