"""What must not get into a recipe, which is stored with every result and shown in every report: secrets, and what is
no text or number.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from rpsa.text import SECRET_IN_QUERY

_MOST_VALUES = 100_000  # a few aliases of YAML can stand for billions
_SECRET_KEY = re.compile(
    r"(?:hub|hf|push_to_hub|auth|use_auth|access|api|bearer|wandb|id)?_?token|.*api_?key|.*passw(?:or)?d|.*secret"
    r"|.*credentials?|authorization|.*(?:private|secret|access|account|auth|wandb|ssh|gpg)[_-]?key",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    rf"://[^/\s]*@|{SECRET_IN_QUERY}"
    r"|\b(?:hf_|sk-|gh[oprsu]_|github_pat_|glpat-|gsk_|xai-|nvapi-|pplx-|xox[abprs]-|AIza)[A-Za-z0-9_-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[A-Za-z0-9_-]{8,}\.eyJ|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:Bearer|Basic) [A-Za-z0-9._~+/-]{16,}"
)
"""As those who give them out write them: Hugging Face, OpenAI, GitHub, GitLab, Groq, xAI, NVIDIA, Slack, Google, AWS"""


def hygiene_problems(raw: dict[str, Any]) -> Iterator[str]:
    """One `path: problem` line for each value that has no place in a recipe; a secret itself is not repeated."""
    for number, (path, value) in enumerate(_values(raw, "", 0)):
        if number > _MOST_VALUES:
            yield f"{path.partition('.')[0]}: more than {_MOST_VALUES:,} values; does it contain itself?"
            return
        key = path.rpartition(".")[2]
        if _SECRET_VALUE.search(path):
            yield f"{path.partition('.')[0]}: one of its keys is a secret, which is not written into a recipe"
        elif _is_odd(path) or (isinstance(value, str) and _is_odd(value)):
            yield f"{path!a}: holds a control character"
        elif _is_secret(key, value):
            yield (
                f"{path}: a secret is not written into a recipe, which is stored with every result: "
                f"set {_variable(path)} in the environment"
            )
        elif not isinstance(value, str | bool | int | float | None):
            yield f"{path}: is {type(value).__name__}; a recipe holds text, numbers, lists and mappings"


def _values(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """All values that are no lists or mappings, with their paths."""
    if depth > 50:
        yield path, object()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, path, depth + 1)
    else:
        yield path, value


def _is_odd(text: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _is_secret(key: str, value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    return bool(_SECRET_KEY.fullmatch(key) or _SECRET_VALUE.search(value))


def _variable(path: str) -> str:
    if "judge" in path:
        return "RPSA_JUDGE_API_KEY"
    return "HF_TOKEN" if "train." in path or path.endswith("hf_token") else "it"
