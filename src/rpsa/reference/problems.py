"""The problems that D_ref's responses answer, and how they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpsa.errors import RPSAError
from rpsa.prompts import PromptStyle, math_prompt, styled
from rpsa.rows import Row, draw, read_rows, text_field


@dataclass(frozen=True)
class Problem:
    """`prompt` is the full user message; `answer` the gold answer, empty if unknown; `id` is unique."""

    id: str
    prompt: str
    answer: str
    family: str = ""


def load_problems(
    source: str | Path, n: int, seed: int, prompt_style: PromptStyle = "appendix_b"
) -> list[Problem]:
    """`n` problems drawn without replacement by `seed` from a file or a Hugging Face dataset (`id:split`).

    Rows have MATH-500's fields: `problem`, `answer`, `unique_id` (or `id`; else the row's number) and, if
    there, `subject` as the family; the user message is Appendix B's, to which `section_4` appends "Please
    think step by step.". A row with `prompt` in place of `problem` gives the user message as it is.

    Raises RPSAError if the source cannot be read, a field is missing, or it has fewer than `n` rows.
    """
    rows = read_rows(source, preferred_split="test")
    if n < 1 or n > len(rows):
        raise RPSAError(f"{source} has {len(rows)} problems: ask for 1 to {len(rows)}, not {n}")
    return [_problem(row, str(i), prompt_style) for i, row in draw(list(enumerate(rows)), n, seed)]


def _problem(row: Row, number: str, prompt_style: PromptStyle) -> Problem:
    if "problem" not in row.fields and "prompt" in row.fields:
        prompt = text_field(row, ["prompt"])
    else:
        prompt = styled(math_prompt(text_field(row, ["problem"])), prompt_style)
    identifier = next((row.fields[name] for name in ("unique_id", "id") if name in row.fields), number)
    return Problem(str(identifier), prompt, text_field(row, ["answer"]), str(row.fields.get("subject", "")))


def check_ids(problems: Sequence[Problem]) -> None:
    """Raises RPSAError if two problems share an id."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise RPSAError(f"two problems have the id {problem.id!r}: ids must be unique")
        seen.add(problem.id)
