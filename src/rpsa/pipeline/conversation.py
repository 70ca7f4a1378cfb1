"""Conversation: one question to one model or several, thought and answer apart. Each question stands alone."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rpsa.chat import render_prompt, split_response
from rpsa.errors import RPSAError
from rpsa.evaluation.run import Subject, adapter_base, model_subject
from rpsa.generation import Sampling
from rpsa.models import check_model, quiet, said_model
from rpsa.recipe.problems import source_problem
from rpsa.recipe.sections import Evaluate
from rpsa.text import printable
from rpsa.thought import NO_THOUGHT


def others_of(model: str, beside: str | None) -> list[str]:
    """The models that are asked, the one that was there before first.

    Raises:
        RPSAError: one of them is not there.
    """
    for name in (model, beside):
        if name and (problem := source_problem("model", name)):
            raise RPSAError(problem)
    before = beside or adapter_base(model)
    return [name for name in (before, model) if name]


@dataclass
class Speaker:
    """A model, loaded when it is first asked."""

    name: str
    thought: str
    sampling: Sampling

    @cached_property
    def _subject(self) -> Subject:
        model = said_model(self.thought, dtype="auto")
        check_model(adapter_base(self.name) or self.name, model)
        return model_subject(self.name, model, Evaluate(backend="transformers"))

    @cached_property
    def _generator(self) -> Any:
        return self._subject.make_generator()

    def answer(self, prompt: str) -> tuple[str, str]:
        """Thought and answer; a response that is not whole is all answer."""
        subject = self._subject
        ids = render_prompt(subject.tokenizer, prompt, subject.thought)
        [(_, completion)] = self._generator.generate([ids], self.sampling, [prompt])
        try:
            return split_response(completion.text, subject.thought or NO_THOUGHT)
        except RPSAError:
            return "", completion.text


def talk(speakers: Sequence[Speaker], prompts: Sequence[str]) -> None:
    """Ask the prompts, or what is typed line by line until the input ends, and print every answer."""
    from rich.console import Console
    from rich.text import Text

    quiet()
    console = Console(highlight=False)
    for prompt in prompts or _typed():
        for speaker in speakers:
            thought, answer = speaker.answer(prompt)
            console.print(Text(f"\n{printable(speaker.name)}", style="bold"))
            if thought.strip():
                console.print(Text(_shown(thought), style="dim"))
            console.print(Text(_shown(answer)))


def _shown(text: str) -> str:
    return "\n".join(printable(line) for line in text.strip().splitlines())


def _typed() -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
