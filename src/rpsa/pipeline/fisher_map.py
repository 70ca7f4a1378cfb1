"""`rpsa fisher-map`: Fig. 1 and 2 of saved Fishers, their numbers, and how much their masks have in common."""

import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rpsa.analysis.anatomy import MEANING, Overlap, anatomy, overlap, to_json
from rpsa.artifacts import atomic_write, stable_json
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.parameters import trainable_parameters

log = logging.getLogger(__name__)

RESULTS = "fisher_map.json"
_SMALL = 0.01  # the share whose overlap is always shown beside that of k


def fisher_map(folders: Sequence[Path], ks: Sequence[float], out: Path, model: str | None = None) -> None:
    """Write `fisher_map.json` and the figures of each Fisher into `out`, and print the tables.

    Raises:
        RPSAError: a folder holds no Fisher, a k is not in [0, 1], or `model` has not the Fishers' parameters.
    """
    from rpsa.report.drawing import write_figure
    from rpsa.report.fisher_figures import layer_map, module_bars
    from rpsa.report.fisher_table import render_anatomy, render_overlaps

    labels = distinct_labels(folders)
    fishers = {label: FisherDiagonal.load(folder) for label, folder in zip(labels, folders, strict=True)}
    content: dict[str, Any] = {"meaning": MEANING, "fishers": {}, "overlap": []}
    for label, folder in zip(labels, folders, strict=True):
        fisher = fishers[label]
        trained, classes = _structure(model, fisher) if model else (None, None)
        at = [anatomy(fisher, k, trained=trained, classes=classes) for k in ks]
        content["fishers"][label] = {"folder": str(folder)} | to_json(at)
        render_anatomy(label, at)
        figures = {"modules": module_bars(at[0], label)}
        if at[0].layers():
            figures["layers"] = layer_map(at[0], label)
        for name, figure in figures.items():
            write_figure(figure, out, f"{label}-{name}")
    overlaps = _overlaps(fishers, [*ks, *([] if _SMALL in ks else [_SMALL])])
    content["overlap"] = [
        {"fishers": list(pair)} | vars(one) for pair, found in overlaps.items() for one in found
    ]
    if overlaps:
        render_overlaps(overlaps)
    atomic_write(out / RESULTS, stable_json(content))
    print(f"\nNumbers and figures: {out}")


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """Short names, fit for files: the shortest ends of the paths that tell them apart, without a common last part.

    Raises:
        RPSAError: a folder is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise RPSAError(f"{folders[0]}: name each Fisher once")
    while len(parts) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    lengths = range(1, max(map(len, parts)) + 1)
    return next(
        labels
        for length in lengths
        if len(set(labels := ["-".join(part[-length:]).strip("/") for part in parts])) == len(parts)
    )


def _overlaps(
    fishers: dict[str, FisherDiagonal], ks: Sequence[float]
) -> dict[tuple[str, str], list[Overlap]]:
    found = {}
    for first, second in combinations(fishers, 2):
        try:
            found[first, second] = [overlap(fishers[first], fishers[second], k) for k in ks]
        except RPSAError as error:
            log.warning("%s and %s: %s", first, second, error)
    return found


def _structure(name: str, fisher: FisherDiagonal) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of all that the model trains, and the classes of its modules; no weight is loaded.

    Under LoRA only the adapter trains, and the modules are those of the model that it is put on.
    """
    from rpsa.pipeline.models import empty_model

    model = empty_model(name)
    classes = {path: type(module).__name__ for path, module in model.named_modules() if path}
    if any("lora_" in scored for scored in fisher):
        return {}, {f"base_model.model.{path}": of_class for path, of_class in classes.items()}
    fisher.check_shapes(model)
    return {n: tuple(p.shape) for n, p in trainable_parameters(model).items()}, classes
