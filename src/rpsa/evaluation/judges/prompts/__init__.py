"""Published prompts, word for word: a classifier works only with the prompt that it was trained on.

| file | source |
|---|---|
| `wildguard.txt` | the `wildguard` package of its authors (allenai/wildguard, Apache 2.0) |
| `harmbench_llama2.txt` | model card of cais/HarmBench-Llama-2-13b-cls (MIT) |
| `harmbench_mistral.txt` | model card of cais/HarmBench-Mistral-7b-val-cls (MIT) |
| `strongreject_finetuned.txt` | judge_templates.json of the authors' package, dsbowen/strong_reject (MIT) |
| `strongreject_rubric.txt` | the same; its system message is in `policies.py` |
| `reasoningshield.txt` | `reasoningshield_prompt.txt` in ReasoningShield/ReasoningShield-1B (Apache 2.0) |
| `shieldgemma.txt` | model card of google/shieldgemma-2b (Gemma terms): its guidelines for responses, one a line |
| `xstest.txt` | XSTest (Röttger et al. 2024), GPT-4 classification prompt; paul-rottger/xstest |

The placeholders were renamed to `{prompt}` and `{response}`. The prompts of Llama Guard, Qwen3Guard and
Granite Guardian, and what stands around ShieldGemma's guidelines, come with their tokenizers. `policy.txt`,
`policy_output.txt` and `policy_content.txt` are our own.
"""

import hashlib
from importlib.resources import files


def template(name: str) -> str:
    """The text of `name`.txt, whitespace at its end included: the StrongREJECT classifier's last space counts."""
    return (files(__name__) / f"{name}.txt").read_bytes().decode()


def prompt_sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
