import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from helpers.examples import examples
from helpers.paths import RECIPES
from rpsa.artifacts import folder_name
from rpsa.errors import RPSAError
from rpsa.pipeline.alignment import training_arguments
from rpsa.pipeline.groundwork import HeldOutTask
from rpsa.pipeline.stages import fisher_task, tasks_of
from rpsa.provenance import STAGES
from rpsa.recipe import Align, Fisher, Recipe, load_recipe, recipe_schema
from rpsa.recipe.loading import parse_yaml
from rpsa.recipe.methods import WELL_KNOWN
from rpsa.recipe.problems import installed_names

DEMO = RECIPES / "tiny" / "demo.yaml"
STUDY = RECIPES / "tiny" / "study.yaml"

MINIMAL = """
version: 1
name: small
model: {name: tiny:0}
reference: {problems: tiny}
safety: {data: tiny:refusals}
"""


def small(tmp_path: Path, more: str = "", overrides: typing.Sequence[str] = ()) -> Recipe:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL + more)
    return load_recipe(path, overrides)


def test_demo_expands_into_readable_unique_cells() -> None:
    cells = load_recipe(DEMO).cells()
    ids = [cell.id for cell in cells]
    assert len(set(ids)) == len(ids) == 21
    assert "fft+rpsa/tiny-0/seed0" in ids
    assert "original/tiny-2" in ids
    by_id = {cell.id: cell for cell in cells}
    rpsa, constant = by_id["fft+rpsa/tiny-1/seed0"], by_id["fft+constant/tiny-1/seed0"]
    assert rpsa.align == Align(frozen_ratio="dynamic", window=10, every=2)
    assert constant.align == Align(frozen_ratio=0.6, window=10, every=2)
    assert by_id["fft+random/tiny-1/seed0"].align == Align(
        frozen_ratio=0.6, mask="random", window=10, every=2
    )
    assert rpsa.train == constant.train == by_id["fft/tiny-1/seed0"].train
    assert by_id["fft/tiny-1/seed0"].align is None
    assert by_id["lora/tiny-1/seed0"].train["num_train_epochs"] == 6
    assert by_id["lora/tiny-1/seed0"].lora["r"] == 4
    assert by_id["fft/tiny-1/seed0"].lora == {}
    original = by_id["original/tiny-1"]
    assert (original.paradigm, original.safety, original.learning_rate) == ("none", None, None)


def test_every_named_variant_is_one_change_and_trainable(tmp_path: Path) -> None:
    methods = [name for name, method in WELL_KNOWN.items() if "align" in method]
    cells = {cell.method: cell for cell in load_recipe(DEMO, [f"matrix.methods={methods}"]).cells()}
    base = Align(window=10, every=2)
    constant = base.model_copy(update={"frozen_ratio": 0.6})
    expected = {
        "rpsa": base,
        "noise_k": base.model_copy(update={"frozen_ratio": "noise"}),
        "gradient_only": base.model_copy(update={"gradient_only": True}),
        "raw_moments": base.model_copy(update={"frozen_moments": "raw"}),
        "sigma4": base.model_copy(update={"sigma_scale": 4.0}),
        "constant": constant,
        **{
            mask: constant.model_copy(update={"mask": mask})
            for mask in ("random", "random_nonzero", "random_per_tensor", "magnitude", "inverse")
        },
        "zero_frozen": constant.model_copy(update={"zero_fisher": "frozen"}),
        "per_sequence": constant,
    }
    assert {c.method for c in cells.values() if c.fisher.estimator == "per_sequence"} == {
        "fft+per_sequence",
        "lora+per_sequence",
    }
    assert set(cells) >= {f"{paradigm}+{name}" for paradigm in ("fft", "lora") for name in expected}
    for method, cell in cells.items():
        variant = method.partition("+")[2]
        if variant in expected:  # the others are newer than this list
            assert cell.align == expected[variant], method
        assert training_arguments(load_recipe(DEMO), cell, tmp_path).ratio()


def test_study_runs_the_whole_grid_and_each_original_once() -> None:
    recipe = load_recipe(STUDY)
    cells = recipe.cells()
    points = len(recipe.matrix.grid["train.learning_rate"]) * len(recipe.matrix.grid["safety.data"])
    assert len(cells) == len({cell.id for cell in cells}) == 3 + 3 * 3 * 6 * points
    for cell in cells:
        if cell.safety:
            assert cell.train["learning_rate"] == cell.grid["train.learning_rate"]
            assert cell.safety.data == cell.grid["safety.data"]


def test_every_cell_fits_trl_and_peft(tmp_path: Path) -> None:
    from peft import LoraConfig
    from trl import SFTConfig

    for cell in load_recipe(DEMO).cells()[:7]:
        if cell.paradigm != "none":
            config = SFTConfig(output_dir=str(tmp_path), **installed_names(cell.train, SFTConfig))
            assert config.learning_rate == {"fft": 2e-3, "lora": 1e-2}[cell.paradigm]
            assert config.save_strategy == "no"
        if cell.paradigm == "lora":
            assert LoraConfig(**cell.lora).lora_alpha == 16


def test_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    recipe = small(tmp_path, "matrix: {methods: [fft+rpsa, lora+rpsa]}\n")
    fft, lora = recipe.cells()
    assert fft.align == Align(frozen_ratio="dynamic", window=20, every=25, sigma_scale=2.0)
    assert (fft.train["learning_rate"], fft.train["num_train_epochs"]) == (1e-5, 3)
    assert (lora.train["learning_rate"], lora.train["num_train_epochs"]) == (1e-4, 6)
    assert (fft.train["weight_decay"], fft.train["max_grad_norm"]) == (1e-4, 1.0)
    assert (lora.lora["r"], lora.lora["lora_alpha"], lora.lora["lora_dropout"]) == (4, 16, 0.05)
    assert recipe.reference.n == 100
    assert recipe.folder == Path("runs/small")


def test_strength_of_settings(tmp_path: Path) -> None:
    more = """
train: {learning_rate: 1e-3, weight_decay: 0.1}
align: {every: 3}
matrix:
  paradigms: {fft: {train: {learning_rate: 2e-3}}}
  methods:
    fft:
    mine: {paradigm: fft, train: {learning_rate: 4e-3}, align: {window: 7}, safety: {n: 9}}
    lora: {lora: {r: 2}}
"""
    fft, mine, lora = small(tmp_path, more).cells()
    assert [c.train["learning_rate"] for c in (fft, mine, lora)] == [2e-3, 4e-3, 1e-3]
    assert {c.train["weight_decay"] for c in (fft, mine, lora)} == {0.1}
    assert mine.align == Align(window=7, every=3)
    assert mine.safety is not None
    assert (mine.safety.n, mine.safety.data) == (9, "tiny:refusals")
    assert lora.lora["r"] == 2


def test_the_command_line_wins_over_paradigms_and_the_grid() -> None:
    cells = load_recipe(DEMO, ["train.learning_rate=5e-4", "matrix.bases=[tiny:1]"]).cells()
    assert {c.learning_rate for c in cells} == {None, 5e-4}
    assert {c.base for c in cells} == {"tiny:1"}
    cells = load_recipe(STUDY, ["train.learning_rate=5e-4", "safety.data=tiny:balanced"]).cells()
    assert len(cells) == 3 + 3 * 3 * 6
    assert {c.learning_rate for c in cells} == {None, 5e-4}
    cells = load_recipe(STUDY, ["matrix.grid.train.learning_rate=[7e-4]"]).cells()
    assert {c.learning_rate for c in cells} == {None, 7e-4}


def test_an_override_reaches_one_method_of_a_list() -> None:
    cells = load_recipe(DEMO, ["matrix.methods.fft.train.weight_decay=0.5"]).cells()
    assert {c.method for c in cells if c.train.get("weight_decay") == 0.5} == {"fft"}
    assert len(cells) == 21


def test_an_axis_of_the_grid_runs_only_where_it_concerns(tmp_path: Path) -> None:
    more = "matrix: {methods: [original, fft, fft+rpsa, lora], grid: {align.window: [2, 3], lora.r: [1, 2, 4]}}\n"
    counts = [cell.method for cell in small(tmp_path, more).cells()]
    assert counts == ["original", "fft", "fft+rpsa", "fft+rpsa", "lora", "lora", "lora"]


def test_data_dir_is_put_in(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.jsonl").write_text("{}")
    recipe = small(
        tmp_path, "data_dir: nowhere\n", ["safety.data=${data_dir}/x.jsonl", f"data_dir={tmp_path}/d"]
    )
    assert recipe.safety.data == f"{tmp_path}/d/x.jsonl"


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    assert small(tmp_path, "report:\nfisher:\n").fisher == Fisher()


MISTAKES = [
    ("fisher.estimatr=1", "fisher.estimatr: unknown key; did you mean 'estimator'?"),
    ("fishr.n=1", "fishr: unknown key; did you mean 'fisher'?"),
    (
        "fisher.estimator=per_tokn",
        "fisher.estimator: 'per_tokn' is not a valid value; did you mean 'per_token'?",
    ),
    ("fisher.scope='('", "fisher.scope: '(' is not a regular expression"),
    ("align.frozen_ratio=1.4", "align.frozen_ratio: 1.4 is not between 0 and 1"),
    (
        "align.frozen_ratio=dynamc",
        "align.frozen_ratio: 'dynamc' is neither a number between 0 and 1 nor 'dynamic' nor 'noise'",
    ),
    (
        "align.frozen_ratio=true",
        "align.frozen_ratio: expected a number between 0 and 1, 'dynamic' or 'noise', not True",
    ),
    ("align.window=0", "align.window: 0 is not greater than 0"),
    ("reference.n=many", "reference.n: expected a whole number, not 'many'"),
    ("reference.n=true", "reference.n: expected a whole number, not True"),
    ("reference.temperature=.nan", "reference.temperature: nan is not a finite number"),
    ("reference=3", "reference: expected a mapping, not 3"),
    ("train.lr=1", "train.lr: unknown key of SFTConfig; did you mean 'learning_rate'?"),
    ("train.learning_rat=1", "train.learning_rat: unknown key of SFTConfig; did you mean 'learning_rate'?"),
    ("train.learning_rate=fast", "train.learning_rate: expected a number, not 'fast'"),
    ("train.learning_rate=-1", "train.learning_rate: -1 is not greater than 0"),
    (
        "train.lr_scheduler_type=cosin",
        "train.lr_scheduler_type: 'cosin' is not a valid value; did you mean 'cosine'?",
    ),
    ("train.seed=1", "train.seed: set matrix.seeds instead"),
    ("lora.rank=1", "lora.rank: unknown key of LoraConfig; did you mean 'r'?"),
    ("lora.r=1.5", "lora.r: expected a whole number, not 1.5"),
    ("lora.r=0", "lora.r: 0 is not greater than 0"),
    (
        "matrix.methods=[fft+rspa]",
        "'fft+rspa' is not a well-known method and has no paradigm; did you mean 'fft+rpsa'?",
    ),
    (
        "matrix.methods.fft.align.windw=1",
        "matrix.methods.fft.align.windw: unknown key; did you mean 'window'?",
    ),
    ("matrix.methods.fft.train.foo=1", "matrix.methods.fft.train.foo: unknown key of SFTConfig"),
    ("matrix.paradigms.lor.train.a=1", "matrix.paradigms.lor: unknown key; did you mean 'lora'?"),
    ("matrix.bases=[tiny:7]", "matrix.bases: 'tiny:7' is unknown; did you mean 'tiny:"),
    ("matrix.seeds=[1, 1]", "matrix.seeds: 1 appears twice"),
    ("matrix.seeds=[]", "matrix.seeds: empty"),
    ("matrix.grid.foo=[1]", "matrix.grid.foo: a grid key is train.*"),
    ("matrix.grid.align.windw=[1]", "matrix.grid.align.windw: unknown key; did you mean 'window'?"),
    ("matrix.grid.align.frozen_ratio=[2]", "matrix.grid.align.frozen_ratio: 2 is not between 0 and 1"),
    ("matrix.grid.train.learning_rate=[a]", "matrix.grid.train.learning_rate: expected a number, not 'a'"),
    ("safety.data=tiny:refusal", "safety.data: 'tiny:refusal' is unknown; did you mean 'tiny:refusals'?"),
    ("safety.data=null", "safety.data: missing"),
    ("safety.data=self", "safety.prompts: missing; for data: self name the harmful requests"),
    (
        "safety.prompts=tiny",
        "safety.prompts: only data that the model makes itself has it; set safety.data=self",
    ),
    ("safety.steer=x", "safety.steer: only data that the model makes itself has it"),
    ("safety.filter=refusal", "safety.filter: only data that the model makes itself has it"),
    (
        "matrix.methods.fft.safety.per_prompt=2",
        "matrix.methods.fft.safety.per_prompt: only data that the model",
    ),
    ("matrix.grid.safety.per_prompt=[2, 4]", "matrix.grid.safety.per_prompt: only data that the model makes"),
    ("safety.per_prompt=0", "safety.per_prompt: 0 is not greater than 0"),
    ("safety.promts=tiny", "safety.promts: unknown key; did you mean 'prompts'?"),
    ("safety.benign=self", "safety.benign: 'self' is for safety.data; name a file or a dataset"),
    (
        "safety={data: self, prompts: nowhere/x.jsonl}",
        "safety.prompts: no such file or folder: 'nowhere/x.jsonl'",
    ),
    (
        "safety={data: self, prompts: tiny, benign: 'tiny:x'}",
        "safety.benign: 'tiny:x' is unknown; did you mean 'tiny'?",
    ),
    (
        "safety.data=nowhere/x.jsonl",
        "safety.data: no such file or folder: 'nowhere/x.jsonl'; there is no nowhere",
    ),
    ("reference.problems=null", "reference.problems: missing"),
    ("evaluate.tasks=[tiy]", "evaluate.tasks: 'tiy' is unknown; did you mean 'tiny'?"),
    ("analysis.perturb.draws=1", "evaluate.tasks: empty; sweeps and analysis.perturb show what is measured"),
    ("version=2", "version: 2 is not a valid value; valid: 1"),
    ("name=a/b", "name: 'a/b' does not match"),
    ("safety.data=${data}", "${data} is unknown; the only variable is ${data_dir}"),
    ("safety.data=${data_dir}/x", "data_dir: missing"),
    ("noequals", "'noequals': write an override as section.key=value"),
    ("name.x=1", "'name' is not a section"),
    ("train.learning_rate=[", "train.learning_rate:"),
]


@pytest.mark.parametrize(("override", "expected"), MISTAKES)
def test_mistakes_are_one_readable_line(override: str, expected: str) -> None:
    with pytest.raises(RPSAError) as caught:
        load_recipe(DEMO, [override, *(["evaluate.tasks=[]"] if "perturb" in override else [])])
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_several_mistakes_are_all_named() -> None:
    with pytest.raises(RPSAError, match=r"1 more: .*align\.windw|1 more: .*fisher\.probs"):
        load_recipe(DEMO, ["align.windw=1", "fisher.probs=2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", "r.yaml:2: key 'a' appears twice"),
        ("a:\n  b: 1\n  b: 2", "r.yaml:3: key 'b' appears twice"),
        ("a: [1\nb: 2", "r.yaml:2: while parsing a flow sequence"),
        ("a: 1\n\tb: 2", "r.yaml:2: "),
        ("1: 2", "r.yaml:1: key 1 is not text"),
        ("- a", "expected a mapping with keys such as version"),
        ("", "expected a mapping"),
    ],
)
def test_broken_yaml_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RPSAError, match=r"^r\.yaml") as caught:
        load_recipe(path)
    assert expected in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(MINIMAL)
    with pytest.raises(RPSAError, match=r"no such recipe; did you mean 'demo\.yaml'\?"):
        load_recipe(tmp_path / "demos.yaml")
    with pytest.raises(RPSAError, match=r"is a folder, not a recipe; it holds demo\.yaml"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RPSAError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_yaml_scalars_mean_what_they_look_like() -> None:
    text = "{a: 1e-3, b: no, c: 010, d: true, e: 2024-01-01, f: '1', g: .5, h: ~, i: 3., j: -2}"
    assert parse_yaml(text, "t") == {
        "a": 0.001,
        "b": "no",
        "c": 10,
        "d": True,
        "e": "2024-01-01",
        "f": "1",
        "g": 0.5,
        "h": None,
        "i": 3.0,
        "j": -2,
    }


def test_choices_are_those_of_the_parts() -> None:
    """The recipe repeats some choices, so that a typo is reported before torch is imported."""
    from rpsa.fisher.estimators import FisherConfig
    from rpsa.safety_data import SafetyFormat
    from rpsa.settings import MaskKind

    def choices(model: type[BaseModel], name: str) -> tuple[Any, ...]:
        return typing.get_args(model.model_fields[name].annotation)

    from rpsa.recipe import Safety

    assert choices(Align, "mask") == typing.get_args(MaskKind)
    assert choices(Safety, "format") == typing.get_args(SafetyFormat)
    hints = typing.get_type_hints(FisherConfig)
    assert choices(Fisher, "estimator") == typing.get_args(hints["estimator"])
    assert choices(Fisher, "precision") == typing.get_args(hints["precision"])
    ours = set(Fisher.model_fields) - {"warmup_steps", "batch_size", "activation_checkpointing"}
    assert ours <= {field.name for field in dataclasses.fields(FisherConfig)}


def test_the_schema_admits_the_shipped_recipes_keys() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == {*Recipe.model_fields, "extends"}
    for path in (path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate"):
        assert set(parse_yaml(path.read_text(), path.name)) <= set(schema["properties"])
    assert schema["$defs"]["Fisher"]["additionalProperties"] is False
    assert "fft+rpsa" in schema["$defs"]["Matrix"]["properties"]["methods"]["anyOf"][0]["items"]["enum"]


SWEPT = """
evaluate: {tasks: [tiny]}
sweeps:
  rank:
    methods: [lora, lora+constant]
    over: {lora.r: [1, 2], align.frozen_ratio: [0.3, 0.6]}
matrix: {methods: [original, lora], bases: ["tiny:0"]}
"""


def test_sweeps_add_cells_of_their_own(tmp_path: Path) -> None:
    cells = small(tmp_path, SWEPT).cells()
    assert [cell.id for cell in cells if cell.sweep is None] == ["original/tiny-0", "lora/tiny-0/seed42"]
    swept = [cell for cell in cells if cell.sweep == "rank"]
    assert [dict(cell.grid) for cell in swept if cell.method == "lora"] == [{"lora.r": 1}, {"lora.r": 2}]
    assert len([cell for cell in swept if cell.method == "lora+constant"]) == 4
    assert {cell.lora["r"] for cell in swept} == {1, 2}
    assert len({cell.id for cell in cells}) == len(cells)
    assert all(cell.id.startswith("sweep-rank/") for cell in swept)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("lora.rr: [1, 2]", r"sweeps\.rank\.over\.lora\.rr: unknown key of LoraConfig"),
        ("lora.r: [0, 2]", r"sweeps\.rank\.over\.lora\.r: 0 is not greater than 0"),
        (
            "align.frozen_ratio: [2.0]",
            r"sweeps\.rank\.over\.align\.frozen_ratio: 2\.0 is not between 0 and 1",
        ),
        ("rank: [1, 2]", r"sweeps\.rank\.over\.rank: a grid key is"),
        ("lora.r: [1, 1]", r"1 appears twice"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line(tmp_path: Path, written: str, message: str) -> None:
    with pytest.raises(RPSAError, match=message):
        small(tmp_path, SWEPT.replace("lora.r: [1, 2], align.frozen_ratio: [0.3, 0.6]", written))


@examples(300)
@given(st.lists(st.text(max_size=300), unique=True, max_size=8))
@example(
    [
        "tiny:0",
        "tiny-0",
        "tiny--0",
        "tiny/0",
        "tiny 0",
        "..",
        ".",
        "",
        "-",
        "a/b",
        "a--b",
        "a/../b",
        "模型",
        "型模",
    ]
)
@example(
    [folder_name("模型"), "模型", "a\0b", "a\nb", "x" * 101, "x" * 102, "con", "~", "$HOME", "*", "\ud800"]
)
def test_a_name_is_one_folder_and_no_other_names(names: list[str]) -> None:
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for name in folders:
        assert re.fullmatch(r"[A-Za-z0-9+_][A-Za-z0-9+._-]{0,120}", name)
        assert (Path("/run") / name).resolve().parent == Path("/run")


def test_well_behaved_names_stay_as_they_are() -> None:
    for name in ("fft+rpsa", "seed0", "Qwen2.5_x", "a-b", "1e-3"):
        assert folder_name(name) == name
    assert folder_name("tiny:0") == "tiny-0"
    assert folder_name("Qwen/Qwen3-8B") == "Qwen--Qwen3-8B"


METHOD = "{paradigm: fft}"


@pytest.mark.parametrize(
    "name", ["..", ".", "../../x", "模型", "a/b", " ", "*", "~", "a b", ".hidden", "-x", "x" * 300]
)
def test_whatever_a_method_is_called_its_folders_are_in_the_run(tmp_path: Path, name: str) -> None:
    methods = json.dumps(
        {name: {"paradigm": "fft"}, "fft": {"paradigm": "fft"}, "original": {"paradigm": "none"}}
    )
    recipe = small(
        tmp_path, f"output_dir: {tmp_path}/run\nevaluate: {{tasks: [tiny]}}\nmatrix: {{methods: {methods}}}"
    )
    folders = [task.folder.resolve() for stage in ("align", "evaluate") for task in tasks_of(recipe, stage)]
    assert len(set(folders)) == 5
    for folder in folders:
        place = folder.relative_to(tmp_path / "run").parts
        assert place[0] in ("align", "evaluate")
        assert len(place) in (3, 4)
        assert not any(folder in other.parents for other in folders)


def test_a_base_above_the_run_has_a_folder_in_it(tmp_path: Path) -> None:
    recipe = small(
        tmp_path, 'matrix: {bases: ["..", "."], methods: [original, fft+rpsa]}\nevaluate: {tasks: [tiny]}'
    )
    for stage in STAGES[:-1]:
        for task in tasks_of(recipe, stage):
            home = "held-out" if isinstance(task, HeldOutTask) else stage
            assert (recipe.folder / home).resolve() in task.folder.resolve().parents


@pytest.mark.parametrize(
    "part",
    [
        "matrix: {grid: {train.run_name: ['a|b', 'a-b', 'a b']}}",
        "matrix: {grid: {train.run_name: ['1', '1.0', 'true', '0.1']}}",
        "matrix: {grid: {train.seed_: [1]}, methods: [fft]}".replace("train.seed_", "align.every"),
        "matrix: {grid: {lora.target_modules: [[a, b], ['a, b'], ['a', 'b ']]}, methods: [lora]}",
        "matrix: {methods: [fft, lora], grid: {train.learning_rate: [1e-3, 2e-3], lora.r: [1, 2]}, seeds: [0, 1]}",
        "sweeps: {a: {methods: [fft], over: {train.learning_rate: [1e-3]}}}",
    ],
)
def test_two_runs_never_share_a_folder(tmp_path: Path, part: str) -> None:
    cells = [Path(cell.id) for cell in small(tmp_path, part + "\n" + "evaluate: {tasks: [tiny]}").cells()]
    assert len(set(cells)) == len(cells)
    assert not any(one in other.parents for one in cells for other in cells)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            f"matrix: {{methods: {{a: {METHOD}, A: {METHOD}}}}}",
            "matrix: 2 runs would have the same folder, a/tiny-0",
        ),
        (
            "matrix: {methods: {sweep-a: {paradigm: none}}, bases: [fft, tiny:0]}\nevaluate: {tasks: [tiny]}\n"
            "sweeps: {a: {methods: [fft], over: {train.learning_rate: [1e-3]}}}",
            "matrix: sweep-a/fft/fft/seed42,learning_rate=0.001 would be a folder inside of another run's",
        ),
    ],
)
def test_folders_that_would_be_the_same_are_refused(tmp_path: Path, part: str, message: str) -> None:
    with pytest.raises(RPSAError, match=message):
        small(tmp_path, part)


def test_methods_with_fishers_of_their_own_have_folders_of_their_own(tmp_path: Path) -> None:
    methods = {
        "a": "{paradigm: fft, align: {}, fisher: {probes: 8}}",
        "b": "{paradigm: fft, align: {}, fisher: {probes: 16}}",
        "c": "{paradigm: fft, align: {}, fisher: {batch_size: 1}}",
    }
    written = ", ".join(f"{name}: {settings}" for name, settings in methods.items())
    recipe = small(tmp_path, f"matrix: {{methods: {{{written}}}}}")
    folders = [fisher_task(recipe, cell).folder.name for cell in recipe.cells()]  # type: ignore[union-attr]
    assert len(set(folders)) == 3
    assert folders[2] == "full"  # how it is batched does not change a Fisher
