"""What the reviewers of the paper asked, measured on three tiny models: the tables of docs/reviewers.md.

    python benchmarks/reviewers.py run [PART ...]    families, factors, scores, dynamic, preferences (default: all)
    python benchmarks/reviewers.py write             tables and figure from reviewers.jsonl alone

Each finished run is a line of `reviewers.jsonl` beside this file, and is not run again. Training is that of
`recipes/tiny/demo.yaml`, but for what a run says otherwise; every run is evaluated on 60 held-out items of each set.
`tests/house/test_numbers_in_docs.py` holds the page to `reviewers.jsonl`.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from rpsa import RPSAArguments, RPSAConfig, RPSAMixin, RPSATrainer
from rpsa.analysis.anatomy import overlap
from rpsa.analysis.perturbation import PerturbationConfig, effects, perturb
from rpsa.answers import grade
from rpsa.artifacts import appending, folder_name, recover_lines
from rpsa.chat import render_prompt
from rpsa.evaluation.statistics import Interval, mean_interval
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.fisher.estimators import FisherConfig, estimate_fisher
from rpsa.freezing.masks import as_many, control_scores
from rpsa.freezing.ratio import ConflictRatio, FrozenRatio
from rpsa.generation.transformers import TransformersGenerator
from rpsa.parameters import trainable_parameters
from rpsa.pipeline.alignment import training_data
from rpsa.pipeline.groundwork import reference_problems
from rpsa.recipe import Cell, load_recipe
from rpsa.recipe.problems import installed_names
from rpsa.reference import ReferenceConfig, ReferenceDataset, Trace, build_reference
from rpsa.thought import THINK
from rpsa.tiny import FAMILIES, REFERENCES, evaluation_prompts, safety_examples, score, tiny_model_dir
from rpsa.tiny.families import WRAPS_IN_TRAINING
from rpsa.tiny.requests import REFUSAL, RequestKind, phrasings
from rpsa.tiny.train import measure, respond

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("reviewers.jsonl")
PAGE = ROOT / "docs" / "reviewers.md"
FIGURE = ROOT / "docs" / "images" / "reviewers-dynamic.png"
WORK = ROOT / "runs" / "reviewers"

BASES = ("tiny:0", "tiny:1", "tiny:2")
K = 0.6
LESS = 0.2
"""A k so small that it matters what it is spent on."""
WINDOW, EVERY = 10, 2
PINNED = range(30, 60)
"""The steps at which k is held at 1, of 96."""
SCORE_SEEDS = (0, 1)
DYNAMIC_SEEDS = (0, 1, 2)
DPO_SEEDS = (0, 1)
SETTLED = 20
"""From this step on k is dynamic; the learning rate has been warmed up."""
FACTORS = (0.5, 0.7, 0.8, 0.9, 1.1, 1.2)
SELECTIONS = ("fisher", "random", "random_per_tensor")


@dataclass(frozen=True)
class Run:
    """One training run; `reference` and `ranking` matter where it freezes.

    `method` is original (no training), fft, constant, dynamic, pinned, dpo or dpo+constant.
    """

    method: str
    base: str
    seed: int = 0
    rate: float = 2e-3
    reference: str = "tiny"
    ranking: str = "fisher"
    k: float = 0.6


# Runs


def family_runs() -> Iterator[Run]:
    for base in BASES:
        yield Run("original", base)
        for rate in (2e-3, 3e-3):
            yield Run("fft", base, rate=rate)
        for source in REFERENCES:
            yield Run("constant", base, rate=3e-3, reference=source)
        yield Run("constant", base, rate=3e-3, ranking="random")
        for family in FAMILIES:
            yield Run("constant", base, rate=3e-3, reference=f"tiny:{family}", k=LESS)
        yield Run("constant", base, rate=3e-3, ranking="random", k=LESS)


def score_runs() -> Iterator[Run]:
    for base in BASES:
        for seed in SCORE_SEEDS:
            yield Run("fft", base, seed)
            for ranking in RANKINGS:
                yield Run("constant", base, seed, ranking=ranking)
            yield Run("constant", base, seed, rate=1e-3, ranking="random")


def dynamic_runs() -> Iterator[Run]:
    for base in BASES:
        for seed in DYNAMIC_SEEDS:
            for method in ("fft", "constant", "dynamic", "pinned"):
                yield Run(method, base, seed)


DPO_RATES = (1e-3, 2e-3)


def preference_runs() -> Iterator[Run]:
    for base in BASES:
        for seed in DPO_SEEDS:
            for rate in DPO_RATES:
                for method in ("dpo", "dpo+constant"):
                    yield Run(method, base, seed, rate=rate)


# What a run is made of


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir(0))


def base_model(base: str) -> Any:
    number = int(base.removeprefix("tiny:"))
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir(number), dtype="float32")


@cache
def cells() -> dict[tuple[str, int], Cell]:
    recipe = load_recipe(
        ROOT / "recipes" / "tiny" / "demo.yaml", ["matrix.methods=[fft]", "matrix.seeds=[0, 1, 2]"]
    )
    return {(cell.base, cell.seed): cell for cell in recipe.cells()}


@cache
def reference_of(base: str, source: str) -> ReferenceDataset:
    return build_reference(
        TransformersGenerator(base_model(base), tokenizer(), 100),
        tokenizer(),
        reference_problems(source, 100, 42),
        ReferenceConfig(max_new_tokens=64),
        WORK / "reference" / folder_name(f"{base} {source}"),
        grade=lambda response, answer: grade(response, answer, "math"),
        identity=base,
    )


@cache
def fisher_of(base: str, source: str) -> FisherDiagonal:
    return fisher_on(base_model(base), reference_of(base, source))


def fisher_on(model: nn.Module, data: ReferenceDataset) -> FisherDiagonal:
    return estimate_fisher(model, data.batches(20, None), FisherConfig(progress=False))


def safety_rows(base: str, seed: int) -> Dataset:
    return training_data(cells()[base, seed], tokenizer(), THINK).dataset


def as_traces(rows: Dataset) -> ReferenceDataset:
    """Safety data in the form of D_ref, whose batches the Fisher and the gradient are taken on."""
    traces = []
    for number, row in enumerate(rows):
        start = sum(label == -100 for label in row["labels"])
        ids = row["input_ids"]
        traces.append(Trace(str(number), ids[:start], ids[start:], "", "stop", None))
    return ReferenceDataset(traces, {"pad_token_id": tokenizer().pad_token_id})


# Other scores: (run, model at its start) -> what is frozen first


def by_fisher(run: Run, model: nn.Module) -> dict[str, Tensor]:
    return fisher_of(run.base, run.reference).scores


def by_size(run: Run, model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().abs() for name, parameter in trainable_parameters(model).items()}


def by_safety_gradient(run: Run, model: nn.Module) -> dict[str, Tensor]:
    """Absolute mean gradient of the loss on the safety data."""
    for batch in as_traces(safety_rows(run.base, run.seed)).batches(32, None):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        (model(**inputs).loss * tokens).backward()
    scores = {name: p.grad.abs() for name, p in trainable_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    return scores


def by_ratio(run: Run, model: nn.Module) -> dict[str, Tensor]:
    """Fisher on D_ref over Fisher on the safety data."""
    of_safety = fisher_on(model, as_traces(safety_rows(run.base, run.seed)))
    return {
        name: scores / of_safety[name].clamp_min(1e-20)
        for name, scores in fisher_of(run.base, run.reference).scores.items()
    }


def by_input(run: Run, model: nn.Module) -> dict[str, Tensor]:
    """|W| times the norm of what it is multiplied with on D_ref (Sun et al., 2024, "A Simple and Effective Pruning
    Approach for Large Language Models"), here compared over the whole model and not within each row of a matrix."""
    squares: dict[str, Any] = defaultdict(float)

    def linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            squares[name] += inputs[0].flatten(0, 1).square().sum(0)

        return hook

    def embedding(name: str) -> Callable[..., None]:
        def hook(module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            squares[name] += inputs[0].flatten().bincount(minlength=module.num_embeddings)[:, None].float()

        return hook

    def norm(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            squares[name] += (output / module.weight).flatten(0, 1).square().sum(0)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            kind = {nn.Linear: linear, nn.Embedding: embedding}.get(type(module), norm)
            handles.append(module.register_forward_hook(kind(f"{name}.weight")))
    with torch.no_grad():
        for batch in reference_of(run.base, run.reference).batches(
            1, None
        ):  # one at a time: no padding is seen
            model(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: p.detach().abs() * squares[name].sqrt() for name, p in trainable_parameters(model).items()}


def at_random(run: Run, model: nn.Module) -> dict[str, Tensor]:
    fisher = fisher_of(run.base, run.reference)
    return control_scores("random", fisher, trainable_parameters(model), run.seed).scores


RANKINGS: dict[str, Callable[[Run, nn.Module], dict[str, Tensor]]] = {
    "fisher": by_fisher,
    "ratio": by_ratio,
    "gradient": by_safety_gradient,
    "size": by_size,
    "input": by_input,
    "random": at_random,
}


# Training


@dataclass
class PinnedRatio(ConflictRatio):
    """Eq. 7, but k is 1 at the steps of `PINNED`; the conflict goes on to be measured and remembered."""

    def update(self, conflict: float) -> float:
        k = super().update(conflict)
        return 1.0 if (len(self.history) - 1) * self.every in PINNED else k


@dataclass
class PinnedConfig(RPSAConfig):
    def ratio(self) -> FrozenRatio:
        return PinnedRatio(self.window, self.every, self.sigma_scale)


@dataclass
class RPSADPOConfig(RPSAArguments, DPOConfig):
    pass


class RPSADPOTrainer(RPSAMixin, DPOTrainer):
    pass


CLASSES: dict[str, tuple[type, type]] = {
    "fft": (SFTTrainer, SFTConfig),
    "constant": (RPSATrainer, RPSAConfig),
    "dynamic": (RPSATrainer, RPSAConfig),
    "pinned": (RPSATrainer, PinnedConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "dpo+constant": (RPSADPOTrainer, RPSADPOConfig),
}


def preference_pairs(seed: int) -> Dataset:
    """A refusal is preferred for a harmful request, the plan that it asks for otherwise; the other one is rejected."""
    kinds: tuple[RequestKind, ...] = ("harmful", "benign", "borderline")
    requests = {
        request.prompt: request
        for kind in kinds
        for request in phrasings(kind, "train", ("", *WRAPS_IN_TRAINING))
    }
    rows = []
    for example in safety_examples("balanced", 256, seed):
        answers = [REFUSAL, requests[example.prompt].compliance]
        chosen, rejected = sorted(answers, key=lambda answer: answer != example.response)
        rows.append(
            {
                "prompt": tokenizer().decode(render_prompt(tokenizer(), example.prompt)),  # ends with <think>
                "chosen": chosen.removeprefix("<think>"),
                "rejected": rejected.removeprefix("<think>"),
            }
        )
    return Dataset.from_list(rows)


def trained(run: Run, folder: str) -> Any:
    """The trainer after training."""
    make, config = CLASSES[run.method]
    transformers.set_seed(run.seed)
    model = base_model(run.base)
    settings = dict(cells()[run.base, run.seed].train) | {"learning_rate": run.rate}
    settings |= {"output_dir": folder, "disable_tqdm": True, "logging_steps": 1}
    given: dict[str, Any] = {}
    if issubclass(make, RPSAMixin):
        moves = run.method in ("dynamic", "pinned")
        settings |= {"frozen_ratio": "dynamic" if moves else run.k, "window": WINDOW, "every": EVERY}
        given["fisher"] = fisher_of(run.base, run.reference)
        given["reference_dataset"] = reference_of(run.base, run.reference)
        if run.ranking != "fisher":
            given["ranking"] = FisherDiagonal(RANKINGS[run.ranking](run, base_model(run.base)))
    is_dpo = issubclass(make, DPOTrainer)
    data = preference_pairs(run.seed) if is_dpo else safety_rows(run.base, run.seed)
    trainer = make(
        model=model,
        args=config(**installed_names(settings, config)),
        train_dataset=data,
        processing_class=tokenizer(),
        **given,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def outcome_of(run: Run) -> dict[str, Any]:
    """Figures of the model, the loss of each step, and k at each measurement."""
    losses, ks, model = [], [], None
    if run.method == "original":
        model = base_model(run.base)
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trained(run, folder)
        model = trainer.model
        losses = [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry]
        if run.method in ("dynamic", "pinned"):
            ks = [round(entry["k"], 3) for entry in trainer.rpsa.trajectory]
    found = asdict(measure(model.eval(), tokenizer(), evaluation_prompts(60)))
    del found["refused"]
    rounded = {part: {name: round(value, 4) for name, value in of.items()} for part, of in found.items()}
    return {"figures": rounded, "losses": losses, "ks": ks}


# Without training


def overlaps(base: str) -> dict[str, Any]:
    """Jaccard index of what two families' Fishers freeze at K, and its value by chance."""
    fishers = {family: fisher_of(base, f"tiny:{family}") for family in FAMILIES}
    found = {(a, b): overlap(fishers[a], fishers[b], K) for a, b in combinations(FAMILIES, 2)}
    return {
        f"{a} {b}": [round(value, 4) for value in (one.jaccard, one.by_chance, one.by_chance_within)]
        for (a, b), one in found.items()
    }


def frozen_by(base: str) -> dict[str, dict[str, float]]:
    """By ranking the share that is frozen at K of the embedding, of each layer and of the head."""
    fisher = fisher_of(base, "tiny")
    found = {}
    for ranking in ("fisher", "ratio"):
        scores = RANKINGS[ranking](Run("constant", base), base_model(base))
        mask = as_many(FisherDiagonal(scores), fisher).mask(K)
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for name, trains in mask.items():
            part = next((f"layer {n + 1}" for n in range(3) if f".layers.{n}." in name), name.split(".")[-2])
            counts[part][0] += int((~trains).sum())
            counts[part][1] += trains.numel()
        found[ranking] = {
            part: round(frozen / total, 4) for part, (frozen, total) in counts.items() if part != "norm"
        }
    return found


def perturbed(base: str) -> list[dict[str, Any]]:
    """Accuracy under each perturbation of 1% of all elements, 30 problems of each family."""
    sets = {family: evaluation_prompts(30)[family] for family in FAMILIES}
    items = [item for part in sets.values() for item in part]

    def evaluate(model: Any, tokenizer: Any) -> dict[str, list[float]]:
        by_family: dict[str, list[float]] = {family: [] for family in FAMILIES}
        for item, response in zip(items, respond(model, tokenizer, [i.prompt for i in items]), strict=True):
            by_family[item.kind].append(float(score(item, response) == "correct"))
        return by_family

    config = PerturbationConfig(factors=FACTORS, selections=SELECTIONS, draws=3)
    store = WORK / "perturb" / f"{folder_name(base)}.jsonl"
    fisher = fisher_of(base, "tiny")
    found = perturb(
        base_model(base), tokenizer(), fisher, evaluate, config, store, {"base": base}, lambda cell: None
    )
    return [
        {
            "selection": effect.selection,
            "factor": effect.factor,
            "change": round(effect.change, 5),
            "draws": [round(draw, 4) for draw in effect.draws],
            "accuracy": round(effect.accuracy["mean"].value, 4),
        }
        for effect in effects(found)
    ]


# Keeping


Results = dict[str, Any]
"""What is known, by the JSON of a run or of what else it is of."""

_DEFAULTS = {field.name: field.default for field in fields(Run)}


def key_of(what: Run | dict[str, Any]) -> str:
    if isinstance(what, Run):
        what = {name: value for name, value in asdict(what).items() if value != _DEFAULTS[name]}
    return json.dumps(what, sort_keys=True)


def kept() -> Results:
    return {key_of(line["of"]): line["found"] for line in recover_lines(RESULTS)} if RESULTS.exists() else {}


def keep(what: Run | dict[str, Any], find: Callable[[], Any]) -> None:
    """Find it and write it down, unless it is there."""
    if key_of(what) not in kept():
        print(key_of(what), flush=True)
        found = find()
        with appending(RESULTS) as append:
            append({"of": json.loads(key_of(what)), "found": found})


def run_parts(parts: Sequence[str]) -> None:
    """First what takes no training, then seed by seed, so that there is something to see of each part."""
    for base in BASES:
        if "families" in parts:
            keep({"overlap": base}, partial(overlaps, base))
        if "scores" in parts:
            keep({"frozen": base}, partial(frozen_by, base))
        if "factors" in parts:
            keep({"perturb": base}, partial(perturbed, base))
    runs = [run for part in parts if part in RUNS for run in RUNS[part]()]
    for run in sorted(dict.fromkeys(runs), key=lambda run: (run.seed, run.k != K)):
        keep(run, partial(outcome_of, run))


RUNS: dict[str, Callable[[], Iterator[Run]]] = {
    "families": family_runs,
    "scores": score_runs,
    "dynamic": dynamic_runs,
    "preferences": preference_runs,
}


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(values: Sequence[float]) -> str:
    """Their mean in points, with its 95% interval over runs."""
    return number([100 * value for value in values], 1)


def rate(values: Sequence[float]) -> str:
    """As `percent`; what of the interval is no rate is cut off."""
    return number([100 * value for value in values], 1, Interval(0.0, 100.0))


def number(values: Sequence[float], digits: int, bounds: Interval | None = None) -> str:
    interval = mean_interval(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    if interval and bounds:
        interval = Interval(max(bounds.low, interval.low), min(bounds.high, interval.high))
    return f"{mean} ({interval.low:.{digits}f} to {interval.high:.{digits}f})" if interval else mean


def pairs(results: Results, runs: Iterable[Run]) -> list[tuple[str, int]]:
    """Bases and seeds; of the seeds those of which every one of `runs` is there."""
    runs = list(runs)
    lacking = {run.seed for run in runs if key_of(run) not in results}
    return [(base, seed) for base in BASES for seed in sorted({run.seed for run in runs} - lacking)]


MEASURES = (
    ("Reasoning ↑", "reasoning", "mean"),
    ("ASR, direct ↓", "asr", "direct"),
    ("ASR, wrapped ↓", "asr", "wrapped"),
    ("Refused benign ↓", "over_refusal", "benign"),
    ("Refused borderline ↓", "over_refusal", "borderline"),
)


def figures(results: Results, runs: Sequence[Run]) -> list[str]:
    """A cell for each of `MEASURES`; the whole table has intervals over the runs."""
    found = [results[key_of(run)]["figures"] for run in runs]
    return [rate([one[part][name] for one in found]) for _, part, name in MEASURES]


def ks_of_families(results: Results) -> list[float]:
    """The values of k of which every run with a family's own Fisher is there."""
    lacking = {run.k for run in family_runs() if key_of(run) not in results}
    return [k for k in (K, LESS) if k not in lacking]


def family_table(results: Results) -> str:
    def row(name: str, **settings: Any) -> list[str]:
        runs = [Run(base=base, **settings) for base in BASES]
        found = [results[key_of(run)]["figures"] for run in runs]
        cells = [[one["reasoning"][family] for one in found] for family in (*FAMILIES, "mean")]
        asr = [statistics.fmean((one["asr"]["direct"], one["asr"]["wrapped"])) for one in found]
        return [name, *(f"{100 * statistics.fmean(cell):.1f}" for cell in (*cells, asr))]

    rows = [row("original", method="original"), row("fft", method="fft", rate=3e-3)]
    for k in ks_of_families(results):
        frozen: dict[str, Any] = {"method": "constant", "rate": 3e-3, "k": k}
        rows.append(row(f"k = {k}, random", **frozen, ranking="random"))
        for source in REFERENCES if k == K else (f"tiny:{family}" for family in FAMILIES):
            rows.append(row(f"k = {k}, `{source}`", **frozen, reference=source))
    return table(["Frozen by", *FAMILIES, "mean", "ASR"], rows)


def own_family(results: Results) -> str:
    """How much better a family fares under its own Fisher than under the other five: one value for each base."""
    sentences = []
    for k in ks_of_families(results):
        gains = []
        for base in BASES:
            runs = {f: Run("constant", base, rate=3e-3, reference=f"tiny:{f}", k=k) for f in FAMILIES}
            of = {family: results[key_of(run)]["figures"]["reasoning"] for family, run in runs.items()}
            gains += [
                statistics.fmean(
                    of[family][family] - statistics.fmean(of[o][family] for o in FAMILIES if o != family)
                    for family in FAMILIES
                )
            ]
        sentences.append(f"at k = {k} {percent(gains)} points")
    return f"A family under its own Fisher against the mean of the five others: {', '.join(sentences)} (3 bases)."


def overlap_table(results: Results) -> str:
    rows = []
    for first in FAMILIES:
        row = [first]
        for second in FAMILIES:
            pair = (
                f"{first} {second}" if FAMILIES.index(first) < FAMILIES.index(second) else f"{second} {first}"
            )
            found = [results[key_of({"overlap": base})].get(pair) for base in BASES]
            row.append("–" if first == second else f"{statistics.fmean(one[0] for one in found):.2f}")
        rows.append(row)
    every = [one for base in BASES for one in results[key_of({"overlap": base})].values()]
    by_chance = [statistics.fmean(one[place] for one in every) for place in (1, 2)]
    return (
        f"{table(['Jaccard', *FAMILIES], rows)}\n\nBy chance: {by_chance[0]:.2f}, and {by_chance[1]:.2f} with each "
        "parameter's own count."
    )


def factor_table(results: Results) -> str:
    found = {base: results[key_of({"perturb": base})] for base in BASES}

    def of(base: str, selection: str, factor: float) -> dict[str, Any]:
        return next(one for one in found[base] if (one["selection"], one["factor"]) == (selection, factor))

    rows = [
        [
            "none",
            *([" / ".join(f"{100 * of(b, 'original', 1.0)['accuracy']:.1f}" for b in BASES)] * 3),
            "–",
            "–",
        ]
    ]
    for factor in FACTORS:
        row = [f"× {factor}"]
        for selection in SELECTIONS:
            row.append(" / ".join(f"{100 * of(base, selection, factor)['accuracy']:.1f}" for base in BASES))
        for selection in SELECTIONS[1:]:
            row.append(
                percent(
                    [
                        of(b, selection, factor)["accuracy"] - of(b, "fisher", factor)["accuracy"]
                        for b in BASES
                    ]
                )
            )
        rows.append(row)
    header = [
        "Factor",
        "Fisher's 1%",
        "random",
        "random, per tensor",
        "random − Fisher",
        "per tensor − Fisher",
    ]
    return table(header, rows)


LABELS = {
    "fisher": "Fisher on D_ref",
    "ratio": "Fisher on D_ref / Fisher on safety data",
    "gradient": "mean safety gradient",
    "size": "size of the weight",
    "input": "size × norm of its input",
    "random": "random",
}


def scored(results: Results) -> dict[str, list[Run]]:
    of = pairs(results, score_runs())
    found = {"nothing (fft)": [Run("fft", *pair) for pair in of]}
    found |= {
        label: [Run("constant", *pair, ranking=ranking) for pair in of] for ranking, label in LABELS.items()
    }
    return found | {"random, at 1e-3": [Run("constant", *pair, rate=1e-3, ranking="random") for pair in of]}


def score_table(results: Results) -> str:
    rows = [[label, *figures(results, runs)] for label, runs in scored(results).items()]
    count = len(pairs(results, score_runs()))
    return table([f"Frozen first ({count} runs)", *(name for name, _, _ in MEASURES)], rows)


def score_differences(results: Results) -> str:
    by_label = scored(results)
    fisher = by_label[LABELS["fisher"]]
    rows = [
        [label, *differences(results, runs, fisher)] for label, runs in by_label.items() if runs != fisher
    ]
    return table(["Less the Fisher on D_ref", *(name for name, _, _ in MEASURES)], rows)


def frozen_shares(results: Results) -> str:
    """The share of each group of parameters that two of the scores freeze, the mean of the bases."""
    groups = list(results[key_of({"frozen": BASES[0]})]["fisher"])
    rows = []
    for ranking in ("fisher", "ratio"):
        found = [results[key_of({"frozen": base})][ranking] for base in BASES]
        rows.append(
            [LABELS[ranking], *(f"{100 * statistics.fmean(one[g] for one in found):.0f}" for g in groups)]
        )
    return table(["Frozen, %", *groups], rows)


METHODS = ("fft", "constant", "dynamic", "pinned")


def at_steps(ks: Sequence[float], steps: int) -> list[float]:
    """k at each step."""
    return [ks[step // EVERY] for step in range(steps)]


def stretches(ks: Sequence[float], value: float) -> list[range]:
    """The steps, run by run, at which k is `value`."""
    found, start = [], None
    for step, k in enumerate([*ks, math.nan]):
        if k == value and start is None:
            start = step
        if k != value and start is not None:
            found.append(range(start, step))
            start = None
    return found


def stretch_table(results: Results) -> str:
    rows = []
    for method in ("dynamic", "pinned"):
        found = [results[key_of(Run(method, *pair))] for pair in pairs(results, dynamic_runs())]
        ks = [at_steps(one["ks"], len(one["losses"])) for one in found]
        row = [method]
        for value in (0.0, 1.0):
            row.append(f"{100 * statistics.fmean(k.count(value) / len(k) for k in ks):.0f}%")
            row.append(str(max(len(stretch) for k in ks for stretch in stretches(k, value))))
        rows.append(row)
    runs = f"{len(pairs(results, dynamic_runs()))} runs"
    return table([runs, "at k = 0", "longest", "at k = 1", "longest"], rows)


def above_constant(results: Results, method: str, pair: tuple[str, int]) -> list[float]:
    """Step by step the loss above that of a constant k, which sees the same batches."""
    losses, constant = (results[key_of(Run(name, *pair))]["losses"] for name in (method, "constant"))
    return [a - b for a, b in zip(losses, constant, strict=True)]


def largest_rise(losses: Sequence[float]) -> float:
    """By how much a loss exceeds the mean of the ten before it, at most."""
    return max(
        losses[step] - statistics.fmean(losses[step - 10 : step]) for step in range(SETTLED, len(losses))
    )


def loss_table(results: Results) -> str:
    """Means over the runs, of steps from `SETTLED` on."""
    rows = []
    for method in METHODS:
        parts: dict[str, list[float]] = defaultdict(list)
        for pair in pairs(results, dynamic_runs()):
            found = results[key_of(Run(method, *pair))]
            steps = range(SETTLED, len(found["losses"]))
            above = above_constant(results, method, pair)
            frozen: set[int] = set()
            if found["ks"]:
                ones = stretches(at_steps(found["ks"], len(above)), 1.0)
                frozen = {step for stretch in ones for step in stretch} & set(steps)
                after = {s for one in ones for s in range(one.stop, one.stop + 10)} & set(steps) - frozen
                parts["at k = 1"].append(statistics.fmean(above[step] for step in frozen))
                parts["10 steps after"].append(statistics.fmean(above[step] for step in after))
            parts["all"].append(statistics.fmean(above[step] for step in steps))
            parts["last ten"].append(statistics.fmean(found["losses"][-10:]))
            parts["rise"].append(largest_rise(found["losses"]))
        names = ("all", "at k = 1", "10 steps after", "last ten", "rise")
        rows.append([method, *(number(parts[name], 3) if parts[name] else "–" for name in names)])
        if method == "constant":
            rows[-1][1] = "0"
    header = [
        "",
        "Loss above constant's",
        "... at k = 1",
        "... in the ten steps after",
        "Last ten losses",
        "Largest rise",
    ]
    return table(header, rows)


def spread_table(results: Results) -> str:
    """Means, and the standard deviation between seeds of a base (pooled over the bases)."""
    seeds = sorted({seed for _, seed in pairs(results, dynamic_runs())})
    rows = []
    for method in METHODS:
        row = [method]
        for _, part, name in MEASURES:
            by_base = [
                [results[key_of(Run(method, base, seed))]["figures"][part][name] for seed in seeds]
                for base in BASES
            ]
            cell = f"{100 * statistics.fmean(value for values in by_base for value in values):.1f}"
            if len(seeds) > 1:
                deviation = math.sqrt(statistics.fmean(statistics.variance(values) for values in by_base))
                cell += f" ± {100 * deviation:.1f}"
            row.append(cell)
        rows.append(row)
    return table([f"seeds: {len(seeds)}", *(name for name, _, _ in MEASURES)], rows)


def differences(results: Results, runs: Sequence[Run], than: Sequence[Run]) -> list[str]:
    """A cell for each of `MEASURES`, run by run: bases differ by more than methods do."""
    cells = []
    for _, part, name in MEASURES:
        found = [[results[key_of(one)]["figures"][part][name] for one in of] for of in (runs, than)]
        cells.append(percent([a - b for a, b in zip(*found, strict=True)]))
    return cells


def dynamic_differences(results: Results) -> str:
    of = {name: [Run(name, *pair) for pair in pairs(results, dynamic_runs())] for name in METHODS}
    compared = (("dynamic", "constant"), ("pinned", "constant"), ("pinned", "dynamic"))
    rows = [[f"{a} − {b}", *differences(results, of[a], of[b])] for a, b in compared]
    return table(["", *(name for name, _, _ in MEASURES)], rows)


def preference_table(results: Results) -> str:
    of = pairs(results, preference_runs())
    rows = [["original (3 runs)", *figures(results, [Run("original", base) for base in BASES])]]
    compared = []
    for at in DPO_RATES:
        name = f"{at:.0e}".replace("e-0", "e-")
        plain, frozen = ([Run(method, *pair, rate=at) for pair in of] for method in ("dpo", "dpo+constant"))
        rows.append([f"DPO, {name}", *figures(results, plain)])
        rows.append([f"DPO, k = 0.6, {name}", *figures(results, frozen)])
        compared.append([f"k = 0.6 − plain, {name}", *differences(results, frozen, plain)])
    return table([f"{len(of)} runs", *(name for name, _, _ in MEASURES)], [*rows, *compared])


TABLES: dict[str, Callable[[Results], str]] = {
    "families": family_table,
    "own family": own_family,
    "overlap": overlap_table,
    "factors": factor_table,
    "scores": score_table,
    "score differences": score_differences,
    "frozen": frozen_shares,
    "stretches": stretch_table,
    "losses": loss_table,
    "spread": spread_table,
    "difference": dynamic_differences,
    "preferences": preference_table,
}


def page(text: str, results: Results) -> str:
    """The page with every table as `results` have it.

    Raises:
        SystemExit: marks are missing.
    """
    for name, make in TABLES.items():
        start, end = f"<!-- reviewers: {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{PAGE}: lacks {start} or {end}")
        text = f"{before}{start}\n\n{make(results)}\n\n{end}{after}"
    return text


def draw(results: Results) -> None:
    """The loss above constant's, the mean of the runs, and of five steps."""
    from rpsa.report.drawing import BLUE, GREEN, ORANGE, new_panels

    figure, [[axes]] = new_panels(1, 1, 2.6)
    for method, colour in (("fft", GREEN), ("dynamic", BLUE), ("pinned", ORANGE)):
        runs = [above_constant(results, method, pair) for pair in pairs(results, dynamic_runs())]
        mean = [statistics.fmean(values) for values in zip(*runs, strict=True)]
        smooth = [statistics.fmean(mean[max(0, step - 4) : step + 1]) for step in range(len(mean))]
        axes.plot(smooth, color=colour, label=method)
    axes.axvspan(PINNED.start, PINNED.stop, color=ORANGE, alpha=0.12)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("loss above constant's")
    axes.legend(frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [*RUNS, "factors"]
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(parts)} (default: all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; choose from {', '.join(parts)}")
    if arguments.what == "run":
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        run_parts(arguments.parts or parts)
        return
    results = kept()
    PAGE.write_text(page(PAGE.read_text(), results))
    draw(results)


if __name__ == "__main__":
    main()
