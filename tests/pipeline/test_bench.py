"""`rpsa bench`: what is tried, what is chosen, what is refused, and a whole one that goes on where it was stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from rpsa.artifacts import read_json
from rpsa.errors import RPSAError
from rpsa.pipeline.bench import Part, axes_of, check_bench, choose, points, run_bench
from rpsa.recipe import load_recipe
from rpsa.report.summaries import RunResult

RECIPE = """
version: 1
name: small
reference: {problems: tiny, n: 8, max_new_tokens: 48, batch_size: 8, held_out: 0}
fisher: {probes: 1, batch_size: 8}
safety: {n: 16, max_length: 128, validation_share: 0.0}
train: {per_device_train_batch_size: 8, num_train_epochs: 1, use_cpu: true, bf16: false, save_strategy: no,
  report_to: none, activation_checkpointing: false}
evaluate: {tasks: [tiny], n: 2, temperature: 0.0, max_new_tokens: 48, batch_size: 64}
matrix: {bases: ["tiny:3"], seeds: [1], methods: [original, fft, fft+ewc, lora]}
bench:
  bases: ["tiny:0"]
  seeds: [0]
  data: {refusals: {data: "tiny:refusals"}, balanced: {data: "tiny:balanced"}}
  tune:
    fft: {train.learning_rate: [1e-3, 1e-2]}
    lora: {train.learning_rate: [1e-2]}
    fft+ewc: {alternatives.penalty_strength: [0.1, 1.0]}
  targets: {reasoning: 0.01, direct: 0.02, wrapped: 0.05, benign: 0.05, borderline: 0.1}
"""


def recipe(tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, [f"output_dir={tmp_path / 'run'}", *overrides])


def test_a_method_is_tuned_over_what_its_paradigm_is_and_itself(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    assert axes_of(given, "fft") == {"train.learning_rate": [1e-3, 1e-2]}
    axes = axes_of(given, "fft+ewc")
    assert axes == {"train.learning_rate": [1e-3, 1e-2], "alternatives.penalty_strength": [0.1, 1.0]}
    assert len(list(points(Part("balanced", "fft+ewc", axes)))) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench=null", "safety.data=tiny:balanced"], "bench: missing"),
        (
            ["bench.bases=[tiny:3]", "bench.seeds=[1]", "matrix.seeds=[2, 1]"],
            "bench.bases: tiny:3 is a base of the test, too (matrix.bases), with seed 1;",
        ),
        (["bench.tune={fft: {train.learning_rate: [1e-3]}}"], "bench.tune: nothing for lora"),
        (["bench.tune={ftt: {train.learning_rate: [1e-3]}}"], "bench.tune.ftt: neither a method"),
        (["matrix.grid={train.learning_rate: [1e-3]}"], "bench: not together with sweeps or matrix.grid"),
    ],
)
def test_a_bench_that_cannot_be_is_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RPSAError) as error:
        check_bench(recipe(tmp_path, *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_may_be_chosen_on_a_base_of_the_test_with_other_seeds(tmp_path: Path) -> None:
    assert check_bench(recipe(tmp_path, "bench.bases=[tiny:3]", "bench.seeds=[0]", "matrix.seeds=[1, 2]"))


def test_a_data_set_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RPSAError, match=r"bench\.data\.mine\.data"):
        recipe(tmp_path, "bench.data={mine: {data: nowhere.jsonl}}")
    with pytest.raises(RPSAError, match=r"bench: .*train\.learning_rat"):
        run_bench(recipe(tmp_path, "bench.tune.fft={train.learning_rat: [1.0]}"))


class Made:
    """A study whose rates of attacks are given, by learning rate; None: the run failed."""

    def __init__(self, rates: dict[float, float | None]) -> None:
        self.rates = rates
        self.parts = [Part("balanced", "fft", {"train.learning_rate": list(rates)})]
        self.originals = {"tiny:0": self._run(0.6)}

    def _run(self, rate: float) -> RunResult:
        return RunResult("fft", "tiny:0", 0, 1e-3, {"mean": 1.0}, 0.0, {"direct": rate, "mean": rate}, {})

    def at(self, part: Part, point: Any) -> tuple[list[RunResult], list[str]]:
        rate = self.rates[point["train.learning_rate"]]
        return ([], ["diverged"]) if rate is None else ([self._run(rate)], [])


def test_the_smallest_shortfall_is_chosen_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    bench = recipe(tmp_path, "bench.targets={direct: 0.02}").bench
    for rates, chosen in (
        ({1e-4: 0.3, 1e-3: 0.1, 1e-2: 0.2}, 1e-3),
        ({1e-4: 0.1, 1e-3: 0.1}, 1e-4),
        ({1e-4: 0.02, 1e-3: 0.0}, 1e-4),  # both are enough
        ({1e-4: 0.3, 1e-3: None}, 1e-4),
    ):
        made: Any = Made(rates)
        found = choose(made, bench)
        assert [part.over["train.learning_rate"] for part in found.parts] == [[chosen]]
        assert len(found.tried) == len(rates)
    failed: Any = Made({1e-4: None})
    with pytest.raises(RPSAError, match="every run on the bases of development failed; the first: diverged"):
        choose(failed, bench)


@pytest.mark.integration
def test_a_whole_bench(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    folder = run_bench(given)
    choice = read_json(tmp_path / "run" / "choice.json")
    assert len(choice["tried"]) == 2 * (2 + 4 + 1)
    assert len(choice["chosen"]) == 6
    board = read_json(folder / "bench.json")
    assert {(one["data"], one["method"]) for one in board["entries"]} == {
        (data, method) for data in ("refusals", "balanced") for method in ("fft", "fft+ewc", "lora")
    }
    assert all(one["runs"] == 1 for one in board["entries"])
    plain = [one["cost"] for one in board["entries"] if one["method"] == "fft"]
    assert plain == [1.0, 1.0]
    settings = {(one["data"], one["method"]): one["settings"] for one in choice["chosen"]}
    assert all(one["settings"] == settings[one["data"], one["method"]] for one in board["entries"])

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("stage.json")}
    text = (folder / "bench.json").read_bytes()
    lost = next(path for path in before if "test/evaluate/sweep" in str(path))
    shutil.rmtree(lost.parent)
    run_bench(given)
    again = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert again == {lost}
    assert (folder / "bench.json").read_bytes() == text
