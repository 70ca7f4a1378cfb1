"""Plans: of a recipe's bases the stages that one GPU does, the align stage of every method, the study, what to warn of.

Memory comes from `memory`, tokens, seconds and steps from `time`, generation from `serving`, totals from `totals`.
"""

import math
from collections.abc import Sequence

from rpsa.errors import RPSAError
from rpsa.plan.aligning import method_plans
from rpsa.plan.bases import Base
from rpsa.plan.dry_run import fake_tensors
from rpsa.plan.judging import calls_of, judgings
from rpsa.plan.one_gpu import single_gpu_stages
from rpsa.plan.render import MethodPlan, Plan, SingleGpuStage
from rpsa.plan.storage import downloads, left_on_disk
from rpsa.plan.time import evaluation_responses, never_dynamic_warning, reference_responses
from rpsa.plan.totals import Bytes, kind_of, make_study
from rpsa.recipe.schema import Recipe
from rpsa.safety_data import ALL_REFUSE, REFUSALS_ALONE


def make_plan(
    recipe: Recipe,
    gpu_memory: float = 80,
    gpus: Sequence[int] = (1, 2, 4, 8),
    usd_per_hour: float | None = None,
) -> Plan:
    """Plan a checked recipe for GPUs of `gpu_memory` GiB, with 1 GiB and 5% left to CUDA and fragmentation.

    `usd_per_hour` is the price of one GPU.

    Raises:
        RPSAError: a model's config is not available, or the recipe's settings contradict each other.
    """
    if not 0 < gpu_memory < math.inf or not gpus or min(gpus) < 1:
        raise RPSAError("--gpu-memory is GiB greater than 0, --gpus one or more numbers such as 1,2,4")
    if usd_per_hour is not None and not 0 <= usd_per_hour < math.inf:
        raise RPSAError("--usd-per-hour is the price of one GPU for an hour, 0 or more")
    bases = [Base(recipe, name, sorted(gpus), gpu_memory) for name in recipe.bases]
    methods: list[MethodPlan] = []
    stages: dict[str, list[SingleGpuStage]] = {}
    disk: list[Bytes] = []
    for base in bases:
        with fake_tensors():
            of_base = method_plans(base)
            methods += of_base
            stages[base.name] = list(single_gpu_stages(base))
            disk += left_on_disk(base, of_base, stages[base.name])
    cells = recipe.cells()
    evaluation = evaluation_responses(recipe.evaluate)
    endpoints = [one for one in judgings(recipe.evaluate, evaluation) if one.model is None]
    works = [stage.work for of_base in stages.values() for stage in of_base] + [m.work for m in methods]
    study = make_study(
        recipe,
        kind_of(gpu_memory),
        sorted(gpus),
        usd_per_hour,
        works,
        [calls_of(one, len(cells)) for one in endpoints],
        disk,
        downloads(recipe, bases, evaluation),
    )
    return Plan(
        name=recipe.name,
        gpu_memory=gpu_memory,
        parameters={base.name: base.parameters for base in bases},
        thoughts={base.name: None if base.thought is None else str(base.thought) for base in bases},
        methods=methods,
        stages=stages,
        reference=reference_responses(recipe) if any(cell.needs_reference for cell in cells) else None,
        evaluation=evaluation,
        evaluated=len(cells),
        study=study,
        warnings=[*_warnings(methods, stages), *([_FOUR_BITS] if recipe.model.quantization else [])],
    )


_FOUR_BITS = (
    "model.quantization: the base is counted in its own dtype; 4-bit weights take a quarter of bf16's memory"
)


def _warnings(methods: list[MethodPlan], stages: dict[str, list[SingleGpuStage]]) -> list[str]:
    warnings = []
    for base, found in stages.items():
        warnings += [
            f"{base}: stage {s.stage} does not fit on one GPU{_advice(s.stage)}" for s in found if not s.fits
        ]
    for method in methods:
        where = f"{method.method} on {method.base}"
        if not any(layout.fits for layout in method.layouts):
            warnings.append(f"{where}: fits on none of these numbers of GPUs")
        for layout in method.layouts:
            if layout.steps and layout.steps.never_dynamic:
                warnings.append(f"{where}: {never_dynamic_warning(layout.steps, layout.gpus)}")
        if method.safety.examples is None:
            warnings.append(
                f"{where}: steps unknown; set safety.n, or give safety.data a file on this machine"
            )
    alone = dict.fromkeys(m.method for m in methods if (m.safety.refusing or 0.0) >= ALL_REFUSE)
    return warnings + ([f"{', '.join(alone)}: {REFUSALS_ALONE}"] if alone else [])


def _advice(stage: str) -> str:
    if stage.startswith("Fisher"):
        return ": set fisher.activation_checkpointing, a smaller fisher.batch_size or reference.reference_max_length"
    section = "reference" if stage.startswith(("reference", "safety")) else "evaluate"
    return f": lower {section}.batch_size or {section}.max_new_tokens"
