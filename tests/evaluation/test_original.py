"""The reasoning loss of an evaluated model: stored, read back also from before it existed, with an honest interval."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rpsa.cli import app
from rpsa.evaluation.original import HeldOut, loss_from_json, loss_interval, loss_to_json, measured_loss
from rpsa.evaluation.results import EvaluationResult
from rpsa.models import load_model, load_tokenizer, location
from rpsa.reasoning_loss import ReasoningLoss, TraceLoss
from rpsa.recipe.sections import Model
from rpsa.reference import ReferenceConfig, ReferenceDataset, build_reference
from rpsa.thought import NO_THOUGHT
from rpsa.tiny import REFERENCE_FAMILIES, reasoning_problems


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rpsa.generation.transformers import TransformersGenerator

    folder = tmp_path_factory.mktemp("traces")
    tokenizer = load_tokenizer("tiny:0", Model())
    build_reference(
        TransformersGenerator(load_model("tiny:0", Model()), tokenizer, batch_size=8),
        tokenizer,
        reasoning_problems(6, 7, "train", REFERENCE_FAMILIES),
        ReferenceConfig(problems=6, max_new_tokens=64),
        folder,
        grade=lambda response, answer: True,
    )
    return folder


def test_the_original_has_a_divergence_of_0_and_another_base_has_not(traces: Path) -> None:
    held_out = HeldOut(traces, "tiny:0", 4096)
    original, other = (
        measured_loss(lambda name=name: load_model(name, Model()), held_out)  # type: ignore[misc]
        for name in ("tiny:0", "tiny:1")
    )
    assert original is not None
    assert other is not None
    assert original.kl == 0
    assert other.kl is not None
    assert other.kl > 1e-4
    alone = measured_loss(lambda: load_model("tiny:1", Model()), HeldOut(traces, None, 4096))
    assert alone is not None
    assert (alone.nll, alone.kl) == (other.nll, None)


def test_what_cannot_be_measured_is_a_line_and_no_result(
    traces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert measured_loss(None, None) is None
    assert not caplog.records
    assert measured_loss(None, HeldOut(traces, "tiny:0", None)) is None
    assert "a server says nothing of log-probabilities" in caplog.text
    assert measured_loss(lambda: load_model(str(tmp_path), Model()), HeldOut(traces, None, None)) is None
    assert "no reasoning loss: model" in caplog.text
    assert measured_loss(lambda: load_model("tiny:0", Model()), HeldOut(traces, "tiny:0", 3)) is None
    assert "leaves no response token of any trace" in caplog.text


def test_a_loss_is_read_back_and_results_from_before_it_are_read_too() -> None:
    loss = ReasoningLoss(tuple(TraceLoss(str(i), 5 + i, 0.1 * i, 0.01 * i) for i in range(4)))
    stored = json.loads(json.dumps(loss_to_json(loss)))
    assert loss_from_json(stored) == loss
    assert loss_from_json(None) is None
    assert stored["nll"] == pytest.approx((0.6 + 1.4 + 2.4) / 26)
    assert stored["per_trace"][1] == {"problem_id": "1", "tokens": 6, "nll": 0.1, "kl": 0.01}
    assert loss_to_json(ReasoningLoss((TraceLoss("0", 3, 0.5, None),)))["kl_ci95"] is None
    before = {"sets": {}, "samples": 0, "thought": NO_THOUGHT.to_json(), "data_sha256": {}, "sandbox": None}
    before |= {"judge": "exact", "refusal_judge": {"id": "refusal"}}
    assert EvaluationResult.from_json(before).reasoning_loss is None
    with_it = EvaluationResult.from_json(before | {"reasoning_loss": stored})
    assert with_it.reasoning_loss == loss
    assert EvaluationResult.from_json(with_it.to_json()) == with_it


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(600):
        lengths = [draw.randint(20, 400) for _ in range(32)]
        # longer traces are harder, so that the mean over tokens is not that over traces
        traces = [
            TraceLoss(str(i), n, draw.gammavariate(4, (0.1 + n / 1000) / 4), None)
            for i, n in enumerate(lengths)
        ]
        interval = loss_interval(ReasoningLoss(tuple(traces)), "nll")
        assert interval is not None
        held += interval.low <= _TRUTH <= interval.high
    assert 0.92 <= held / 600 <= 0.98


_LENGTHS = range(20, 401)
_TRUTH = sum(n * (0.1 + n / 1000) for n in _LENGTHS) / sum(_LENGTHS)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    return done.exit_code, done.output + str(done.exception or "")


def test_the_command_measures_it(traces: Path, tmp_path: Path) -> None:
    quick = ("--tasks", "tiny", "--set", "n=1", "--set", "max_new_tokens=32", "--set", "temperature=0")
    code, said = run(
        "tiny:1", *quick, "--out", str(tmp_path), "--held-out", str(traces), "--original", "tiny:0"
    )
    assert code == 0, said
    found = json.loads((tmp_path / "results.json").read_text())["reasoning_loss"]
    assert found["traces"] == len(ReferenceDataset.load(traces).traces)
    assert found["kl"] > 0
    assert f"held-out traces, nats per token: NLL {found['nll']:.3g}" in said.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--original", "tiny:0"), "--original: give the traces to compare it on"),
        (("--held-out", "nowhere"), "--held-out nowhere: holds no traces"),
        (("--held-out", "TRACES", "--original", "tiny:9"), "--original: "),
    ],
)
def test_a_mistake_is_one_line(
    traces: Path, options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(traces) if option == "TRACES" else option for option in options]
    done = CliRunner().invoke(app, ["evaluate", location("tiny:0"), "--tasks", "tiny", *given])
    assert done.exit_code != 0
    assert says in done.output + str(getattr(done, "stderr", "")) + str(done.exception)
