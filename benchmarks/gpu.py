"""Acceptance on a GPU: the tests of the method on CUDA, a whole run, training at 8B, vLLM, and the plan beside them.

    make gpu                                                    # one H100 or H200, 25 minutes at most, no network
    make gpu GPU="--smollm2 FOLDER"                             # and a run on the model that `rpsa fetch` left there
    python benchmarks/gpu.py --only tests --minutes 9           # a part of it: the rest of the file is kept
    python benchmarks/gpu.py --device cpu --shape test          # the rehearsal, on any machine
    python benchmarks/docs_numbers.py gpu                       # then the page that shows it

Every part is a process of its own with a limit of its own. The file (`benchmarks/gpu.json`) is written anew after each,
so that what was found is kept whatever comes: a part that fails, crashes, runs out of memory or time is one line, and
the others go on. What a part prints is in `--logs`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).with_name("gpu.json")
REHEARSAL = ROOT / "runs" / "gpu-rehearsal.json"

TESTED = (
    *(
        "fisher/test_quantile.py",
        "fisher/test_hooked.py",
        "fisher/test_estimators.py",
        "fisher/test_batches.py",
    ),
    *("fisher/test_diagonal.py", "freezing/test_devices.py", "freezing/test_freezing.py"),
    *("freezing/test_steps.py", "freezing/test_compact.py", "test_divergence.py"),
    *("reasoning_loss/test_reasoning_loss.py", "generation/test_generation.py", "training/test_trainer.py"),
)
REHEARSED = ("freezing/test_devices.py",)
"""The others are run on the CPU by `make test`."""
METHODS = {"lora": ("plain", "rpsa"), "fft": ("plain", "compact", "rpsa")}
REHEARSED_METHODS = {"lora": ("rpsa",), "fft": ("plain", "compact")}
CPU_PATIENCE = 10
"""Limits are those of a GPU; a CPU has so many times as long."""
SECONDS_LEFT = 15
"""A part is not begun with less."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """`limit` in seconds; `figures` reads what the command left, whatever became of it."""

    name: str
    command: list[str]
    limit: int
    figures: Callable[[], Figures] = dict
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    """Why it is skipped."""


def parts(given: argparse.Namespace, scratch: Path) -> list[Part]:
    """In the order in which they are worth the time."""
    is_cpu = given.device == "cpu"
    tests = [_tests(file, scratch) for file in (REHEARSED if is_cpu else TESTED)]
    trained = [
        _trained(paradigm, method, given, scratch)
        for paradigm, methods in (REHEARSED_METHODS if is_cpu else METHODS).items()
        for method in methods
    ]
    planned = [_planned(given, scratch)]
    return [_machine(scratch), *tests, *_runs(given, scratch), *trained, *planned, *_served(given, scratch)]


def _machine(scratch: Path) -> Part:
    path = scratch / "machine.json"
    return Part("machine", [*_self("machine"), str(path)], 120, lambda: _read(path))


def _tests(file: str, scratch: Path) -> Part:
    outcomes = scratch / f"{file.replace('/', '-')}.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "helpers.outcomes", "-p", "no:cacheprovider", "-q"]
    command += ["-m", "gpu and not integration and not slow", f"tests/{file}"]
    environment = {"RPSA_TEST_OUTCOMES": str(outcomes)}
    return Part(f"tests: {file}", command, 150, lambda: {"tests": _outcomes(outcomes)}, environment)


def _runs(given: argparse.Namespace, scratch: Path) -> list[Part]:
    """Whole runs: everything between a recipe and a report."""
    demo = [*_rpsa("run", "recipes/tiny/demo.yaml"), "matrix.bases=[tiny:0]", "matrix.parallel=1"]
    if given.device == "cpu":
        demo += ["reference.n=8", "safety.n=16", "evaluate.n=4", "matrix.methods=[original, fft+rpsa]"]
        return [Part("run: demo", [*demo, f"output_dir={scratch / 'demo'}"], 150)]
    on_gpu = [*demo, "train.use_cpu=false", "train.bf16=true"]
    found = [
        Part("run: demo, trained on the GPU", [*on_gpu, f"output_dir={scratch / 'gpu'}"], 150),
        Part("run: demo, trained on the CPU", [*demo, f"output_dir={scratch / 'cpu'}"], 120),
    ]
    folder = given.smollm2
    quick = [
        *_rpsa("run", "recipes/smollm2-135m/quick.yaml"),
        f"matrix.bases=[{folder}]",
        "train.use_cpu=false",
    ]
    results = scratch / "smollm2" / "report" / "results.json"
    return [
        *found,
        Part(
            "run: SmolLM2-135M, quick",
            [*quick, f"output_dir={scratch / 'smollm2'}"],
            300,
            lambda: _summary(results),
            missing="" if folder else "no --smollm2 FOLDER (`rpsa fetch smollm2`)",
        ),
    ]


def _trained(paradigm: str, method: str, given: argparse.Namespace, scratch: Path) -> Part:
    path = scratch / f"{paradigm}-{method}.json"
    command = [sys.executable, "benchmarks/gpu_8b.py", paradigm, "--methods", method, "--shape", given.shape]
    command += ["--steps", str(given.steps), "--every", str(given.steps), "--batch", str(given.batch)]
    command += ["--length", str(given.length), "--weights", _weights(given), "--device", given.device]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return Part(
        f"{given.shape} {paradigm} {method}",
        [*command, "--json", str(path)],
        200,
        lambda: _read(path).get(method, {}),
        environment,
    )


def _planned(given: argparse.Namespace, scratch: Path) -> Part:
    path = scratch / "plan.json"
    shape = {name: getattr(given, name) for name in ("device", "shape", "batch", "length")}
    command = [*_self("planned"), json.dumps(shape | {"weights": _weights(given)}), str(path)]
    return Part("plan", command, 300, lambda: _read(path))


def _served(given: argparse.Namespace, scratch: Path) -> list[Part]:
    path = scratch / "serving.json"
    why = "vLLM is not installed" if find_spec("vllm") is None else ""
    tests = _tests("generation/test_vllm.py", scratch)
    command = [*tests.command[:-3], "-m", "", tests.command[-1]]
    rate = [sys.executable, "benchmarks/serving.py", given.shape, "--dummy", "--json", str(path)]
    size = ["--count", "512", "--mean", "500"] if given.device == "cuda" else ["--count", "8", "--mean", "8"]
    return [
        Part("tests: vLLM", command, 240, tests.figures, tests.environment, why),
        Part(f"{given.shape} vLLM", [*rate, *size], 240, lambda: _read(path), missing=why),
    ]


def _weights(given: argparse.Namespace) -> str:
    return "bfloat16" if given.device == "cuda" else "float32"


def _rpsa(*words: str) -> list[str]:
    return [sys.executable, "-m", "rpsa", *words]


def _self(task: str) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--task", task]


# What parts leave


def _read(path: Path) -> Figures:
    found: Figures = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _outcomes(path: Path) -> dict[str, list[Any]]:
    """Outcome, seconds and reason by test; of several lines the last."""
    lines = path.read_text().splitlines() if path.is_file() else []
    entries = [json.loads(line) for line in lines]
    return {
        one["test"].removeprefix("tests/"): [one["outcome"], one["seconds"], one["reason"]] for one in entries
    }


def _summary(results: Path) -> Figures:
    by = {}
    for one in _read(results).get("summary", []):
        by[one["method"]] = {name: one[name]["mean"] for name in ("reasoning", "asr") if one.get(name)}
    return by


# Running them


def ran(part: Part, limit: float, environment: dict[str, str], log: Path) -> Figures:
    """How one part ended, in seconds, one line and figures."""
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment | part.environment,
            start_new_session=True,
        )
        try:
            process.wait(limit)
            outcome = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
        finally:  # what it has started, too
            _kill(process)
    code = None if outcome == "out of time" else process.returncode
    said = "" if outcome == "passed" else _reason(log, code)
    if outcome == "failed" and "OutOfMemoryError" in said:
        outcome = "out of memory"
    if outcome == "out of time":
        said = f"stopped after {limit:.0f} s: {said}".removesuffix(": ")
    try:
        figures = part.figures()
    except (ValueError, KeyError, TypeError) as error:
        figures, said = {}, f"{said} (unreadable: {error})"
    return {"outcome": outcome, "seconds": round(time.monotonic() - started, 1), "said": said, **figures}


def _kill(process: "subprocess.Popen[Any]") -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(log: Path, code: int | None) -> str:
    """The last line that names an error; else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(E +)?[\w.]*(Error|Exception)\b|error: |rpsa: |FAILED ", line)
    ]
    if code is not None and code < 0:
        return f"killed by signal {-code}: {(errors or lines or [''])[-1]}"[:300]
    last = "" if code is None else f"exit code {code}"
    return (errors or lines or [last])[-1][:300]


def environment_of(device: str) -> dict[str, str]:
    """Of every part: no network, one GPU or none, this repository's code."""
    path = os.pathsep.join(str(ROOT / name) for name in ("src", "tests", "benchmarks"))
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": f"{path}{os.pathsep}{before}" if before else path,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RPSA_TEST_DEVICE": device,
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if device == "cuda"
        else "",
    }


def run(given: argparse.Namespace) -> Figures:
    """All parts that are asked for, while there is time; the file is written after each."""
    found: Figures = _read(given.out) if given.only else {}
    found |= {"device": given.device, "shape": given.shape, "batch": given.batch, "length": given.length}
    found.setdefault("parts", {})
    given.logs.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    environment = environment_of(given.device)
    scratch = Path(tempfile.mkdtemp(prefix="rpsa-gpu-"))
    try:
        for part in parts(given, scratch):
            if given.only and not any(part.name.startswith(name) for name in given.only):
                continue
            left = end - time.monotonic() - 2
            if part.missing:
                result = {"outcome": "skipped", "seconds": 0.0, "said": part.missing}
            elif left < min(SECONDS_LEFT, part.limit):
                result = {"outcome": "not begun", "seconds": 0.0, "said": "no time was left"}
            else:
                log = given.logs / (re.sub(r"\W+", "-", part.name) + ".log")
                patience = 1 if given.device == "cuda" else CPU_PATIENCE
                result = ran(part, min(part.limit * patience, left), environment, log)
            found["parts"][part.name] = result
            _write(given.out, found)
            print(f"{part.name}: {summary_of(result)}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _write(path: Path, found: Figures) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(found, indent=1) + "\n")
    fresh.replace(path)


def summary_of(result: Figures) -> str:
    """One line."""
    words = [result["outcome"], f"{result['seconds']:.0f} s"]
    if "tests" in result:
        words.append(", ".join(f"{n} {outcome}" for outcome, n in counted(result["tests"]).items()))
    return "; ".join([*words, result["said"]]).rstrip("; ")


def counted(tests: dict[str, list[Any]]) -> dict[str, int]:
    outcomes = [outcome for outcome, *_ in tests.values()]
    return {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(sorted(outcomes))}


# What runs in a process of its own


def machine(path: Path) -> None:
    """What it is; and one product of matrices and one kernel of each optimizer's kind, so that a broken one shows."""
    import torch

    from rpsa.pipeline.environment import facts

    device = os.environ["RPSA_TEST_DEVICE"]
    found: Figures = {"facts": facts()}
    if device == "cuda":
        index = torch.cuda.current_device()
        found["facts"] |= {
            "Compute capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
            "Driver": _driver(),
        }
    path.write_text(json.dumps(found))
    matrix = torch.eye(256, device=device, dtype=torch.bfloat16)
    assert float((matrix @ matrix).sum()) == 256, "a product of matrices is wrong"


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def planned(given: Figures, path: Path) -> None:
    """What `rpsa plan`'s arithmetic says of each run of gpu_8b.py, by paradigm and method, on an H100."""
    found: dict[str, dict[str, Figures]] = {}
    asked = METHODS if given["device"] == "cuda" else REHEARSED_METHODS
    for paradigm, methods in asked.items():
        found[paradigm] = {method: _plan_of(paradigm, method, given) for method in methods}
        path.write_text(json.dumps({"planned": found}))


def _plan_of(paradigm: str, method: str, given: Figures) -> Figures:
    from gpu_8b import LORA, RATIO, config_of

    from rpsa.plan.dry_run import Precision, Shape, build_model, fake_tensors
    from rpsa.plan.layers import SHALLOW, Skeleton, are_alike, with_layers
    from rpsa.plan.memory import Freezing, align_memory, dry_passes, fisher_memory
    from rpsa.plan.time import (
        GPUS,
        compute_seconds,
        fisher_operations,
        launch_seconds,
        training_operations,
        update_seconds,
    )

    is_lora, is_gpu = paradigm == "lora", given["device"] == "cuda"
    lora = LORA if is_lora else None
    config, shape = config_of(given["shape"]), Shape(given["batch"], given["length"])
    compact = 1 - RATIO if method == "compact" else None
    freezing = None
    if method != "plain":
        freezing = Freezing(
            method == "rpsa", raw_moments=False, gradient_only=False, audit=True, compact=compact
        )
    with fake_tensors():
        model = build_model(config, given["weights"], lora)
        few = [build_model(with_layers(config, number), given["weights"], lora) for number in SHALLOW]
        skeleton = Skeleton(model, few if are_alike(model) else [])
        precision = Precision(bf16=is_gpu, checkpointing=True)
        reference = shape if method == "rpsa" else None
        passes = dry_passes(skeleton, shape, reference, precision, compact, accumulated=False)
        memory = align_memory(model, passes, "adamw_torch", freezing).on(1, "one GPU")
        fisher = fisher_memory(skeleton, Shape(1, given["length"]), 1, checkpointing=True)
    parameters, tokens = sum(p.numel() for p in model.parameters()), shape.sequences * shape.tokens
    gpu, how = GPUS[0], {"lora": is_lora, "checkpointing": True}
    compute = compute_seconds(training_operations(parameters, tokens, **how), gpu, precision="bf16")
    step = max(compute, launch_seconds(checkpointing=True)) + update_seconds(sum(memory.kept.values()), gpu)
    found = {"tokens a second": tokens / step, "peak GiB": memory.total / 2**30}
    if method != "plain":
        seconds = compute_seconds(
            fisher_operations(parameters, shape.tokens, 1, **how), gpu, precision="bf16"
        )
        found |= {"fisher seconds a sample": seconds, "fisher peak GiB": fisher.total / 2**30}
    return found


# The page


def page(found: Figures) -> str:
    """What the docs show of the file: the machine, a row for each part, and what was measured beside the plan."""
    if not found:
        return "**`make gpu` has not run on a GPU.** Its parts were tried on a CPU (`--device cpu --shape test`)."
    if found["device"] != "cuda":
        raise SystemExit("this is a rehearsal, and no result of a GPU: run `make gpu` on one")
    facts = found["parts"].get("machine", {}).get("facts", {})
    machine = ", ".join(
        f"{name} {facts[name]}" for name in ("GPU", "CUDA", "Driver", "torch", "vllm") if name in facts
    )
    rows = [
        [name, one["outcome"], f"{one['seconds']:.0f} s", _counts(one), _cell(one["said"])]
        for name, one in found["parts"].items()
    ]
    lines = [f"{machine}.", "", _table(["Part", "Outcome", "Time", "Tests", "Said"], rows)]
    broken = [
        [f"`{_cell(test)}`", outcome, _cell(reason)]
        for one in found["parts"].values()
        for test, (outcome, _, reason) in one.get("tests", {}).items()
        if outcome in ("failed", "died")
    ]
    if broken:
        lines += ["", _table(["Test", "Outcome", "Reason"], broken)]
    beside = _beside_the_plan(found)
    if beside:
        head = [
            "Run",
            "Tokens/s",
            "planned",
            "Peak GiB",
            "planned",
            "Fisher, s a sample",
            "planned",
            "Its peak GiB",
            "planned",
        ]
        said = f"Shape {found['shape']}, {found['batch']} × {found['length']} tokens a step; planned for an H100."
        lines += ["", said, "", _table(head, beside)]
    return "\n".join(lines)


def _beside_the_plan(found: Figures) -> list[list[str]]:
    plans = found["parts"].get("plan", {}).get("planned", {})
    columns = {
        "tokens a second": ",.0f",
        "peak GiB": ".1f",
        "fisher seconds a sample": ".2f",
        "fisher peak GiB": ".1f",
    }
    rows = []
    for paradigm, methods in METHODS.items():
        for method in methods:
            measured = found["parts"].get(f"{found['shape']} {paradigm} {method}", {})
            plan = plans.get(paradigm, {}).get(method, {})
            if any(name in measured for name in columns):
                cells = [
                    _figure(of.get(name), form) for name, form in columns.items() for of in (measured, plan)
                ]
                rows.append([f"{paradigm} {method}", *cells])
    served = found["parts"].get(f"{found['shape']} vLLM", {})
    if "tokens a second" in served:
        rate = [_figure(served.get(name), ",.0f") for name in ("tokens a second", "planned")]
        rows.append(["vLLM", *rate, *[""] * 6])
    return rows


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _counts(one: Figures) -> str:
    return (
        ", ".join(f"{n} {outcome}" for outcome, n in counted(one["tests"]).items()) if "tests" in one else ""
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["8b", "1b", "test"], default="8b")
    parser.add_argument("--batch", type=int, help="sequences of a step; default: 2")
    parser.add_argument(
        "--length", type=int, help="tokens of a sequence; default: 2048, of the shape test 32"
    )
    parser.add_argument("--steps", type=int, help="of each training; default: 16, of the shape test 2")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so; others stay")
    parser.add_argument("--smollm2", type=Path, help="the folder of `rpsa fetch smollm2`")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logs", type=Path, default=ROOT / "runs" / "gpu-logs")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        task, *words = given.task
        if task == "machine":
            machine(Path(words[0]))
        else:
            planned(json.loads(words[0]), Path(words[1]))
        return
    is_test = given.shape == "test"
    given.batch = given.batch or 2
    given.length = given.length or (32 if is_test else 2048)
    given.steps = given.steps or (2 if is_test else 16)
    given.out = given.out or (OUT if given.device == "cuda" else REHEARSAL)
    given.out, given.logs = given.out.absolute(), given.logs.absolute()
    given.smollm2 = given.smollm2 and given.smollm2.absolute()
    outcomes = [one["outcome"] for one in run(given)["parts"].values()]
    print(f"{given.out}: {', '.join(f'{outcomes.count(o)} {o}' for o in dict.fromkeys(outcomes))}")
    sys.exit(any(outcome not in ("passed", "skipped") for outcome in outcomes))


if __name__ == "__main__":
    main()
