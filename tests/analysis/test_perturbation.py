"""Fig. 3: which elements are scaled, that they come back bit for bit, and what the intervals say."""

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from helpers.examples import examples
from rpsa.analysis.perturbation import (
    PerturbationCell,
    PerturbationConfig,
    PerturbationOutcome,
    accuracy,
    cells,
    difference,
    effects,
    newcombe,
    perturb,
    scaled,
    select,
    wilson,
)
from rpsa.artifacts import LOCK
from rpsa.cli import app
from rpsa.errors import RPSAError
from rpsa.evaluation.run import loaded_to_generate
from rpsa.fisher.diagonal import FisherDiagonal, sampled_weights
from rpsa.generation.transformers import TransformersGenerator
from rpsa.models import load_model, load_tokenizer
from rpsa.parameters import trainable_parameters
from rpsa.pipeline.analyses import reasoning_scores
from rpsa.pipeline.stages import tasks_of
from rpsa.progress import no_progress
from rpsa.recipe import load_recipe
from rpsa.recipe.sections import Evaluate as EvaluateSettings
from rpsa.recipe.sections import Model
from rpsa.report.paper_figures import perturbation_bars

SHAPES = {"a.weight": (7, 5), "b.weight": (30,), "c.weight": (4, 3, 2)}
ELEMENTS = 89


def random_scores(seed: int, levels: int = 10_000) -> FisherDiagonal:
    """With few `levels` most elements are tied, and some are 0."""
    generator = torch.Generator().manual_seed(seed)
    return FisherDiagonal(
        {n: torch.randint(0, levels, s, generator=generator).float() for n, s in SHAPES.items()}
    )


def random_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def as_set(selection: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, int(i)) for name, indices in selection.items() for i in indices}


# Selections


@examples(60)
@given(st.integers(0, 1000), st.sampled_from([3, 10_000]), st.sampled_from([0.02, 0.1, 0.25, 0.5]))
def test_fisher_selection_is_the_top_of_a_sorted_list(seed: int, levels: int, fraction: float) -> None:
    fisher = random_scores(seed, levels)
    ranked = sorted(
        (
            (-value, place, name, i)
            for place, name in enumerate(fisher)
            for i, value in enumerate(fisher[name].flatten().tolist())
        ),
    )  # of equals the first
    top = {(name, i) for _, _, name, i in ranked[: math.floor(fraction * ELEMENTS)]}
    assert as_set(select("fisher", fisher, {}, fraction, 0)) == top


@examples(30)
@given(st.integers(0, 1000), st.sampled_from([3, 10_000]), st.sampled_from([0.05, 0.25]))
def test_controls_have_the_same_count_and_per_tensor_the_same_counts(
    seed: int, levels: int, fraction: float
) -> None:
    fisher, weights = random_scores(seed, levels), random_weights(seed)
    top = select("fisher", fisher, weights, fraction, seed)
    for selection in ("random", "random_nonzero", "random_per_tensor", "magnitude", "inverse"):
        found = select(selection, fisher, weights, fraction, seed)  # type: ignore[arg-type]
        assert len(as_set(found)) == sum(map(len, found.values())) == math.floor(fraction * ELEMENTS)
        if selection == "random_per_tensor":
            assert {n: len(i) for n, i in found.items()} == {n: len(i) for n, i in top.items()}
        if selection == "magnitude":
            chosen = as_set(found)
            rest = [
                abs(v)
                for n, w in weights.items()
                for i, v in enumerate(w.flatten().tolist())
                if (n, i) not in chosen
            ]
            assert min(abs(weights[n].flatten()[i].item()) for n, i in chosen) >= max(rest)


def test_random_draws_differ_and_are_uniform_over_all_elements() -> None:
    fisher = random_scores(0)
    fisher.scores["b.weight"].zero_()  # F = 0 protects nobody from a random draw
    draws = [as_set(select("random", fisher, {}, 0.25, seed)) for seed in range(200)]
    assert len({frozenset(draw) for draw in draws}) == 200
    expected = 200 * math.floor(0.25 * ELEMENTS) / ELEMENTS
    for name, shape in SHAPES.items():
        counts = [sum((name, i) in draw for draw in draws) for i in range(math.prod(shape))]
        assert statistics.fmean(counts) == pytest.approx(expected, rel=0.1)
        assert max(counts) < 2 * expected


def test_too_few_elements_with_fisher_are_said(caplog: pytest.LogCaptureFixture) -> None:
    fisher = FisherDiagonal({"a.weight": torch.tensor([0.0, 1, 0, 2, 0, 0])})
    assert as_set(select("fisher", fisher, {}, 0.5, 0)) == {("a.weight", 1), ("a.weight", 3)}
    assert "only 2 elements have F > 0, not the 3 wanted" in caplog.text
    with pytest.raises(RPSAError, match="less than one of them"):
        select("fisher", fisher, {}, 0.1, 0)


# Scaling and undoing


def bits(tensors: dict[str, Tensor]) -> list[Any]:
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return [t.detach().contiguous().view(kinds[t.dtype]).tolist() for t in tensors.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_scaling_is_exact_and_undone_bit_for_bit(dtype: torch.dtype, fails: bool) -> None:
    weights = {name: w.to(dtype).requires_grad_() for name, w in random_weights(1).items()}
    weights["t.weight"] = torch.randn(5, 6).to(dtype).t()  # not contiguous
    special = [math.nan, math.inf, -math.inf, -0.0, 1e-40, 3e38]
    weights["t.weight"][0, :] = torch.tensor(special[:5], dtype=dtype)
    before = {name: w.detach().clone() for name, w in weights.items()}
    selection = {
        name: torch.randperm(w.numel(), generator=torch.Generator().manual_seed(2))[: w.numel() // 2]
        for name, w in weights.items()
    }
    selection["t.weight"] = torch.arange(10)
    selection["b.weight"] = torch.tensor([], dtype=torch.int64)
    try:
        with scaled(weights, selection, 0.7):
            for name, w in weights.items():
                for i, (old, new) in enumerate(
                    zip(before[name].flatten(), w.detach().flatten(), strict=True)
                ):
                    wanted = old * 0.7 if i in selection[name].tolist() else old
                    assert torch.equal(new, wanted) or (new.isnan() and wanted.isnan())
            assert torch.is_grad_enabled()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert bits(weights) == bits(before)


# The experiment


def model_and_fisher() -> tuple[nn.Module, FisherDiagonal]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    generator = torch.Generator().manual_seed(1)
    scores = {n: torch.rand(p.shape, generator=generator) for n, p in trainable_parameters(model).items()}
    return model, FisherDiagonal(scores)


INPUTS = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))


class Evaluation:
    """Real, if small: which class the model sees in each input. Stops like Ctrl-C after `patience` calls."""

    def __init__(self, patience: int = 1000) -> None:
        self.calls = 0
        self.patience = patience

    @torch.no_grad()
    def __call__(self, model: Any, tokenizer: Any) -> dict[str, Sequence[float]]:
        if self.calls == self.patience:
            raise KeyboardInterrupt
        self.calls += 1
        right = (model(INPUTS).argmax(-1) == torch.arange(12) % 4).float().tolist()
        return {"first": right[:5], "second": right[5:]}


CONFIG = PerturbationConfig(fractions=(0.1, 0.3), factors=(0.5, -2.0), draws=2)


def test_cells_are_every_combination_and_the_original_is_first() -> None:
    found = cells(CONFIG)
    assert found[0] == PerturbationCell("original")
    assert len(found) == len(set(found)) == 1 + 2 * 2 * (1 + 2 + 2 + 1)


def test_an_interrupted_run_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    model, fisher = model_and_fisher()
    before = bits(dict(model.named_parameters()))
    whole = perturb(model, None, fisher, Evaluation(), CONFIG, tmp_path / "whole.jsonl", {"model": "m"})
    stopped = Evaluation(patience=7)
    with pytest.raises(KeyboardInterrupt):
        perturb(model, None, fisher, stopped, CONFIG, tmp_path / "cells.jsonl", {"model": "m"})
    assert bits(dict(model.named_parameters())) == before
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"cell": {"sel')  # a crash in the middle of a line
    seen: list[PerturbationCell] = []
    rest = Evaluation()
    resumed = perturb(
        model, None, fisher, rest, CONFIG, tmp_path / "cells.jsonl", {"model": "m"}, seen.append
    )
    assert rest.calls == len(seen) == len(whole) - 7
    assert seen == [outcome.cell for outcome in whole[7:]]
    assert resumed == whole
    assert bits(dict(model.named_parameters())) == before


def test_more_cells_can_be_added_and_other_inputs_are_refused(tmp_path: Path) -> None:
    model, fisher = model_and_fisher()
    store = tmp_path / "cells.jsonl"
    small = PerturbationConfig(selections=("fisher",), fractions=(0.1,), factors=(0.5,))
    perturb(model, None, fisher, Evaluation(), small, store, {"model": "m", "tasks": ["x"]})
    more = Evaluation()
    perturb(model, None, fisher, more, CONFIG, store, {"model": "m", "tasks": ["x"]})
    assert more.calls == len(cells(CONFIG)) - 2
    with pytest.raises(RPSAError, match="holds cells of another model, seed: give another folder"):
        perturb(model, None, fisher, Evaluation(), small, store, {"model": "n", "tasks": ["x"], "seed": 1})


def test_an_outcome_says_where_and_how_much_was_changed(tmp_path: Path) -> None:
    model, fisher = model_and_fisher()
    parameters = dict(model.named_parameters())
    whole = math.sqrt(sum(p.square().sum().item() for p in parameters.values()))
    for outcome in perturb(model, None, fisher, Evaluation(), CONFIG, tmp_path / "cells.jsonl", {})[1:]:
        cell = outcome.cell
        chosen = select(cell.selection, fisher, parameters, cell.fraction, 42 + cell.draw)  # type: ignore[arg-type]
        with torch.no_grad(), scaled(parameters, chosen, cell.factor):
            after = {name: p.clone() for name, p in parameters.items()}
        moved = math.sqrt(sum((after[n] - p).square().sum().item() for n, p in parameters.items()))
        assert outcome.change == pytest.approx(moved / whole, rel=1e-5)
        assert outcome.elements == len(as_set(chosen))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": (0.0,)}, "fraction 0.0 is not above 0"),
        ({"selections": ("fischer",)}, "selection 'fischer' is not one of fisher, random"),
        ({"draws": 0}, "draws is 0"),
    ],
)
def test_impossible_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(RPSAError, match=message):
        PerturbationConfig(**settings)


# What it says


@given(st.integers(0, 50), st.integers(1, 50))
@example(0, 15)  # the lower limit was -3e-17
def test_wilson_limits_solve_the_score_equation(right: int, more: int) -> None:
    n = right + more
    share = right / n
    for limit in wilson(share, n):
        assert abs(share - limit) == pytest.approx(1.96 * math.sqrt(limit * (1 - limit) / n), abs=1e-9)


@pytest.mark.parametrize(("p", "q", "together"), [(0.95, 0.6, 0.3), (1.0, 0.97, 0.0), (0.5, 0.5, 0.9)])
def test_paired_intervals_hold_the_truth_about_95_times_in_100(p: float, q: float, together: float) -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        pairs = []
        for _ in range(60):
            shared = draw.random()
            mine, other = (shared if draw.random() < together else draw.random() for _ in range(2))
            pairs.append((float(mine < p), float(other < q)))
        found = newcombe(*zip(*pairs, strict=True))
        assert found.low <= found.value <= found.high
        held += found.low <= p - q <= found.high
    assert held >= 930


def test_pairing_narrows_an_interval() -> None:
    before = [1.0] * 30 + [0.0] * 30
    paired, crossed = newcombe(before, [1.0] * 28 + [0.0] * 32), newcombe(before, [0.0] * 32 + [1.0] * 28)
    assert paired.value == crossed.value
    assert paired.high - paired.low < 0.6 * (crossed.high - crossed.low)


def test_draws_widen_an_interval() -> None:
    same = {"x": [[1.0, 0.0] * 20] * 5}
    spread = {"x": [[1.0] * 40, [0.0] * 40, [1.0, 0.0] * 20, [1.0] * 40, [0.0] * 40]}
    narrow, wide = accuracy(same)["x"], accuracy(spread)["x"]
    assert narrow.value == wide.value == 0.5
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    t_half = 2.776 * statistics.stdev([1, 0, 0.5, 1, 0]) / math.sqrt(5)
    assert wide.high == pytest.approx(min(1, 0.5 + math.hypot(t_half, wilson(0.5, 40)[1] - 0.5)))


def test_the_mean_counts_every_benchmark_alike() -> None:
    samples = {"big": [[1.0] * 90 + [0.0] * 10], "small": [[0.0] * 10]}
    found = accuracy(samples)["mean"]
    assert found.value == pytest.approx(0.45)
    assert found.low < 0.45 < found.high
    other = {"big": [[1.0] * 100], "small": [[0.0] * 5 + [1.0] * 5]}
    assert difference(other, samples)["mean"].value == pytest.approx(0.3)


def made_up_outcomes() -> list[PerturbationOutcome]:
    def scores(right: int) -> dict[str, list[float]]:
        return {"add": [1.0] * right + [0.0] * (20 - right), "sort": [1.0] * 20}

    outcomes = [PerturbationOutcome(PerturbationCell("original"), {}, 0.0, scores(20))]
    for factor, lost in ((0.9, 0), (0.5, 12)):
        outcomes.append(
            PerturbationOutcome(PerturbationCell("fisher", 0.01, factor), {"mlp": 7}, 0.05, scores(20 - lost))
        )
        outcomes += [
            PerturbationOutcome(PerturbationCell("random", 0.01, factor, d), {"mlp": 7}, 0.04, scores(20 - d))
            for d in range(3)
        ]
    return outcomes


def test_effects_compare_with_the_original_and_with_the_fisher() -> None:
    found = {(e.selection, e.factor): e for e in effects(made_up_outcomes())}
    assert list(found) == [
        *(("original", 1.0), ("fisher", 0.9), ("random", 0.9)),
        *(("fisher", 0.5), ("random", 0.5)),
    ]
    assert found["original", 1.0].drop is None
    fisher, drawn = found["fisher", 0.5], found["random", 0.5]
    assert fisher.above_fisher is None
    assert fisher.drop is not None
    assert drawn.above_fisher is not None
    assert fisher.accuracy["add"].value == pytest.approx(8 / 20)
    assert fisher.drop["add"].value == pytest.approx(12 / 20)
    assert drawn.draws == pytest.approx([1.0, 39 / 40, 38 / 40])
    assert drawn.accuracy["add"].value == pytest.approx(19 / 20)
    assert drawn.above_fisher["add"].value == pytest.approx(11 / 20)
    assert drawn.above_fisher["mean"].value == pytest.approx(11 / 40)
    assert drawn.above_fisher["mean"].low > 0
    assert found["random", 0.9].above_fisher["mean"].low < 0  # type: ignore[index]


def test_the_bars_are_the_accuracies() -> None:
    shown = effects(made_up_outcomes())
    figure = perturbation_bars(shown)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["1% of all elements × 0.9", "1% of all elements × 0.5"]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    expected = [e for e in shown if e.factor in (1.0, 0.5)]
    assert heights == pytest.approx(
        [100 * e.accuracy[n].value for e in expected for n in ("add", "sort", "mean")]
    )


# The command


def test_perturb_measures_the_tiny_model_and_goes_on(tmp_path: Path) -> None:
    model = load_model("tiny:0", Model())
    generator = torch.Generator().manual_seed(0)
    FisherDiagonal(
        {n: torch.rand(p.shape, generator=generator) for n, p in trainable_parameters(model).items()}
    ).save(tmp_path / "fisher")

    def run(factors: str) -> Any:
        return CliRunner().invoke(
            app,
            [
                *("perturb", "tiny:0", str(tmp_path / "fisher"), "--tasks", "tiny", "--n", "2"),
                *("--out", str(tmp_path / "out"), "--factors", factors, "--draws", "1", "--temperature", "0"),
                *("--max-new-tokens", "24", "--selections", "fisher,random", "--batch-size", "64"),
            ],
        )

    assert run("0").exit_code == 0
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3
    done = run("0,1")
    assert done.exit_code == 0, done.output
    longer = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert longer[:4] == lines
    assert len(longer) == 1 + 5
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    by_cell = {(e["selection"], e["factor"]): e for e in results["effects"]}
    unchanged = by_cell["original", 1.0]["accuracy"]
    assert by_cell["fisher", 1.0]["accuracy"] == unchanged  # times 1, and times 0 before it, left no trace
    assert (tmp_path / "out" / "perturbation.png").stat().st_size > 10_000
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("generation_dtype", ["bfloat16", "float32"])
def test_perturbed_weights_generate_in_the_dtype_of_an_evaluation(
    generation_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
version: 1
name: small
output_dir: {tmp_path / "run"}
model: {{name: "tiny:0", dtype: float32, generation_dtype: {generation_dtype}}}
reference: {{problems: tiny}}
safety: {{data: "tiny:refusals"}}
evaluate: {{tasks: [rpsa_tiny_add], n: 1, temperature: 0.0, max_new_tokens: 4}}
matrix: {{methods: [fft+rpsa]}}
analysis: {{perturb: {{fractions: [0.5], factors: [0.7], selections: [fisher, magnitude]}}}}
""")
    loaded = load_recipe(recipe)
    stored = load_model("tiny:0", loaded.model)
    generator = torch.Generator().manual_seed(0)
    parameters = trainable_parameters(stored)
    fisher = FisherDiagonal({n: torch.rand(p.shape, generator=generator) for n, p in parameters.items()})
    fisher.save(loaded.folder / "fisher" / "tiny-0" / "full")
    asked: list[dict[str, Tensor]] = []

    class Watched(TransformersGenerator):
        def generate(self, *arguments: Any) -> Any:
            asked.append({name: value.clone() for name, value in self.model.state_dict().items()})
            return super().generate(*arguments)

    monkeypatch.setattr("rpsa.generation.transformers.TransformersGenerator", Watched)
    [task] = tasks_of(loaded, "analyse")
    task.run(tmp_path / "out", no_progress)

    evaluated = loaded_to_generate("tiny:0", None, loaded.model, generation_dtype)
    assert len(asked) == 3
    for selection, weights in zip((None, "fisher", "magnitude"), asked, strict=True):
        chosen = select(selection, fisher, parameters, 0.5, 0) if selection else {}  # type: ignore[arg-type]
        with scaled(parameters, chosen, 0.7):
            evaluated.load_state_dict(stored.state_dict())
        assert {w.dtype for w in weights.values()} == {getattr(torch, generation_dtype)}
        assert all(torch.equal(weights[name], value) for name, value in evaluated.state_dict().items())
    inputs = json.loads((tmp_path / "out" / "results.json").read_text())["inputs"]
    assert inputs.get("generation_dtype") == (None if generation_dtype == "float32" else generation_dtype)


def test_another_models_fisher_has_to_be_asked_for(tmp_path: Path) -> None:
    of = dict(load_model("tiny:1", Model()).named_parameters())
    scores = {name: parameter.detach().abs() for name, parameter in of.items()}
    FisherDiagonal(scores, {"weights": sampled_weights(of)}).save(tmp_path / "fisher")
    command = [
        "perturb",
        "tiny:0",
        str(tmp_path / "fisher"),
        "--out",
        str(tmp_path / "out"),
        "--tasks",
        "rpsa_tiny_add",
    ]
    command += ["--n", "1", "--max-new-tokens", "4", "--selections", "fisher"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "measured on another model" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    done = CliRunner().invoke(app, [*command, "--any-weights"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tinny"], "tasks: 'tinny' is unknown"),
        (["--tasks", "tiny", "--temperature", "-1"], "temperature"),
        (["--tasks", "tiny", "--factors", "x"], "--factors: 'x' is not a list of numbers"),
        (["--tasks", "tiny"], "nowhere: no Fisher here"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["perturb", "tiny:0", "nowhere", "--out", str(tmp_path / "out"), *arguments]
    )
    assert done.exit_code == 2
    [line] = done.stderr.strip().splitlines()
    assert message in line


def test_accuracies_of_which_most_responses_have_no_answer_are_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = EvaluateSettings(tasks=["rpsa_tiny_add"], n=4, temperature=0, max_new_tokens=2)
    evaluate = reasoning_scores(settings)
    model, tokenizer = load_model("tiny:0", Model()), load_tokenizer("tiny:0", Model())
    for _ in range(2):
        assert evaluate(model, tokenizer) == {"add": [0.0] * 4}
    [said] = [record.message for record in caplog.records if record.name == "rpsa.pipeline.analyses"]
    assert said.startswith("add: 100% of the responses have no answer that can be read (truncated 100%)")
