"""Structure: which layer and which part of a decoder a parameter belongs to, from names and shapes alone.

The layers are the largest block of the module tree that is repeated under a number. Inside a layer, the names of
the modules around a parameter tell attention from MLP; where they do not, the shapes do (`_kind_by_widths`). A
module that holds vectors and no matrix is a norm. Outside of the layers, a matrix as long as the vocabulary is the
embedding if it comes first and the head if it comes later.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
Shapes = Mapping[str, Sequence[int]]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)
_HEAD = re.compile(r"head|embed_out|unembed", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|wte|wpe", re.IGNORECASE)
_WRAPPING = {"weight", "default", "base_layer", "modules_to_save", "original_module"}


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        layer: number of its layer; None outside of the layers.
        module: its module's name, as short as tells it from all others: `q_proj`, `attn.c_proj`, `q_proj.bias`,
            `up_proj.lora_B`. The same in all layers, and for all experts of a layer.
        kind: a bias is of the kind of its matrix, a router of that of its experts.
        is_matrix: not a vector; experts stacked in one tensor are matrices.
    """

    layer: int | None
    module: str
    kind: Kind
    is_matrix: bool


@dataclass(frozen=True)
class _Place:
    """A name taken apart: `model.layers.3.mlp.up_proj.bias` -> layer 3, path (mlp, up_proj), leaf bias."""

    layer: int | None
    path: tuple[str, ...]
    leaf: str  # "bias", "lora_A" and the like; "" for the matrix itself
    is_of_module: bool  # False where the parameter has no module of its own (`experts.gate_up_proj`)


def roles(shapes: Shapes, classes: Mapping[str, str] | None = None) -> dict[str, Role]:
    """The role of each parameter.

    Args:
        shapes: canonical names in the order of the model, as in a `FisherDiagonal`; LoRA parameters too.
        classes: dotted path of each module -> name of its class, from a model if there is one: read like names.
    """
    stack = _stack(shapes)
    repeated = _repeated(shapes, stack)
    places = {name: _place(name, stack, repeated) for name in shapes}
    kinds = _kinds(shapes, places, _class_words(classes or {}, stack, repeated))
    labels = _labels({place.path for place in places.values()})
    return {
        name: Role(
            layer=place.layer,
            module=".".join(filter(None, (labels[place.path], place.leaf))),
            kind=kinds[name],
            is_matrix=len(shapes[name]) > 1,
        )
        for name, place in places.items()
    }


# Layers


def _stack(shapes: Shapes) -> tuple[str, ...] | None:
    """Path of the module that numbers the layers: of all that number something, the one with most elements."""
    sizes: Counter[tuple[str, ...]] = Counter()
    for name, shape in shapes.items():
        if prefix := _numbered(name.split(".")):
            sizes[prefix] += math.prod(shape)
    return sizes.most_common(1)[0][0] if sizes else None


def _numbered(parts: list[str]) -> tuple[str, ...] | None:
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if first is None else tuple(parts[:first])


def _repeated(shapes: Shapes, stack: tuple[str, ...] | None) -> set[tuple[str, ...]]:
    """Paths that number modules of equal shape (experts), other than the layers: their numbers tell nothing apart."""
    members: dict[tuple[str, ...], dict[str, set[tuple[object, ...]]]] = defaultdict(lambda: defaultdict(set))
    for name, shape in shapes.items():
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit() and tuple(parts[:i]) != stack:
                members[tuple(parts[:i])][part].add((*parts[i + 1 :], tuple(shape)))
    return {
        path
        for path, numbers in members.items()
        if len(numbers) > 1 and len({frozenset(member) for member in numbers.values()}) == 1
    }


def _place(name: str, stack: tuple[str, ...] | None, repeated: set[tuple[str, ...]]) -> _Place:
    parts = name.split(".")
    layer = None
    start = 0
    if stack is not None and tuple(parts[: len(stack)]) == stack and parts[len(stack)].isdigit():
        layer, start = int(parts[len(stack)]), len(stack) + 1
    path = [
        part
        for i, part in enumerate(parts)
        if i >= start and part not in _WRAPPING and not (part.isdigit() and tuple(parts[:i]) in repeated)
    ]
    # lora_A.default.weight, lora_embedding_A.default, lora_magnitude_vector
    leaf = path.pop() if path and (path[-1] == "bias" or path[-1].startswith("lora_")) else ""
    return _Place(layer, tuple(path) or ("weight",), leaf, bool(leaf) or parts[-1] == "weight")


# Names


def _labels(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest end of each path that no other path ends with; the whole path if there is none."""
    paths = list(paths)
    ends = Counter(path[-n:] for path in paths for n in range(1, len(path) + 1))

    def shortest(path: tuple[str, ...]) -> tuple[str, ...]:
        own = (path[-n:] for n in range(1, len(path)))
        return next((end for end in own if ends[end] == 1 and not end[0].isdigit()), path)

    return {path: ".".join(shortest(path)) for path in paths}


def _class_words(
    classes: Mapping[str, str], stack: tuple[str, ...] | None, repeated: set[tuple[str, ...]]
) -> dict[tuple[bool, tuple[str, ...]], str]:
    """Class names by (is in a layer, path of the module)."""
    words = {}
    for name, of_class in classes.items():
        place = _place(f"{name}.weight", stack, repeated)
        words[place.layer is not None, place.path] = of_class
    return words


# Kinds


def _kinds(
    shapes: Shapes,
    places: Mapping[str, _Place],
    class_words: Mapping[tuple[bool, tuple[str, ...]], str],
) -> dict[str, Kind]:
    holds_matrix = {(p.layer, p.path) for name, p in places.items() if len(shapes[name]) > 1}
    by_shape = _kinds_by_shape(shapes, places)
    kinds: dict[str, Kind] = {}
    for name, place in places.items():
        # from the module itself outwards
        words = [
            f"{place.path[n - 1]} {class_words.get((place.layer is not None, place.path[:n]), '')}"
            for n in range(len(place.path), 0, -1)
        ]
        has_weight = place.leaf != "bias" or f"{name.removesuffix('bias')}weight" in shapes
        if place.is_of_module and (place.layer, place.path) not in holds_matrix and has_weight:
            kinds[name] = "norm"
        elif place.layer is None:
            kinds[name] = _outside(words[0]) or by_shape.get(name, "other")
        else:
            kinds[name] = _inside(words) or by_shape[name]
    return kinds


def _inside(words: Iterable[str]) -> Kind | None:
    for word in words:
        if _ATTENTION.search(word):
            return "attention"
        if _MLP.search(word):
            return "mlp"
    return None


def _outside(word: str) -> Kind | None:
    if _HEAD.search(word):
        return "head"
    return "embedding" if _EMBEDDING.search(word) else None


def _kinds_by_shape(shapes: Shapes, places: Mapping[str, _Place]) -> dict[str, Kind]:
    """What the shapes tell, of every parameter: a part of a layer as a whole, matrices outside one by one."""
    kinds: dict[str, Kind] = {}
    parts: dict[tuple[int, str], dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, place in places.items():
        if place.layer is not None:
            # modules without one around them, like OPT's fc1 and fc2, are one part
            part = place.path[0] if len(place.path) > 1 else ""
            parts[place.layer, part][place.path].append(name)
    matrices = {
        key: [m for names in modules.values() if (m := _matrix([shapes[n] for n in names]))]
        for key, modules in parts.items()
    }
    dimensions = Counter(d for found in matrices.values() for matrix in found for d in set(matrix))
    hidden = dimensions.most_common(1)[0][0] if dimensions else 0
    for key, modules in parts.items():
        kind = _kind_by_widths(matrices[key], hidden)
        kinds |= {name: kind for names in modules.values() for name in names}
    outside = [n for n, place in places.items() if place.layer is None and len(shapes[n]) > 1]
    vocabulary = max((max(shapes[n]) for n in outside), default=0)
    long = [n for n in outside if vocabulary in shapes[n]]
    kinds |= {n: "head" if i else "embedding" for i, n in enumerate(long)}
    return kinds


def _matrix(shapes: list[Sequence[int]]) -> tuple[int, int] | None:
    """(out, in) of a module's weight; with LoRA that of B A."""
    matrices = [tuple(shape) for shape in shapes if len(shape) > 1]
    if len(matrices) == 2 and matrices[0][0] == matrices[1][1]:
        return matrices[1][0], matrices[0][1]
    return matrices[0][-2:] if matrices else None  # type: ignore[return-value]


def _kind_by_widths(matrices: Sequence[tuple[int, int]], hidden: int) -> Kind:
    """Attention or MLP by how wide the matrices are that lead from and to the hidden size, either way round.

    An MLP is equally wide in all of them (up, down; gate, up, down), or twice in the first if it is gated and
    fused. Attention has four (query and output, key and value), or two where query, key and value are fused. A
    part with a matrix that does not touch the hidden size is neither.
    """
    if any(hidden not in matrix for matrix in matrices):
        return "other"
    widths = sorted((sum(matrix) - hidden for matrix in matrices), reverse=True)
    if len(widths) == 4 and widths[0] == widths[1] >= widths[2] == widths[3]:
        return "attention"
    if len(widths) in (2, 3) and len(set(widths)) == 1:
        return "mlp"
    if len(widths) == 2 and widths[0] == 2 * widths[1] and widths[1] > hidden:
        return "mlp"
    if len(widths) == 2 and widths[1] < widths[0] <= 3 * widths[1]:
        return "attention"
    return "other"
