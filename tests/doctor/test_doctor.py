"""`rpsa doctor`: a hub and a judge that listen here, disks and GPUs of a size that is given."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from helpers.command_line import invoke
from helpers.listening import listening
from helpers.paths import RECIPES
from rpsa.doctor import Finding, machine_findings, needs
from rpsa.doctor.hub import access_findings, cached_bytes, repositories
from rpsa.doctor.needs import endpoint_findings, plan_findings
from rpsa.recipe import load_recipe
from rpsa.tiny import tiny_model_dir

DEMO = RECIPES / "tiny" / "demo.yaml"
SMALL = ["matrix.bases=[tiny:0]", "matrix.methods=[original, fft]", "reference.n=4"]
SHIPPED = sorted(
    path
    for path in RECIPES.glob("*/*.yaml")
    if path.parent.name not in ("base", "accelerate", "smoke", "smollm2-135m")
)

Answers = dict[str, tuple[int, dict[str, str], Any]]
"""By path: status, headers, body."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, body = self.server.answers.get(self.path, (404, {}, {}))  # type: ignore[attr-defined]
        self.server.asked.append((self.path, self.headers["Authorization"]))  # type: ignore[attr-defined]
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def serving(answers: Answers) -> AbstractContextManager[ThreadingHTTPServer]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.answers, server.asked = answers, []
    return listening(server)


def told(findings: Iterator[Finding], about: str) -> Finding:
    [found] = [one for one in findings if about in one.about]
    return found


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_repository_of_a_recipe_is_named_once(recipe: Path) -> None:
    found = repositories(load_recipe(recipe))
    names = [(one.kind, one.name) for one in found]
    assert len(set(names)) == len(names)
    if recipe.parent.name == "tiny":
        assert found == []
    else:
        assert found[0].name.partition("/")[0] in ("deepseek-ai", "Qwen")
        assert {one.kind for one in found} == {"model", "dataset"}


def test_models_data_benchmarks_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    (tmp_path / "own.jsonl").write_text('{"prompt": "x", "response": "y"}\n')
    recipe = load_recipe(
        DEMO,
        [
            "matrix.bases=[org/model]",
            "matrix.methods=[original, lora]",
            "safety.data=org/refusals:train",
            f"safety.benign={tmp_path / 'own.jsonl'}",
            "safety.benign_share=0.5",
            "reference.problems=org/problems",
            "evaluate.tasks=[rpsa_aime24, rpsa_gpqa_main, rpsa_strongreject]",
            "evaluate.judge=llama-guard-3",
            "evaluate.second_judge=llama-guard-3",
            f"data_dir={tmp_path}",
        ],
    )
    names = [
        *("org/model", "org/problems", "org/refusals", "Idavidrein/gpqa", "walledai/StrongREJECT"),
        "meta-llama/Llama-Guard-3-8B",
    ]
    assert [one.name for one in repositories(recipe)] == names
    monkeypatch.setenv("RPSA_DATA_DIR", str(tmp_path))
    assert [one.name for one in repositories(recipe.model_copy(update={"data_dir": None}))] == names


def test_the_hub_is_asked_for_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    recipe = load_recipe(
        DEMO,
        [
            "matrix.bases=[org/open, org/gated, org/private]",
            "matrix.methods=[original, fft]",
            "safety.data=org/rows",
        ],
    )
    answers: Answers = {
        "/api/models/org/open/auth-check": (200, {}, {}),
        "/api/models/org/gated/auth-check": (403, {"X-Error-Code": "GatedRepo"}, {}),
        "/api/models/org/private/auth-check": (401, {"X-Error-Code": "RepoNotFound"}, {}),
        "/api/datasets/org/rows/auth-check": (200, {}, {}),
    }
    with serving(answers) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        found = list(access_findings(recipe, cached_bytes()))
        assert [one for one in server.asked if "auth-check" in one[0]] == [  # type: ignore[attr-defined]
            (path, "Bearer hf_ours") for path in answers
        ]
    assert [one.state for one in found] == ["ok", "missing", "missing", "ok"]
    assert "accept its terms at https://huggingface.co/org/gated" in found[1].said
    assert "is private" in found[2].said
    monkeypatch.setattr(
        constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )  # nobody is there now
    away = list(access_findings(recipe, cached_bytes()))
    assert {one.state for one in away} == {"missing"}
    assert all("the hub does not answer" in one.said for one in away)
    _cache(tmp_path / "cache" / "datasets--org--rows")
    assert [one.state for one in access_findings(recipe, cached_bytes())] == ["missing"] * 3 + ["ok"]


def _cache(folder: Path) -> None:
    for place in ("blobs", "refs", "snapshots/abc"):
        (folder / place).mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "blobs" / "1").write_text("{}")
    (folder / "snapshots" / "abc" / "rows.json").symlink_to(folder / "blobs" / "1")


@pytest.mark.parametrize(
    ("status", "body", "model", "state", "said"),
    [
        (200, {"data": [{"id": "guard"}]}, "guard", "ok", "serves guard"),
        (200, {"data": [{"id": "other"}]}, "guard", "missing", "has no model 'guard', but other"),
        (401, {}, "guard", "missing", "refuses the key (401): set RPSA_JUDGE_API_KEY"),
        (404, {}, "guard", "note", "no list of models (404)"),
        (200, ["?"], "guard", "note", "cannot be read"),
    ],
)
def test_a_judge_behind_an_endpoint_is_asked(
    status: int, body: Any, model: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPSA_JUDGE_API_KEY", "sk-ours")
    with serving({"/v1/models": (status, {}, body)}) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        judge = f"evaluate.judge_settings={{base_url: {url}, model: {model}}}"
        recipe = load_recipe(DEMO, [*SMALL, "evaluate.judge=policy", judge])
        found = told(endpoint_findings(recipe), "evaluate.judge at")
        assert server.asked == [("/v1/models", "Bearer sk-ours")]  # type: ignore[attr-defined]
    assert (found.state, said in found.said) == (state, True)
    away = told(endpoint_findings(recipe), "evaluate.judge at")
    assert (away.state, away.said.startswith("does not answer")) == ("missing", True)


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, [*SMALL, f"output_dir={tmp_path / 'not' / 'yet'}"])
    assert told(plan_findings(recipe, {}), "Disk").state == "ok"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 0))
    found = told(plan_findings(recipe, {}), "Disk")
    assert (found.state, "0.0 GB free; free some" in found.said) == ("missing", True)


def test_gpus_that_are_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(DEMO, SMALL)
    monkeypatch.setattr(needs, "gpu_memory", lambda: [80.0, 80.0])
    assert told(plan_findings(recipe, {}), "Memory").said == "all stages fit on 2 × 80 GiB"
    monkeypatch.setattr(needs, "gpu_memory", lambda: [0.1])
    found = [one for one in plan_findings(recipe, {}) if one.about == "Memory"]
    assert {one.state for one in found} == {"missing"}
    assert any("fits on none" in one.said for one in found)
    monkeypatch.setattr(needs, "gpu_memory", lambda: [20.0])
    judges = ["evaluate.judge=llama-guard-3", "evaluate.second_judge=wildguard"]
    guarded = plan_findings(load_recipe(DEMO, [*SMALL, *judges]), {})
    assert any(one.about == "Memory" and "do not fit on one GPU together" in one.said for one in guarded)


def test_a_model_that_needs_a_gpu_and_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(0), tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe = load_recipe(DEMO, [*SMALL, f"matrix.bases=[{tmp_path / 'model'}]", "train.use_cpu=false"])
    assert told(plan_findings(recipe, {}), "Memory").said.startswith("no GPU")


def test_a_driver_without_a_build_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = told(machine_findings(), "GPU")
    assert (found.state, "sees no GPU" in found.said) == ("missing", True)
    (tmp_path / "nvidia-smi").unlink()
    assert told(machine_findings(), "GPU").state == "note"


def test_the_command_ends_with_1_if_something_is_missing(tmp_path: Path) -> None:
    assert "Sandbox" in invoke("doctor").stdout
    done = invoke("doctor", str(DEMO), *SMALL)
    assert "ok      Recipe: its data" in done.stdout
    gone = invoke("doctor", str(DEMO), *SMALL, "matrix.bases=[org/nowhere]")
    assert (done.exit_code, gone.exit_code) == (0, 1)
    assert "missing org/nowhere (to align): not in the cache" in gone.stdout
