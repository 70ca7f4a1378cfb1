"""A recipe's plan: each base's methods and stages, and what there is to warn of."""

import math
from collections.abc import Sequence

from rpsa.errors import RPSAError
from rpsa.plan.dry_run import fake_tensors
from rpsa.plan.parts import Base, plan_methods, plan_single_gpu_stages
from rpsa.plan.render import MethodPlan, Plan, SingleGpuStage
from rpsa.plan.time import never_dynamic_warning
from rpsa.plan.tokens import evaluation_responses, reference_responses
from rpsa.recipe.schema import Recipe


def make_plan(recipe: Recipe, gpu_memory: float = 80, gpus: Sequence[int] = (1, 2, 4, 8)) -> Plan:
    """Plan a checked recipe for GPUs of `gpu_memory` GiB, with 1 GiB and 5% left to CUDA and fragmentation.

    Raises:
        RPSAError: a model's config is not to be had, or the recipe's settings contradict each other.
    """
    if not 0 < gpu_memory < math.inf or not gpus or min(gpus) < 1:
        raise RPSAError("--gpu-memory is GiB greater than 0, --gpus one or more numbers such as 1,2,4")
    methods: list[MethodPlan] = []
    stages: dict[str, list[SingleGpuStage]] = {}
    parameters: dict[str, int] = {}
    thoughts: dict[str, str | None] = {}
    for name in recipe.bases:
        base = Base(recipe, name, sorted(gpus), gpu_memory)
        thoughts[name] = None if base.thought is None else str(base.thought)
        with fake_tensors():
            methods += plan_methods(base)
            stages[name] = list(plan_single_gpu_stages(base))
            parameters[name] = sum(p.numel() for p in base.model(recipe.model.dtype).parameters())
    cells = recipe.cells()
    return Plan(
        name=recipe.name,
        gpu_memory=gpu_memory,
        parameters=parameters,
        thoughts=thoughts,
        methods=methods,
        stages=stages,
        reference=reference_responses(recipe) if any(cell.needs_reference for cell in cells) else None,
        evaluation=evaluation_responses(recipe.evaluate),
        evaluated=len(cells),
        warnings=_warnings(methods, stages),
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
    return warnings


def _advice(stage: str) -> str:
    if stage.startswith("Fisher"):
        return ": set fisher.activation_checkpointing, a smaller fisher.batch_size or reference.reference_max_length"
    section = "reference" if stage.startswith("reference") else "evaluate"
    return f": lower {section}.batch_size or {section}.max_new_tokens"
