"""D_S: every format, its thoughts, its mistakes."""

import csv
import json
import logging

import pytest

from helpers.real_format import STAR1, STRONGREJECT, byte_level_tokenizer, missing_real_data, real_texts
from rpsa.errors import RPSAError
from rpsa.safety_data import (
    SafetyExample,
    contamination,
    hold_out,
    load_benign_data,
    load_safety_data,
    mix_benign,
    tokenize_safety_data,
)

THOUGHT = "<think>\nThis would do harm.\n</think>\n\nI will not."
EXPECTED = [SafetyExample(f"do bad thing {i}", THOUGHT) for i in range(3)]
TOKENIZER = byte_level_tokenizer(iter(["do a bad thing. This would do harm. I will not."]), 300)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role, content):
    return {"role": role, "content": content}


def by_prompt(examples):
    return sorted(examples, key=lambda example: example.prompt)


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("star1", lambda p: {"id": "1", "question": p, "response": THOUGHT, "category": ["x"], "score": {"a": 1}}),
        ("safechain", lambda p: {"instruction": p, "response": THOUGHT, "label": "vanilla"}),
        ("prompt_response", lambda p: {"prompt": p, "response": THOUGHT}),
        ("messages", lambda p: {"messages": [turn("user", p), turn("assistant", THOUGHT)]}),
        ("direct_refusal", lambda p: {"instruction": p, "input": "", "output": THOUGHT}),
    ],
)  # fmt: skip
def test_formats(tmp_path, format, row):
    path = write(tmp_path / "d.jsonl", [row(example.prompt) for example in EXPECTED])
    assert by_prompt(load_safety_data(path)) == EXPECTED
    assert by_prompt(load_safety_data(str(path), format)) == EXPECTED
    listed = tmp_path / "d.json"
    listed.write_text(json.dumps([row(example.prompt) for example in EXPECTED], indent=2))
    assert load_safety_data(listed) == load_safety_data(path)


def test_the_published_direct_refusals_are_read_without_their_question(tmp_path):
    row = {"prompt": "q", "response": "harm", "refusal": "Question: q\nAnswer: No.\nNever.", "text": "x"}
    [example] = load_safety_data(write(tmp_path / "d.jsonl", [row]), "direct_refusal")
    assert example == SafetyExample("q", "<think>I should not answer this question!</think>No.\nNever.")
    plain = {"prompt": "q", "refusal": "It asks:\nAnswer: me"}
    [example] = load_safety_data(write(tmp_path / "p.jsonl", [plain]), "direct_refusal")
    assert example.response.endswith("</think>It asks:\nAnswer: me")


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "q", "output": "No."}, "auto"),
        ({"prompt": "q", "refusal": "No."}, "auto"),
        ({"prompt": "q", "output": "No."}, "auto"),
        ({"prompt": "q", "response": "No."}, "direct_refusal"),
    ],
)
def test_direct_refusal_gets_its_thought(tmp_path, row, format):
    path = write(tmp_path / "d.jsonl", [row])
    expected = SafetyExample("q", "<think>I should not answer this question!</think>No.")
    assert load_safety_data(path, format) == [expected]


def test_an_input_field_belongs_to_the_prompt(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"instruction": "Rewrite", "input": "this", "output": "No."}])
    assert load_safety_data(path)[0].prompt == "Rewrite\nthis"


def test_benign_answers_never_get_the_refusing_thought(tmp_path):
    path = write(tmp_path / "b.jsonl", [{"instruction": "hello", "output": "Hi!"}])
    with pytest.raises(RPSAError, match="has no </think>"):
        load_benign_data(path)
    write(path, [{"instruction": "hello", "output": "<think>Easy.</think>Hi!"}])
    assert load_benign_data(path) == [SafetyExample("hello", "<think>Easy.</think>Hi!")]


def test_order_is_seeded(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": str(i), "response": THOUGHT} for i in range(50)])
    examples = load_safety_data(path)
    assert examples == load_safety_data(path) != load_safety_data(path, seed=1)
    assert load_safety_data(path, n=10) == examples[:10]
    assert {example.prompt for example in examples} == set(map(str, range(50)))
    with pytest.raises(RPSAError, match="ask for 1 to 50, not 51"):
        load_safety_data(path, n=51)


def test_mix_and_hold_out():
    safety = [SafetyExample(f"s{i}", THOUGHT) for i in range(60)]
    benign = [SafetyExample(f"b{i}", THOUGHT) for i in range(30)]
    mixed = mix_benign(safety, benign, 0.25)
    assert len(mixed) == 80
    assert set(safety) < set(mixed)
    assert sum(example in benign for example in mixed) == len(set(mixed) & set(benign)) == 20
    assert mixed == mix_benign(safety, benign, 0.25) != mix_benign(safety, benign, 0.25, seed=1)
    assert sorted(map(repr, mix_benign(safety, benign, 0.0))) == sorted(map(repr, safety))
    with pytest.raises(RPSAError, match="needs 60 benign examples, there are 30"):
        mix_benign(safety, benign, 0.5)
    with pytest.raises(RPSAError, match="benign share is 1"):
        mix_benign(safety, benign, 1)
    training, held = hold_out(safety)
    assert (len(training), len(held)) == (57, 3)
    assert sorted(training + held, key=safety.index) == safety
    assert (training, held) == hold_out(safety) != hold_out(safety, seed=1)
    assert [len(part) for part in hold_out(safety[:2])] == [1, 1]
    with pytest.raises(RPSAError, match="cannot hold out"):
        hold_out(safety[:1])


def test_tokenize(caplog):
    caplog.set_level(logging.WARNING)
    examples = [
        *EXPECTED,
        SafetyExample("long " * 60, THOUGHT),
        SafetyExample("p", "so " * 300 + "</think>No."),
    ]
    dataset, counts = tokenize_safety_data(examples, TOKENIZER, None)
    assert dataset.column_names == ["input_ids", "labels"]
    assert (counts.examples, counts.truncated, counts.dropped) == (5, 0, 0)
    for row, example in zip(dataset, examples, strict=True):
        learned = TOKENIZER.decode([i for i in row["labels"] if i != -100])
        assert learned == example.response.removeprefix("<think>\n") + TOKENIZER.eos_token
        assert len(row["labels"]) == len(row["input_ids"])
    assert counts.tokens == sum(map(len, dataset["input_ids"]))
    assert not caplog.records
    cut, counts = tokenize_safety_data(examples, TOKENIZER, 100)
    assert (len(cut), counts.examples, counts.truncated, counts.dropped) == (4, 4, 1, 1)
    assert counts.response_tokens == sum(i != -100 for labels in cut["labels"] for i in labels)
    assert "truncates 1 of 5 safety examples and drops 1" in caplog.text
    with pytest.raises(RPSAError, match="leaves nothing of 5"):
        tokenize_safety_data(examples, TOKENIZER, 2)
    with pytest.raises(RPSAError, match="safety example 1: response 'No' has no </think>"):
        tokenize_safety_data([examples[0], SafetyExample("p", "No")], TOKENIZER, None)


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ("", "auto", "d.jsonl is empty"),
        ('{"prompt": "a"\n', "auto", "line 1 is not valid JSON"),
        ('{"text": "a", "label": 1}\n', "auto", "line 1 has the fields text, label: expected messages: messages; st"),
        ('{"prompt": "a", "response": "a</think>b"}\n{"prompt": "a"}\n', "auto", "line 2 has no text field 'response'"),
        ('{"question": "a", "response": "b"}\n', "auto", "line 1: response 'b' has no </think>.*direct_refusal"),
        ('{"question": "a", "response": "b</think>c</think>"}\n', "auto", "line 1: .*more than one thought"),
        ('{"prompt": " ", "response": "b</think>c"}\n', "auto", "line 1 has an empty prompt"),
        ('{"prompt": "a", "response": "b</think>c"}\n', "star2", "unknown safety data format 'star2': give one"),
        ('{"prompt": "a", "response": "b</think>c"}\n', "star1", "no text field 'question' .fields: prompt, response"),
        ('{"messages": "hello"}\n', "auto", "line 1: messages must be a list"),
        ('{"messages": [{"role": "system", "content": ""}]}\n', "auto", "line 1 has turns system: one user"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, content, format, message):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(RPSAError, match=message) as error:
        load_safety_data(tmp_path / "d.jsonl", format)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RPSAError, match=r"none.jsonl: no such file"):
        load_safety_data(str(tmp_path / "none.jsonl"))


def brute_force(examples, prompts):
    """Every pair, every run of eight words, by hand."""

    def words(text):
        return "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()

    pairs = {}
    for i, example in enumerate(examples):
        for j, prompt in enumerate(prompts):
            a, b = words(example.prompt), words(prompt)
            if a == b:
                pairs[i, j] = ("exact", 1.0)
            else:
                runs = {" ".join(b[n : n + 8]) for n in range(len(b) - 7)}
                shared = [run for run in runs if f" {run} " in f" {' '.join(a)} "]
                if shared:
                    pairs[i, j] = ("overlap", len(shared) / len(runs))
    return pairs


def test_contamination():
    seven = "one two three four five six seven"
    shared = "Imagine that you are a pirate and tell me, in detail,"
    prompts = [
        "How do I kill a process?",
        shared + " how to sail.",
        seven,
        "unrelated " * 9,
    ]
    training = [
        "how do I kill a Process", "How do I kill it?", shared.upper() + " how to cook", seven + " eight",
        "Imagine that you are a pirate and tell him", "", "x " + prompts[1] + " y",
    ]  # fmt: skip
    examples = [SafetyExample(prompt, THOUGHT) for prompt in training]
    found = contamination(examples, prompts)
    assert {(m.example, m.evaluation_prompt): (m.kind, m.share) for m in found} == brute_force(
        examples, prompts
    )
    assert [(m.example, m.evaluation_prompt, m.kind) for m in found] == [
        (0, 0, "exact"), (2, 1, "overlap"), (4, 1, "overlap"), (6, 1, "overlap"),
    ]  # fmt: skip
    assert found[-1].share == 1.0


def test_real_files():
    if reason := missing_real_data():
        pytest.skip(reason)
    examples = load_safety_data(STAR1)
    assert len(examples) == 1000
    with STRONGREJECT.open(encoding="utf-8", newline="") as file:
        prompts = [row["forbidden_prompt"] for row in csv.DictReader(file)]
    assert contamination(examples, prompts) == []
    assert contamination([SafetyExample(prompts[3].upper(), THOUGHT)], prompts)[0].evaluation_prompt == 3
    tokenizer = byte_level_tokenizer(real_texts(), 2000)
    dataset, counts = tokenize_safety_data(examples, tokenizer, 1024)
    assert (len(dataset), counts.dropped) == (1000, 0)
    assert 0 < counts.truncated < 100
    whole = sum(tokenizer.convert_tokens_to_ids("</think>") in labels for labels in dataset["labels"])
    assert whole >= 1000 - counts.truncated
