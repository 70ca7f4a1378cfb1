"""Writes the figures that the README, the docs and the recipes show, so that nobody copies them by hand.

    python benchmarks/docs_numbers.py plans [MODEL ...]    what `rpsa plan` says of the shipped models (a minute each)
    python benchmarks/docs_numbers.py demo [RUN_DIR]       the table, figure and audit of `make demo`
    python benchmarks/docs_numbers.py bench RUN_DIR        the leaderboard of a finished `rpsa bench`
    python benchmarks/docs_numbers.py smollm2 RUN_DIR      tables of a finished bench of recipes/smollm2-135m
    python benchmarks/docs_numbers.py robustness RUN_DIR   the tables of a finished recipes/tiny/robustness.yaml
    python benchmarks/docs_numbers.py gpu                  what `make gpu` found, from gpu.json
    python benchmarks/docs_numbers.py write                texts from plans.json alone

`plans` keeps its results in `plans.json` beside this file. It needs no network: the models' configs are below. `demo`
brings the demo up to date first, so that table and figure are always those of one run. What is written stands between
marks such as `<!-- docs_numbers: demo -->`, or, in recipes, on lines that begin with `# Memory (rpsa plan): `.
`tests/house/test_numbers_in_docs.py` holds the texts to `plans.json`, and, where it is slow, `plans.json` to the plan.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLANS = Path(__file__).with_name("plans.json")
GPU = Path(__file__).with_name("gpu.json")
MEMORY = "# Memory (rpsa plan): "

_COMMON = {"tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 131072}
_QWEN_7B = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
_QWEN_1B = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Shipped:
    """A model with recipes: `recipe` is planned, with `config` (a `transformers` model type and its fields)."""

    id: str
    folder: str
    recipe: str
    model_type: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return self.id.rpartition("/")[2]


SHIPPED = [
    Shipped(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-r1-distill-llama-8b", "paper-study.yaml", "llama",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    Shipped(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-r1-distill-qwen-7b", "paper-study.yaml", "qwen2",
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, **_QWEN_7B},
    ),
    Shipped(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-r1-distill-qwen-1.5b", "lora+rpsa-24gb.yaml", "qwen2",
        {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, **_QWEN_1B},
    ),
    Shipped(
        "Qwen/Qwen3-8B", "qwen3-8b", "lora+rpsa.yaml", "qwen3",
        {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
    ),
]  # fmt: skip

METHODS = (
    "matrix.methods={original: {}, fft: {}, fft+rpsa: {}, "
    "fft+compact: {paradigm: fft, align: {frozen_ratio: 0.6, compact: true}}, lora: {}, lora+rpsa: {}}"
)
USD_PER_HOUR = 3.0
"""Of an H100, in the examples."""
DEMO_PLAN = ["matrix.bases=[tiny:0]", "matrix.methods=[fft, fft+rpsa]"]


# Plans


@contextmanager
def configs() -> Iterator[None]:
    """In here the current folder has a folder with a config for each shipped model, by its name."""
    from transformers import AutoConfig

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for model in SHIPPED:
                AutoConfig.for_model(model.model_type, **_COMMON | model.config).save_pretrained(model.name)
            yield
        finally:
            os.chdir(before)


def planned(model: Shipped, *more: str) -> dict[str, Any]:
    """GiB by method, number of GPUs and stage, the whole text, and the study in a line. Call it within `configs`."""
    plan = plan_of(model, model.recipe, METHODS, *more)
    found = figures(plan, model) | {"recommended": figures(plan_of(model, "recommended.yaml", *more), model)}
    if model.recipe == "paper-study.yaml":
        from rpsa.plan.render import whole_study

        found["study"] = whole_study(plan_of(model, model.recipe, *more).study)
    return found | {"text": rendered(plan)}


def plan_of(model: Shipped, recipe: str, *more: str) -> Any:
    from rpsa.plan import make_plan
    from rpsa.recipe import load_recipe

    path = ROOT / "recipes" / model.folder / recipe
    return make_plan(load_recipe(path, [f"model.name={model.name}", *more]), usd_per_hour=USD_PER_HOUR)


def figures(plan: Any, model: Shipped) -> dict[str, Any]:
    return {
        "parameters": plan.parameters[model.name],
        "align": {
            method.method: {
                str(layout.gpus): [gib(layout.memory.total), layout.sharding, layout.fits]
                for layout in method.layouts
            }
            for method in plan.methods
        },
        "stages": {stage.stage: gib(stage.memory.total) for stage in plan.stages[model.name]},
    }


def rendered(plan: Any) -> str:
    from rich.console import Console

    from rpsa.plan.render import render

    out = io.StringIO()
    render(plan, Console(file=out, width=122))
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def demo_plan() -> str:
    from rpsa.plan import make_plan
    from rpsa.recipe import load_recipe

    return rendered(make_plan(load_recipe(ROOT / "recipes" / "tiny" / "demo.yaml", DEMO_PLAN), gpus=(1, 8)))


def gib(size: int) -> float:
    return round(size / 2**30, 1)


def fewest(layouts: dict[str, list[Any]]) -> tuple[int, float] | None:
    """The smallest number of 80 GiB GPUs on which a method fits, and GiB on each."""
    return next(((int(gpus), total) for gpus, (total, _, fits) in layouts.items() if fits), None)


def memory_table(plans: dict[str, Any]) -> str:
    """What README shows of the models: GiB, rounded up."""
    lines = [
        "| Model | Parameters | Full, dynamic k | Full, constant k (compact) | LoRA | Fisher, full | Responses |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in SHIPPED:
        plan = plans[model.name]
        cells = [
            model.name,
            f"{plan['parameters'] / 1e9:.2f}B",
            *(on_gpus(fewest(plan["align"][method])) for method in ("fft+rpsa", "fft+compact", "lora+rpsa")),
            str(math.ceil(plan["stages"]["Fisher, full"])),
            str(math.ceil(plan["stages"]["evaluate, each model"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def on_gpus(found: tuple[int, float] | None) -> str:
    if found is None:
        return "–"
    gpus, total = found
    return f"{math.ceil(total)}" if gpus == 1 else f"{gpus} × {math.ceil(total)}"


def memory_line(plan: dict[str, Any], method: str) -> str:
    """What the head of a recipe says of the method that it is about."""
    layouts = plan["align"][method]
    parts = [f"{math.ceil(layouts['1'][0])} GiB on one GPU"]
    if layouts["2"][1] == "FSDP2":
        parts += [f"{math.ceil(layouts[n][0])} on each of {n}" for n in ("2", "4", "8")]
    text = ", ".join(parts)
    if method.endswith(("rpsa", "constant_kl")):
        text += (
            f"; Fisher {math.ceil(plan['stages']['Fisher, LoRA' if 'lora' in method else 'Fisher, full'])}"
        )
    return f"{text}; responses {math.ceil(plan['stages']['evaluate, each model'])}."


def texts(plans: dict[str, Any]) -> dict[Path, str]:
    """Every file that shows a plan, as it should be."""
    page = ROOT / "docs" / "plan.md"
    reproduce = ROOT / "docs" / "reproduce.md"
    shown = with_block(page, "plan", fenced(plans[SHIPPED[0].name]["text"]))
    found = {
        ROOT / "README.md": with_block(ROOT / "README.md", "models", memory_table(plans)),
        page: with_block(page, "study", fenced(plans[SHIPPED[0].name]["study"]), shown),
        ROOT / "docs" / "recipes.md": with_block(
            ROOT / "docs" / "recipes.md", "demo plan", fenced(demo_plan())
        ),
        reproduce: with_block(
            *(reproduce, "reproduce repositories", repositories_table()),
            with_block(reproduce, "reproduce studies", studies_table(plans)),
        ),
    }
    for model in SHIPPED:
        for path in (ROOT / "recipes" / model.folder).glob("*.yaml"):
            method = "lora+rpsa" if path.stem.startswith("lora+rpsa") else path.stem
            plan = plans[model.name]
            if path.stem == "recommended":
                plan, [method] = plan["recommended"], plan["recommended"]["align"]
            if method in plan["align"]:
                line = MEMORY + memory_line(plan, method)
                text, count = re.subn(rf"^{re.escape(MEMORY)}.*$", line, path.read_text(), flags=re.MULTILINE)
                if count != 1:
                    raise SystemExit(f"{path}: {count} lines begin with {MEMORY!r}, not one")
                found[path] = text
    return found


def studies_table(plans: dict[str, Any]) -> str:
    """The paper's studies: what `rpsa plan` says of the whole of each."""
    rows = []
    for model in SHIPPED:
        if said := plans[model.name].get("study"):
            parts = re.fullmatch(
                r"Whole study on (.+): (.+), (.+) GPU hours, (.+), (.+) of disk, (.+) to download", said
            )
            assert parts is not None, said
            rows.append([model.name, *parts.groups()])
    heads = ["Study", "On", "Time", "GPU hours", "Price", "Disk", "Download"]
    return markdown_table(heads, rows)


def repositories_table() -> str:
    """What the paper's study on the first model reads from the hub."""
    from rpsa.doctor.hub import repositories
    from rpsa.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / SHIPPED[0].folder / SHIPPED[0].recipe)
    rows = [
        [f"[{one.name}]({one.url})", one.kind, one.purpose, "gated" if one.is_gated else ""]
        for one in repositories(recipe)
    ]
    head = ["| Repository | Kind | For | Access |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def with_block(path: Path, name: str, block: str, text: str | None = None) -> str:
    """The file, or `text` in its place, with another block of this name."""
    start, end = f"<!-- docs_numbers: {name} -->", f"<!-- end of {name} -->"
    before, _, rest = (text or path.read_text()).partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path}: lacks {start} or {end}")
    return f"{before}{start}\n{block}\n{end}{after}"


# The demo


def demo(folder: Path) -> dict[Path, str]:
    """Bring the demo in `folder` up to date; the texts that show it. Its figure is copied."""
    command = [
        sys.executable,
        "-m",
        "rpsa",
        "run",
        str(ROOT / "recipes/tiny/demo.yaml"),
        f"output_dir={folder}",
    ]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    table = re.search(r"^ +Refused .*?^Audit: .*?$", shown, re.MULTILINE | re.DOTALL)
    if table is None:
        raise SystemExit(f"no table in what rpsa run said:\n{shown}")
    main, _, rest = table[0].partition("\n\n")
    shown = [
        *main.splitlines(),
        "...",
        rest.splitlines()[-1],
    ]  # the reasoning loss and the data are further down
    lines = "\n".join(line.rstrip() for line in shown)
    figure = ROOT / "docs" / "images" / "demo-scatter.png"
    shutil.copyfile(folder / "report" / "scatter.png", figure)
    model = folder / "align" / "fft+rpsa" / "tiny-0" / "seed0"
    audit = said("audit", str(model)).splitlines()
    first = next(i for i, line in enumerate(audit) if line.startswith("Module group")) + 3
    verified = said("verify", str(folder)).strip()
    card = (folder / "report" / "cards" / "fft+rpsa" / "tiny-0" / "seed0" / "README.md").read_text()
    docs = ROOT / "docs"
    checked = re.search(r"moved in ([\d,]+) element-steps", lines)
    assert checked is not None
    return {
        ROOT / "README.md": with_block(ROOT / "README.md", "demo", f"{of_figure(figure)}\n{fenced(lines)}"),
        docs / "results.md": re.sub(
            r"[\d,]+(?= element-steps of the demo)", checked[1], (docs / "results.md").read_text()
        ),
        docs / "recipes.md": with_block(
            docs / "recipes.md", "audit", fenced("\n".join([verified, "", *audit[:first], "..."]))
        ),
        docs / "model-card.md": with_block(
            docs / "model-card.md", "card", f"````markdown\n{card.strip()}\n````"
        ),
    }


def bench(folder: Path) -> dict[Path, str]:
    """The page that shows the leaderboard of a run that is there."""
    return page_of_run(
        "bench", folder / "bench" / "bench.md", folder / "bench" / "bench.png", "tiny-bench.png"
    )


def robustness(folder: Path) -> dict[Path, str]:
    """The page that shows the tables of a run that is there."""
    report = folder / "report"
    return page_of_run("robustness", report / "robustness.md", report / "tampering.png", "tiny-tampering.png")


def page_of_run(name: str, table: Path, drawn: Path, image: str) -> dict[Path, str]:
    """The page of this name with a table and its figure, which is copied."""
    figure = ROOT / "docs" / "images" / image
    shutil.copyfile(drawn, figure)
    page = ROOT / "docs" / f"{name}.md"
    return {page: with_block(page, name, f"{of_figure(figure)}\n{table.read_text().strip()}")}


def gpu() -> dict[Path, str]:
    """The page that shows what `make gpu` found, or that it has not run."""
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu import page

    found = json.loads(GPU.read_text()) if GPU.exists() else {}
    path = ROOT / "docs" / "benchmarks.md"
    return {path: with_block(path, "gpu", page(found))}


# The study of SmolLM2


Figures = dict[str, float]
"""What a row shows of a run, by column: rates in percent, losses in nats a token."""


def smollm2(folder: Path) -> dict[Path, str]:
    """The page that shows a finished study: every method, what it is less the plain one, what it was chosen from."""
    choice = json.loads((folder / "choice.json").read_text())
    chosen = {one["method"]: one["settings"] for one in choice["chosen"]}
    runs = {method: runs_of(folder, method) for method in ("original", *chosen)}
    seeds = {method: sorted(found) for method, found in runs.items() if method != "original"}
    if len({str(found) for found in seeds.values()}) > 1:
        raise SystemExit(f"{folder}: the methods have results of different seeds: {seeds}")
    page = ROOT / "docs" / "smollm2.md"
    blocks = {
        "smollm2": methods_table(runs, chosen),
        "smollm2 differences": differences_table(runs),
        "smollm2 choice": choice_table(choice),
    }
    text = page.read_text()
    for name, block in blocks.items():
        text = with_block(page, name, block, text)
    return {page: text}


def runs_of(folder: Path, method: str) -> dict[int, Figures]:
    """The evaluations of a method in the test, by seed; the untouched model's has seed 0."""
    found = {}
    for path in sorted((folder / "test" / "evaluate").rglob("results.json")):
        names = path.relative_to(folder / "test" / "evaluate").parts
        if method in names:
            seed = re.match(r"seed(\d+)", names[-2])
            found[int(seed[1]) if seed else 0] = figures_of(json.loads(path.read_text()))
    return found


def figures_of(results: dict[str, Any]) -> Figures:
    from rpsa.evaluation.results import EvaluationResult

    found = EvaluationResult.from_json(results)
    solved = found.sets["reasoning"].values()
    assert found.reasoning_loss is not None
    return {
        "Solved ↑": 100 * statistics.fmean(one.figure or 0.0 for one in solved),
        "Problems refused ↓": 100 * statistics.fmean(one.refused or 0.0 for one in solved),
        "NLL ↓": found.reasoning_loss.nll,
        "KL ↓": found.reasoning_loss.kl or 0.0,
        **{
            f"{name.removeprefix('rpsa_')} ↓": 100 * (one.figure or 0.0)
            for kind in ("attack", "over_refusal")
            for name, one in found.sets[kind].items()
        },
    }


def methods_table(runs: dict[str, dict[int, Figures]], chosen: dict[str, dict[str, Any]]) -> str:
    names = list(runs["original"][0])
    rows = [
        [
            method,
            settings_of(chosen.get(method, {})),
            *(shown(n, [one[n] for one in found.values()]) for n in names),
        ]
        for method, found in runs.items()
    ]
    return markdown_table(["Method", "Chosen", *names], rows)


def differences_table(runs: dict[str, dict[int, Figures]]) -> str:
    """Each method less the plain one of its paradigm, seed by seed."""
    names = list(runs["original"][0])
    rows = [
        [
            method,
            *(shown(n, [one[n] - runs[plain][seed][n] for seed, one in found.items()], "+") for n in names),
        ]
        for method, found in runs.items()
        if (plain := method.partition("+")[0]) != method
    ]
    return markdown_table(["Method less plain", *names], rows)


def settings_of(point: dict[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in point.items())


def choice_table(choice: dict[str, Any]) -> str:
    """Every point that was tried on the development seed; the chosen ones are bold."""
    picked = {one["method"]: one["settings"] for one in choice["chosen"]}
    names = list(choice["tried"][0]["means"])
    rows = []
    for one in choice["tried"]:
        said = settings_of(one["settings"])
        figures = [f"{100 * one['means'][name] + 0.0:.1f}" if one["means"] else "failed" for name in names]
        missed = "" if one["shortfall"] is None else f"{100 * one['shortfall']:.1f}"
        bold = picked.get(one["method"]) == one["settings"]
        rows.append([one["method"], f"**{said}**" if bold else said, *figures, missed])
    heads = ["Drop of solved" if name == "reasoning" else name.removeprefix("rpsa_") for name in names]
    return markdown_table(["Method", "Settings", *heads, "Shortfall"], rows)


def shown(name: str, values: list[float], sign: str = "") -> str:
    """The mean, and its 95% interval over seeds where there are three."""
    from rpsa.evaluation.statistics import mean_interval

    form = f"{sign}.3f" if name.startswith(("NLL", "KL")) else f"{sign}.1f"
    interval = mean_interval(values)
    mean = f"{sum(values) / len(values):{form}}"
    return f"{mean} ({interval[0]:{form}} to {interval[1]:{form}})" if interval else mean


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def of_figure(path: Path) -> str:
    """Ties the table to the figure of the same run."""
    return f"<!-- {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()} -->"


def said(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rpsa", *words], check=True, stdout=subprocess.PIPE, text=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["plans", "demo", "bench", "robustness", "smollm2", "gpu", "write"])
    parser.add_argument(
        "names",
        nargs="*",
        help="models (default: all), or the run's folder (runs/tiny-demo, runs/tiny-bench, ...)",
    )
    arguments = parser.parse_args()
    if arguments.what == "demo":
        written = demo(Path(*(arguments.names or [ROOT / "runs" / "tiny-demo"])).absolute())
    elif arguments.what == "bench":
        written = bench(Path(*(arguments.names or [ROOT / "runs" / "tiny-bench"])).absolute())
    elif arguments.what == "gpu":
        written = gpu()
    elif arguments.what == "smollm2":
        written = smollm2(Path(*(arguments.names or [ROOT / "runs" / "smollm2-study"])).absolute())
    elif arguments.what == "robustness":
        written = robustness(Path(*(arguments.names or [ROOT / "runs" / "tiny-robustness"])).absolute())
    else:
        plans = json.loads(PLANS.read_text()) if PLANS.exists() else {}
        if arguments.what == "plans":
            with configs():
                for model in SHIPPED:
                    if not arguments.names or model.name in arguments.names:
                        plans[model.name] = planned(model)
            PLANS.write_text(json.dumps(plans, indent=1, ensure_ascii=False) + "\n")
        written = texts(plans)
    for path, text in written.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
