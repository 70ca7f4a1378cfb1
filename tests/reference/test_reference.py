"""D_ref: read, sampled, interrupted, resumed, batched."""

import gzip
import json
import logging
import re
from dataclasses import replace

import pytest
import torch

from helpers.real_format import AIME24, MATH500, byte_level_tokenizer, missing_real_data, small_qwen2
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.generation import Completion, Sampling
from rpsa.generation.transformers import TransformersGenerator
from rpsa.prompts import math_prompt
from rpsa.reference import (
    Problem,
    ReferenceConfig,
    ReferenceDataset,
    Trace,
    build_reference,
    load_problems,
)
from rpsa.rows import read_rows

torch.set_num_threads(1)

TOKENIZER = byte_level_tokenizer(iter(["What is one and one? Two."]), 280)
MODEL = small_qwen2(len(TOKENIZER))
PROBLEMS = [Problem(f"p{i}", "What is one and " + "one " * i, str(i)) for i in range(7)]
CONFIG = ReferenceConfig(problems=7, max_new_tokens=6, temperature=1.0)


def generator(batch_size=2):
    return TransformersGenerator(MODEL, TOKENIZER, batch_size)


def grade(text, gold):
    return len(text) % 2 == int(gold) % 2


def build(folder, source=None, problems=PROBLEMS, config=CONFIG, **options):
    return build_reference(source or generator(), TOKENIZER, problems, config, folder, grade, **options)


class Interrupted:
    """A generator that stops after `count` responses, as Ctrl-C does."""

    def __init__(self, count):
        self.count = count
        self.asked = []

    def generate(self, prompts, sampling, sample_ids):
        self.asked = list(sample_ids)
        for n, item in enumerate(generator(1).generate(prompts, sampling, sample_ids)):
            if n == self.count:
                raise KeyboardInterrupt
            yield item


class Scripted:
    """A generator of given responses."""

    def __init__(self, rows):
        self.rows = rows

    def generate(self, prompts, sampling, sample_ids):
        for i, (ids, text) in enumerate(self.rows):
            yield i, Completion(ids, text, "stop")


def test_problems_without_an_answer_are_neither_right_nor_wrong(tmp_path):
    problems = [*PROBLEMS[:2], *(replace(problem, answer="") for problem in PROBLEMS[2:])]
    assert build(tmp_path, problems=problems).manifest["graded"] == 2


def test_build_stores_what_was_sampled_and_load_gives_it_back(tmp_path):
    built = build(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"traces.jsonl", "manifest.json"}
    prompts = [render_prompt(TOKENIZER, p.prompt) for p in PROBLEMS]
    direct = dict(generator().generate(prompts, Sampling(1.0, 0.95, 6, 42), [p.id for p in PROBLEMS]))
    for i, trace in enumerate(built.traces):
        assert trace == Trace(
            PROBLEMS[i].id, prompts[i], direct[i].token_ids, direct[i].text, direct[i].finish_reason,
            grade(direct[i].text, PROBLEMS[i].answer),
        )  # fmt: skip
    loaded = ReferenceDataset.load(tmp_path)
    assert (loaded.traces, loaded.manifest) == (built.traces, built.manifest)
    assert loaded.manifest["traces"] == loaded.manifest["graded"] == 7
    assert loaded.manifest["correct"] == sum(t.correct for t in built.traces)
    assert loaded.manifest["truncated"] == sum(t.finish_reason == "length" for t in built.traces) > 0
    assert loaded.manifest["config"]["temperature"] == 1.0


def test_an_interrupted_build_goes_on_and_gives_the_same(tmp_path):
    whole = build(tmp_path / "whole")
    folder = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        build(folder, Interrupted(3))
    with pytest.raises(RPSAError, match="no finished D_ref"):
        ReferenceDataset.load(folder)
    (partial,) = folder.iterdir()
    assert len(partial.read_text().splitlines()) == 3
    content = partial.read_bytes()
    partial.write_bytes(content[:-20])  # the last line is torn
    rest, heard = Interrupted(99), []
    resumed = build(folder, rest, on_trace=heard.append)
    assert len(rest.asked) == 5
    assert len(heard) == 7
    assert resumed.traces == whole.traces
    assert (folder / "traces.jsonl").read_bytes() == (tmp_path / "whole" / "traces.jsonl").read_bytes()
    assert not partial.exists()


def test_a_finished_build_is_loaded_and_another_request_replaces_it(tmp_path):
    built = build(tmp_path)
    source = Interrupted(99)
    assert build(tmp_path, source).traces == built.traces
    assert not source.asked
    other = build(tmp_path, source, config=ReferenceConfig(seed=1, max_new_tokens=6))
    assert len(source.asked) == 7
    assert ReferenceDataset.load(tmp_path).traces == other.traces != built.traces


def test_an_old_manifest_never_stands_beside_new_traces(tmp_path, monkeypatch):
    build(tmp_path)

    def power_cut(manifest):
        raise KeyboardInterrupt

    monkeypatch.setattr("rpsa.reference.stable_json", power_cut)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, config=ReferenceConfig(seed=1, max_new_tokens=6))
    with pytest.raises(RPSAError, match="no finished D_ref"):
        ReferenceDataset.load(tmp_path)


def test_a_partial_file_of_another_model_or_sampling_is_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Interrupted(3), identity="base 0")
    for options in (
        {"identity": "base 1"},
        {"config": ReferenceConfig(seed=1, max_new_tokens=6), "identity": "base 0"},
    ):
        source = Interrupted(0)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, source, **options)
        assert len(source.asked) == 7
    source = Interrupted(0)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source, identity="base 0")
    assert len(source.asked) == 4


def test_a_damaged_partial_file_is_named(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Interrupted(3))
    (partial,) = tmp_path.iterdir()
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text(lines[0] + "{broken\n" + lines[2])
    with pytest.raises(RPSAError, match=r"line 2 is damaged"):
        build(tmp_path)
    partial.write_text(lines[0] + '{"other": 1}\n')
    with pytest.raises(RPSAError, match=r"line 2 is not a trace"):
        build(tmp_path)


def test_wrong_traces_stay_empty_ones_go(tmp_path, caplog):
    rows = [([7, 1], "ab"), ([1], ""), ([8, 1], "a")]
    problems = [Problem("even", "a", "0"), Problem("empty", "b", "0"), Problem("odd", "c", "0")]
    kept = build(tmp_path / "all", Scripted(rows), problems)
    assert [(t.problem_id, t.correct) for t in kept.traces] == [("even", True), ("odd", False)]
    assert "the response to empty is empty" in caplog.text
    right = build(tmp_path / "right", Scripted(rows), problems, ReferenceConfig(only_correct=True))
    assert [t.problem_id for t in right.traces] == ["even"]
    assert (right.manifest["dropped_empty"], right.manifest["dropped_wrong"]) == (1, 1)
    with pytest.raises(RPSAError, match="no traces"):
        build(tmp_path / "none", Scripted(rows[1:2]), problems[1:2])
    unknown = build(tmp_path / "unknown", Scripted(rows[:1]), [Problem("even", "a", "")])
    assert unknown.traces[0].correct is None
    with pytest.raises(RPSAError, match="two problems have the id 'even'"):
        build(tmp_path / "twice", Scripted(rows), [problems[0], problems[0]])


def dataset(*lengths):
    """Traces with prompts 1, 2, ... tokens long and distinct ids; `lengths` are those of the responses."""
    traces = [
        Trace(f"t{i}", [10 + i] * (i + 1), [50 + i] * n, "x", "stop", True) for i, n in enumerate(lengths)
    ]
    return ReferenceDataset(traces, {"pad_token_id": 9})


def test_batches_are_sorted_padded_and_labelled():
    batches = list(dataset(4, 1, 2).batches(2, None))
    assert [b["sample_ids"] for b in batches] == [["t1", "t0"], ["t2"]]
    first = batches[0]
    assert first["input_ids"].tolist() == [[11, 11, 51, 9, 9], [10, 50, 50, 50, 50]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert first["labels"].tolist() == [[-100, -100, 51, -100, -100], [-100, 50, 50, 50, 50]]
    assert all(first[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "labels"))


def test_max_length_cuts_the_end_and_says_so_once(caplog):
    caplog.set_level(logging.WARNING)
    data = dataset(4, 1, 2)  # 5, 3 and 5 tokens, prompts 1, 2 and 3
    batches = list(data.batches(8, 3))
    list(data.batches(8, 3))
    assert batches[0]["sample_ids"] == ["t0", "t1"]  # t2's prompt fills the length
    assert batches[0]["labels"].tolist() == [[-100, 50, 50], [-100, -100, 51]]
    assert [r.getMessage() for r in caplog.records] == [
        "reference max_length 3 cuts 2 of 3 traces (4 of 13 tokens); 1 traces left out"
    ]
    with pytest.raises(RPSAError, match="leaves no response token"):
        next(data.batches(8, 1))


def test_rotating_batch_is_a_window_that_wraps():
    data = dataset(1, 1, 1, 1, 1)
    windows = [data.rotating_batch(step, 2, None)["sample_ids"] for step in range(4)]
    assert windows == [["t0", "t1"], ["t2", "t3"], ["t4", "t0"], ["t1", "t2"]]
    assert data.rotating_batch(2, 2, None)["input_ids"].tolist() == [
        [14, 14, 14, 14, 14, 54],
        [10, 50, 9, 9, 9, 9],
    ]
    assert len(data.rotating_batch(3, 7, None)["sample_ids"]) == 7
    # what max_length leaves out does not shrink the batch
    assert data.rotating_batch(1, 3, 4)["sample_ids"] == ["t0", "t1", "t2"]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_load_problems(tmp_path):
    source = write(
        tmp_path / "p.jsonl", *({"problem": f"{i}+1?", "answer": i + 1, "id": i} for i in range(50))
    )
    problems = load_problems(str(source), 5, 42)
    assert problems == load_problems(source, 5, 42) != load_problems(source, 5, 43)
    first = problems[0]
    assert first.prompt == math_prompt(f"{first.id}+1?")
    assert first.answer == str(int(first.id) + 1)
    assert first.prompt.endswith(
        "Final Answer: \\boxed{your_answer}.\n\nProblem: " + f"{first.id}+1?\n\nAnswer:"
    )
    assert load_problems(source, 1, 0, "section_4")[0].prompt.endswith(
        "Answer:\n\nPlease think step by step."
    )
    raw = write(tmp_path / "raw.jsonl", {"prompt": "as {it} is", "answer": "x"})
    assert load_problems(raw, 1, 0) == [Problem("0", "as {it} is", "x")]
    with pytest.raises(RPSAError, match="ask for 1 to 50, not 51"):
        load_problems(source, 51, 0)


def test_problems_of_the_real_files():
    if reason := missing_real_data():
        pytest.skip(reason)
    problems = load_problems(MATH500, 100, 42)
    assert len({p.id for p in problems}) == 100
    assert all(re.fullmatch(r"test/\w+/\d+\.json", p.id) and p.family for p in problems)
    assert {p.answer for p in load_problems(AIME24, 30, 0)} >= {"204", "25"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "x.jsonl is empty"),
        ("x.json", "[]", "x.json is empty"),
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl line 2 is not valid JSON"),
        ("x.json", '[{"a": 1},', "x.json is not valid JSON"),
        ("x.jsonl", '{"a": 1}\n\n[1]\n', "line 3 is list"),
        ("x.json", "[1]", "row 1 is int"),
        ("x.jsonl", '{"problem": "p", "b": 1}\n', "line 1 has no text field 'answer' .fields: b, problem."),
        ("x.jsonl", '{"answer": "p"}\n', "line 1 has no text field 'problem' .fields: answer."),
        ("x.jsonl.gz", "not gzipped", "cannot be read"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RPSAError, match=message) as error:
        load_problems(tmp_path / name, 1, 0)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    for source in (tmp_path / "no", str(tmp_path / "no.jsonl"), "no.csv"):
        with pytest.raises(RPSAError, match="no such file"):
            read_rows(source)


def test_read_rows_of_each_kind(tmp_path):
    rows = [{"a": "x\u2028y", "b": "1"}, {"a": "z", "b": "2"}]
    write(tmp_path / "r.jsonl", *rows)
    (tmp_path / "r.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "r.csv").write_text('a,b\nx\u2028y,1\n"z",2\n', encoding="utf-8")
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress((tmp_path / "r.jsonl").read_bytes()))
    (tmp_path / "raw.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows), "utf-8"
    )
    for name in ("r.jsonl", "r.json", "r.csv", "r.jsonl.gz", "raw.jsonl"):
        assert [row.fields for row in read_rows(tmp_path / name)] == rows, name


def test_read_rows_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "train.jsonl", {"a": "x"})
    assert [row.fields for row in read_rows(str(tmp_path / "one"))] == [{"a": "x"}]
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "train.jsonl", {"a": "x"})
    write(tmp_path / "two" / "test.jsonl", {"a": "y"})
    both = str(tmp_path / "two")
    assert read_rows(both)[0].fields == {"a": "x"}
    assert read_rows(both, "test")[0].fields == {"a": "y"}
    assert read_rows(f"{both}:test")[0].where.endswith("two:test row 1")
    with pytest.raises(RPSAError, match="has the splits"):
        read_rows(both, "validation")
    with pytest.raises(RPSAError, match="neither a file nor a dataset"):
        read_rows(f"{both}:none")
