"""Checks of a whole recipe that types cannot make: fields of TRL and PEFT, missing files, missing parts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from rpsa.recipe.methods import Method, Trainer
from rpsa.recipe.problems import (
    dataclass_problems,
    did_you_mean,
    installed_names,
    source_problem,
    validation_problems,
)
from rpsa.recipe.schema import Cell, Recipe, concerns
from rpsa.recipe.sections import (
    OF_SELF_MADE,
    SELF_MADE,
    Align,
    Alternatives,
    Fisher,
    Robustness,
    Safety,
    Section,
)

# Where a setting that belongs to another section is looked for by mistake.
_SET_ELSEWHERE = {
    "output_dir": "output_dir",
    "seed": "matrix.seeds",
    "max_length": "safety.max_length",
    "fsdp": "launch.config",
    "fsdp_config": "launch.config",
    "deepspeed": "launch.config",
}
_ABOVE_ZERO = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("r", "lora_alpha"),
)
_SECTIONS: dict[str, type[Section]] = {
    "align": Align,
    "alternatives": Alternatives,
    "fisher": Fisher,
    "safety": Safety,
}
_OF_ANCHORS = {"anchor", "anchor_top"}
_OF_OTHERS = {"penalty_strength", "nullspace_energy", *_OF_ANCHORS}
"""Of the alternatives, what does nothing by itself."""
_NOT_BELOW_ZERO = (
    *("weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"),
    *("logging_steps", "eval_steps", "save_steps"),
)


def recipe_problems(recipe: Recipe) -> Iterator[str]:
    """One `path: problem` line for each mistake, the cheap checks first."""
    if not recipe.bases:
        yield "model.name: missing; name a model here or in matrix.bases"
    grid = list(_grid_problems(recipe))
    yield from grid
    if recipe.bases and not grid:
        yield from _name_problems(recipe)
        yield from _alternatives_problems(recipe)
        yield from _sweep_problems(recipe)
        yield from _keep_best_problems(recipe)
        yield from _self_made_problems(recipe)
    if trainers := list(_trainer_problems(recipe)):
        yield from trainers
    else:
        yield from _dataclass_problems(recipe)
    yield from _quantization_problems(recipe)
    yield from _source_problems(recipe)
    yield from _launch_problems(recipe)
    yield from _robustness_problems(recipe)
    if not recipe.evaluate.tasks and (recipe.sweeps or recipe.analysis.perturb):
        yield "evaluate.tasks: empty; sweeps and analysis.perturb show what is measured on tasks"


def _settings(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    yield "", recipe.train, recipe.lora
    yield "matrix.paradigms.fft.", recipe.matrix.paradigms.fft.train, recipe.matrix.paradigms.fft.lora
    yield "matrix.paradigms.lora.", recipe.matrix.paradigms.lora.train, recipe.matrix.paradigms.lora.lora
    for name, method in recipe.matrix.methods.items():
        yield f"matrix.methods.{name}.", method.train, method.lora
    for sweep, swept in recipe.sweeps.items():
        for name, method in swept.methods.items():
            yield f"sweeps.{sweep}.methods.{name}.", method.train, method.lora
    for where, grid in _grids(recipe):
        for key, values in grid.items():
            section, _, name = key.partition(".")
            for value in values:
                if section == "train":
                    yield f"{where}.", {name: value}, {}
                if section == "lora":
                    yield f"{where}.", {}, {name: value}


def _grids(recipe: Recipe) -> Iterator[tuple[str, Mapping[str, list[Any]]]]:
    yield "matrix.grid", recipe.matrix.grid
    for name, sweep in recipe.sweeps.items():
        yield f"sweeps.{name}.over", sweep.over


def _dataclass_problems(recipe: Recipe) -> Iterator[str]:
    settings = list(_settings(recipe))
    if any(train for _, train, _ in settings):
        configs = {cell.trainer: train_config(cell.trainer) for cell in _trained(recipe)} or {
            "sft": train_config("sft")
        }
        for where, train, _ in settings:
            ours = [key for key, value in train.items() if key in _SET_ELSEWHERE and value is not None]
            yield from (f"{where}train.{key}: set {_SET_ELSEWHERE[key]} instead" for key in ours)
            yield from _train_problems(f"{where}train", train, list(configs.values()))
            yield from _range_problems(f"{where}train", train)
        yield from _misplaced_fields(recipe, configs)
    if any(lora for _, _, lora in settings):
        from peft import LoraConfig

        for where, _, lora in settings:
            yield from dataclass_problems(f"{where}lora", lora, LoraConfig)
            yield from _range_problems(f"{where}lora", lora)


def train_config(trainer: str) -> type:
    """TRL's own config of a trainer, whose fields a recipe's `train` has."""
    import trl

    config: type = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[trainer]
    return config


def _train_problems(path: str, train: Mapping[str, Any], configs: list[type]) -> Iterator[str]:
    """Each field is one of a trainer's that the recipe has."""
    for key, value in train.items():
        if key != "trainer":
            found = [list(dataclass_problems(path, installed_names({key: value}, c), c)) for c in configs]
            yield from min(found, key=len)


def _misplaced_fields(recipe: Recipe, configs: Mapping[str, type]) -> Iterator[str]:
    """Where a recipe has several trainers: fields that reach one that does not have them, each once."""
    if len(configs) < 2:
        return
    found: dict[str, str] = {}
    for cell in _trained(recipe):
        config = configs[cell.trainer]
        for problem in dataclass_problems("train", installed_names(cell.train, config), config):
            found.setdefault(problem, cell.method)
    yield from (f"{problem}, which trains {method}" for problem, method in found.items())


def _trained(recipe: Recipe) -> list[Cell]:
    if not recipe.bases or any(_grid_problems(recipe)):
        return []
    return [cell for cell in recipe.cells() if cell.paradigm != "none"]


def _trainer_problems(recipe: Recipe) -> Iterator[str]:
    """Trainers that there are not, and what pairs of responses cannot be used for; each once."""
    found: dict[str, None] = {}
    for cell in _trained(recipe):
        found |= dict.fromkeys(_problems_of_trainer(cell))
    yield from found


def _problems_of_trainer(cell: Cell) -> Iterator[str]:
    if cell.trainer == "grpo":
        yield (
            "train.trainer: grpo needs rewards, which a recipe has none of; in a script, put rpsa.RPSAMixin before "
            "trl.GRPOTrainer"
        )
    elif cell.trainer not in (valid := get_args(Trainer)):
        yield f"train.trainer: {cell.trainer!r} is not a valid value{did_you_mean(str(cell.trainer), valid)}"
    if cell.trainer != "dpo" or cell.safety is None:
        return
    if cell.safety.is_self_made:
        yield "safety.data: self has no rejected responses, which dpo needs; name rows of prompt, chosen and rejected"
    if cell.safety.format != "auto":
        yield f"safety.format: {cell.safety.format} is not of pairs; with train.trainer=dpo leave it out"
    if cell.safety.keep_best == "safety_and_reasoning":
        yield (
            "safety.keep_best: safety_and_reasoning adds up nats per token, and dpo's loss is none; set it to safety"
        )
    if cell.alternatives and cell.alternatives.rehearsal_share:
        yield f"{cell.method}: rehearsal_share: D_ref has no rejected responses, which dpo needs; take it out"


def _range_problems(path: str, values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if key in _ABOVE_ZERO and not 0 < value < float("inf"):
            yield f"{path}.{key}: {value!r} is not greater than 0"
        if key in _NOT_BELOW_ZERO and not 0 <= value < float("inf"):
            yield f"{path}.{key}: {value!r} is not at least 0"
        if key == "data_seed" and not 0 <= value < 2**32:
            yield f"{path}.{key}: {value!r} is not between 0 and {2**32 - 1}"


def _name_problems(recipe: Recipe) -> Iterator[str]:
    """No run's folder is another's, or inside of it, also where a file system does not tell capitals from others."""
    folders = Counter(cell.id.casefold() for cell in recipe.cells())
    name, count = folders.most_common(1)[0]
    if count > 1:
        yield f"matrix: {count} runs would have the same folder, {name}; give a method, base or value another name"
    inside = (other for other in folders for parent in Path(other).parents if str(parent) in folders)
    if name := next(inside, ""):
        yield f"matrix: {name} would be a folder inside of another run's; give the method or the sweep another name"


def _alternatives_problems(recipe: Recipe) -> Iterator[str]:
    varied = {
        key.partition(".")[2] for _, grid in _grids(recipe) for key in grid if key.startswith("alternatives.")
    }
    for path, method in _methods(recipe):
        chosen = method.alternatives
        if chosen is None:
            continue
        if method.paradigm == "none":
            yield f"{path}.alternatives: the untouched model is not trained; take it out"
        elif not chosen.does_something and not (chosen.model_fields_set - _OF_OTHERS) & varied:
            yield f"{path}.alternatives: does nothing; set penalty, projection, rehearsal_share, ... or take it out"
        elif "penalty_strength" in chosen.model_fields_set and chosen.penalty is None:
            yield f"{path}.alternatives.penalty_strength: of no penalty; set penalty, too"
        elif "nullspace_energy" in chosen.model_fields_set and chosen.projection != "nullspace":
            yield f"{path}.alternatives.nullspace_energy: of no null space; set projection: nullspace, too"
        elif (name := next(iter(_OF_ANCHORS & chosen.model_fields_set), None)) and not (
            chosen.has_anchor or {"kl", "der"} & varied
        ):
            yield f"{path}.alternatives.{name}: of no anchor; set kl or der, too"
    cells = [cell for cell in recipe.cells() if cell.alternatives]
    both = [
        cell.method
        for cell in cells
        if cell.align and cell.alternatives and cell.alternatives.replaces_freezing
    ]
    yield from _misplaced_alternatives(cells)
    for name in dict.fromkeys(both):
        yield (
            f"{name}: only rehearsal_share, kl and der go together with align; take the other alternatives, or align, "
            "out"
        )
    if recipe.reference.problems is None:
        for name in dict.fromkeys(cell.method for cell in cells if cell.needs_reference and not cell.align):
            yield f"reference.problems: missing; {name} needs the model's own reasoning"


def _misplaced_alternatives(cells: list[Cell]) -> Iterator[str]:
    """What works in one paradigm alone, and what needs two Fishers."""
    for cell in _first_of_each(cells, lambda chosen: chosen.penalty == "product"):
        assert cell.alternatives is not None
        where = f"{cell.method}: alternatives.penalty: product"
        if cell.paradigm == "fft":
            yield f"{where} is about a LoRA adapter's B A; in full fine-tuning use fisher"
        elif cell.alternatives.restored_ratio > 0:
            yield f"{where} goes by the base's Fisher, restored_ratio by the adapter's; take one of them out"
    for cell in _first_of_each(cells, lambda chosen: chosen.projection == "nullspace"):
        if cell.paradigm == "lora":
            yield (
                f"{cell.method}: alternatives.projection: nullspace is for full fine-tuning, where weights move by "
                "themselves; in LoRA use agem or signs"
            )


def _first_of_each(cells: list[Cell], concerns: Callable[[Alternatives], bool]) -> Iterable[Cell]:
    """Of each method the first cell whose alternatives this concerns."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.alternatives and concerns(cell.alternatives):
            found.setdefault(cell.method, cell)
    return found.values()


def _methods(recipe: Recipe) -> Iterator[tuple[str, Method]]:
    for name, method in recipe.matrix.methods.items():
        yield f"matrix.methods.{name}", method
    for sweep, swept in recipe.sweeps.items():
        for name, method in swept.methods.items():
            yield f"sweeps.{sweep}.methods.{name}", method


def _grid_problems(recipe: Recipe) -> Iterator[str]:
    for where, grid in _grids(recipe):
        for key, values in grid.items():
            section, _, name = key.partition(".")
            if section in ("train", "lora") and name:
                continue
            if section not in _SECTIONS or not name:
                yield f"{where}.{key}: a grid key is train.*, lora.*, {', '.join(f'{s}.*' for s in _SECTIONS)}"
                continue
            model = _SECTIONS[section]
            for value in values:
                try:
                    model.model_validate({name: value})
                except ValidationError as error:
                    yield f"{where}.{section}.{validation_problems(error, model)[0]}"


def _sweep_problems(recipe: Recipe) -> Iterator[str]:
    """What a sweep would not change, every point of it being the same."""
    for name, sweep in recipe.sweeps.items():
        for key in sweep.over:
            if not any(concerns(key, method) for method in sweep.methods.values()):
                yield f"sweeps.{name}.over.{key}: concerns none of the sweep's methods"


def _keep_best_problems(recipe: Recipe) -> Iterator[str]:
    """Each once, with the first run of which it is true."""
    found: dict[str, str] = {}
    for cell in recipe.cells():
        if cell.safety is not None and cell.safety.keep_best is not None:
            for problem in _keep_best_of(recipe, cell):
                found.setdefault(problem, cell.id)
    yield from (f"safety.keep_best: {problem} (of {name})" for problem, name in found.items())


def _keep_best_of(recipe: Recipe, cell: Cell) -> Iterator[str]:
    assert cell.safety is not None
    if cell.safety.validation_share == 0:
        yield "nothing is held out to choose by; set safety.validation_share"
    if (cell.train.get("eval_strategy") or "no") == "no":
        yield "no step is evaluated; set train.eval_strategy, epoch or steps"
    if cell.train.get("save_strategy") == "no":
        yield "no step is saved; take train.save_strategy out, or set it to that of evaluations"
    for name in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
        if cell.train.get(name) is not None:
            yield f"train.{name} says what is best, too; take one of the two out"
    needs_reasoning = cell.safety.keep_best == "safety_and_reasoning"
    if needs_reasoning and not (recipe.reference.problems and recipe.reference.held_out):
        yield "safety_and_reasoning needs held-out reasoning; set reference.problems, and reference.held_out above 0"


def _quantization_problems(recipe: Recipe) -> Iterator[str]:
    """What needs whole weights; each once."""
    if recipe.model.quantization is None:
        return
    where = f"model.quantization: {recipe.model.quantization}"
    trained = _trained(recipe)
    if full := next((cell.method for cell in trained if cell.paradigm == "fft"), None):
        yield f"{where} is for adapters; take {full} out of the matrix, or name a lora method in its place"
    elif of_base := next((c.method for c in trained if c.needs_fisher and not c.starts_from_fisher), None):
        yield f"{where}: {of_base} goes by the Fisher of the base's own weights, which 4 bits have none of; take it out"
    for section in ("reference", "evaluate"):
        if getattr(recipe, section).backend == "vllm":
            yield f"{section}.backend: vllm would not run the 4-bit weights that are trained; set transformers, or auto"
    if recipe.robustness is not None:
        on_weights = ("finetune", "direction", "prune", "quantise", "merge")
        if name := next((one for one in on_weights if getattr(recipe.robustness, one) is not None), None):
            yield f"robustness.{name}: changes weights, which {where} has none of that are whole; set it to null"


def _launch_problems(recipe: Recipe) -> Iterator[str]:
    launch = recipe.launch
    if launch is None:
        return
    if launch.config is None and launch.num_processes is None:
        yield "launch: name config (an accelerate config file) or num_processes"
    if launch.config is not None and not Path(launch.config).is_file():
        yield f"launch.config: no such file: {launch.config!r}"
    if recipe.matrix.parallel > 1:
        yield "matrix.parallel: cannot be more than 1 beside launch, whose processes share one task"


def _robustness_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.robustness is None:
        return
    yield from robustness_problems(recipe.robustness)
    if not recipe.evaluate.tasks:
        yield "robustness: evaluate.tasks names nothing, and an attacked model is compared with the evaluated one"


def robustness_problems(settings: Robustness) -> Iterator[str]:
    """Of the section by itself: sources that are missing or not there, and settings that PEFT does not have."""
    for name, needed, by in (
        ("harmful", settings.needs_harmful, "many_shot, finetune and direction need"),
        ("benign", settings.needs_benign, "finetune and direction need"),
    ):
        source: str | None = getattr(settings, name)
        if needed and source is None:
            yield (
                f"robustness.{name}: missing; {by} {name} requests with answers that comply; name a file or a dataset, "
                "or set these attacks to null"
            )
        elif source is not None and (problem := source_problem("rows", source)):
            yield f"robustness.{name}: {problem}"
    if settings.templates is not None and (problem := source_problem("safety", settings.templates)):
        yield f"robustness.templates: {problem}"
    for task in settings.tasks or ():
        if problem := source_problem("task", task):
            yield f"robustness.tasks: {problem}"
    if settings.finetune is not None and settings.finetune.lora:
        from peft import LoraConfig

        yield from dataclass_problems("robustness.finetune.lora", settings.finetune.lora, LoraConfig)


def _source_problems(recipe: Recipe) -> Iterator[str]:
    def check(path: str, kind: str, source: str | None) -> Iterator[str]:
        if source is not None and (problem := source_problem(kind, source)):
            yield f"{path}: {problem}"

    yield from check("model.name", "model", recipe.model.name)
    for base in recipe.matrix.bases:
        yield from check("matrix.bases", "model", base)
    yield from check("reference.problems", "problems", recipe.reference.problems)
    for name in recipe.evaluate.tasks:
        yield from check("evaluate.tasks", "task", name)
    methods = [method for _, method in _methods(recipe)]
    if recipe.reference.problems is None and any(method.align is not None for method in methods):
        yield "reference.problems: missing; freezing needs reasoning problems to measure on"
    places = [*_safety_sections(recipe), *_safety_points(recipe)]
    has_self_made = any(safety.data == SELF_MADE for _, safety in places)
    for path, safety in places:
        # what the model answers itself needs prompts alone
        of_prompts = safety.data == SELF_MADE if safety.data else has_self_made
        yield from check(f"{path}.data", "safety", safety.data)
        yield from check(f"{path}.prompts", "prompts", safety.prompts)
        if safety.benign == SELF_MADE:
            yield f"{path}.benign: 'self' is for safety.data; name a file or a dataset"
        else:
            yield from check(f"{path}.benign", "prompts" if of_prompts else "safety", safety.benign)
    if not any(safety.data for _, safety in places) and any(m.paradigm != "none" for m in methods):
        yield "safety.data: missing; name the safety examples to train on"


def _safety_sections(recipe: Recipe) -> Iterator[tuple[str, Safety]]:
    """Every section safety as it is written down, with its place."""
    paradigms = recipe.matrix.paradigms
    places = [
        ("safety", recipe.safety),
        ("matrix.paradigms.fft.safety", paradigms.fft.safety),
        ("matrix.paradigms.lora.safety", paradigms.lora.safety),
        *((f"{where}.safety", method.safety) for where, method in _methods(recipe)),
        *((f"bench.data.{name}", data) for name, data in (recipe.bench.data if recipe.bench else {}).items()),
    ]
    yield from ((path, safety) for path, safety in places if safety is not None)


def _safety_points(recipe: Recipe) -> Iterator[tuple[str, Safety]]:
    """What grids and sweeps set of it, value by value."""
    for where, grid in _grids(recipe):
        for key, values in grid.items():
            section, _, name = key.partition(".")
            if section == "safety" and name in ("data", "benign", *OF_SELF_MADE):
                for value in values:
                    if isinstance(value, str) or name not in ("data", "benign", "prompts"):
                        yield f"{where}.safety", Safety.model_construct(**{name: value})


def _self_made_problems(recipe: Recipe) -> Iterator[str]:
    """Data that the model is to make itself without requests, and settings of it where there are other data."""
    sections = [cell.safety for cell in recipe.cells() if cell.safety is not None]
    made = [safety for safety in sections if safety.is_self_made]
    if any(safety.prompts is None for safety in made):
        yield "safety.prompts: missing; for data: self name the harmful requests that the model answers"
    if made:
        return
    for path, safety in [*_safety_sections(recipe), *_safety_points(recipe)]:
        for name in OF_SELF_MADE:
            if name in safety.model_fields_set and not safety.is_self_made:
                yield f"{path}.{name}: only data that the model makes itself has it; set safety.data=self"
