"""Fig. 1 and 2 in numbers, each against a loop over single elements."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from typer.testing import CliRunner

from helpers.architectures import tiny
from helpers.examples import examples
from rpsa.analysis.anatomy import anatomy, overlap
from rpsa.analysis.structure import roles
from rpsa.cli import app
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.parameters import trainable_parameters
from rpsa.pipeline.analyses import distinct_labels
from rpsa.report.paper_figures import layer_map, module_bars


def random_fisher(architecture: str = "llama", seed: int = 0, only: str = "") -> FisherDiagonal:
    """Scores over several orders of magnitude, a third of them zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in trainable_parameters(tiny(architecture)).items() if only in n}
    return FisherDiagonal(
        {
            name: torch.rand(shape, generator=generator) ** 8 * (torch.rand(shape, generator=generator) > 0.3)
            for name, shape in shapes.items()
        }
    )


def elements(fisher: FisherDiagonal) -> list[tuple[str, float]]:
    return [(name, value) for name in fisher for value in fisher[name].flatten().tolist()]


@pytest.mark.parametrize("k", [0.3, 0.6, 1.0])
def test_every_number_is_a_count_over_elements(k: float) -> None:
    fisher = random_fisher()
    found = anatomy(fisher, k)
    role = roles({name: score.shape for name, score in fisher.scores.items()})
    tau = fisher.threshold(k)
    trains = sum(value <= tau for _, value in elements(fisher))
    cells: dict[Any, list[float]] = {}
    for name, value in elements(fisher):
        r = role[name]
        for key in (r.module, ("kind", r.kind), ("layer", r.layer), (r.layer, r.module)):
            cells.setdefault(key, []).append(value)
        if r.is_matrix and r.kind in ("attention", "mlp"):
            cells.setdefault(("block", r.kind), []).append(value)
    tallies: dict[Any, Any] = dict(found.by(lambda r: r.module))
    tallies |= {("kind", kind): t for kind, t in found.by(lambda r: r.kind).items()}
    tallies |= found.by(lambda r: (r.layer, r.module))
    tallies |= {("layer", layer): t for layer, t in found.layers().items()}
    tallies |= {("block", kind): t for kind, t in found.blocks().items()}
    del cells["layer", None]
    assert tallies.keys() == cells.keys()
    for key, values in cells.items():
        tally = tallies[key]
        assert tally.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-6)
        assert tally.elements == len(values)
        assert tally.zero_fraction == pytest.approx(values.count(0.0) / len(values))
        frozen = sum(value > tau for value in values)
        assert tally.frozen_fraction == frozen / len(values)
        assert found.trainable_share(tally) == pytest.approx((len(values) - frozen) / trains)


def test_attention_over_mlp_over_elements_and_over_matrices() -> None:
    fisher = random_fisher()
    values: dict[str, list[float]] = {}
    for name, value in elements(fisher):
        if "_proj" in name:
            values.setdefault(name.split(".")[-2], []).append(value)
    attention, mlp = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]

    def over_elements(names: list[str]) -> float:
        return float(np.mean(list(itertools.chain.from_iterable(values[name] for name in names))))

    def over_matrices(names: list[str]) -> float:
        return float(np.mean([np.mean(values[name]) for name in names]))

    found = anatomy(fisher, 0.6).attention_over_mlp()
    assert found == pytest.approx(
        {
            "elements": over_elements(attention) / over_elements(mlp),
            "matrices": over_matrices(attention) / over_matrices(mlp),
        }
    )
    assert anatomy(random_fisher("mamba"), 0.6).attention_over_mlp() is None


def test_parameters_out_of_scope_always_train() -> None:
    fisher = random_fisher(only="mlp")
    trained = {n: tuple(p.shape) for n, p in trainable_parameters(tiny("llama")).items()}
    found = anatomy(fisher, 1.0, trained=trained)
    head = found.by(lambda r: r.kind)["head"]
    assert (head.elements, head.unscored, head.frozen_fraction) == (0, 64 * 32, 0.0)
    trains = sum(math.prod(shape) for shape in trained.values()) - found.all.frozen
    assert found.trainable_share(head) == 64 * 32 / trains


@examples(15)
@given(st.integers(0, 1000), st.sampled_from([0.01, 0.2, 0.6, 1.0]))
def test_overlap_is_that_of_sets(seed: int, k: float) -> None:
    first, second = (
        random_fisher(seed=seed, only="layers.0.mlp"),
        random_fisher(seed=seed + 1, only="layers.0.mlp"),
    )
    sets = [
        {
            (name, i)
            for name in fisher
            for i, value in enumerate(fisher[name].flatten().tolist())
            if value > tau
        }
        for fisher in (first, second)
        for tau in [fisher.threshold(k)]
    ]
    found = overlap(first, second, k)
    assert found.sizes == (len(sets[0]), len(sets[1]))
    union = len(sets[0] | sets[1])
    assert found.jaccard == (len(sets[0] & sets[1]) / union if union else 0.0)
    assert overlap(first, first, k).jaccard == (1.0 if found.sizes[0] else 0.0)


def test_chance_is_the_mean_over_all_sets_of_these_sizes() -> None:
    # frozen at k = 0.5: 3 elements of each; in `a` 2 and 1, in `b` 1 and 2
    first = FisherDiagonal({"a": torch.tensor([9.0, 8, 1, 2]), "b": torch.tensor([7.0, 3])})
    second = FisherDiagonal({"a": torch.tensor([1.0, 2, 3, 9]), "b": torch.tensor([8.0, 7])})
    found = overlap(first, second, 0.5)
    assert found.sizes == (3, 3)

    def mean_common(a: int, b: int, n: int) -> float:
        pairs = itertools.product(itertools.combinations(range(n), a), itertools.combinations(range(n), b))
        return float(np.mean([len(set(x) & set(y)) for x, y in pairs]))

    anywhere, within = mean_common(3, 3, 6), mean_common(2, 1, 4) + mean_common(1, 2, 2)
    assert found.by_chance == pytest.approx(anywhere / (6 - anywhere))
    assert found.by_chance_within == pytest.approx(within / (6 - within))


def test_overlap_of_different_models_is_refused() -> None:
    with pytest.raises(RPSAError, match="score different parameters"):
        overlap(random_fisher(), random_fisher("qwen3"), 0.6)


def test_the_figures_show_the_numbers() -> None:
    found = anatomy(random_fisher("gpt2"), 0.6)
    upper, lower, _ = layer_map(found, "x").axes
    rows = [label.get_text() for label in upper.get_yticklabels()]
    assert rows == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "biases", "norms"]
    shown = upper.images[0].get_array()
    cells = found.by(lambda r: (r.layer, r.module))
    for layer, row in itertools.product(range(2), range(4)):
        assert shown[row, layer] == pytest.approx(cells[layer, rows[row]].mean)
    assert lower.lines[0].get_ydata() == pytest.approx([t.mean for t in found.layers().values()])
    left, right = module_bars(found, "x").axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == [*rows[:4], "wte", "wpe"]
    modules = found.by(lambda r: r.module)
    assert [bar.get_width() for bar in left.patches] == pytest.approx([modules[n].mean for n in names])
    assert [bar.get_width() for bar in right.patches] == pytest.approx(
        [t.mean for t in found.blocks().values()]
    )


def test_a_matrix_of_zeros_is_shown_as_such() -> None:
    # as A at the start of LoRA: its gradients are 0
    fisher = FisherDiagonal(
        {
            f"layers.{i}.mlp.up_proj.lora_{side}.default.weight": torch.full((4, 8), value * (i + 1))
            for i in range(2)
            for side, value in (("A", 0.0), ("B", 1.0))
        }
    )
    upper, *_ = layer_map(anatomy(fisher, 0.6), "x").axes
    shown = upper.images[0].get_array()
    assert np.isnan(np.ma.filled(shown[0], np.nan)).all()
    assert shown[1].tolist() == [1.0, 2.0]


# The command


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["fisher-map", *map(str, arguments)])


def test_fisher_map_writes_numbers_and_figures(tmp_path: Path) -> None:
    fishers = {name: random_fisher(seed=seed) for seed, name in enumerate(("a", "b"))}
    for name, fisher in fishers.items():
        fisher.save(tmp_path / name / "full")
    done = invoke(tmp_path / "a" / "full", tmp_path / "b" / "full", "--out", tmp_path / "out", "--k", "0.5")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "fisher_map.json").read_text())
    assert set(content["fishers"]) == {"a", "b"}
    found = anatomy(fishers["b"], 0.5)
    for entry in content["fishers"]["b"]["modules"]:
        tally = found.by(lambda r: r.module)[entry["module"]]
        assert entry["mean"] == tally.mean
        assert entry["trainable_share"]["0.5"] == found.trainable_share(tally)
    layer = content["fishers"]["b"]["layers"][1]
    assert layer["modules"]["q_proj"]["mean"] == found.by(lambda r: (r.layer, r.module))[1, "q_proj"].mean
    assert [(o["k"], o["jaccard"]) for o in content["overlap"]] == [
        (k, overlap(fishers["a"], fishers["b"], k).jaccard) for k in (0.5, 0.01)
    ]
    for name in ("a-layers", "a-modules", "b-layers", "b-modules"):
        assert imread(tmp_path / "out" / f"{name}.png").shape[1] == 1200
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<?xml")
    assert "q_proj" in done.output
    assert "Jaccard" in done.output
    assert max(map(len, done.output.splitlines()[:-1])) <= 80


def test_fisher_map_of_different_models_and_with_a_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random_fisher().save(tmp_path / "llama")
    random_fisher("gpt2").save(tmp_path / "gpt2")
    assert invoke(tmp_path / "llama", tmp_path / "gpt2", "--out", tmp_path / "out").exit_code == 0
    assert "llama and gpt2: the two Fishers score different parameters" in caplog.text
    from rpsa.models import empty_model

    shapes = {n: p.shape for n, p in trainable_parameters(empty_model("tiny:0")).items()}
    scoped = FisherDiagonal(
        {n: torch.rand(s) for n, s in shapes.items() if "mlp" in n}, {"estimation": {"scope": "mlp"}}
    )
    scoped.save(tmp_path / "scoped")
    done = invoke(tmp_path / "scoped", "--out", tmp_path / "out", "--model", "tiny:0", "--k", "1")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "fisher_map.json").read_text())
    head = next(m for m in content["fishers"]["scoped"]["modules"] if m["module"] == "lm_head")
    assert head["mean"] is None
    assert head["trainable_share"]["1.0"] > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no Fisher here (manifest.json is missing)"),
        (["llama", "llama"], "name each Fisher once"),
        (["llama", "--k", "0.6;0.9"], "--k: '0.6;0.9' is not a list of numbers such as 0.6,0.9"),
        (["llama", "--k", "2"], "frozen ratio 2.0 is not between 0 and 1"),
        (["llama", "--model", "tiny:0"], "this Fisher does not fit the model"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random_fisher().save("llama")
    done = invoke(*arguments, "--out", "out")
    assert done.exit_code == 2
    [line] = done.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_labels_tell_folders_apart() -> None:
    assert distinct_labels([Path("run/fisher/a/full"), Path("run/fisher/b/full")]) == ["a", "b"]
    assert distinct_labels([Path("x/a/full"), Path("y/a/lora")]) == ["full", "lora"]
    assert distinct_labels([Path("x/a/full"), Path("x/b/full"), Path("x/b/lora")]) == [
        "a-full",
        "b-full",
        "b-lora",
    ]
    assert distinct_labels([Path("x/only")]) == ["only"]
