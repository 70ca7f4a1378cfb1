"""The model card and its metadata: what they say is what the trainer did, and every saved or pushed model has them."""

import copy
import json
import math
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetInfo
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import small_runs
from helpers import trl_runs as t
from helpers.paths import ROOT
from helpers.trl_runs import RPSADPOConfig, RPSADPOTrainer
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.parameters import fingerprint, trainable_parameters
from rpsa.pipeline import run, verify
from rpsa.pipeline.reporting import estimated
from rpsa.reference import ReferenceDataset
from rpsa.training.card import (
    CARD,
    METADATA,
    Measured,
    add_results,
    card_with_results,
    render_card,
    write_card,
)
from rpsa.training.metadata import CardNames, _license, hub_id, model_metadata, public_name
from rpsa.training.trainer import AUDIT_FILE, RPSATrainer

RESULTS = Measured(
    reasoning={"mean": 0.5, "aime24": 0.5},
    asr={"strongreject": 0.125, "mean": 0.125},
    over_refusal={"xstest": 0.04},
    refused=0.01,
    truncated=0.2,
    judge="some-judge",
    samples=1234,
)
ORIGINAL = replace(RESULTS, reasoning={"aime24": 0.6, "mean": 0.6}, asr={"strongreject": 0.9, "mean": 0.9})


@pytest.fixture(scope="module")
def pieces() -> SimpleNamespace:
    return SimpleNamespace(
        tokenizer=t.word_tokenizer(),
        data=t.safety_rows(),
        reference=t.reference_traces(),
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def trainer_of(pieces: Any, folder: Path, model: Any = None, **settings: Any) -> RPSATrainer:
    args = t.config(folder, **settings)
    return t.make_trainer(model or t.make_model(), args, pieces.data, pieces.tokenizer, pieces.reference)


def trained(pieces: Any, folder: Path, model: Any = None, **settings: Any) -> RPSATrainer:
    trainer = trainer_of(pieces, folder, model, **settings)
    trainer.train()
    return trainer


def read(folder: Path) -> tuple[ModelCard, dict[str, Any]]:
    return ModelCard.load(folder / CARD), json.loads((folder / METADATA).read_text())


def test_a_saved_model_carries_what_its_trainer_did(pieces: Any, tmp_path: Path) -> None:
    trainer = trained(pieces, tmp_path, weight_decay=0.03)
    trainer.save_model(str(tmp_path / "model"))
    card, facts = read(tmp_path / "model")
    audit = json.loads((tmp_path / "model" / AUDIT_FILE).read_text())

    assert card.data.library_name == "transformers"
    assert {"rpsa", "safety-alignment", "sft", "trl"} <= set(card.data.tags)
    assert card.data.model_name == "model"

    assert facts["freezing"] == {
        "frozen_ratio": "dynamic",
        "window": 2,
        "every": 1,
        "sigma_scale": 2.0,
        "mask": "fisher",
        "exact": True,
        "compact": False,
        "frozen_moments": "zero",
        "zero_fisher": "trainable",
        "last_ratio": trainer.freezer.frozen_ratio,
        "elements": sum(p.numel() for p in trainer.freezer.parameters.values()),
        "nonzero": trainer.fisher.nonzero,
        "frozen_fraction": sum(trainer.freezer.frozen_counts().values())
        / sum(p.numel() for p in trainer.model.parameters()),
    }
    ks = [entry["k"] for entry in trainer.rpsa.trajectory]
    assert facts["trajectory"]["measurements"] == 8
    assert facts["trajectory"]["k"] == {"min": min(ks), "median": median(ks), "max": max(ks)}
    assert facts["trajectory"]["share_k_0"] == ks.count(0) / 8
    assert facts["trajectory"]["share_k_1"] == ks.count(1) / 8
    assert ks.count(0) != ks.count(1)
    assert facts["audit"]["frozen_elements_moved"] == 0
    assert facts["audit"]["frozen_element_steps_checked"] == audit["frozen_element_steps_checked"] > 1000
    assert facts["audit"]["steps"] == 8
    estimation = trainer.fisher.manifest["estimation"]
    for name in ("samples", "tokens", "estimator", "probes", "split_half"):
        assert facts["fisher"][name] == estimation[name]
    assert facts["fisher"]["fingerprint"] == fingerprint(trainer.fisher.scores)
    assert facts["reference"]["traces"] == len(pieces.reference.traces)
    assert facts["safety_data"]["examples"] == len(pieces.data)
    assert facts["training"]["batch_size"] == 4
    assert facts["training"]["weight_decay"] == 0.03
    assert facts["training"]["steps"] == 8
    assert facts["results"] is None

    for said in (
        f"{facts['audit']['frozen_element_steps_checked']:,} element-steps checked",
        "0 frozen elements moved",
        f"k was {min(ks):.3f} to {max(ks):.3f}, median {median(ks):.3f}",
        f"it was 0 in {ks.count(0) / 8:.1%} and 1 in {ks.count(1) / 8:.1%}",
        f"Frozen in the end: {facts['freezing']['frozen_fraction']:.2%}",
        "weight decay 0.03",
        f"{estimation['samples']} samples with {estimation['tokens']} response tokens",
        facts["reference"]["sha256"],
        f"24 examples, SHA-256 of the rows as trained on `{facts['safety_data']['sha256']}`",
        "Nothing was measured when this card was written",
        "An attack success rate is not safety",
    ):
        assert said in card.text
    for unsaid in ("never left 0.5", "gradients only", "LoRA", "unfinished", "control", str(tmp_path)):
        assert unsaid not in card.content


# Where metadata have None by their own documentation
NOTHING: list[tuple[str, ...]] = [
    ("freezing",), ("trajectory",), ("audit",), ("fisher",), ("reference",), ("weights_fingerprint",),
    ("fisher", "samples"), ("fisher", "tokens"), ("fisher", "scope"), ("fisher", "split_half"),
    ("fisher", "lora_a_nonzero"), ("fisher", "weights_fingerprint"), ("fisher", "data_fingerprint"),
    *(("fisher", "split_half", k) for k in ("0.01", "0.1", "0.5", "0.6")),
    *(("reference", name) for name in ("sampled_from", "problems", "problems_sha256", "temperature", "top_p",
                                       "max_new_tokens", "only_correct")),
    ("base_model", "hub_id"), ("base_model", "revision"),
    ("safety_data", "hub_id"), ("safety_data", "examples"), ("safety_data", "sha256"),
    *(("training", name) for name in ("best_step", "autocast", "max_length", "loss", "eval_loss", "nonfinite")),
    ("alternatives",),
]  # fmt: skip


@pytest.fixture(scope="module")
def facts_of_a_run(pieces: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer = trained(pieces, tmp_path_factory.mktemp("run"), max_steps=2)
    facts = model_metadata(trainer, CardNames(model="some", base="org/base", dataset="org/data", rehearsed=3))
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


@pytest.mark.parametrize("nothing", NOTHING, ids="-".join)
def test_what_may_be_missing_may_be_missing(nothing: tuple[str, ...], facts_of_a_run: dict[str, Any]) -> None:
    facts = copy.deepcopy(facts_of_a_run)
    *path, last = nothing
    inner = facts
    for name in path:
        inner = inner[name]
    inner[last] = None
    card = render_card(facts)
    assert "## Limits" in card
    assert "None" not in card


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.5, False), (0.97, True)])
def test_a_card_says_that_the_data_were_refusals_alone(
    share: float | None, said: bool, facts_of_a_run: dict[str, Any]
) -> None:
    facts = copy.deepcopy(facts_of_a_run)
    facts["safety_data"]["refusing"] = share
    assert ("Refusals alone: 97% of the examples refuse." in render_card(facts)) == said


def test_one_trace_and_a_few_elements_have_no_halves(pieces: Any, tmp_path: Path) -> None:
    reference = ReferenceDataset(pieces.reference.traces[:1])
    model = t.make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.norm.weight")
    for fisher in (t.fisher_of(t.make_model(), reference), t.fisher_of(model, pieces.reference)):
        few = len(fisher) == 1
        shares = fisher.manifest["estimation"]["split_half"]
        assert shares["0.01"] is None
        assert few or set(shares.values()) == {None}
        args = t.config(tmp_path / str(few), max_steps=1)
        trainer = t.make_trainer(
            model if few else t.make_model(), args, pieces.data, pieces.tokenizer, reference, fisher=fisher
        )
        trainer.train()
        trainer.save_model()
        card, facts = read(tmp_path / str(few))
        assert facts["fisher"]["split_half"] == shares
        known = [share for share in shares.values() if share is not None]
        said = f"{known[0]:.3f} for the top" if known else "not known"
        assert f"Agreement of its two halves (chance is the share itself): {said}" in card.text
        assert "0.01: not known" in estimated(fisher.manifest["estimation"])


def test_virtual_tokens_have_no_rank_and_no_targets(pieces: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model: Any = get_peft_model(
        t.make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    trained(pieces, tmp_path, model, max_steps=2).save_model()
    card, facts = read(tmp_path)
    assert "- Adapter: PROMPT_TUNING.\n" in card.text
    assert facts["adapter"]["r"] is None
    assert facts["audit"]["frozen_elements_moved"] == 0


def test_the_mean_frozen_fraction_is_that_of_the_steps(pieces: Any, tmp_path: Path) -> None:
    trainer = trainer_of(pieces, tmp_path)
    masked = trainer.rpsa.on_gradients_complete
    fractions = []

    def record() -> None:
        masked()
        counts = trainer.freezer.frozen_counts()
        fractions.append(sum(counts.values()) / sum(p.numel() for p in trainer.freezer.parameters.values()))

    trainer.rpsa.on_gradients_complete = record  # type: ignore[method-assign]
    trainer.train()
    trainer.save_model()
    assert len(set(fractions)) > 1
    assert f"{sum(fractions) / len(fractions):.2%} on average over the steps" in read(tmp_path)[0].text


def test_the_fingerprint_is_that_of_the_weights_on_disk(pieces: Any, tmp_path: Path) -> None:
    trainer = trained(pieces, tmp_path, max_steps=2)
    trainer.save_model()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _, facts = read(tmp_path)
    assert facts["weights_fingerprint"] == fingerprint(loaded.named_parameters())
    assert facts["fisher"]["weights_fingerprint"] == fingerprint(t.make_model().named_parameters())


def test_a_lora_adapters_card_is_ours_and_not_pefts(pieces: Any, tmp_path: Path) -> None:
    base = t.make_model()
    base.config._name_or_path = "some-org/some-base"
    trained(pieces, tmp_path, t.make_lora(base)).save_model()
    card, facts = read(tmp_path)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "some-org/some-base"
    assert {"rpsa", "lora", "base_model:adapter:some-org/some-base", "trl"} <= set(card.data.tags)
    assert (facts["adapter"]["r"], facts["adapter"]["target_modules"]) == (4, ["down_proj", "up_proj"])
    assert facts["training"]["trainable_parameters"] < facts["training"]["parameters"] / 2
    assert "only elements of B have any and could be frozen by it; A always trained" in card.text
    assert "AutoPeftModelForCausalLM" in card.text
    assert "[some-org/some-base](https://huggingface.co/some-org/some-base)" in card.text
    assert "Framework versions" not in card.text


def test_lora_with_fisher_in_a_is_not_said_to_freeze_b_alone(pieces: Any, tmp_path: Path) -> None:
    model = t.make_lora()
    scores = {name: torch.rand(p.shape) + 0.1 for name, p in trainable_parameters(model).items()}
    args = t.config(tmp_path, max_steps=1)
    trainer = t.make_trainer(
        model, args, pieces.data, pieces.tokenizer, pieces.reference, fisher=FisherDiagonal(scores)
    )
    trainer.train()
    trainer.save_model()
    card, facts = read(tmp_path)
    assert facts["fisher"]["lora_a_nonzero"] is True
    assert "could be frozen by it" not in card.text
    assert f"Scores of unknown origin, with the fingerprint `{fingerprint(scores)}`" in card.text


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({"gradient_only": True}, "weight decay and momentum still moved them", "bit-identical"),
        ({"frozen_ratio": 0.6}, "constant, 0.6 of the elements", "measurements"),
        ({"window": 20}, "k never left 0.5 in 8 measurements", "dynamic and stayed"),
        ({"mask": "random"}, "`random`, a control", "(RPSA)."),
        ({"audit": False}, "Audit: none was kept", "elements moved in"),
        ({"zero_fisher": "frozen"}, "Elements with F = 0: frozen", "F = 0: trainable"),
    ],
)
def test_settings_are_said_in_words(
    settings: Any, said: str, unsaid: str, pieces: Any, tmp_path: Path
) -> None:
    trained(pieces, tmp_path, **settings).save_model()
    card, facts = read(tmp_path)
    assert said in card.text
    assert unsaid not in card.text
    if settings == {"gradient_only": True}:
        assert facts["audit"]["frozen_elements_moved"] > 0
        assert f"{facts['audit']['frozen_elements_moved']:,} frozen elements moved" in card.text


def test_before_training_nothing_is_claimed(pieces: Any, tmp_path: Path) -> None:
    trainer_of(pieces, tmp_path).save_model()
    card, facts = read(tmp_path)
    assert facts["freezing"]["frozen_fraction"] is None
    assert "saved before any training" in card.text
    assert "Frozen in the end" not in card.text


def test_dpo_through_the_mixin_has_a_card(pieces: Any, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f"w{30 - i} w3", "rejected": f"w{i + 2} w5"}
        for i in range(2, 14)
    ]
    model = t.make_model()
    settings = t.SFT_SETTINGS | {"max_steps": 2, "window": 2, "every": 1}
    trainer = RPSADPOTrainer(
        model=model,
        ref_model=t.make_model(),
        args=RPSADPOConfig(**settings, output_dir=str(tmp_path)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=pieces.tokenizer,
        fisher=t.fisher_of(model, pieces.reference),
        reference_dataset=pieces.reference,
    )
    trainer.train()
    trainer.save_model()
    card, facts = read(tmp_path)
    assert {"rpsa", "dpo"} <= set(card.data.tags)
    assert facts["training"]["trainer"] == "RPSADPOTrainer"
    assert facts["safety_data"]["examples"] == 12
    assert len(facts["safety_data"]["sha256"]) == 64


def test_plain_fine_tuning_has_a_smaller_card(pieces: Any, tmp_path: Path) -> None:
    args = SFTConfig(**(t.SFT_SETTINGS | {"max_steps": 2}), output_dir=str(tmp_path))
    trainer = SFTTrainer(
        model=t.make_model(), args=args, train_dataset=pieces.data, processing_class=pieces.tokenizer
    )
    trainer.train()
    names = CardNames(model="plain", base="tiny:0", dataset=str(tmp_path / "safety.jsonl"))
    write_card(tmp_path, model_metadata(trainer, names))
    card, facts = read(tmp_path)
    assert "This is `tiny:0`, fine-tuned on safety data. No parameter was frozen." in card.text
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "rpsa" not in card.data.tags
    assert "Safety data: `safety.jsonl`, 24 examples" in card.text
    assert "What was frozen" not in card.text
    assert "was not protected" not in card.text
    assert facts["freezing"] is facts["fisher"] is facts["trajectory"] is facts["audit"] is None


# Pushing


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The text files of each commit that the hub would have got."""
    commits: list[dict[str, str]] = []

    def upload_folder(self: Any, *, folder_path: str, ignore_patterns: Any = None, **_: Any) -> None:
        names = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        kept = filter_repo_objects(names, ignore_patterns=ignore_patterns)
        commits.append({n: (Path(folder_path) / n).read_text() for n in kept if n.endswith((".md", ".json"))})

    def create_repo(self: Any, repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"someone/{repo_id.rpartition('/')[2]}")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return commits


def test_what_push_to_hub_commits(pieces: Any, tmp_path: Path, pushed: list[dict[str, str]]) -> None:
    trainer = trained(pieces, tmp_path / "out", hub_model_id="someone/safe-model")
    trainer.push_to_hub(dataset_name="UCSC-VLAA/STAR-1", tags="mine", license="apache-2.0", language="en")
    [commit] = pushed
    card = ModelCard(commit[CARD])
    assert card.data.model_name == "safe-model"
    assert card.data.datasets == ["UCSC-VLAA/STAR-1"]
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert {"mine", "rpsa", "trl"} <= set(card.data.tags)
    assert "## What was frozen" in card.text
    assert json.loads(commit[METADATA])["audit"]["frozen_elements_moved"] == 0
    assert AUDIT_FILE in commit


def test_saving_with_push_to_hub_pushes_the_card(
    pieces: Any, tmp_path: Path, pushed: list[dict[str, str]]
) -> None:
    trainer = trained(pieces, tmp_path / "out", push_to_hub=True, hub_strategy="end")
    trainer.save_model()
    assert "## What was frozen" in pushed[-1][CARD]


def test_a_push_in_mid_training_says_that_it_is_unfinished(
    pieces: Any, tmp_path: Path, pushed: list[dict[str, str]]
) -> None:
    settings = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 3, "hub_always_push": True}

    def finished(self: Any) -> bool:
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.PushInProgress.is_done", finished)
        patch.setattr("transformers.trainer.PushInProgress.wait_until_done", lambda self: None)
        trained(pieces, tmp_path / "out", **settings)
    assert "3 optimizer steps of 8 planned: unfinished" in pushed[0][CARD]
    checkpoint, _ = read(tmp_path / "out" / "checkpoint-6")
    assert "6 optimizer steps of 8 planned: unfinished" in checkpoint.text


def test_the_best_checkpoint_is_named(pieces: Any, tmp_path: Path) -> None:
    args = t.config(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.5,
    )
    trainer = t.make_trainer(
        t.make_model(),
        args,
        pieces.data,
        pieces.tokenizer,
        pieces.reference,
        eval_dataset=pieces.data.select(range(4)),
    )
    trainer.train()
    trainer.save_model()
    card, facts = read(tmp_path)
    assert facts["training"]["best_step"] == trainer.state.best_global_step < 6
    assert f"the weights are those of step {trainer.state.best_global_step}" in card.text


# Results


def test_results_are_added_and_replaced(pieces: Any, tmp_path: Path) -> None:
    trainer = trained(pieces, tmp_path)
    trainer.save_model()
    before = (tmp_path / CARD).read_text()
    first = card_with_results(tmp_path, RESULTS)
    assert (tmp_path / CARD).read_text() == before
    assert "| Reasoning, correct ↑: aime24 | 50.0 |\n| Reasoning, correct ↑: mean | 50.0 |" in first
    assert "Judge: `some-judge`. 1,234 responses." in first
    assert "Nothing was measured" not in first
    assert "Not measured" not in first
    head, _, tail = before.partition("## Results")
    assert first.startswith(head)
    assert first.endswith("## Limits" + tail.partition("## Limits")[2])

    (tmp_path / CARD).write_text(first.replace("## Limits\n", "## Limits\n\nBy hand.\n"))
    second = card_with_results(tmp_path, replace(RESULTS, asr={}, tax=0.13), ORIGINAL)
    assert "| Reasoning, correct ↑: aime24 | 50.0 | 60.0 |" in second
    assert "Safety Tax Rate (drop in reasoning per drop in attack success, lower is better): 0.13." in second
    assert "Not measured: attack success." in second
    assert second.count("## Results") == 1
    assert "By hand." in second
    assert ModelCard(second).data.to_dict() == ModelCard(before).data.to_dict()


def test_results_stay_as_long_as_the_weights_do(
    pieces: Any, tmp_path: Path, pushed: list[dict[str, str]]
) -> None:
    trainer = trained(pieces, tmp_path)
    trainer.save_model()
    add_results(tmp_path, RESULTS, ORIGINAL)
    _, facts = read(tmp_path)
    assert facts["results"] == {"model": RESULTS.to_json(), "original": ORIGINAL.to_json()}
    written = card_with_results(tmp_path, RESULTS, ORIGINAL)
    assert (tmp_path / CARD).read_text() == written

    trainer.push_to_hub(dataset_name="UCSC-VLAA/STAR-1")
    assert "| Reasoning, correct ↑: aime24 | 50.0 | 60.0 |" in pushed[-1][CARD]
    assert json.loads(pushed[-1][METADATA])["results"] == facts["results"]

    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    trainer.save_model()
    card, facts = read(tmp_path)
    assert facts["results"] is None
    assert "Nothing was measured" in card.text


def test_a_folder_without_a_card_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match=r"README\.md: no such file; only models that were saved with a card"):
        add_results(tmp_path, RESULTS)


# In a run


@pytest.mark.integration
def test_a_run_gives_every_aligned_model_a_card(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(small_runs.RECIPE)
    folder = run(small_runs.small(recipe, "matrix.methods=[original, fft, lora+rpsa]"))
    plain, _ = read(folder / "align" / "fft" / "tiny-0" / "seed0")
    model = folder / "align" / "lora+rpsa" / "tiny-0" / "seed0"
    frozen, facts = read(model)
    assert plain.data.model_name == "fft-tiny-0-seed0"
    assert "This is `tiny:0`, fine-tuned on safety data. No parameter was frozen." in plain.text
    assert "This is a LORA adapter for `tiny:0`" in frozen.text
    assert "responses to problems of `tiny`, sampled from `tiny:0`" in frozen.text
    assert "Safety data: `tiny:refusals`, 16 examples" in frozen.text
    assert facts["reference"]["temperature"] == 0.6
    assert str(tmp_path) not in (model / CARD).read_text() + (model / METADATA).read_text()

    def attacks(cell: str) -> dict[str, Any]:
        found = json.loads((folder / "evaluate" / cell / "results.json").read_text())
        return {name: one["attack_success_rate"] for name, one in found["sets"]["attack"].items()}

    card = (folder / "report" / "cards" / "lora+rpsa" / "tiny-0" / "seed0" / CARD).read_text()
    rate, before = attacks("lora+rpsa/tiny-0/seed0")["direct"], attacks("original/tiny-0")["direct"]
    assert f"| Attack success ↓: direct | {100 * rate:.1f} | {100 * before:.1f} |" in card
    verify(folder)

    page = (ROOT / "docs" / "model-card.md").read_text()
    [example] = re.findall(r"````markdown\n(.*?)````", page, re.DOTALL)
    assert re.findall(r"^#+ .*", example, re.M)[1:] == re.findall(r"^#+ .*", card, re.M)[1:]
    assert example.partition("## Limits")[2].strip().splitlines() == [
        line for line in card.partition("## Limits")[2].strip().splitlines() if "LoRA" not in line
    ]


# Names


def test_a_base_in_a_folder_gives_its_name_and_license_and_no_path(pieces: Any, tmp_path: Path) -> None:
    base = tmp_path / "secret" / "my-base"
    t.make_model().save_pretrained(base)
    (base / CARD).write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# Base\n")
    model = LlamaForCausalLM.from_pretrained(base)
    trained(pieces, tmp_path / "out", model, max_steps=1).save_model()
    card, facts = read(tmp_path / "out")
    assert facts["base_model"]["name"] == "my-base"
    assert card.data.base_model is None
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "mine", "LICENSE")
    assert "secret" not in (tmp_path / "out" / CARD).read_text() + json.dumps(facts)


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path.startswith("/api/models/org/licensed")
        body = b'{"id": "org/licensed", "cardData": {"license": "mit"}}' if found else b"{}"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_license_of_a_base_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{server.server_port}")
        assert _license("org/licensed") == {"license": "mit"}
        assert _license("org/missing") == {}
        server.shutdown()
    assert _license("org/unreachable") == {}
    assert _license("no such: name") == {}


def test_a_run_that_diverged_is_saved_with_its_card(pieces: Any, tmp_path: Path) -> None:
    trainer = trained(pieces, tmp_path, max_steps=2)
    trainer.state.log_history.append({"loss": math.nan})
    trainer.save_model()
    card, facts = read(tmp_path)
    assert facts["training"]["loss"] == "nan"
    assert "Last loss: training nan." in card.text


def test_where_a_dataset_was_downloaded_from(pieces: Any, tmp_path: Path) -> None:
    info = DatasetInfo(download_checksums={"hf://datasets/UCSC-VLAA/STAR-1@0a1b2c/STAR-1.json": {}})
    data = Dataset(pieces.data.data, info=info)
    trainer = t.make_trainer(t.make_model(), t.config(tmp_path), data, pieces.tokenizer, pieces.reference)
    trainer.save_model()
    card, _ = read(tmp_path)
    assert card.data.datasets == ["UCSC-VLAA/STAR-1"]
    assert "(https://huggingface.co/datasets/UCSC-VLAA/STAR-1), 24 examples" in card.text


def test_another_row_is_another_hash(pieces: Any, tmp_path: Path) -> None:
    def digest(data: Dataset) -> str:
        trainer = t.make_trainer(t.make_model(), t.config(tmp_path), data, pieces.tokenizer, pieces.reference)
        return str(model_metadata(trainer, CardNames())["safety_data"]["sha256"])

    rows = pieces.data.to_list()
    changed = [*rows[:-1], {**rows[-1], "input_ids": [*rows[-1]["input_ids"][:-1], 7]}]
    assert digest(pieces.data) == digest(Dataset.from_list(rows)) != digest(Dataset.from_list(changed))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model-1.5B", "org/model-1.5B"),
        ("gpt2", "gpt2"),
        ("tiny:0", None),
        ("/models/x", None),
        ("../x", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
    ],
)
def test_hub_ids(name: str | None, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_public_names(tmp_path: Path) -> None:
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("/gone/model") == "model"
    assert public_name("org/model") == "org/model"


@pytest.mark.parametrize("name", ["a\n---\nevil: true\n# b", "a|b `c` <d> [e](f) \x1b[31m", "'\"{}: - !!x"])
def test_names_in_a_card_are_nothing_but_text(pieces: Any, tmp_path: Path, name: str) -> None:
    trainer = trained(pieces, tmp_path / "out")
    names = CardNames(model=name, base=name, dataset=name, problems=name)
    write_card(tmp_path, model_metadata(trainer, names))
    add_results(tmp_path, Measured(reasoning={name: 0.5, "mean": 0.5}, judge=name))
    card, _ = read(tmp_path)
    assert card.data.model_name == name
    assert "evil" not in card.data.to_dict()
    assert set(filter(lambda c: not c.isprintable(), card.text)) <= {"\n"}
    assert len([line for line in card.text.splitlines() if line.startswith("# ")]) == 1
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
