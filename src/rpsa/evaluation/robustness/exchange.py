"""Files exchanged with HarmBench and AdversariaLLM, whose attacks by gradients are not written again here.

Out goes HarmBench's table of behaviours, which AdversariaLLM's `adv_behaviors` reads, too, and beside it the targets
that attacks such as GCG optimise towards. Back come HarmBench's test cases ({behaviour: [prompt, ...]}), which this
package asks a model itself, its completions ({behaviour: [{test_case, generation}, ...]}), or a `run.json` of
AdversariaLLM (runs, each with its original prompt and the completions of every step), which are judged as they are.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpsa.artifacts import atomic_write, folder_name, read_json, reading_records, stable_json
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import Item
from rpsa.evaluation.run import Questions
from rpsa.generation import Completion, Sampling, sample_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID")


def write_behaviours(items: Sequence[Item], path: Path, target: str) -> Path:
    """The harmful requests as HarmBench's table, and `target`, how an answer should begin, for each of them.

    Returns:
        The JSON file of the targets, beside `path`.

    Raises:
        RPSAError: there are none.
    """
    attacks = [item for item in items if item.kind == "attack"]
    if not attacks:
        raise RPSAError("--export: the tasks have no harmful requests; name some that do")
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for item in attacks:
        table.writerow([item.prompt, "standard", "harmful", "", "", behaviour_of(item)])
    atomic_write(path, text.getvalue())
    targets = path.with_name(f"{path.stem}.targets.json")
    atomic_write(targets, stable_json({behaviour_of(item): target for item in attacks}))
    return targets


def behaviour_of(item: Item) -> str:
    """An id that HarmBench can name a folder by."""
    return folder_name(f"{item.set}/{item.id}")


@dataclass(frozen=True)
class Exchanged:
    """What another tool found: by behaviour its prompts, and the responses to them where it has asked itself."""

    prompts: Mapping[str, Sequence[str]]
    responses: Mapping[str, Sequence[str]] | None = None

    def ask(self, asked: Questions, tokenizer: "PreTrainedTokenizerBase") -> Questions:
        """Every prompt in place of the request that it was found for; a harmful request that has none is not asked.

        Where the responses are known already, nothing else is either.
        """
        cases = [
            (item, index, prompt)
            for item in dict.fromkeys(item for item, _ in asked.asked if item.kind == "attack")
            for index, prompt in enumerate(self.prompts.get(behaviour_of(item), ()))
        ]
        kept = [
            (pair, ids)
            for pair, ids in zip(asked.asked, asked.prompts, strict=True)
            if pair[0].kind != "attack" and self.responses is None
        ]
        pairs = [*((item, index) for item, index, _ in cases), *(pair for pair, _ in kept)]
        rendered = [render_prompt(tokenizer, prompt, asked.thought) for _, _, prompt in cases]
        ids = [sample_id(item.set, item.id, index) for item, index in pairs]
        return replace(asked, asked=pairs, prompts=[*rendered, *(ids for _, ids in kept)], ids=ids)


def read_exchanged(path: Path, items: Sequence[Item]) -> Exchanged:
    """Test cases or completions of HarmBench's, or a run of AdversariaLLM's, whatever the file holds.

    Of a run the last step counts. Its prompts are matched with requests by their text, HarmBench's by their ids.

    Raises:
        RPSAError: it is none of these, or knows none of the harmful requests of `items`.
    """
    content = read_json(path)
    attacks = [item for item in items if item.kind == "attack"]
    with reading_records(path):
        if isinstance(content, dict) and "runs" in content:
            found = _of_runs(content["runs"], attacks)
        elif isinstance(content, dict):
            found = _of_harmbench(content)
        else:
            raise RPSAError(
                f"{path}: neither HarmBench's test cases or completions nor a run of AdversariaLLM's"
            )
    if not any(behaviour_of(item) in found.prompts for item in attacks):
        raise RPSAError(
            f"{path}: has none of the harmful requests of the tasks; is it of other tasks, or another n?"
        )
    return found


def _of_harmbench(content: Mapping[str, Any]) -> Exchanged:
    cases = [case for found in content.values() for case in found]
    if all(isinstance(case, str) for case in cases):
        return Exchanged(content)
    return Exchanged(
        {name: [str(case["test_case"]) for case in found] for name, found in content.items()},
        {name: [str(case["generation"]) for case in found] for name, found in content.items()},
    )


def _of_runs(runs: Sequence[Mapping[str, Any]], attacks: Sequence[Item]) -> Exchanged:
    names = {item.prompt: behaviour_of(item) for item in attacks}
    prompts: dict[str, list[str]] = {}
    responses: dict[str, list[str]] = {}
    for run in runs:
        name = names.get(_said_by_user(run["original_prompt"]))
        if name is None:
            continue
        last = run["steps"][-1]
        asked = _said_by_user(last.get("model_input") or run["original_prompt"])
        for said in last["model_completions"]:
            prompts.setdefault(name, []).append(asked)
            responses.setdefault(name, []).append(str(said))
    return Exchanged(prompts, responses)


def _said_by_user(conversation: Sequence[Mapping[str, Any]]) -> str:
    return str(next(turn["content"] for turn in conversation if turn["role"] == "user"))


class Stored:
    """A `Generator` of responses that are known already, by the ids of their samples."""

    def __init__(
        self, exchanged: Exchanged, items: Sequence[Item], tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = {
            sample_id(item.set, item.id, index): text
            for item in items
            for index, text in enumerate((exchanged.responses or {}).get(behaviour_of(item), ()))
        }

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, sample_ids: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        for position, name in enumerate(sample_ids):
            text = self.texts[name]
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            yield position, Completion(ids, text, "stop", exact=False)
