"""Perplexity of training data before training: against a plain loop, and of whose words it is low."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpsa.evaluation.run import model_subject
from rpsa.generation import Sampling
from rpsa.progress import no_progress
from rpsa.recipe.sections import Model, Reference, Safety
from rpsa.safety_data import tokenize_safety_data
from rpsa.self_data.making import SelfDataConfig, make_self_data
from rpsa.self_data.offers import prompts_of
from rpsa.self_data.stored import load_self_data, tokenized
from rpsa.tiny import safety_examples, tiny_model_dir
from rpsa.training.perplexity import response_perplexity

CPU = torch.device("cpu")


def base(number: int = 0) -> tuple[Any, Any]:
    folder = tiny_model_dir(number)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def test_against_a_plain_loop() -> None:
    model, tokenizer = base()
    dataset, _ = tokenize_safety_data(safety_examples("balanced", 10, 0), tokenizer, 24)
    rows = list(dataset)
    losses = []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].detach().double()
        for place, label in enumerate(row["labels"]):
            if label != -100:
                losses.append(-logits[place - 1].log_softmax(dim=0)[label].item())
    expected = math.exp(sum(losses) / len(losses))
    model.train()
    before = torch.get_rng_state()
    for batch_size in (1, 3, 64):
        assert response_perplexity(model, rows, CPU, batch_size) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_models_own_words_are_the_least_foreign(tmp_path: Path) -> None:
    model, tokenizer = base()
    settings = Safety(data="self", prompts="tiny", benign="tiny", n=48)
    subject = model_subject("tiny:0", Model(), Reference(batch_size=64))
    config = SelfDataConfig(Sampling(max_new_tokens=48, seed=0), "", 8)
    make_self_data(subject, prompts_of(settings, 0), config, tmp_path, no_progress)
    own, _ = tokenized(load_self_data(tmp_path), None)
    found = {"self": response_perplexity(model, list(own), CPU, 16)}
    for kind in ("refusals", "balanced"):
        dataset, _ = tokenize_safety_data(safety_examples(kind, 48, 0), tokenizer, None)  # type: ignore[arg-type]
        found[kind] = response_perplexity(model, list(dataset), CPU, 16)
    assert 1 <= found["self"] < min(found["refusals"], found["balanced"]), found
