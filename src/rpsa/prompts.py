"""Prompts of Appendix B: user messages of the reasoning benchmarks, with the backslashes that typesetting lost.

There is no system prompt; `<think>` is opened by the chat template (`rpsa.chat`).
"""

from collections.abc import Sequence
from typing import Literal

PromptStyle = Literal["appendix_b", "section_4"]

_MATH = (
    "Solve the following math problem. Present the final answer in the format: Final Answer: "
    "\\boxed{{your_answer}}.\n\nProblem: {problem}\n\nAnswer:"
)
_CHOICE = (
    "What is the correct answer to this question:{question}\n\nChoices:\n{choices}\n\n"
    "Please reason step by step, and present your final answer using the format: Final Answer: "
    "\\boxed{{X}}, where X is one of A, B, C, or D."
)
_COMPLETION = (
    "Solve the following problem.\n\nProblem:\n\n{stub}\n\n"
    "Please reason step by step, and put your final answer within a code block:"
)
_FUNCTION = (
    "{text} Your code should satisfy the following assertion: {assertion}. "
    "Please reason step by step, and put your final answer within a code block:"
)
_STEP_BY_STEP = "\n\nPlease think step by step."


def math_prompt(problem: str) -> str:
    """Appendix B, "AIME Prompt"."""
    return _MATH.format(problem=problem)


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """Appendix B, "GPQA Prompt"; the choices are lettered from A."""
    lettered = "\n".join(f"({'ABCD'[i]}) {choice}" for i, choice in enumerate(choices))
    return _CHOICE.format(question=question, choices=lettered)


def completion_prompt(stub: str) -> str:
    """Appendix B, "HumanEval Prompt": a function's signature and docstring to complete."""
    return _COMPLETION.format(stub=stub)


def function_prompt(text: str, assertion: str) -> str:
    """Appendix B, "MBPP+ Prompt": a description and one assertion."""
    return _FUNCTION.format(text=text, assertion=assertion)


def styled(prompt: str, style: PromptStyle) -> str:
    """Section 4.2.1 asks for "Please think step by step." in every reasoning prompt; Appendix B has it nowhere."""
    return prompt + _STEP_BY_STEP if style == "section_4" else prompt
