"""Figures as the report's page shows them."""

from typing import NamedTuple


class Shown(NamedTuple):
    """An SVG file with what stands under it."""

    name: str
    svg: bytes
    title: str
    caption: str


CAPTIONS: dict[str, tuple[str, str]] = {
    "scatter": (
        "Safety against reasoning",
        "The upper right corner is best. Large marks are means, small ones single runs.",
    ),
    "scatter_benchmarks": (
        "Safety against reasoning on each benchmark",
        "As above, with the accuracy on one benchmark in each panel; the attack success rate is the mean.",
    ),
    "ablation": (
        "Masks and controls",
        "Large marks are means with their 95% interval over runs, small ones single runs; the dashed line is the "
        "untouched model. STR of single runs can lie far off where attack success hardly fell.",
    ),
    "trajectories": (
        "Course of k and c",
        "The frozen ratio k follows the conflict c between the reasoning and the safety gradient. Until the window "
        "is full, k is 0.5.",
    ),
    "learning_rate": (
        "Against the learning rate",
        "The learning rate is itself a strong lever. Lines are means, bands the range over bases and seeds; the "
        "dashed line is the untouched model.",
    ),
}
