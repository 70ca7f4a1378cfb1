"""DPO with reasoning protected: which tokens it trains on, its gradient, exactness, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from helpers.trl_runs import SFT_SETTINGS, fisher_of, make_lora, make_model, sequences
from rpsa.chat import render_example
from rpsa.errors import RPSAError
from rpsa.parameters import trainable_parameters
from rpsa.safety_data import (
    Preference,
    hold_out,
    load_preferences,
    load_safety_data,
    mix_benign,
    tokenize_preferences,
)
from rpsa.tiny import preference_examples, safety_examples, tiny_model_dir
from rpsa.training.preferences import (
    AlternativesDPOConfig,
    AlternativesDPOTrainer,
    PreferenceTrainer,
    RPSADPOConfig,
    RPSADPOTrainer,
    drop_reference,
)

BETA = 0.3
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def pairs() -> Dataset:
    prompts, chosen, rejected = (sequences(12, seed, low=2) for seed in (7, 8, 9))
    return Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected})


def make_trainer(
    build: Any, folder: Path, tokenizer: Any, reference: Any, config: Any = RPSADPOConfig, **settings: Any
) -> Any:
    model = build()
    frozen = {"window": 2, "every": 1} if config is RPSADPOConfig else {}
    args = config(
        **(SFT_SETTINGS | {"max_steps": 6, "beta": BETA, "max_length": None} | frozen | settings),
        output_dir=str(folder),
    )
    trainer: Any = RPSADPOTrainer if config is RPSADPOConfig else AlternativesDPOTrainer
    return trainer(
        model=model,
        ref_model=None if build is make_lora else build(),
        args=args,
        train_dataset=pairs(),
        processing_class=tokenizer,
        fisher=fisher_of(model, reference),
        reference_dataset=reference,
    )


def make_still() -> Any:
    """Without dropout in attention, which TRL leaves on."""
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return model


def log_prob(model: nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, :-1]
    found = logits.log_softmax(-1).gather(-1, torch.tensor((prompt + response)[1:])[:, None])
    return found[len(prompt) - 1 :].sum()


def test_the_gradient_is_that_of_the_pairs_as_they_were_tokenised(
    tmp_path: Path, tokenizer: Any, reference: Any
) -> None:
    """At the start model and reference are one, and the gradient of -log sigmoid(beta x) at x = 0 is -beta x' / 2."""
    trainer = make_trainer(make_still, tmp_path, tokenizer, reference, max_steps=1)
    seen: list[dict[str, torch.Tensor]] = []
    rows: list[Any] = []
    masking, step = trainer.rpsa.on_gradients_complete, trainer.compute_loss
    trainer.rpsa.on_gradients_complete = lambda: (  # type: ignore[method-assign]
        seen.append({n: p.grad.clone() for n, p in trainer.freezer.parameters.items()}),
        masking(),
    )
    trainer.compute_loss = lambda model, inputs, **kw: (rows.append(inputs), step(model, inputs, **kw))[1]  # type: ignore[method-assign]
    trainer.train()

    twin = make_still()
    margin: Any = 0.0
    for batch in rows:
        half = len(batch["input_ids"]) // 2
        for row in range(half):
            sides = []
            for at in (row, half + row):
                length = int(batch["attention_mask"][at].sum())
                ids = batch["input_ids"][at][:length].tolist()
                start = length - int(batch["completion_mask"][at].sum())
                sides.append(log_prob(twin, ids[:start], ids[start:]))
                known = {(tuple(p["prompt_ids"]), tuple(p[c])) for p in pairs() for c in COLUMNS[1:]}
                assert (tuple(ids[:start]), tuple(ids[start:])) in known
            margin = margin + sides[0] - sides[1]
    examples = sum(len(batch["input_ids"]) // 2 for batch in rows)
    assert examples == 4
    (-BETA * margin / 2 / examples).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(seen[0][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("build", [make_model, make_lora], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"frozen_ratio": 0.6}, {"frozen_ratio": 0.6, "compact": True}, {"precompute_ref_log_probs": True}],
    ids=["dynamic", "constant", "compact", "precomputed"],
)
def test_nothing_frozen_moves_and_a_resumed_run_is_the_same(
    build: Any, settings: Any, tmp_path: Path, tokenizer: Any, reference: Any
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole = make_trainer(build, tmp_path / "whole", tokenizer, reference, **saved, **settings)
    whole.train()
    report = whole.rpsa.report()
    assert report["frozen_elements_moved"] == 0
    assert report["frozen_element_steps_checked"] > 500
    assert any(group["changed"] > 0 for group in report["drift"]["groups"].values())
    again = make_trainer(build, tmp_path / "again", tokenizer, reference, **saved, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, weights in trainable_parameters(whole.model).items():
        assert torch.equal(weights, trainable_parameters(again.model)[name]), name


def test_an_adapter_is_saved_without_the_one_it_is_compared_with(
    tmp_path: Path, tokenizer: Any, reference: Any
) -> None:
    trainer = make_trainer(make_lora, tmp_path, tokenizer, reference, max_steps=1)
    trainer.train()
    drop_reference(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    assert not any(path.is_dir() for path in (tmp_path / "final").iterdir())
    metadata = json.loads((tmp_path / "final" / "rpsa_metadata.json").read_text())
    assert metadata["training"]["parameters"] == sum(p.numel() for p in make_lora().parameters())
    assert (
        f"RPSADPOTrainer (beta {BETA}), 1 optimizer steps" in (tmp_path / "final" / "README.md").read_text()
    )


def test_an_alternative_to_freezing(tmp_path: Path, tokenizer: Any, reference: Any) -> None:
    def distance(strength: float) -> float:
        settings = {"penalty": "fisher", "penalty_strength": strength, "learning_rate": 1e-3}
        trainer = make_trainer(make_model, tmp_path, tokenizer, reference, AlternativesDPOConfig, **settings)
        trainer.train()
        start = make_model()
        moved = zip(trainer.model.parameters(), start.parameters(), strict=True)
        return float(sum(((a - b) ** 2).sum() for a, b in moved))

    assert distance(1e6) < 0.9 * distance(1e-6)


def test_text_is_tokenised_by_trl_as_ever(tmp_path: Path, tokenizer: Any) -> None:
    text = Dataset.from_list([{"prompt": "w2 w3", "chosen": " w4", "rejected": " w5"}] * 4)
    args = DPOConfig(**SFT_SETTINGS, output_dir=str(tmp_path))
    found = [
        of(
            model=LlamaForCausalLM(make_model().config),
            ref_model=make_model(),
            args=args,
            train_dataset=text,
            processing_class=tokenizer,
        ).train_dataset[0]
        for of in (DPOTrainer, PreferenceTrainer)
    ]
    assert found[0] == found[1]
    assert found[0]["prompt_ids"] == [2, 3]


# Data


def said(thought: str, answer: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


YES, NO = said("It may be done.", "Here it is."), said("This would do harm.", "I will not.")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": NO, "rejected": YES},
        {"question": "p", "chosen": NO, "rejected": YES, "score": 1},
        {"prompt": [turn("user", "p")], "chosen": [turn("assistant", NO)], "rejected": [turn("assistant", YES)]},
        {"chosen": [turn("user", "p"), turn("assistant", NO)], "rejected": [turn("user", "p"), turn("assistant", YES)]},
        {"prompt": "p", "chosen": [turn("user", "p"), turn("assistant", NO)], "rejected": YES},
    ],
    ids=["text", "question", "chats", "whole chats", "both"],
)  # fmt: skip
def test_pairs_as_they_are_published(row: dict[str, Any], tmp_path: Path) -> None:
    assert load_preferences(rows_file(tmp_path, row)) == [Preference("p", NO, YES)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": NO}, "line 1 has no text field 'rejected'"),
        ({"chosen": NO, "rejected": YES}, "line 1 has no text field 'prompt'"),
        ({"prompt": " ", "chosen": NO, "rejected": YES}, "line 1 has an empty prompt"),
        ({"prompt": "p", "chosen": NO, "rejected": NO}, "line 1: chosen and rejected are the same"),
        ({"prompt": "p", "chosen": NO, "rejected": "Here."}, "line 1: rejected: response 'Here.' has no </think>"),
        (
            {"prompt": "p", "chosen": [turn("user", "q"), turn("assistant", NO)], "rejected": YES},
            "line 1: chosen answers another prompt",
        ),
        ({"prompt": "p", "chosen": [turn("user", NO)], "rejected": YES}, "turns user, user"),
        ({"prompt": "p", "chosen": [], "rejected": YES}, "line 1 has turns user: one user"),
    ],
)  # fmt: skip
def test_a_pair_that_is_none_is_one_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match=message) as error:
        load_preferences(rows_file(tmp_path, row))
    assert "\n" not in str(error.value)


def test_pairs_where_examples_are_wanted_are_pointed_to_dpo(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match="pairs of chosen and rejected are for DPO"):
        load_safety_data(rows_file(tmp_path, {"text": "p", "chosen": NO, "rejected": YES}))


def test_pairs_are_rendered_like_examples() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(0))
    examples = preference_examples("balanced", 8, seed=0)
    dataset, counts = tokenize_preferences(examples, tokenizer, None)
    tokens = 0
    for row, one in zip(dataset, examples, strict=True):
        for side, response in (("chosen_ids", one.response), ("rejected_ids", one.rejected)):
            expected = render_example(tokenizer, one.prompt, response, None)
            assert row["prompt_ids"] + row[side] == expected.input_ids
            assert row[side] == [label for label in expected.labels if label != -100]
            tokens += len(row[side])
    assert (counts.examples, counts.truncated, counts.dropped) == (8, 0, 0)
    assert counts.response_tokens == tokens
    shortest = min(len(row["prompt_ids"]) for row in dataset)
    cut, counts = tokenize_preferences(examples, tokenizer, shortest + 1)
    assert counts.dropped == sum(len(row["prompt_ids"]) > shortest for row in dataset) > 0
    assert all(len(row["chosen_ids"]) == len(row["rejected_ids"]) == 1 for row in cut)


def test_tiny_pairs_are_the_tiny_examples_and_what_they_are_not() -> None:
    for kind in ("refusals", "balanced", "answers"):
        found = preference_examples(kind, 16, seed=3)
        assert [(e.prompt, e.response) for e in found] == [
            (e.prompt, e.response) for e in safety_examples(kind, 16, seed=3)
        ]
        for one in found:
            assert ("sorry" in one.response) != ("sorry" in one.rejected)
    training, held = hold_out(found, 0.25, seed=0)
    assert all(isinstance(one, Preference) for one in mix_benign(training, held, 0.1))
