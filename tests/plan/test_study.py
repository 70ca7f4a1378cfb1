"""Totals of a study against arithmetic by hand, and the command that shows them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import invoke
from helpers.paths import RECIPES
from rpsa.errors import RPSAError
from rpsa.plan import Plan, make_plan
from rpsa.plan.judging import ANSWER_SHARE, judge_parameters, judgings
from rpsa.plan.render import whole_study
from rpsa.plan.time import GPUS, evaluation_responses
from rpsa.plan.totals import Total, Work, makespan, wall_seconds
from rpsa.recipe import load_recipe
from rpsa.recipe.sections import Evaluate

DEMO = RECIPES / "tiny" / "demo.yaml"
TINY = ["matrix.bases=[tiny:0]", "matrix.parallel=1"]


def demo(*settings: str, **how: Any) -> Plan:
    return make_plan(load_recipe(DEMO, [*TINY, "matrix.methods=[original, fft, lora]", *settings]), **how)


def test_workers_take_tasks_as_they_come() -> None:
    assert makespan([3.0, 3.0, 3.0], 1) == 9
    assert makespan([3.0, 3.0, 3.0], 2) == 6
    assert makespan([5.0, 1.0, 1.0, 1.0], 2) == 5
    assert makespan([], 2) == 0


def test_stages_follow_one_another_and_what_is_launched_takes_all_gpus() -> None:
    fisher = Work("fisher", "F", 1, {"H100": {1: 80.0, 4: 20.0}})
    align = Work("align", "A", 3, {"H100": {2: 40.0, 4: 25.0}})
    evaluate = Work("evaluate", "E", 4, {"H100": {1: 100.0}})
    works = [evaluate, fisher, align]
    assert wall_seconds(works, "H100", 4, 4, launched=True) == 20 + 3 * 25 + 100
    assert wall_seconds(works, "H100", 4, 1, launched=True) == 20 + 3 * 25 + 4 * 100
    assert wall_seconds(works, "H100", 2, 2, launched=True) == 80 + 3 * 40 + 2 * 100
    assert wall_seconds(works, "H100", 1, 1, launched=True) is None
    assert wall_seconds(works, "A100", 4, 4, launched=True) is None
    beside = [Work("align", "A", 3, {"H100": {1: 10.0}}), Work("evaluate", "E", 2, {"H100": {2: 30.0}})]
    assert wall_seconds(beside, "H100", 4, 4, launched=False) == 10 + 30
    assert wall_seconds(beside, "H100", 2, 2, launched=False) == 20 + 60


def test_the_totals_are_sums_of_the_parts() -> None:
    plan = demo(gpus=(1, 2), usd_per_hour=3.0)
    one, two = plan.study.totals
    parts = sum(work.times * work.seconds["H100"][1] for work in plan.works)
    assert one.seconds == one.as_written == pytest.approx(parts)
    assert one.usd == pytest.approx(3 * parts / 3600)
    assert one.seconds is not None
    assert two.seconds is not None
    assert two.seconds < one.seconds == two.as_written
    assert two.gpu_hours == pytest.approx(2 * two.seconds / 3600)
    assert plan.study.total == one
    assert whole_study(plan.study).startswith("Whole study on 1 × H100-80: ")
    assert demo("matrix.parallel=2", gpus=(1, 2)).study.total == Total(2, two.seconds, two.seconds, None)


def test_every_run_counts_in_time_and_on_disk() -> None:
    once, thrice = demo(gpus=(1,)), demo("matrix.seeds=[1, 2, 3]", gpus=(1,))
    assert {w.name: w.times for w in once.works} == {
        "tiny:0: held out": 1, "tiny:0: fft": 1, "tiny:0: lora": 1, "tiny:0: evaluate, each model": 3
    }  # fmt: skip
    assert {w.times for w in thrice.works if w.stage == "align"} == {3}
    assert [w.times for w in thrice.works if w.stage == "evaluate"] == [7]
    left = {one.name: one.size for one in once.study.disk}
    assert left["tiny:0: fft"] == 4 * 363_552
    assert {one.name: one.size for one in thrice.study.disk}["tiny:0: fft"] == 3 * left["tiny:0: fft"]
    assert once.study.download == []


def test_judges_read_answers_and_cost_time_here_and_calls_elsewhere() -> None:
    settings = Evaluate(
        tasks=["rpsa_strongreject", "rpsa_xstest", "rpsa_aime24"],
        judge="llama-guard-3",
        second_judge="rubric",
        second_judge_settings={"base_url": "http://127.0.0.1/v1", "model": "m"},
        judge_thoughts=False,
    )
    guard, rubric = judgings(settings, evaluation_responses(settings))
    assert (guard.texts, guard.parameters, rubric.model) == (313, 8_000_000_000, None)
    assert guard.tokens_in == 313 * 300 + round(ANSWER_SHARE * 313 * 800)
    h100 = GPUS[0]
    reading = 2 * 8e9 * guard.tokens_in / (989e12 * 0.4)
    assert guard.seconds(h100) == pytest.approx(reading + 313 * 8 / 16 * 0.025)
    assert rubric.seconds(h100) == 0
    with_thoughts = settings.model_copy(update={"judge_thoughts": True, "second_judge": None})
    [both] = judgings(with_thoughts, evaluation_responses(with_thoughts))
    assert (both.texts, both.tokens_in) == (2 * 313, 2 * 313 * 300 + 313 * 800)
    apart = with_thoughts.model_copy(update={"thought_judge": "reasoningshield"})
    assert [(one.judge, one.texts) for one in judgings(apart, evaluation_responses(apart))] == [
        ("llama-guard-3", 313), ("reasoningshield", 313)
    ]  # fmt: skip
    assert [judge_parameters(name) for name in ("cais/HarmBench-Llama-2-13b-cls", "x/Guard-Gen-0.6B", "a/b")] == [
        13_000_000_000, 600_000_000, 8_000_000_000
    ]  # fmt: skip


def test_vllm_unless_the_recipe_says_otherwise() -> None:
    """And several engines are as many GPUs."""
    by_vllm = demo(gpus=(1, 2)).stages["tiny:0"][-1]
    slow = demo("evaluate.backend=transformers", "evaluate.batch_size=4", gpus=(1, 2)).stages["tiny:0"][-1]
    assert "vLLM" in by_vllm.work.arithmetic[0]
    assert "by transformers, 4 at a time" in slow.work.arithmetic[0]
    double = demo("evaluate.engine={data_parallel_size: 2}", gpus=(1, 2))
    assert list(double.stages["tiny:0"][-1].work.seconds["H100"]) == [2]
    assert double.study.totals[0].seconds is None


def test_the_fishers_precision_decides_its_time() -> None:
    def seconds(precision: str) -> float:
        plan = make_plan(
            load_recipe(DEMO, [*TINY, "matrix.methods=[fft+rpsa]", f"fisher.precision={precision}"]),
            gpus=(1,),
        )
        return next(s.seconds["H100"] for s in plan.stages["tiny:0"] if s.stage == "Fisher, full")

    assert seconds("fp32") / seconds("bf16") == pytest.approx(989 / 67)
    assert seconds("tf32") / seconds("bf16") == pytest.approx(2)


def test_an_anchor_costs_a_second_pass() -> None:
    plan = make_plan(load_recipe(DEMO, [*TINY, "matrix.methods=[fft+constant, fft+constant_kl]"]), gpus=(1,))
    constant, anchored = (method.work for method in plan.methods)
    assert "of the anchor" in anchored.arithmetic[0]
    assert anchored.seconds["H100"][1] == pytest.approx(2 * constant.seconds["H100"][1], rel=0.1)


def test_the_command_explains_and_says_the_same_as_json() -> None:
    words = [
        "plan",
        str(DEMO),
        *TINY,
        "matrix.methods=[original, fft]",
        "--gpus",
        "1,2",
        "--usd-per-hour",
        "2",
    ]
    shown = invoke(*words, "--explain")
    assert shown.exit_code == 0, shown.output
    for said in ("Whole study on 1 × H100-80: ", "tokens a second", "operations of", "On disk", "$"):
        assert said in shown.stdout, said
    plan = json.loads(invoke(*words, "--json").stdout)
    assert plan["study"]["disk_bytes"] > 4 * 363_552
    assert [total["gpus"] for total in plan["study"]["totals"]] == [1, 2]
    for line in plan["methods"][0]["work"]["arithmetic"]:
        assert line in " ".join(shown.stdout.split())
    with pytest.raises(RPSAError, match="usd-per-hour"):
        demo(usd_per_hour=-1)


def test_a_missing_config_is_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rpsa.cli import main\ntry:\n    main()\nfinally:\n"
        "    print([m for m in ('torch', 'transformers', 'trl', 'peft') if m in sys.modules])"
    )
    recipe = RECIPES / "deepseek-r1-distill-qwen-7b" / "lora.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(recipe), "model.name=nobody/nothing"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (2, "[]")
    assert "`hf download nobody/nothing config.json`" in done.stderr
