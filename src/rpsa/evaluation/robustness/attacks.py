"""Attacks: what a recipe's section `robustness` comes to, one by one, and the attacked model as a subject."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rpsa.alternatives.after_training import starting_weights
from rpsa.artifacts import sha256_of
from rpsa.chat import render_example, render_prompt
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import BENCHMARKS, TINY_PREFIX, Item, TaskOptions
from rpsa.evaluation.items import expanded, load_task
from rpsa.evaluation.robustness.direction import refusal_direction, remove_direction
from rpsa.evaluation.robustness.jailbreaks import many_shot, prefilled, read_templates, templated
from rpsa.evaluation.robustness.tampering import tampered
from rpsa.evaluation.robustness.weights import merge, prune, quantise
from rpsa.evaluation.run import Questions, Subject, make_subject, questions
from rpsa.models import load_model, model_config
from rpsa.recipe.methods import LORA_DEFAULTS
from rpsa.recipe.sections import Evaluate, Model, Robustness
from rpsa.rows import draw
from rpsa.safety_data import SafetyExample, load_benign_data
from rpsa.thought import ThoughtFormat
from rpsa.tiny import REQUEST_SETS, complying_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Change = Callable[["PreTrainedModel"], "PreTrainedModel"]


@dataclass(frozen=True)
class Attack:
    """One attack at one strength.

    Attributes:
        kind: the setting of section `robustness` that it is from.
        name: unique, and fit for a folder.
        settings: JSON-able: what decides it besides the model, sources by name.
        curve, steps: of further training, what it is, and how far it goes; None for anything else.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]
    curve: str | None = None
    steps: int | None = None

    @property
    def changes_weights(self) -> bool:
        return self.kind not in ("prefill", "many_shot", "templates")


def attacks_of(settings: Robustness, *, has_base: bool) -> list[Attack]:
    """All attacks of the section, in its order; merging only where there is a base to go back to."""
    found: list[Attack] = []
    drawn = {"seed": settings.seed, "harmful": settings.harmful}
    both = drawn | {"benign": settings.benign}
    if (prefill := settings.prefill) is not None:
        begun = {"thinking": prefill.closing}
        found += [
            Attack(
                "prefill", f"prefill-thought{_number(n, prefill.thought)}", {"thinking": text, "answer": None}
            )
            for n, text in enumerate(prefill.thought)
        ]
        found += [
            Attack("prefill", f"prefill-answer{_number(n, prefill.answer)}", begun | {"answer": text})
            for n, text in enumerate(prefill.answer)
        ]
    if settings.many_shot is not None:
        found += [
            Attack("many_shot", f"many-shot-{n}", drawn | {"shots": n}) for n in settings.many_shot.shots
        ]
    if settings.templates is not None:
        found.append(Attack("templates", "templates", {"templates": settings.templates}))
    if (tuned := settings.finetune) is not None:
        common = {"seed": settings.seed, "rows": tuned.rows, "batch_size": tuned.batch_size}
        found += [
            Attack(
                "finetune",
                f"finetune-{data}-{paradigm}-{steps}",
                common
                | {"data": data, "source": getattr(settings, data), "paradigm": paradigm, "steps": steps}
                | {"learning_rate": getattr(tuned, f"{paradigm}_learning_rate")}
                | ({"lora": LORA_DEFAULTS | tuned.lora} if paradigm == "lora" else {}),
                f"{data} rows, {'LoRA' if paradigm == 'lora' else 'full fine-tuning'}",
                steps,
            )
            for data in tuned.data
            for paradigm in tuned.paradigms
            for steps in tuned.steps
        ]
    if settings.direction is not None:
        found.append(Attack("direction", "direction", both | {"prompts": settings.direction.prompts}))
    if settings.prune is not None:
        found += [Attack("prune", f"prune-{ratio:g}", {"ratio": ratio}) for ratio in settings.prune.ratios]
    if settings.quantise is not None:
        found += [Attack("quantise", name, {"scheme": name}) for name in settings.quantise.schemes]
    if settings.merge is not None and has_base:
        found += [Attack("merge", f"merge-{one:g}", {"weight": one}) for one in settings.merge.weights]
    return found


def _number(place: int, among: Sequence[str]) -> str:
    return f"-{place + 1}" if len(among) > 1 else ""


def sources_of(attack: Attack) -> list[str]:
    """The sources of rows that an attack reads."""
    named = (attack.settings.get(name) for name in ("harmful", "benign", "source", "templates"))
    return [source for source in named if source is not None]


def asked_under_attack(settings: Robustness, evaluate: Evaluate, options: TaskOptions) -> Evaluate:
    """The settings of the evaluation under attack: its own tasks, or those of the evaluation that have requests.

    Raises:
        RPSAError: no task has harmful requests.
    """
    tasks = settings.tasks
    if tasks is None:
        tasks = [one for task in expanded(evaluate.tasks) for one in _with_requests(task, options)]
    if not any(item.kind == "attack" for task in expanded(tasks) for item in load_task(task, options)):
        raise RPSAError(
            "robustness.tasks: no task has harmful requests, and nothing else can be attacked; add one"
        )
    return evaluate.model_copy(update={"tasks": tasks})


def _with_requests(task: str, options: TaskOptions) -> list[str]:
    """A task, or what of it are requests."""
    if task == "tiny":
        return [f"{TINY_PREFIX}{name}" for name in REQUEST_SETS]
    if task in BENCHMARKS:
        return [task] if BENCHMARKS[task].kind != "reasoning" else []
    return [task] if any(item.kind != "reasoning" for item in load_task(task, options)) else []


@dataclass(frozen=True)
class Target:
    """The model to be attacked.

    Attributes:
        key: what tells it from any other.
        weights: a folder, a hub id or a shipped base; of an adapter, its base.
        base: what merging goes back to; None: it is not merged.
        model: how it is loaded, as a recipe says.
    """

    key: str
    weights: str
    adapter: str | None
    base: str | None
    model: Model = field(default_factory=Model)

    def subject(self, settings: Evaluate, attack: Attack | None = None) -> Subject:
        """The model as it is, or under an attack.

        Raises:
            RPSAError: a source cannot be read, or the model's template or architecture does not admit the attack.
        """
        changes = attack is not None and attack.changes_weights
        key = sha256_of([self.key, attack.kind, dict(attack.settings)]) if attack and changes else self.key
        plain = make_subject(key, self.weights, self.adapter, self.model, settings)
        if attack is None:
            return plain
        if not changes:
            return replace(plain, rephrase=self._rephrasing(attack, plain))
        change = self._change(attack, plain)
        return make_subject(key, self.weights, self.adapter, self.model, settings, change)

    def _rephrasing(self, attack: Attack, subject: Subject) -> Callable[[Questions], Questions]:
        given, tokenizer = attack.settings, subject.tokenizer
        if attack.kind == "prefill":
            return lambda asked: prefilled(asked, tokenizer, given["thinking"], given["answer"])
        if attack.kind == "templates":
            templates = read_templates(given["templates"])
            return lambda asked: templated(asked, tokenizer, templates)
        shots = complying_rows("harmful", given["harmful"], given["shots"], given["seed"], subject.thought)
        positions = positions_of(self.weights, self.model)
        return lambda asked: many_shot(asked, tokenizer, shots, positions)

    def _change(self, attack: Attack, subject: Subject) -> Change:
        given = attack.settings
        if attack.kind == "finetune":
            rows = complying_rows(
                given["data"], given["source"], given["rows"], given["seed"], subject.thought
            )
            examples = [
                render_example(subject.tokenizer, row.prompt, row.response, None, subject.thought)
                for row in rows
            ]
            named = ("steps", "paradigm", "learning_rate", "batch_size", "seed")
            return partial(
                tampered, rows=examples, **{name: given[name] for name in named}, lora=given.get("lora", {})
            )
        if attack.kind == "direction":
            prompts = {
                kind: [
                    render_prompt(subject.tokenizer, row.prompt, subject.thought)
                    for row in complying_rows(
                        kind, given[kind], given["prompts"], given["seed"], subject.thought
                    )
                ]
                for kind in ("harmful", "benign")
            }

            def without_direction(model: "PreTrainedModel") -> None:
                remove_direction(
                    model, refusal_direction(model, prompts["harmful"], prompts["benign"]).vector
                )

            return _in_place(without_direction)
        if attack.kind == "prune":
            return _in_place(lambda model: prune(model, given["ratio"]))
        if attack.kind == "quantise":
            bits, _, group = given["scheme"].removeprefix("int").partition("-")
            return _in_place(lambda model: quantise(model, int(bits), int(group) if group else None))
        assert self.base is not None
        base = self.base
        return _in_place(
            lambda model: merge(model, starting_weights(load_model(base, self.model)), given["weight"])
        )


def _in_place(work: Callable[["PreTrainedModel"], None]) -> Change:
    def change(model: "PreTrainedModel") -> "PreTrainedModel":
        work(model)
        return model

    return change


def complying_rows(
    kind: str, source: str, n: int, seed: int, thought: ThoughtFormat | None
) -> list[SafetyExample]:
    """`n` rows of requests with answers that comply, of the tiny world's own or of a source.

    Raises:
        RPSAError: the source cannot be read, or has fewer.
    """
    if source == "tiny":
        return complying_examples("harmful" if kind == "harmful" else "benign", n, seed)
    found = load_benign_data(source, thought=thought) if thought else load_benign_data(source)
    if n > len(found):
        raise RPSAError(
            f"{source} has {len(found)} rows, and an attack takes {n}: give more, or lower its settings"
        )
    return draw(found, n, seed)


def positions_of(name: str, model: Model) -> int | None:
    """How many tokens a model can take, by its config; None where that does not say."""
    config: Any = model_config(name, model).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_attacks(
    attacks: Sequence[Attack], target: Target, settings: Evaluate, items: Sequence[Item]
) -> None:
    """What can be known of attacks without the model's weights.

    Raises:
        RPSAError: a source cannot be read or has too few rows, or the template does not admit an attack.
    """
    for attack in attacks:
        subject = target.subject(settings, attack)
        if subject.rephrase is not None:
            subject.rephrase(questions(items, settings, subject.tokenizer, subject.thought))
