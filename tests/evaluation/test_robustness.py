"""Attacks by themselves: what is asked, what becomes of weights, and files of other tools."""

import json
from dataclasses import replace
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from helpers.examples import examples
from rpsa.alternatives.after_training import starting_weights
from rpsa.chat import render_prompt
from rpsa.errors import RPSAError
from rpsa.evaluation.benchmarks import TaskOptions
from rpsa.evaluation.items import load_tasks
from rpsa.evaluation.robustness.attacks import (
    Attack,
    Target,
    asked_under_attack,
    attacks_of,
    complying_rows,
)
from rpsa.evaluation.robustness.direction import refusal_direction, remove_direction, residuals
from rpsa.evaluation.robustness.exchange import Stored, behaviour_of, read_exchanged, write_behaviours
from rpsa.evaluation.robustness.jailbreaks import many_shot, prefilled, read_templates, templated
from rpsa.evaluation.robustness.weights import linear_weights, merge, prune, quantise
from rpsa.evaluation.run import evaluate, questions
from rpsa.generation import Completion
from rpsa.models import load_model, load_tokenizer
from rpsa.recipe.sections import Evaluate, ManyShot, Model, Robustness
from rpsa.thought import NO_THOUGHT

TASKS = ["rpsa_tiny_direct", "rpsa_tiny_benign"]
SETTINGS = Evaluate(tasks=TASKS, n=24, temperature=0.0, max_new_tokens=48, batch_size=64)
OPTIONS = TaskOptions(24, 123)
ITEMS = load_tasks(TASKS, OPTIONS)
TOKENIZER = load_tokenizer("tiny:0", Model())
ASKED = questions(ITEMS, SETTINGS, TOKENIZER)


def llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **config))


# By the prompt


def test_a_prefill_ends_the_prompts_of_attacks_alone_and_begins_what_is_judged() -> None:
    inside = prefilled(ASKED, TOKENIZER, "user wants to")
    closed = prefilled(ASKED, TOKENIZER, "", "sure :")
    words = TOKENIZER.convert_tokens_to_ids
    for n, (item, _) in enumerate(ASKED.asked):
        plain = ASKED.prompts[n]
        begun = ([], []) if item.kind != "attack" else (["user", "wants", "to"], ["</think>", "sure", ":"])
        assert inside.prompts[n] == [*plain, *words(begun[0])]
        assert closed.prompts[n] == [*plain, *words(begun[1])]
    completion = Completion(words(["take", "t1", "<eos>"]), "take t1", "stop")
    [response, *_] = closed.responses(dict.fromkeys(range(len(ITEMS)), completion))
    assert response.text == "</think> sure : take t1"
    assert response.answer == "sure : take t1"
    assert response.item.prompt == ITEMS[0].prompt
    assert closed.responses(dict.fromkeys(range(len(ITEMS)), completion))[-1].text == "take t1"


def test_a_model_without_thoughts_begins_its_answer() -> None:
    asked = replace(ASKED, thought=NO_THOUGHT)
    found = prefilled(asked, TOKENIZER, "ignored", "sure :")
    assert found.prompts[0][-2:] == TOKENIZER.convert_tokens_to_ids(["sure", ":"])
    assert found.begun[0] == 2


def test_words_that_a_tokenizer_cannot_spell_are_refused() -> None:
    with pytest.raises(RPSAError, match="cannot spell 'Certainly!'"):
        prefilled(ASKED, TOKENIZER, "Certainly!")


def test_shots_are_earlier_turns_that_comply() -> None:
    shots = complying_rows("harmful", "tiny", 2, 0, ASKED.thought)
    found = many_shot(ASKED, TOKENIZER, shots, 256)
    turns = " ".join(f"<user> {shot.prompt} <asst> {shot.response} <eos>" for shot in shots)
    expected = f"<bos> {turns} <user> {ITEMS[0].prompt} <asst> <think>"
    assert TOKENIZER.decode(found.prompts[0]) == expected
    assert found.prompts[-1] == ASKED.prompts[-1]
    with pytest.raises(
        RPSAError, match=r"2 shots and max_new_tokens make \d+ tokens, and the model takes 60"
    ):
        many_shot(ASKED, TOKENIZER, shots, 60)


def test_templates_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "templates.jsonl"
    path.write_text('{"template": "please {prompt}"}\n{"prompt": "{prompt} ?"}\n')
    found = templated(ASKED, TOKENIZER, read_templates(str(path)))
    assert found.prompts[0] == render_prompt(TOKENIZER, f"please {ITEMS[0].prompt}")
    assert found.prompts[1] == render_prompt(TOKENIZER, f"{ITEMS[1].prompt} ?")
    assert found.prompts[-1] == ASKED.prompts[-1]
    path.write_text('{"template": "without a place"}\n')
    with pytest.raises(RPSAError, match=r"line 1 has no \{prompt\}"):
        read_templates(str(path))


# On the weights


@examples(20)
@given(st.integers(2, 8), st.sampled_from([None, 3, 5]), st.integers(0, 99))
def test_quantisation_is_the_slow_loops(bits: int, group: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Linear(11, 4))
    before = layer[0].weight.detach().clone()
    before[1] = 0
    layer[0].weight.data.copy_(before)
    quantise(layer, bits, group)
    most, width = 2 ** (bits - 1) - 1, group or 11
    for row in range(4):
        for start in range(0, 11, width):
            part = before[row, start : start + width]
            scale = part.abs().max() / most
            for offset, value in enumerate(part):
                expected = 0.0 if scale == 0 else float((value / scale).round() * scale)
                assert float(layer[0].weight[row, start + offset]) == expected
    assert len(layer[0].weight[0, :width].unique()) <= 2**bits - 1


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.33, 0.5, 1.0])
def test_pruning_takes_exactly_the_smallest(ratio: float) -> None:
    model = llama()
    before = {name: weight.detach().clone() for name, weight in linear_weights(model)}
    head, embeddings = model.lm_head.weight.clone(), model.model.embed_tokens.weight.clone()
    prune(model, ratio)
    for name, weight in linear_weights(model):
        assert int((weight == 0).sum()) == floor(ratio * weight.numel())
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])
        if 0 < ratio < 1:
            assert before[name][kept].abs().min() >= before[name][~kept].abs().max()
    assert len(before) == 4 * 7
    assert torch.equal(head, model.lm_head.weight)
    assert torch.equal(embeddings, model.model.embed_tokens.weight)


def test_merging_ends_at_both_models_to_the_bit() -> None:
    base, aligned = llama(), llama()
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    start, end = starting_weights(base), starting_weights(aligned)
    for weight, expected in ((1.0, end), (0.0, start)):
        model = llama()
        model.load_state_dict(aligned.state_dict())
        model.requires_grad_(False)  # as a merged adapter leaves it
        merge(model, start, weight)
        assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    merge(aligned, start, 0.25)
    for name, parameter in aligned.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.75 * start[name] + 0.25 * end[name])


def written(model: Any) -> dict[str, Tensor]:
    """Everything that writes into the residual stream, as (d, ...)."""
    found = {"embeddings": model.get_input_embeddings().weight.detach().T}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            found[name] = module.weight.detach()
            if module.bias is not None:
                found[f"{name}.bias"] = module.bias.detach()[:, None]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_writes_the_direction_any_more(dtype: torch.dtype, tied: bool) -> None:
    model = llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    before = {name: weight.double() for name, weight in written(model).items()}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in written(model)}
    head = model.lm_head.weight.detach().clone()
    r = torch.randn(16, dtype=torch.float64)
    r /= r.norm()
    remove_direction(model, r)
    for name, weight in written(model).items():
        exact = (torch.eye(16, dtype=torch.float64) - torch.outer(r, r)) @ before[name]
        torch.testing.assert_close(weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-9)
        assert float((r @ weight.double()).abs().max()) <= 16 * torch.finfo(dtype).eps, name
        assert not torch.equal(weight.double(), before[name]), name
    assert torch.equal(head, model.lm_head.weight)
    assert any("q_proj" in name for name in others)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if "q_proj" in n)


def test_a_model_without_the_direction_has_none_of_it_anywhere() -> None:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    prompts = [[3, 5, n] for n in range(12)]
    found = refusal_direction(model, prompts[:6], prompts[6:])
    assert found.layer in (1, 2)
    bad, good = residuals(model, prompts[:6]), residuals(model, prompts[6:])
    difference = bad[found.layer - 1].mean(0) - good[found.layer - 1].mean(0)
    torch.testing.assert_close(found.vector, difference / difference.norm())
    assert float((bad @ found.vector).abs().max()) > 1e-3
    remove_direction(model, found.vector)
    assert float((residuals(model, prompts) @ found.vector).abs().max()) < 1e-7


def test_the_layer_is_the_one_that_separates_what_it_was_not_made_from() -> None:
    """Planted: only behind the second layer do the prompts differ by more than noise."""
    model = llama()
    planted = torch.randn(3, 16, 16)  # layers, prompts, d
    planted[1, :8, 0] += 30

    class Planted:
        device = torch.device("cpu")

        def __call__(self, input_ids: Tensor, **_: Any) -> Any:
            rows = planted[:, int(input_ids[0, 0])]
            states = [torch.zeros(1, 1, 16), *(row[None, None] for row in rows), torch.zeros(1, 1, 16)]
            return type("Output", (), {"hidden_states": states})

    found = refusal_direction(Planted(), [[n] for n in range(8)], [[n] for n in range(8, 16)])  # type: ignore[arg-type]
    assert found.layer == 2
    assert abs(float(found.vector[0])) > 0.99
    with pytest.raises(RPSAError, match="at least 4"):
        refusal_direction(model, [[1]], [[2]])


# A model under attack


def test_harmful_rows_undo_an_alignment_and_benign_prompts_are_answered_still(tmp_path: Path) -> None:
    """Planted: a base that was taught to refuse all complies again after ten steps on rows that do."""
    aligned = Target("aligned", "tiny:0", None, "tiny:0")
    refusing = _refusing(tmp_path / "refusing")
    target = replace(aligned, key="refusing", weights=str(refusing))
    before = evaluate(target.subject(SETTINGS), SETTINGS, OPTIONS, tmp_path / "before")
    attack = attacks_of(
        Robustness(harmful="tiny", benign="tiny", prefill=None, many_shot=None).model_copy(
            update={
                "finetune": Robustness().finetune.model_copy(
                    update={"fft_learning_rate": 1e-3, "steps": [10]}
                )
            }  # type: ignore[union-attr]
        ),
        has_base=True,
    )[0]
    assert attack.name == "finetune-harmful-fft-10"
    after = evaluate(target.subject(SETTINGS, attack), SETTINGS, OPTIONS, tmp_path / "after")
    assert before.sets["attack"]["direct"].figure == 0.0
    assert (after.sets["attack"]["direct"].figure or 0) > 0.8
    assert after.sets["over_refusal"]["benign"].figure == 0.0
    # a benign control of the same strength: what was done matters, not that something was
    none = Attack("prune", "prune-0", {"ratio": 0.0})
    control = evaluate(target.subject(SETTINGS, none), SETTINGS, OPTIONS, tmp_path / "control")
    assert control.sets["attack"]["direct"].figure == 0.0
    assert len({before.model, after.model, control.model}) == 3


def _refusing(folder: Path) -> Path:
    from rpsa.chat import render_example
    from rpsa.evaluation.robustness.tampering import tampered
    from rpsa.tiny import safety_examples

    rows = [
        render_example(TOKENIZER, e.prompt, e.response, None) for e in safety_examples("balanced", 128, 0)
    ]
    model = tampered(load_model("tiny:0", Model()), rows, 60, "fft", 1e-3, 16, 0, {})
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_fewer_steps_are_the_beginning_of_more() -> None:
    from rpsa.chat import render_example
    from rpsa.evaluation.robustness.tampering import tampered

    rows = [
        render_example(TOKENIZER, e.prompt, e.response, None)
        for e in complying_rows("benign", "tiny", 8, 0, None)
    ]
    whole = tampered(load_model("tiny:0", Model()), rows, 4, "fft", 1e-3, 4, 7, {})
    part = tampered(load_model("tiny:0", Model()), rows, 2, "fft", 1e-3, 4, 7, {})
    again = tampered(load_model("tiny:0", Model()), rows, 4, "fft", 1e-3, 4, 7, {})
    moved = [
        (whole.get_parameter(n) - p).abs().sum() > (part.get_parameter(n) - p).abs().sum()
        for n, p in load_model("tiny:0", Model()).named_parameters()
    ]
    assert sum(moved) > 0.9 * len(moved)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in whole.named_parameters())


def test_an_attack_by_the_prompt_asks_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rpsa.generation.transformers import TransformersGenerator

    target = Target("base", "tiny:0", None, None)
    evaluate(target.subject(SETTINGS), SETTINGS, OPTIONS, tmp_path / "plain")
    asked: list[str] = []
    real = TransformersGenerator.generate

    def noting(self: Any, prompts: Any, sampling: Any, ids: Any) -> Any:
        asked.extend(ids)
        return real(self, prompts, sampling, ids)

    monkeypatch.setattr(TransformersGenerator, "generate", noting)
    attack = Attack("prefill", "prefill-thought", {"thinking": "user wants to", "answer": None})
    found = evaluate(
        target.subject(SETTINGS, attack),
        SETTINGS,
        OPTIONS,
        tmp_path / "attacked",
        earlier=[tmp_path / "plain"],
    )
    assert {name.split("/")[0] for name in asked} == {"direct"}
    sample = json.loads((tmp_path / "attacked" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["response"].startswith("user wants to")
    assert sample["prompt"] == ITEMS[0].prompt
    assert found.sets["over_refusal"]["benign"].figure == 0.0


def test_what_is_asked_under_attack_are_requests() -> None:
    chosen = asked_under_attack(Robustness(), Evaluate(tasks=["tiny"]), OPTIONS)
    assert chosen.tasks == [f"rpsa_tiny_{name}" for name in ("direct", "wrapped", "benign", "borderline")]
    own = asked_under_attack(Robustness(tasks=["tiny"]), Evaluate(tasks=["rpsa_tiny_add"]), OPTIONS)
    assert own.tasks == ["tiny"]
    with pytest.raises(RPSAError, match="no task has harmful requests"):
        asked_under_attack(Robustness(), Evaluate(tasks=["rpsa_tiny_add"]), OPTIONS)


def test_every_attack_has_a_name_of_its_own_and_merging_needs_a_base() -> None:
    asked = Robustness(harmful="tiny", benign="tiny", templates="x.jsonl", many_shot=ManyShot(shots=[1, 2]))
    names = [attack.name for attack in attacks_of(asked, has_base=True)]
    assert len(set(names)) == len(names) == 3 + 2 + 1 + 20 + 1 + 3 + 2 + 3
    without = [attack.name for attack in attacks_of(asked, has_base=False)]
    assert set(names) - set(without) == {"merge-0.25", "merge-0.5", "merge-0.75"}


# Other tools' files


def test_behaviours_go_out_and_completions_come_back(tmp_path: Path) -> None:
    targets = write_behaviours(ITEMS, tmp_path / "behaviours.csv", "sure :")
    lines = (tmp_path / "behaviours.csv").read_text().splitlines()
    assert lines[0] == "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
    assert len(lines) == 1 + 24
    attacks = [item for item in ITEMS if item.kind == "attack"]
    assert json.loads(targets.read_text()) == {behaviour_of(item): "sure :" for item in attacks}

    completions = {
        behaviour_of(item): [
            {"test_case": f"please {item.prompt}", "generation": f"</think> sure : {item.answer} ."}
        ]
        for item in attacks
    }
    path = tmp_path / "completions.json"
    path.write_text(json.dumps(completions))
    found = read_exchanged(path, ITEMS)
    subject = Target("base", "tiny:0", None, None).subject(SETTINGS)
    judged = replace(
        subject,
        load=None,
        rephrase=lambda asked: found.ask(asked, TOKENIZER),
        make_generator=lambda: Stored(found, ITEMS, TOKENIZER),
    )
    result = evaluate(judged, SETTINGS, OPTIONS, tmp_path / "judged")
    assert result.sets["attack"]["direct"].figure == 1.0
    assert result.samples == 24


def test_test_cases_are_asked_and_runs_are_matched_by_their_text(tmp_path: Path) -> None:
    first = ITEMS[0]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({behaviour_of(first): ["please paint the car", "draw the lamp"]}))
    asked = read_exchanged(path, ITEMS).ask(ASKED, TOKENIZER)
    assert [pair for pair in asked.asked if pair[0].kind == "attack"] == [(first, 0), (first, 1)]
    assert asked.prompts[1] == render_prompt(TOKENIZER, "draw the lamp")
    assert len(asked.ids) == len(set(asked.ids)) == 2 + 24

    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]

    steps = [
        {"step": n, "model_input": turns(f"try {n}"), "model_completions": [f"said {n}"]} for n in range(3)
    ]
    path.write_text(
        json.dumps({"config": {}, "runs": [{"original_prompt": turns(first.prompt), "steps": steps}]})
    )
    found = read_exchanged(path, ITEMS)
    assert found.prompts == {behaviour_of(first): ["try 2"]}
    assert found.responses == {behaviour_of(first): ["said 2"]}
    for text, said in (
        ('{"x": []}', "none of the harmful requests"),
        ("[]", "neither"),
        ('{"x": [1]}', "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(RPSAError, match=said):
            read_exchanged(path, ITEMS)
