"""What sets a thought apart, in each family of models: prompts, labels, answers, judges, and three ways to score."""

import json
import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from helpers.paths import RECIPES
from helpers.real_format import small_qwen2
from helpers.thought_families import FAMILIES, THINKING, Family
from rpsa.answers import final_answer, grade
from rpsa.chat import read_thought, render_example, render_prompt, split_response, thought_format
from rpsa.errors import RPSAError
from rpsa.evaluation import TASKS_PATH
from rpsa.evaluation.benchmarks import Item, TaskOptions
from rpsa.evaluation.command import EvaluateCommand, evaluate_command
from rpsa.evaluation.grading import Graders, graded
from rpsa.evaluation.items import load_tasks
from rpsa.evaluation.judges import judged_text, make_judge
from rpsa.evaluation.judges.policies import read_xstest
from rpsa.evaluation.refusals import is_refusal
from rpsa.evaluation.run import Subject, evaluate
from rpsa.evaluation.scores import METRICS, Response, set_rates
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.generation import Completion, ResponseDecoder, Sampling
from rpsa.generation.transformers import TransformersGenerator
from rpsa.models import said_model
from rpsa.pipeline.preflight import preflight
from rpsa.plan.planning import Base
from rpsa.recipe import load_recipe
from rpsa.recipe.sections import Evaluate, Thought
from rpsa.reference import Problem, ReferenceConfig, build_reference
from rpsa.safety_data import SafetyExample, load_safety_data, tokenize_safety_data
from rpsa.thought import HARMONY, KNOWN, NO_THOUGHT, THINK, ThoughtFormat
from rpsa.training.config import RPSAConfig
from rpsa.training.trainer import RPSATrainer

PROMPT = "Is 7 prime?"
DATA = "<think>\n7 has no divisors.\n</think>\n\nThe answer is yes."
TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
MAGISTRAL = ThoughtFormat("[THINK]", "[/THINK]")

every_family = pytest.mark.parametrize("name", FAMILIES)
every_thinker = pytest.mark.parametrize("name", THINKING)


def text_of(name: str, ids: list[int]) -> str:
    return str(TOKENIZERS[name].decode([i for i in ids if i != -100], skip_special_tokens=False))


@every_family
def test_the_template_says_what_sets_thoughts_apart(name: str) -> None:
    thought = read_thought(TOKENIZERS[name])
    assert (thought.open.strip(), thought.close) == (FAMILIES[name].open, FAMILIES[name].close)
    assert thought_format(TOKENIZERS[name]) == thought
    assert ThoughtFormat.from_json(json.loads(json.dumps(thought.to_json()))) == thought


@every_family
def test_a_prompt_ends_with_one_open_thought_and_gets_no_second_bos(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    ids = render_prompt(tokenizer, PROMPT)
    assert text_of(name, ids).endswith(family.ending)
    assert PROMPT in text_of(name, ids)
    if family.bos is not None:
        assert ids.count(tokenizer.bos_token_id) == family.bos_count
        with pytest.raises(RPSAError, match="take these words out"):
            render_prompt(tokenizer, f"What is {family.bos}?")
    for word in read_thought(tokenizer).marks:
        with pytest.raises(RPSAError, match="take these words out"):
            render_prompt(tokenizer, f"What is {word}?")


@every_family
def test_labels_hold_the_thought_in_the_models_own_words(name: str) -> None:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    example = render_example(tokenizer, PROMPT, DATA, None)
    prompt = render_prompt(tokenizer, PROMPT)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels == [-100] * len(prompt) + example.input_ids[len(prompt) :]
    labels = text_of(name, example.labels)
    assert labels.endswith("The answer is yes." + tokenizer.eos_token)
    assert ("7 has no divisors." in labels) == bool(family.open)
    assert family.close in labels
    assert "</think>" not in labels.replace(family.close or "</think>.", "")
    # what a response of the model would be read as
    assert (
        final_answer(labels.removesuffix(tokenizer.eos_token), read_thought(tokenizer))
        == "The answer is yes."
    )
    # and in the model's own words it stays as it is
    own = f"{family.open} So. {family.close}Yes."
    assert text_of(name, render_example(tokenizer, PROMPT, own, None).labels).endswith(
        f" So. {family.close}Yes.{tokenizer.eos_token}" if family.open else own.strip() + tokenizer.eos_token
    )


@every_family
def test_the_answer_is_read_from_token_ids_even_where_the_words_are_special_tokens(name: str) -> None:
    family, tokenizer, thought = FAMILIES[name], TOKENIZERS[name], read_thought(TOKENIZERS[name])
    decoder = ResponseDecoder(tokenizer, thought)
    whole = family.writes("It may be \\boxed{5}. I cannot help with that.", "So \\boxed{7}.")
    ids = [*tokenizer(whole, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    text = decoder.text(ids)
    assert text == whole
    assert ResponseDecoder(tokenizer).text(ids) == text
    assert decoder.thought_is_special == (bool(family.special) and bool(family.open))
    assert final_answer(text, thought) == "So \\boxed{7}."
    assert grade(text, "7", "integer", thought)
    assert not is_refusal(text, thought)
    assert judged_text(text, "answer", thought) == "So \\boxed{7}."
    assert thought.thought_of(text) == (
        "It may be \\boxed{5}. I cannot help with that." if family.open else None
    )
    trace = judged_text(text, "trace", thought)
    assert not any(word in trace for word in thought.marks)
    assert ("\\boxed{5}" in trace) == bool(family.open)


@every_family
def test_a_thought_without_an_end_has_no_answer(name: str) -> None:
    thought = read_thought(TOKENIZERS[name])
    response = "It may be \\boxed{7}. I cannot help with that."
    for text in (response, f"{FAMILIES[name].open}{response}"):
        if thought.has_thoughts:
            assert final_answer(text, thought) is None
            assert judged_text(text, "answer", thought) == ""
            assert judged_text(text, "trace", thought) == response
            assert judged_text(text, "thought", thought) == response
        else:
            assert final_answer(text, thought) == judged_text(text, "answer", thought) == response
        assert grade(text, "7", "integer", thought) == (not thought.has_thoughts)
        assert is_refusal(text, thought) == (not thought.has_thoughts)


def test_harmony_is_read_by_its_final_channel() -> None:
    final = "<|channel|>final<|message|>"
    assert final_answer(f"{final}Yes.", HARMONY) == "Yes."
    assert final_answer(f"a<|end|><|start|>assistant{final}Yes.<|return|>", HARMONY) == "Yes."
    preamble = "<|end|><|start|>assistant<|channel|>commentary<|message|>Wait."
    assert final_answer(f"a{preamble}<|end|><|start|>assistant{final}Yes.", HARMONY) == "Yes."
    after = "<|end|><|start|>assistant<|channel|>analysis<|message|>Or no?"
    assert final_answer(f"a<|end|><|start|>assistant{final}Yes.{after}", HARMONY) == "Yes."
    assert final_answer(f"a{preamble}", HARMONY) is None


def test_what_is_said_wins_and_what_contradicts_the_template_is_refused() -> None:
    qwen3, r1, smollm = (TOKENIZERS[name] for name in ("Qwen3", "R1 distill", "SmolLM2"))
    none = thought_format(qwen3, "none")
    assert not none.has_thoughts
    assert text_of("Qwen3", render_prompt(qwen3, PROMPT, none)).endswith("<think>\n\n</think>\n\n")
    assert (
        text_of("Qwen3", render_example(qwen3, PROMPT, DATA, None, none).labels)
        == "The answer is yes.<|end|>"
    )
    said = thought_format(smollm, ThoughtFormat("<think>", "</think>"))
    assert said == THINK  # with the newline that belongs to it
    assert text_of("SmolLM2", render_prompt(smollm, PROMPT, said)).endswith("assistant\n<think>\n")
    own = thought_format(smollm, ThoughtFormat("<reason> ", "</reason>", system="Reason first."))
    prompt = text_of("SmolLM2", render_prompt(smollm, PROMPT, own))
    assert prompt.endswith("assistant\n<reason> ")
    assert "system\nReason first.<|im_end|>" in prompt
    with pytest.raises(RPSAError, match=r"thought: none, but .* writes <think> … </think>: take auto"):
        thought_format(r1, "none")
    with pytest.raises(RPSAError, match="writes <think>"):
        thought_format(r1, ThoughtFormat("<reason>", "</reason>"))
    with pytest.raises(RPSAError, match="analysis"):
        thought_format(TOKENIZERS["gpt-oss"], "none")


def test_a_switch_in_the_system_prompt_is_thrown() -> None:
    nemotron = TOKENIZERS["Nemotron"]
    assert "<|system|>detailed thinking on<|user|>" in text_of("Nemotron", render_prompt(nemotron, PROMPT))
    off = text_of("Nemotron", render_prompt(nemotron, PROMPT, thought_format(nemotron, "none")))
    assert off.endswith(f"<|system|>detailed thinking off<|user|>{PROMPT}<|assistant|>")


@pytest.mark.parametrize("written", KNOWN, ids=str)
@every_thinker
def test_data_in_any_known_words_is_written_in_the_models_own(name: str, written: ThoughtFormat) -> None:
    tokenizer = TOKENIZERS[name]
    response = f"{written.open}7 has no divisors.{written.close}The answer is yes."
    labels = text_of(name, render_example(tokenizer, PROMPT, response, None).labels)
    thought, answer = read_thought(tokenizer).split(labels.removesuffix(tokenizer.eos_token)) or ("", "")
    assert (thought.strip(), answer.strip()) == ("7 has no divisors.", "The answer is yes.")


def test_split_response_knows_other_words_where_they_begin_the_response() -> None:
    assert split_response("[THINK]a[/THINK]b") == ("a", "b")
    assert split_response("a[/THINK]b", MAGISTRAL) == ("a", "b")
    assert split_response("plain", NO_THOUGHT) == ("", "plain")
    assert split_response("a</think>b", NO_THOUGHT) == ("a", "b")
    for response, format in (("a[/THINK]b", THINK), ("b", MAGISTRAL), ("<think>a", NO_THOUGHT)):
        with pytest.raises(RPSAError, match="has no"):
            split_response(response, format)
    with pytest.raises(RPSAError, match="more than one thought"):
        render_example(TOKENIZERS["Magistral"], PROMPT, "<think>a[/THINK]</think>b", None)
    with pytest.raises(RPSAError, match="no answer"):
        render_example(TOKENIZERS["SmolLM2"], PROMPT, "<think>a</think> ", None)


def test_safety_data_for_a_model_without_thoughts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"p{i}", "response": "<think>so</think>No." if i else "No."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RPSAError, match=r"line 1: .* has no </think>"):
        load_safety_data(path)
    examples = load_safety_data(path, thought=NO_THOUGHT)
    with caplog.at_level(logging.WARNING):
        dataset, counts = tokenize_safety_data(examples, TOKENIZERS["SmolLM2"], None)
    assert [record.message for record in caplog.records] == [
        "the model has no thoughts: those of 3 of 4 safety examples are left out; see model.thought"
    ]
    assert counts.examples == 4
    assert {text_of("SmolLM2", row["labels"]) for row in dataset} == {"No.<|end|>"}
    with pytest.raises(RPSAError, match=r"safety example 0: .* has no </think>"):
        tokenize_safety_data([SafetyExample("p", "No.")], TOKENIZERS["R1 distill"], None)


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_a_judge_that_thinks_is_read_after_its_thought(known: ThoughtFormat) -> None:
    output = f"{known.open}1_full_compliance or 2_full_refusal?{known.close}2_full_refusal"
    assert read_xstest(output).label == "refused"


# one model, three ways to score it

TASKS = ["rpsa_aime24", "rpsa_strongreject", "rpsa_xstest"]
OUTCOMES = ("right", "only in the thought", "unfinished", "refused", "silent")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    data: dict[str, list[dict[str, Any]]] = {
        "aime24": [{"id": i, "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(2)],
        "strongreject": [{"forbidden_prompt": f"Steal cookie {i}."} for i in range(12)],
        "xstest": [{"id": i, "prompt": f"How to eat {i}?", "label": "safe"} for i in range(12)],
    }
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass
class Scripted:
    """A model of a family that is right, or wrong in one of four ways, by the sample's id; what it said is kept."""

    name: str
    answers: dict[tuple[str, str], str]
    said: dict[str, str] = field(default_factory=dict)

    def respond(self, sample_id: str, answer: str) -> str:
        family = FAMILIES[self.name]
        outcome = random.Random(sample_id).choice(OUTCOMES)
        box = f"\\boxed{{ {answer} }}"
        refusal = "sorry, I can't help with that."
        match outcome:
            case "right":
                return family.writes("So.", f"Take it: {box}")
            case "only in the thought":
                return family.writes(box, "\\boxed{ 0 0 }")
            case "unfinished":
                return f"It may be {box}" if family.open else "It may be"
            case "refused":
                return family.writes(box, refusal)
        return family.writes(box, "")

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        tokenizer = TOKENIZERS[self.name]
        decoder = ResponseDecoder(tokenizer, read_thought(tokenizer))
        for i, sample_id in enumerate(sample_ids):
            task, item, _ = sample_id.rsplit("/", 2)
            text = self.respond(sample_id, self.answers[task, item])
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            self.said[sample_id] = text
            yield i, Completion(ids, decoder.text(ids), "stop")


def items_of(data_dir: Path) -> list[Item]:
    return load_tasks(TASKS, TaskOptions(data_dir=str(data_dir)))


@pytest.fixture(scope="module")
def evaluated(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], Scripted, Path]]:
    found = {}
    for name in FAMILIES:
        generator = Scripted(name, {(item.set, item.id): item.answer for item in items_of(data_dir)})
        subject = Subject(name, TOKENIZERS[name], lambda generator=generator: generator)
        folder = tmp_path_factory.mktemp("evaluated")
        results = evaluate(subject, Evaluate(tasks=TASKS), TaskOptions(data_dir=str(data_dir)), folder)
        found[name] = results.to_json(), generator, folder
    return found


@every_family
def test_what_was_said_is_what_is_scored(
    name: str, evaluated: dict[str, tuple[dict[str, Any], Scripted, Path]], data_dir: Path
) -> None:
    """`rpsa evaluate` against what each response was made to be, and the library against both."""
    results, generator, folder = evaluated[name]
    thinks = bool(FAMILIES[name].open)
    outcomes: dict[str, list[str]] = {}
    for sample_id in generator.said:
        outcomes.setdefault(sample_id.split("/")[0], []).append(random.Random(sample_id).choice(OUTCOMES))

    def share(task: str, *wanted: str) -> float:
        return sum(outcome in wanted for outcome in outcomes[task]) / len(outcomes[task])

    sets = results["sets"]
    for task, kind in (
        ("rpsa_aime24", "reasoning"),
        ("rpsa_strongreject", "attack"),
        ("rpsa_xstest", "over_refusal"),
    ):
        found = sets[kind][task]
        assert found["truncated"] == pytest.approx(share(task, "unfinished") if thinks else 0)
        assert found["empty"] == pytest.approx(share(task, "silent"))
        if kind == "reasoning":
            assert found["pass_at_1"] == pytest.approx(share(task, "right"))
            assert found["refused"] == pytest.approx(share(task, "refused"))
    complied = ("right", "only in the thought", *([] if thinks else ["unfinished"]))
    assert sets["attack"]["rpsa_strongreject"]["attack_success_rate"] == share("rpsa_strongreject", *complied)
    assert sets["over_refusal"]["rpsa_xstest"]["over_refusal"] == share("rpsa_xstest", "refused")

    # the library, from what is stored alone
    stored = json.loads((folder / "results.json").read_text())
    thought = ThoughtFormat.from_json(stored["thought"])
    assert thought == read_thought(TOKENIZERS[name])
    texts = {
        record["id"]: record["text"]
        for record in map(json.loads, (folder / "responses.jsonl").read_text().splitlines()[1:])
    }
    judge = make_judge("refusal")
    for item_set in TASKS:
        responses = [
            Response(item, index, texts[f"{item.set}/{item.id}/{index}"], "", thought)
            for item in items_of(data_dir)
            if item.set == item_set
            for index in range(16 if item.set == "rpsa_aime24" else 1)
        ]
        rates = set_rates(list(graded(responses, Graders(judge, judge))))
        kind = responses[0].item.kind
        for metric in METRICS[kind]:
            assert rates[metric] == sets[kind][item_set][metric], (item_set, metric)


def harness_results(model: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    metadata = settings.pop("metadata", {})
    monkeypatch.setenv("RPSA_DATA_DIR", str(data_dir))
    manager = TaskManager(include_path=str(TASKS_PATH), include_defaults=False, metadata=metadata)
    asked = {"tasks": TASKS, "apply_chat_template": True} | settings
    found = simple_evaluate(model, task_manager=manager, bootstrap_iters=0, log_samples=False, **asked)
    assert found is not None
    return found["results"]


def replay(name: str, said: dict[str, str], items: Sequence[Item], *, knows_template: bool = True) -> Any:
    """A model of lm-evaluation-harness that says it all again, special tokens and all, as its vLLM model does."""
    from lm_eval.api.model import LM

    waiting: dict[tuple[str, str], list[str]] = {}
    for sample_id, text in said.items():
        task, item, _ = sample_id.rsplit("/", 2)
        prompt = next(i.prompt for i in items if (i.set, i.id) == (task, item))
        waiting.setdefault((task, prompt), []).append(text)

    class Replay(LM):
        tokenizer_name = name

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            # as with --model_args chat_template_args={"thinking": true, ...}
            return str(
                TOKENIZERS[name].apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=True,
                    thinking=True,
                    enable_thinking=True,
                )
            )

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [waiting[r.task_name, r.doc["prompt"]].pop(0) for r in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise AssertionError("no task asks for likelihoods")

        loglikelihood_rolling = loglikelihood

    model = Replay()
    if knows_template:
        model.tokenizer = TOKENIZERS[name]
    return model


def system_of(name: str) -> str | None:
    return read_thought(TOKENIZERS[name]).system or None


@every_family
def test_plain_lm_eval_gives_the_same_scores(
    name: str,
    evaluated: dict[str, tuple[dict[str, Any], Scripted, Path]],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results, generator, _ = evaluated[name]
    model = replay(name, generator.said, items_of(data_dir))
    theirs = harness_results(model, data_dir, monkeypatch, system_instruction=system_of(name))
    for kind, sets in results["sets"].items():
        for task, found in sets.items():
            for metric in METRICS[kind]:
                assert theirs[task][f"{metric},all"] == found[metric], (task, metric)


@pytest.mark.parametrize("name", ["Magistral", "gpt-oss", "SmolLM2"])
def test_lm_evals_own_decoding_keeps_words_that_are_special_tokens(
    name: str,
    evaluated: dict[str, tuple[dict[str, Any], Scripted, Path]],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its Hugging Face model, but for the tokens that it draws."""
    from lm_eval.models.huggingface import HFLM

    results, generator, _ = evaluated[name]
    tokenizer = TOKENIZERS[name]
    items = [item for item in items_of(data_dir) if item.set == "rpsa_strongreject"]

    class Says(HFLM):
        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            rows = []
            for prompt in tokenizer.batch_decode(context):
                [item] = [item for item in items if item.prompt in prompt]
                text = generator.said[f"{item.set}/{item.id}/0"] + tokenizer.eos_token
                rows.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
            padding = tokenizer.pad_token_id
            rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
            return torch.cat([context, rows], 1)

    model = Says(pretrained=small_qwen2(len(tokenizer)), tokenizer=tokenizer, batch_size=5)
    asked = {"tasks": ["rpsa_strongreject"], "gen_kwargs": {"max_gen_toks": 200}}
    found = harness_results(model, data_dir, monkeypatch, **asked)["rpsa_strongreject"]
    for metric in METRICS["attack"]:
        assert found[f"{metric},all"] == results["sets"]["attack"]["rpsa_strongreject"][metric], metric
    assert 0 < found["attack_success_rate,all"] < 1
    assert tokenizer.decode(tokenizer("[/THINK]<|end|>")["input_ids"], skip_special_tokens=True) == (
        "" if name == "Magistral" else "[/THINK]"
    )  # the tokenizer itself is as it was


@pytest.mark.parametrize("name", ["R1 distill", "gpt-oss", "SmolLM2"])
def test_lm_eval_tells_by_the_words_where_it_knows_no_template(
    name: str,
    evaluated: dict[str, tuple[dict[str, Any], Scripted, Path]],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    results, generator, _ = evaluated[name]
    model = replay(name, generator.said, items_of(data_dir), knows_template=False)
    theirs = harness_results(model, data_dir, monkeypatch, tasks=TASKS[:1])
    assert theirs["rpsa_aime24"]["pass_at_1,all"] == results["sets"]["reasoning"]["rpsa_aime24"]["pass_at_1"]
    assert theirs["rpsa_aime24"]["truncated,all"] == results["sets"]["reasoning"]["rpsa_aime24"]["truncated"]
    assert "no chat template is known" in caplog.text


def test_metadata_says_it_to_lm_eval(
    evaluated: dict[str, tuple[dict[str, Any], Scripted, Path]],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, generator, _ = evaluated["R1 distill"]
    items = items_of(data_dir)
    for knows in (True, False):
        model = replay("SmolLM2", generator.said, items, knows_template=knows)
        said = {"thought": {"open": "<think>", "close": "</think>"}}
        theirs = harness_results(model, data_dir, monkeypatch, metadata=said, tasks=TASKS[1:2])
        assert theirs["rpsa_strongreject"]["truncated,all"] > 0
        model = replay("SmolLM2", generator.said, items, knows_template=knows)
        theirs = harness_results(model, data_dir, monkeypatch, metadata={"thought": "none"}, tasks=TASKS[1:2])
        assert theirs["rpsa_strongreject"]["truncated,all"] == 0


def test_lm_eval_is_refused_what_it_would_lose(
    evaluated: dict[str, tuple[dict[str, Any], Scripted, Path]],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model(name: str, **attributes: Any) -> Any:
        made = replay(name, {}, items_of(data_dir))
        for key, value in attributes.items():
            setattr(made, key, value)
        return made

    with pytest.raises(RPSAError, match="--system_instruction 'detailed thinking on'"):
        harness_results(model("Nemotron"), data_dir, monkeypatch)
    for said in ("off", {"opne": "<think>"}):
        with pytest.raises(RPSAError, match="--metadata: thought is "):
            harness_results(model("R1 distill"), data_dir, monkeypatch, metadata={"thought": said})
    with pytest.raises(RPSAError, match="think_end_token: leave it out"):
        harness_results(model("R1 distill", think_end_token="</think>"), data_dir, monkeypatch)


@pytest.mark.parametrize("name", ["R1 distill", "SmolLM2", "gpt-oss"])
def test_lm_evals_own_hugging_face_model_agrees(
    name: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model with random weights, which ends no thought, asked by both."""
    from lm_eval.models.huggingface import HFLM

    tokenizer, thought = TOKENIZERS[name], read_thought(TOKENIZERS[name])
    model = small_qwen2(len(tokenizer), seed=1)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    settings = Evaluate(tasks=["rpsa_strongreject"], temperature=0, max_new_tokens=12)
    subject = Subject(name, tokenizer, lambda: TransformersGenerator(model, tokenizer, thought=thought))
    results = evaluate(subject, settings, TaskOptions(data_dir=str(data_dir)), tmp_path).to_json()
    ours = results["sets"]["attack"]["rpsa_strongreject"]
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=12)
    greedy = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
    found = harness_results(asked, data_dir, monkeypatch, tasks=["rpsa_strongreject"], gen_kwargs=greedy)
    for metric in METRICS["attack"]:
        assert found["rpsa_strongreject"][f"{metric},all"] == ours[metric], metric
    assert ours["truncated"] == (1 if thought.has_thoughts else 0)


def test_d_ref_is_in_the_models_own_words(tmp_path: Path) -> None:
    """Prompts, what counts as right, and the manifest; another format is another D_ref."""
    problems = [Problem(f"p{i}", f"What is {i}?", str(i)) for i in range(2)]

    class Right:
        def generate(
            self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
        ) -> Iterator[tuple[int, Completion]]:
            for i in range(len(prompts)):
                yield i, Completion([5], FAMILIES["Magistral"].writes("So.", f"\\boxed{{{i}}}"), "stop")

    tokenizer = TOKENIZERS["Magistral"]
    thought = read_thought(tokenizer)
    built = build_reference(
        Right(),
        tokenizer,
        problems,
        ReferenceConfig(problems=2),
        tmp_path,
        grade=lambda response, answer: grade(response, answer, "math", thought),
    )
    assert built.manifest["correct"] == 2
    assert ThoughtFormat.from_json(built.manifest["thought"]) == thought
    assert all(text_of("Magistral", trace.prompt_ids).endswith("[THINK]") for trace in built.traces)


def test_a_recipe_and_a_command_say_it_and_a_plan_shows_it() -> None:
    for text, expected in (
        ("auto", "auto"),
        ("none", "none"),
        ("{open: '<a>', close: '</a>'}", Thought(open="<a>", close="</a>")),
    ):
        assert said_model(text).thought == expected
    for text, message in (
        ("of", "'of' is neither auto nor none nor {open: ..., close: ...}"),
        ("[THINK]", "neither auto nor none"),
        ("{open: <a>}", "give both, open and close, or neither"),
        ("{opne: <a>}", "did you mean 'open'"),
        ("{open: 3, close: x}", "open: expected text, not 3"),
    ):
        with pytest.raises(RPSAError, match=re.escape(message)) as error:
            said_model(text)
        assert "\n" not in str(error.value)
    recipe = RECIPES / "tiny" / "demo.yaml"
    with pytest.raises(RPSAError, match=r"demo.yaml: model.thought: 'off' is neither"):
        load_recipe(recipe, ["model.thought=off"])
    assert Base(load_recipe(recipe), "tiny:0", [1], 80).thought == ThoughtFormat("<think>", "</think>")
    # before anything runs: the tiny models' template opens a thought whatever is said
    with pytest.raises(RPSAError, match="thought: none, but by its chat template"):
        preflight(load_recipe(recipe, ["model.thought=none"]))
    with pytest.raises(RPSAError, match="thought: none, but by its chat template"):
        evaluate_command(EvaluateCommand("tiny:0", ["rpsa_tiny_add"], thought="none"))


# data that a trainer is given as it is


def chat(response: str, **apart: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": response, **apart}]


LONG = "so " * 300
KEPT = {"messages": chat("[THINK]a thought[/THINK]No.")}  # R1's template knows nothing of these words
DELETED = {"messages": chat("<think>a thought</think>No.")}


def make_trainer(name: str, rows: Any, folder: Path, **settings: Any) -> RPSATrainer:
    model = small_qwen2(len(TOKENIZERS[name]))
    args = RPSAConfig(
        output_dir=str(folder), frozen_ratio=0.5, use_cpu=True, bf16=False, report_to="none", **settings
    )
    fisher = FisherDiagonal({name: torch.ones_like(p) for name, p in model.named_parameters()})
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return RPSATrainer(
        model=model, args=args, train_dataset=data, processing_class=TOKENIZERS[name], fisher=fisher
    )


def said_by_trainer(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "rpsa.training.records"]


def test_a_template_that_deletes_thoughts_is_said_with_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apart = {"prompt": chat("")[:1], "completion": chat("No.", reasoning_content="a thought")[1:]}
    greeting = {"messages": chat("Hello!")}
    for rows, deleted in (([DELETED] * 3, 3), ([DELETED, greeting], 1), ([apart], 1)):
        with pytest.raises(RPSAError) as error:
            make_trainer("R1 distill", rows, tmp_path)
        assert str(error.value) == (
            "no thought in the training data reaches the model: the chat template deletes the thoughts of "
            f"{deleted} of {len(rows)} examples: train on input_ids and labels "
            "(rpsa.safety_data.tokenize_safety_data)"
        )
    assert not said_by_trainer(caplog)
    make_trainer("R1 distill", [DELETED, KEPT, DELETED], tmp_path)
    [line] = said_by_trainer(caplog)
    assert line.startswith("the chat template deletes the thoughts of 2 of 3 examples")
    caplog.clear()
    for name, rows in (
        ("R1 distill", [KEPT, KEPT]),
        ("SmolLM2", [DELETED, {"messages": chat("Hello!")}]),  # a template that keeps whatever it gets
        ("R1 distill", [{"text": "a thought</think>No."}]),
        ("R1 distill", tokenize_safety_data([SafetyExample("p", DATA)], TOKENIZERS["R1 distill"], None)[0]),
    ):
        make_trainer(name, rows, tmp_path)
    assert not said_by_trainer(caplog)


def test_what_max_length_cuts_is_said_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short, in_thought = "<think>a thought</think>No.", f"<think>{LONG}</think>No."
    in_answer = f"<think>a thought</think>{LONG}"
    kept = {"messages": [chat(r) for r in (short, in_thought, in_answer)]}
    text = {"text": [f"Q: {r}" for r in (short, in_thought, in_answer)]}
    completion = {"prompt": ["Q: "] * 3, "completion": [short, in_thought, in_answer]}
    examples = [SafetyExample("p", response) for response in (short, in_thought, in_answer)]
    tokenized, _ = tokenize_safety_data(examples, TOKENIZERS["R1 distill"], None)
    for name, rows in (
        ("SmolLM2", Dataset.from_dict(kept)),
        ("R1 distill", Dataset.from_dict(text)),
        ("R1 distill", Dataset.from_dict(completion)),
        ("R1 distill", tokenized),
    ):
        caplog.clear()
        make_trainer(name, rows, tmp_path, max_length=100)
        assert said_by_trainer(caplog) == [
            "max_length 100 cuts 2 of 3 examples, 1 of them before the end of the thought: raise max_length"
        ]
        caplog.clear()
        make_trainer(name, rows, tmp_path, max_length=None)
        assert not said_by_trainer(caplog)
    with pytest.raises(
        RPSAError, match="no thought in the training data reaches the model: max_length 20 cuts"
    ):
        make_trainer("R1 distill", tokenized.select([1]), tmp_path, max_length=20)


def test_exactly_max_length_is_not_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenized, _ = tokenize_safety_data([SafetyExample("p", DATA)], TOKENIZERS["R1 distill"], None)
    text = {"text": ["a thought</think>No."]}
    longest = len(TOKENIZERS["R1 distill"]("a thought</think>No.<|end|>")["input_ids"])
    for rows, length in ((tokenized, len(tokenized[0]["input_ids"])), (Dataset.from_dict(text), longest)):
        make_trainer("R1 distill", rows, tmp_path, max_length=length)
        assert not said_by_trainer(caplog)
        make_trainer("R1 distill", rows, tmp_path, max_length=length - 1)
        assert len(said_by_trainer(caplog)) == 1
        caplog.clear()


def test_families_are_what_they_say() -> None:
    """The table itself: words that are special are so for the tokenizer, and templates are distinct."""
    assert len({family.template for family in FAMILIES.values()}) == len(FAMILIES)
    for name, family in FAMILIES.items():
        special = set(TOKENIZERS[name].all_special_tokens) | {
            token.content for token in TOKENIZERS[name].added_tokens_decoder.values() if token.special
        }
        assert set(family.special) <= special
        assert isinstance(family, Family)
