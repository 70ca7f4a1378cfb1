"""The benchmarks: which rows are asked, what the prompts say, and what happens without the data."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.paths import DATA_DIR
from rpsa.errors import RPSAError
from rpsa.evaluation import TASKS_PATH
from rpsa.evaluation.benchmarks import BENCHMARKS, GROUPS, Item, TaskOptions
from rpsa.evaluation.data import Source, load_rows
from rpsa.evaluation.items import (
    TASK_NAMES,
    TINY_SETS,
    expanded,
    load_task,
    load_tasks,
    local_benchmarks,
    reachable,
)
from rpsa.generation import Sampling
from rpsa.recipe.problems import SHIPPED
from rpsa.reference import load_problems

needs_data = pytest.mark.skipif(not DATA_DIR.is_dir(), reason="the benchmarks' files are not here")
HERE = TaskOptions(data_dir=str(DATA_DIR))


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> TaskOptions:
    path = folder / name
    if name.endswith(".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskOptions(data_dir=str(folder))


@needs_data
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("rpsa_aime24", 30),
        ("rpsa_humaneval_plus", 164),
        ("rpsa_mbpp_plus", 378),
        ("rpsa_mbpp_paper", 378),
        ("rpsa_math500", 400),
        ("rpsa_strongreject", 313),
        ("rpsa_xstest", 250),
        ("rpsa_xstest_unsafe", 200),
    ],
)
def test_every_row_becomes_an_item(name: str, n: int) -> None:
    items = load_task(name, HERE)
    assert len(items) == len({item.id for item in items}) == n
    assert {item.set for item in items} == {name}
    assert {item.kind for item in items} == {BENCHMARKS[name].kind}
    assert all(item.prompt and (item.answer or item.scorer in ("code", "judge")) for item in items)
    assert all(Item.from_json(json.loads(json.dumps(item.to_json()))) == item for item in items)


@needs_data
def test_prompts_are_those_of_appendix_b() -> None:
    aime = load_task("rpsa_aime24", HERE)[0].prompt
    assert aime.startswith("Solve the following math problem. Present the final answer in the format: ")
    assert "Final Answer: \\boxed{your_answer}.\n\nProblem: " in aime
    assert aime.endswith("\n\nAnswer:")
    humaneval = load_task("rpsa_humaneval_plus", HERE)[0].prompt
    assert humaneval.endswith("Please reason step by step, and put your final answer within a code block:")
    for item in load_task("rpsa_mbpp_plus", HERE):
        assert " Your code should satisfy the following assertion: assert " in item.prompt
        assert f"def {item.problem.entry_point}" in item.problem.reference
    styled = TaskOptions(data_dir=str(DATA_DIR), prompt_style="section_4")
    assert load_task("rpsa_aime24", styled)[0].prompt == aime + "\n\nPlease think step by step."
    assert load_task("rpsa_strongreject", styled) == load_task("rpsa_strongreject", HERE)


@needs_data
def test_the_shown_assertion_is_no_test_of_mbpp_plus() -> None:
    plus, paper = load_task("rpsa_mbpp_plus", HERE), load_task("rpsa_mbpp_paper", HERE)
    for full, shown in zip(plus, paper, strict=True):
        assert full.prompt == shown.prompt
        assert shown.problem.test.strip().splitlines()[-1] in full.prompt
        assert full.problem.test.strip().splitlines()[-1] not in full.prompt


@needs_data
def test_math500_leaves_the_problems_of_d_ref_out(tmp_path: Path) -> None:
    asked = {item.id for item in load_task("rpsa_math500", HERE)}
    reference = {problem.id for problem in load_problems(DATA_DIR / "math500" / "math500.jsonl", 100, 42)}
    assert len(reference) == 100
    assert not asked & reference
    other = sorted(asked)[:3]
    write(tmp_path, "traces.jsonl", [{"problem_id": name} for name in other])
    left = {
        i.id for i in load_task("rpsa_math500", TaskOptions(data_dir=str(DATA_DIR), reference=str(tmp_path)))
    }
    assert len(left) == 497
    assert not left & set(other)


def gpqa_rows(n: int) -> list[dict[str, str]]:
    return [
        {
            "Question": f"What is {i}?",
            "Correct Answer": f"right {i}",
            **{f"Incorrect Answer {j}": f"wrong {j} of {i}" for j in (1, 2, 3)},
            "Record ID": f"rec{i}",
        }
        for i in range(n)
    ]


def test_gpqa_is_shuffled_by_its_questions_alone(tmp_path: Path) -> None:
    rows = gpqa_rows(200)
    items = {item.id: item for item in load_task("rpsa_gpqa_main", write(tmp_path, "gpqa_main.jsonl", rows))}
    places = Counter(item.answer for item in items.values())
    assert set(places) == set("ABCD")
    assert all(30 <= count <= 70 for count in places.values())
    for i in range(200):
        asked = items[f"rec{i}"]
        assert f"({asked.answer}) right {i}\n" in asked.prompt
        assert all(f"wrong {j} of {i}\n" in asked.prompt for j in (1, 2, 3))
    again = write(tmp_path, "gpqa_main.jsonl", rows[::-1][:50])
    assert all(items[item.id].prompt == item.prompt for item in load_task("rpsa_gpqa_main", again))


def test_wildjailbreak_is_250_adversarial_harmful_prompts(tmp_path: Path) -> None:
    rows = [
        {
            "adversarial": f"play {i}",
            "label": "1",
            "data_type": f"adversarial_{'benign' if i % 5 == 0 else 'harmful'}",
        }
        for i in range(600)
    ]
    items = load_task("rpsa_wildjailbreak", write(tmp_path, "WildJailbreak_eval.tsv", rows))
    assert len(items) == len({item.prompt for item in items}) == 250
    numbers = [int(item.prompt.removeprefix("play ")) for item in items]
    assert all(number % 5 for number in numbers)
    assert numbers == sorted(numbers)
    assert max(numbers) > 500  # a draw, not the head


# A row of each set as its owners publish it, rows that are not asked, and the prompts of the items.
SETS: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "rpsa_wildjailbreak_benign": (
        "WildJailbreak_eval.tsv",
        [
            {"adversarial": "play along", "label": "0", "data_type": "adversarial_benign"},
            {"adversarial": "play foul", "label": "1", "data_type": "adversarial_harmful"},
        ],
        ["play along"],
    ),
    "rpsa_orbench_hard": ("or-bench-hard-1k.jsonl", [{"prompt": "a", "category": "c"}], ["a"]),
    "rpsa_falsereject": ("FalseReject_test.jsonl", [{"prompt": "b", "category": "c"}], ["b"]),
    "rpsa_jailbreakbench": (
        "harmful-behaviors.jsonl",
        [{"Index": 0, "Goal": "g", "Target": "t", "Behavior": "short", "Category": "c", "Source": "s"}],
        ["g"],
    ),
    "rpsa_jailbreakbench_benign": (
        "benign-behaviors.jsonl",
        [{"Index": 0, "Goal": "h", "Target": "t", "Behavior": "short", "Category": "c", "Source": "s"}],
        ["h"],
    ),
    "rpsa_sorrybench": (
        "sorrybench.jsonl",
        [
            {"question_id": 1, "category": "1", "turns": ["ask"], "prompt_style": "base"},
            {"question_id": 1, "category": "1", "turns": ["nfx"], "prompt_style": "caesar"},
        ],
        ["ask"],
    ),
}
HARMBENCH = [
    {"BehaviorID": "s", "Behavior": "do it", "FunctionalCategory": "standard", "ContextString": ""},
    {"BehaviorID": "c", "Behavior": "use it", "FunctionalCategory": "contextual", "ContextString": "facts"},
    {"BehaviorID": "k", "Behavior": "copy it", "FunctionalCategory": "copyright", "ContextString": ""},
]


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_as_its_owners_publish_it(name: str, tmp_path: Path) -> None:
    file, rows, prompts = SETS[name]
    items = load_task(name, write(tmp_path, file, rows))
    assert [item.prompt for item in items] == prompts
    assert {(item.kind, item.scorer) for item in items} == {(BENCHMARKS[name].kind, "judge")}
    for column in ("adversarial", "data_type", "prompt", "Goal", "turns", "prompt_style"):
        if column in rows[0]:
            folder = tmp_path / f"without {column}"
            folder.mkdir()
            options = write(folder, file, [{k: v for k, v in row.items() if k != column} for row in rows])
            with pytest.raises(RPSAError, match=f"has no (text field|list of texts) '{column}'") as error:
                load_task(name, options)
            assert "\n" not in str(error.value)


def test_harmbench_direct_in_context_and_wrapped(tmp_path: Path) -> None:
    options = write(tmp_path, "harmbench_behaviors_text_all.jsonl", HARMBENCH)
    assert [(i.id, i.prompt) for i in load_task("rpsa_harmbench", options)] == [("s", "do it")]
    in_context = [(i.id, i.prompt) for i in load_task("rpsa_harmbench_contextual", options)]
    assert in_context == [("c", "facts\n\n---\n\nuse it")]
    write(tmp_path, "in_the_wild_jailbreak.jsonl", [{"prompt": f"Pretend {n}."} for n in range(50)])
    [wrapped] = load_task("rpsa_harmbench_wrapped", options)
    assert wrapped.id == "s"
    assert wrapped.prompt.startswith("Pretend ")
    assert wrapped.prompt.endswith("\n\ndo it")
    files = local_benchmarks(["rpsa_harmbench_wrapped"], str(tmp_path))
    assert [path.name[:9] for path in files.values()] == ["harmbench", "in_the_wi"]


def test_harmbench_of_the_hub_has_a_config_for_each_category(tmp_path: Path) -> None:
    options = write(tmp_path, "harmbench_behaviors.jsonl", [{"prompt": "do it", "category": "c"}])
    assert [item.prompt for item in load_task("rpsa_harmbench", options)] == ["do it"]
    with pytest.raises(RPSAError, match="rpsa_harmbench_contextual: none of the 1 rows is one of its items"):
        load_task("rpsa_harmbench_contextual", options)
    write(tmp_path, "harmbench_behaviors.jsonl", [{"prompt": "use it", "context": "facts", "category": "c"}])
    [item] = load_task("rpsa_harmbench_contextual", options)
    assert item.prompt == "facts\n\n---\n\nuse it"


def test_wrapped_prompts_do_not_depend_on_what_else_is_asked(tmp_path: Path) -> None:
    behaviours = [{**HARMBENCH[0], "BehaviorID": f"b{n}", "Behavior": f"do {n}"} for n in range(40)]
    options = write(tmp_path, "harmbench_behaviors.jsonl", behaviours)
    write(tmp_path, "in_the_wild_jailbreak.jsonl", [{"prompt": f"Pretend {n}."} for n in range(50)])
    everything = {item.id: item.prompt for item in load_task("rpsa_harmbench_wrapped", options)}
    assert len({prompt.split("\n")[0] for prompt in everything.values()}) > 15
    write(tmp_path, "harmbench_behaviors.jsonl", behaviours[::-1][:10])
    assert all(everything[item.id] == item.prompt for item in load_task("rpsa_harmbench_wrapped", options))


@pytest.fixture
def a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the hub's JBB-Behaviors: two splits in one config."""
    data = tmp_path / "jbb" / "data"
    data.mkdir(parents=True)
    for split in ("harmful", "benign"):
        (data / f"{split}.csv").write_text(f"Index,Goal\n0,{split} goal\n")
    (tmp_path / "jbb" / "README.md").write_text(
        "---\nconfigs:\n- config_name: behaviors\n  data_files:\n"
        "  - {split: harmful, path: data/harmful.csv}\n  - {split: benign, path: data/benign.csv}\n---\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "jbb"


def test_a_split_is_named_where_there_are_several(a_hub: Path) -> None:
    for split in ("harmful", "benign"):
        rows = load_rows(Source(str(a_hub), "x", config="behaviors", split=split))
        assert [row.fields["Goal"] for row in rows] == [f"{split} goal"]
    with pytest.raises(RPSAError, match="has no split 'other', only harmful, benign"):
        load_rows(Source(str(a_hub), "x", config="behaviors", split="other"))


def test_sets_that_cannot_be_had_are_told_from_broken_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = write(tmp_path, "harmful_behaviors.jsonl", [{"Goal": "g"}])
    here, away = reachable(["tiny", "rpsa_jailbreakbench", "rpsa_sorrybench"], options)
    assert here == ["tiny", "rpsa_jailbreakbench"]
    assert list(away) == ["rpsa_sorrybench"]
    assert re.search(
        r"sorry-bench-202503 does not load: it is gated: .*hf auth login", str(away["rpsa_sorrybench"])
    )
    write(tmp_path, "harmful_behaviors.jsonl", [{"goal": "AdvBench's"}])
    with pytest.raises(RPSAError, match="has no text field 'Goal'"):
        reachable(["rpsa_jailbreakbench"], options)


def test_a_subset_is_a_draw_in_order(tmp_path: Path) -> None:
    rows = [{"forbidden_prompt": f"p{i}"} for i in range(100)]
    options = write(tmp_path, "strongreject.jsonl", rows)
    everything = [item.id for item in load_task("rpsa_strongreject", options)]
    some = [i.id for i in load_task("rpsa_strongreject", TaskOptions(n=10, seed=1, data_dir=str(tmp_path)))]
    assert len(some) == 10
    assert some == [name for name in everything if name in some]
    assert some != everything[:10]


def test_without_data_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RPSA_DATA_DIR", raising=False)
    with pytest.raises(
        RPSAError,
        match=r"Idavidrein/gpqa does not load: it is gated: .*hf auth login.*RPSA_DATA",
    ):
        load_task("rpsa_gpqa_main", TaskOptions())
    with pytest.raises(
        RPSAError, match=r"has no file called aime24\.\.\., and HuggingFaceH4/aime_2024 does not load"
    ):
        load_task("rpsa_aime24", TaskOptions(data_dir=str(tmp_path)))
    with pytest.raises(RPSAError, match="no such folder"):
        load_task("rpsa_aime24", TaskOptions(data_dir=str(tmp_path / "absent")))
    for name in ("aime24.jsonl", "AIME-24_copy.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        RPSAError, match=r"holds 2 files for aime24: AIME-24_copy\.csv, aime24\.jsonl; keep one"
    ):
        load_task("rpsa_aime24", TaskOptions(data_dir=str(tmp_path)))


def test_the_folder_may_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper", "set.jsonl", [{"a": 1}])
    monkeypatch.setenv("RPSA_DATA_DIR", str(tmp_path))
    assert [row.fields for row in load_rows(Source("nobody/nothing", "set"))] == [{"a": 1}]


def test_files_of_the_users_own(tmp_path: Path) -> None:
    write(
        tmp_path,
        "own.jsonl",
        [
            {"problem": "1+1?", "answer": "2"},
            {"prompt": "write f", "entry_point": "f", "test": "assert f() == 1"},
            {"prompt": "be bad"},
            {"prompt": "be good", "label": "safe"},
            {"prompt": "1+1? Be short.", "answer": "2"},
            {"prompt": "Who?", "answer": "Anna"},
        ],
    )
    items = load_tasks([str(tmp_path / "own.jsonl")], TaskOptions())
    assert [(i.kind, i.scorer) for i in items] == [
        ("reasoning", "integer"),
        ("reasoning", "code"),
        ("reasoning", "number"),
        ("reasoning", "math"),
        ("attack", "judge"),
        ("over_refusal", "judge"),
    ]
    assert [items[2].prompt, items[2].answer] == ["1+1? Be short.", "2"], "asked as it is"
    with pytest.raises(RPSAError, match="two tasks are called own"):
        load_tasks(
            [str(tmp_path / "own.jsonl"), str(tmp_path / ".." / tmp_path.name / "own.jsonl")], TaskOptions()
        )


def test_groups_and_the_tiny_world() -> None:
    assert expanded(["rpsa_aime24", "rpsa_reasoning"]) == list(GROUPS["rpsa_reasoning"])
    assert expanded(["rpsa_tiny"]) == [f"rpsa_tiny_{name}" for name in TINY_SETS]
    together = load_task("tiny", TaskOptions(n=3))
    assert together == load_tasks(["rpsa_tiny"], TaskOptions(n=3))
    assert Counter(item.kind for item in together) == {"reasoning": 18, "attack": 6, "over_refusal": 6}


def yaml_tasks() -> dict[str, dict[str, Any]]:
    """The task files with their includes, function names as text."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))

    def read(path: Path) -> dict[str, Any]:
        content = yaml.load(path.read_text(), Loader)
        return (read(path.parent / content["include"]) | content) if "include" in content else content

    files = {path.stem: read(path) for path in TASKS_PATH.glob("*.yaml")}
    assert all(
        name == file.get("task", file.get("group")) or name == file["group"] for name, file in files.items()
    )
    return files


def test_the_yaml_files_say_what_the_benchmarks_say() -> None:
    files = yaml_tasks()
    assert set(files) | {"tiny"} == set(TASK_NAMES) | set(GROUPS)
    for name, group in GROUPS.items():
        assert files[name]["task"] == list(group)
    paper = Sampling()
    for name, file in files.items():
        if name in GROUPS:
            continue
        assert file["dataset_kwargs"] == {"name": name}
        [only] = file["filter_list"]
        assert only["filter"] == [{"function": "take_first_k", "k": file["repeats"]}]
        if name in BENCHMARKS:
            assert file["repeats"] == BENCHMARKS[name].samples
            drawn = file["generation_kwargs"]
            assert drawn == {
                "until": [],
                "do_sample": True,
                "temperature": paper.temperature,
                "top_p": paper.top_p,
                "max_gen_toks": paper.max_new_tokens,
            }


def test_a_recipe_knows_the_same_names() -> None:
    """It may not import `evaluation`: it reads the names of the files."""
    assert set(SHIPPED["task"]) == set(TASK_NAMES)
