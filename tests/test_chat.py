"""Rendering: one BOS, one open thought, and a thought that survives in the labels, whatever the template."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from helpers.real_format import QWEN3_STYLE_TEMPLATE, R1_STYLE_TEMPLATE, byte_level_tokenizer
from rpsa.chat import read_thought, render_example, render_prompt, split_response, thought_format
from rpsa.errors import RPSAError
from rpsa.thought import THINK

TEXTS = ["Is 7 a prime number? Okay, so 7 has no divisors. The answer is yes.", "I cannot help with that."]
PROMPT = "Is 7 prime?"
THOUGHT = "Okay, so 7 has no divisors.\nIt is  prime — naïvely, ½·14."
ANSWER = "\n\nThe answer is yes."
RESPONSE = f"<think>\n{THOUGHT}\n</think>{ANSWER}"

OPENS_NOTHING = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"


def r1_tokenizer(template: str = R1_STYLE_TEMPLATE) -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(iter(TEXTS), 400, template)


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(iter(TEXTS), 400, QWEN3_STYLE_TEMPLATE, bos=False)


def word_tokenizer(opens: bool = True) -> PreTrainedTokenizerFast:
    sentence = "<pad> <bos> <eos> <unk> <user> <asst> <think> </think> is 7 odd yes no plan refuse"
    words = sentence.split(" ")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.chat_template = "<bos> <user> {{ messages[0].content }} <asst>" + (" <think>" if opens else "")
    return tokenizer


def text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode([i for i in ids if i != -100], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("tokenizer", "ending"),
    [
        (r1_tokenizer(), "<|assistant|><think>\n"),
        (qwen3_tokenizer(), "<|assistant|>\n<think>\n"),
    ],
    ids=["r1", "qwen3"],
)
def test_byte_level_prompt_ends_with_one_open_thought(tokenizer, ending):
    ids = render_prompt(tokenizer, PROMPT)
    assert text(tokenizer, ids).endswith(ending)
    assert PROMPT in text(tokenizer, ids)
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    if tokenizer.bos_token_id is not None:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("opens", [True, False])
def test_word_level_prompt_and_example(opens):
    tokenizer = word_tokenizer(opens)
    thought = thought_format(tokenizer, THINK)  # said: the second template does not show it
    assert (
        text(tokenizer, render_prompt(tokenizer, "is 7 odd", thought))
        == "<bos> <user> is 7 odd <asst> <think>"
    )
    for response in ("<think> plan </think> yes", "plan</think>yes", "<think>plan</think> yes"):
        example = render_example(tokenizer, "is 7 odd", response, None, thought)
        assert text(tokenizer, example.labels) == "plan </think> yes <eos>"
        assert (
            text(tokenizer, example.input_ids)
            == "<bos> <user> is 7 odd <asst> <think> plan </think> yes <eos>"
        )


@pytest.mark.parametrize("tokenizer", [r1_tokenizer(), qwen3_tokenizer()], ids=["r1", "qwen3"])
@pytest.mark.parametrize(
    "response", [RESPONSE, RESPONSE.removeprefix("<think>"), f"{THOUGHT}\n</think>{ANSWER}"]
)
def test_labels_hold_the_thought_and_the_sequence_is_the_plain_text(tokenizer, response):
    example = render_example(tokenizer, PROMPT, response, None)
    prompt_ids = render_prompt(tokenizer, PROMPT)
    assert example.labels[: len(prompt_ids)] == [-100] * len(prompt_ids)
    assert example.input_ids[: len(prompt_ids)] == prompt_ids
    assert example.labels[len(prompt_ids) :] == example.input_ids[len(prompt_ids) :]
    assert text(tokenizer, example.labels) == f"{THOUGHT}\n</think>{ANSWER}{tokenizer.eos_token}"
    assert not example.truncated
    # what the model will see when it generates: the same ids as the whole text tokenised at once
    whole = tokenizer(text(tokenizer, example.input_ids), add_special_tokens=False)["input_ids"]
    assert example.input_ids == whole


def test_the_template_alone_would_delete_the_thought():
    tokenizer = r1_tokenizer()
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
    assert "divisors" not in tokenizer.apply_chat_template(messages, tokenize=False)
    assert "divisors" in text(tokenizer, render_example(tokenizer, PROMPT, RESPONSE, None).labels)


def test_truncation_keeps_the_beginning():
    tokenizer = r1_tokenizer()
    whole = render_example(tokenizer, PROMPT, RESPONSE, None)
    size = len(whole.input_ids)
    assert render_example(tokenizer, PROMPT, RESPONSE, size) == whole
    cut = render_example(tokenizer, PROMPT, RESPONSE, size - 1)
    assert cut.truncated
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-1], whole.labels[:-1])


def test_bos_comes_from_the_template_or_the_tokenizer_but_once():
    without = r1_tokenizer(R1_STYLE_TEMPLATE.replace("{{ bos_token }}", ""))
    assert render_prompt(without, PROMPT) == render_prompt(r1_tokenizer(), PROMPT)
    doubled = r1_tokenizer("{{ bos_token }}" + R1_STYLE_TEMPLATE)
    with pytest.raises(RPSAError, match=r"2 '<.begin.>'"):
        render_prompt(doubled, PROMPT)
    with pytest.raises(RPSAError, match="take it out"):
        render_example(r1_tokenizer(), PROMPT, "a<|begin|>b</think>c", None)


def test_prompts_that_hold_thought_words_are_refused():
    for prompt in ("say <think>", "say </think>"):
        with pytest.raises(RPSAError, match="take these words out"):
            render_prompt(r1_tokenizer(), prompt)
    # a model without thoughts knows nothing of these words
    assert text(r1_tokenizer(OPENS_NOTHING), render_prompt(r1_tokenizer(OPENS_NOTHING), "say <think>"))


def test_tokenizers_that_cannot_do_it_are_refused():
    tokenizer = r1_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(RPSAError, match="no chat template"):
        render_prompt(tokenizer, PROMPT)
    with pytest.raises(RPSAError, match="failed: no system"):
        render_prompt(r1_tokenizer("{{ raise_exception('no system') }}"), PROMPT)
    tokenizer = r1_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RPSAError, match="no EOS"):
        render_example(tokenizer, PROMPT, RESPONSE, None)
    with pytest.raises(RPSAError, match="does not survive"):
        render_example(word_tokenizer(), "is 7 odd", "never heard</think>no", None)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("No.", "has no </think>"),
        ("<think>so", "has no </think>"),
        ("<think>a</think>b</think>c", "more than one"),
        ("<think>a<think>b</think>c", "more than one"),
    ],
)
def test_responses_without_exactly_one_thought_are_refused(response, message):
    with pytest.raises(RPSAError, match=message) as error:
        render_example(r1_tokenizer(), PROMPT, response, None)
    assert "\n" not in str(error.value)


def test_split_response():
    assert split_response(" <think>a</think>b") == ("a", "b")
    assert split_response("\na</think>") == ("\na", "")


IN_THE_WILD = {
    "<think>": [
        "deepseek_r1_distill",
        "qwen3",
        "qwen3_5_think",
        "qwen3_5_nothink",
        "glm4moe",
        "nemotron_3_nano",
    ],
    "<|channel|>analysis<|message|>": ["gptoss"],
    "<|channel>thought": ["gemma4"],
    "": ["qwen3_instruct_2507", "qwen2_5", "llama3", "llama3_1", "llama3_2", "phi3", "gemma", "lfm2"],
}


@pytest.mark.parametrize(
    ("opening", "name"), [(opening, name) for opening, names in IN_THE_WILD.items() for name in names]
)
def test_templates_in_the_wild(opening, name):
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this TRL ships no {name}.jinja")
    tokenizer = r1_tokenizer(path.read_text(encoding="utf-8"))
    thought = read_thought(tokenizer)
    assert thought.open.strip() == opening
    ids = render_prompt(tokenizer, PROMPT)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert text(tokenizer, ids).endswith(thought.open)
    labels = text(tokenizer, render_example(tokenizer, PROMPT, RESPONSE, None).labels)
    assert (THOUGHT in labels) == bool(opening)
    assert thought.answer_of(labels.removesuffix(tokenizer.eos_token)) == ANSWER.strip()
