"""Chat templates in the form of the families of reasoning models, written for these tests, each with a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from helpers.real_format import byte_level_tokenizer

_WORDS = ["Is 7 prime? 7 has no divisors, so the answer is yes. Sorry, I cannot help with that request."]


def _turns(user: str, assistant: str, system: str = "") -> str:
    """A loop over messages; `{}` in each form is the content."""
    system = system or user
    parts = [
        f"{{% {'if' if i == 0 else 'elif'} m.role == '{role}' %}}{form.replace('{}', '{{ m.content }}')}"
        for i, (role, form) in enumerate({"system": system, "user": user, "assistant": assistant}.items())
    ]
    return "{% for m in messages %}" + "".join(parts) + "{% endif %}{% endfor %}"


# Thoughts of earlier turns are deleted.
_FORGETS = "{% set kept = m.content.split('</think>') | last %}{{ kept | trim }}"
_CHATML = ("<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>system\n{}<|im_end|>\n")
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n"


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        template: its chat template.
        open, close: the words of its format; empty: it has no thoughts.
        ending: how a prompt ends.
        special: its words that its tokenizer counts as special, so that plain decoding leaves them out.
        bos: the BOS token, if it has one, and how often it is in a prompt.
    """

    template: str
    open: str
    close: str
    ending: str
    special: Sequence[str] = ()
    bos: str | None = "<|begin|>"
    bos_count: int = 1
    adds_bos: bool = False
    eos: str = "<|end|>"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = byte_level_tokenizer(iter(_WORDS), 300, self.template, bos=self.adds_bos)
        words = ["<|im_start|>", "<|im_end|>", *self.special, *([self.bos] if self.bos else [])]
        tokenizer.add_tokens(
            [word for word in words if word not in tokenizer.get_vocab()], special_tokens=True
        )
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.eos
        return tokenizer

    def writes(self, thought: str, answer: str) -> str:
        """A response after the prompt: what the model of such a family says."""
        return f"{thought}{self.close}{answer}" if self.close else answer


FAMILIES = {
    "R1 distill": Family(
        "{{ bos_token }}"
        + _turns("<|user|>{}", "<|assistant|>" + _FORGETS + "{{ eos_token }}", "{}")
        + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        "<think>",
        "</think>",
        "<|assistant|><think>\n",
    ),
    "R1 distill, before it opened the thought": Family(
        _turns("<|user|>{}", "<|assistant|>" + _FORGETS + "{{ eos_token }}", "{}")
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<think>",
        "</think>",
        "<|assistant|><think>\n",
        adds_bos=True,
    ),
    "QwQ": Family(
        _turns(_CHATML[0], "<|im_start|>assistant\n" + _FORGETS + "<|im_end|>\n", _CHATML[1])
        + _ASK
        + "<think>\n{% endif %}",
        "<think>",
        "</think>",
        "assistant\n<think>\n",
        bos=None,
        bos_count=0,
    ),
    "Qwen3": Family(
        _turns(_CHATML[0], "<|im_start|>assistant\n" + _FORGETS + "<|im_end|>\n", _CHATML[1])
        + _ASK
        + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<think>",
        "</think>",
        "assistant\n<think>\n",
        bos=None,
        bos_count=0,
    ),
    "Magistral": Family(
        "{{ bos_token }}{% if messages[0].role != 'system' %}[SYSTEM_PROMPT]Think first, in the form "
        "[THINK]your thoughts[/THINK]your answer.[/SYSTEM_PROMPT]{% endif %}"
        + _turns("[INST]{}[/INST]", "{}{{ eos_token }}", "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]"),
        "[THINK]",
        "[/THINK]",
        "[/INST][THINK]",
        special=("[THINK]", "[/THINK]", "[INST]", "[/INST]"),
    ),
    "gpt-oss": Family(
        "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}.<|end|>"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|start|>assistant<|channel|>analysis<|message|>",
        special=("<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
        bos="<|startoftext|>",
        bos_count=0,
        eos="<|return|>",
    ),
    "EXAONE Deep": Family(
        _turns(
            "[|user|]{}\n",
            "[|assistant|]{{ (m.content.split('</thought>') | last) | trim }}[|endofturn|]\n",
            "[|system|]{}\n",
        )
        + "{% if add_generation_prompt %}[|assistant|]<thought>\n{% endif %}",
        "<thought>",
        "</thought>",
        "[|assistant|]<thought>\n",
        bos="[BOS]",
        bos_count=0,
    ),
    "Seed-OSS": Family(
        "{% for m in messages %}{{ bos_token + m.role }}\n"
        "{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}",
        "<seed:think>",
        "</seed:think>",
        "assistant\n<seed:think>",
        special=("<seed:think>", "</seed:think>"),
        bos="<seed:bos>",
        bos_count=2,
    ),
    "Nemotron": Family(
        "{{ bos_token }}{% set thinks = 'detailed thinking on' in messages[0].content %}"
        + _turns("<|user|>{}", "<|assistant|>" + _FORGETS + "{{ eos_token }}", "<|system|>{}")
        + "{% if add_generation_prompt %}<|assistant|>{% if thinks %}<think>\n{% endif %}{% endif %}",
        "<think>",
        "</think>",
        "<|assistant|><think>\n",
    ),
    "Granite 3.2": Family(
        "{% if thinking %}<|system|>Write your thoughts after 'Here is my thought process:' and your answer after "
        "'Here is my response:'.{% endif %}"
        + _turns("<|user|>{}", "<|assistant|>{}{{ eos_token }}", "<|system|>{}")
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "Here is my thought process:",
        "Here is my response:",
        "<|assistant|>Here is my thought process:\n",
        bos=None,
        bos_count=0,
    ),
    "Gemma 4": Family(
        "{{ bos_token }}{% if enable_thinking %}<|turn>system\n<|think|><turn|>\n{% endif %}"
        + _turns(
            "<|turn>user\n{}<turn|>\n",
            "<|turn>model\n{{ (m.content.split('<channel|>') | last) | trim }}<turn|>\n",
        )
        + "{# a thought: <|channel>thought\n...<channel|> #}{% if add_generation_prompt %}<|turn>model\n{% endif %}",
        "<|channel>thought",
        "<channel|>",
        "model\n<|channel>thought\n",
        special=("<|channel>", "<channel|>", "<|think|>"),
    ),
    "a tag of its own": Family(
        "{{ bos_token }}"
        + _turns("<|user|>{}", "<|assistant|>{}{{ eos_token }}", "{}")
        + "{% if add_generation_prompt %}<|assistant|><inner_thoughts>\n{% endif %}",
        "<inner_thoughts>",
        "</inner_thoughts>",
        "<|assistant|><inner_thoughts>\n",
    ),
    "SmolLM2": Family(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + _turns(_CHATML[0], "<|im_start|>assistant\n{}<|im_end|>\n", _CHATML[1])
        + _ASK
        + "{% endif %}",
        "",
        "",
        "<|im_start|>assistant\n",
        bos="<|im_start|>",
        bos_count=3,
    ),
    "Llama 3": Family(
        "{{ bos_token }}"
        + _turns("<|user|>{}", "<|assistant|>{}{{ eos_token }}", "<|system|>{}")
        + "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}",
        "",
        "",
        "<|assistant|>\n\n",
        adds_bos=True,
    ),
    "Qwen2.5": Family(
        _turns(_CHATML[0], "<|im_start|>assistant\n{}<|im_end|>\n", _CHATML[1]) + _ASK + "{% endif %}",
        "",
        "",
        "<|im_start|>assistant\n",
        bos=None,
        bos_count=0,
    ),
    "a template that always closes the thought": Family(
        "{{ bos_token }}"
        + _turns("<|user|>{}", "<|assistant|>" + _FORGETS + "{{ eos_token }}", "{}")
        + "{% if add_generation_prompt %}<|assistant|><think>\n\n</think>\n\n{% endif %}",
        "",
        "",
        "<think>\n\n</think>\n\n",
    ),
}
THINKING = [name for name, family in FAMILIES.items() if family.open]
"""The families with thoughts."""
