"""The Fisher diagonal of Eq. 4 as a value: scores by parameter, section 3.2's threshold and mask, files.

A Fisher of one model says nothing of another. So it keeps some values of the weights that it was measured on, and
refuses others. A hash would tell the same from the different; values tell also a model after some training, or in
another dtype, from one that has nothing to do with it.
"""

import base64
import copy
import json
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rpsa.artifacts import read_json, reading
from rpsa.errors import RPSAError, check_type
from rpsa.fisher.quantile import Ranking, threshold_rank
from rpsa.parameters import canonical_name, fingerprint, trainable_parameters
from rpsa.sharding import barrier, full, is_sharded, local, rank

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_SHARD_BYTES = 4 << 30

Origin = Literal["same", "trained", "other"]
"""The weights that were measured, in whatever dtype; a state that training may have brought them to; none of both."""

Sampled = Mapping[str, tuple[str, str]]
"""Parameter name -> dtype, and some of its values: float32 in base64."""

_VALUES = 1 << 13
_DEVIATIONS = 6.0


def sampled_weights(parameters: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Some evenly spaced values of each parameter, JSON-able; of a sharded model all ranks must ask for them.

    Some 8,000 in all, at least 4 a parameter. What is not made of numbers (quantised) or not there (meta) is left out.
    """
    each = max(4, min(256, _VALUES // max(1, len(parameters))))
    return {
        name: (str(p.dtype).removeprefix("torch."), _encoded(_values(p, each)))
        for name, p in parameters.items()
        if p.is_floating_point() and not p.is_meta
    }


def origin_of(sampled: Sampled, parameters: Mapping[str, Tensor]) -> Origin:
    """What `parameters` are to the weights of which `sampled_weights` took some.

    Trained weights are known by their correlation with what they were, or by elements that never moved: there
    always are some where frozen ones are exactly frozen. Two models have neither in common. Parameters that have
    another shape, and those that are constant (norms at their start), say nothing.
    """
    pairs = []
    for name, (dtype, text) in sampled.items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.is_floating_point() or parameter.is_meta:
            continue
        before = _decoded(text)
        pairs.append(
            (before, _values(parameter, len(before)), dtype == str(parameter.dtype).removeprefix("torch."))
        )
    if all(_is_same(*pair) for pair in pairs):
        return "same"
    varied = [(a, b) for a, b, _ in pairs if len(a) > 1 and a.std() > 0]
    if not varied:
        return "trained"
    before, now = (torch.cat([_standardised(pair[i]) for pair in varied]) for i in (0, 1))
    equal = torch.cat([a == b for a, b in varied]).double().mean()
    chance = min(0.5, _DEVIATIONS / len(before) ** 0.5)
    return "trained" if float((before * now).mean()) > chance or float(equal) > 0.05 else "other"


def _values(parameter: Tensor, count: int) -> Tensor:
    flat = full(parameter.detach()).flatten()
    places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long()
    return flat[places.to(flat.device)].to("cpu", torch.float32)


def _is_same(before: Tensor, now: Tensor, same_dtype: bool) -> bool:
    if len(before) != len(now):
        return True  # quantised, or laid out in another way: not to be compared
    # rounding to bfloat16 changes a value by up to 2^-9 of it
    return torch.equal(before, now) if same_dtype else torch.allclose(before, now, rtol=2**-8, atol=1e-7)


def _standardised(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else centred


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


class FisherDiagonal:
    """Importance scores, one per parameter element.

    Args:
        scores: canonical parameter name -> non-negative tensor of the parameter's shape. Held as fp32, or as
            bf16 if all are bf16. Sharded scores (DTensor) stay sharded; all ranks must then do the same with them.
        manifest: where they came from (JSON-able); `estimate_fisher` fills it.

    Raises:
        RPSAError: a score is negative or not finite.
    """

    def __init__(self, scores: Mapping[str, Tensor], manifest: Mapping[str, Any] | None = None) -> None:
        check_type("scores", scores, Mapping, "tensors by parameter name")
        for name, score in scores.items():
            check_type(f"scores[{name!r}]", score, Tensor, "a tensor of the parameter's shape")
        dtypes = {score.dtype for score in scores.values()}
        dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        self.scores = {name: score.detach().to(dtype) for name, score in scores.items()}
        self.manifest: dict[str, Any] = dict(manifest or {})
        self._sharded = is_sharded(self.scores)
        for name, score in self.scores.items():
            if not _finite_and_not_negative(local(score)):
                raise RPSAError(f"Fisher scores of {name!r} must be finite and not negative")

    def __getitem__(self, name: str) -> Tensor:
        """fp32, in the shape of the parameter."""
        return self.scores[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def _ranking(self) -> Ranking:
        return Ranking(map(local, self.scores.values()), sharded=self._sharded)

    @property
    def nonzero(self) -> int:
        """How many elements have F > 0: only these can be frozen."""
        return self._ranking.nonzero

    def threshold(self, k: float) -> float:
        """tau_k = Q_{1-k}({F_i | F_i > 0}): elements above it are frozen.

        Raises:
            RPSAError: k is not in [0, 1], or every score is zero.
        """
        if self.nonzero == 0:
            raise RPSAError("every Fisher score is zero: nothing can be frozen; check the labels of D_ref")
        return self._ranking.value(threshold_rank(self.nonzero, k))

    def mask(self, k: float) -> dict[str, Tensor]:
        """M = 1[F <= tau_k]: bool tensors, True = trainable."""
        tau = self.threshold(k)
        return {name: score.float() <= tau for name, score in self.scores.items()}

    def check(self, model: nn.Module) -> None:
        """Raise RPSAError unless the scores are those of `model`'s trainable parameters: names, shapes, weights.

        Weights that may have been trained since are let through with a warning: a run that goes on has such. Of a
        sharded model all ranks must ask.
        """
        if self.check_related(model) == "trained":
            log.warning(
                "this Fisher was measured on other weights: right if training has made these of them, wrong if it "
                "starts here"
            )

    def check_related(self, model: nn.Module) -> Origin:
        """`check` without its warning; says whether the weights are the same or trained since."""
        self.check_shapes(model)
        origin, what = self.origin(model)
        if origin == "other":
            raise RPSAError(f"this Fisher was measured on another {what}; {_what_to_do(what)}")
        return origin

    def check_weights(self, model: nn.Module) -> None:
        """Raise RPSAError unless the scores were measured on the weights that `model` has, in whatever dtype."""
        if self.check_related(model) == "trained":
            raise RPSAError(f"this Fisher was measured on other weights; {_what_to_do('model')}")

    def check_shapes(self, model: nn.Module) -> None:
        """Raise RPSAError unless the scores are those of `model`'s trainable parameters, by name and shape."""
        parameters = trainable_parameters(model)
        for name, score in self.scores.items():
            if name not in parameters:
                raise RPSAError(
                    f"this Fisher does not fit the model: it scores {name!r}, which the model does not train"
                )
            if score.shape != parameters[name].shape:
                raise RPSAError(
                    f"this Fisher does not fit the model: {name!r} has scores of shape {tuple(score.shape)}, "
                    f"the parameter is {tuple(parameters[name].shape)}"
                )
        scoped = (self.manifest.get("estimation") or {}).get("scope")
        missing = [name for name in parameters if name not in self.scores]
        if missing and not scoped:
            raise RPSAError(
                f"this Fisher does not fit the model: {missing[0]!r} has no scores "
                f"({len(missing)} such parameters); give zeros for what may always train"
            )

    def origin(self, model: nn.Module) -> tuple[Origin, str]:
        """What `model`'s weights are to those that were measured, and what it is about: the model, or its adapter.

        "same" where nothing is known of the measured weights, and where `for_any_weights` was asked for.
        """
        every = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
        adapter = trainable_parameters(model) if hasattr(model, "peft_config") else {}
        base = {name: parameter for name, parameter in every.items() if name not in adapter}
        kind = "LoRA initialisation" if any("lora_" in name for name in adapter) else "adapter"
        if self.manifest.get("any_weights"):
            return "same", "model"
        if "weights" not in self.manifest:
            known = self.manifest.get("fingerprint")
            return ("same" if known in (None, fingerprint(every)) else "other"), "model"
        found: list[tuple[Origin, str]] = [
            (origin_of(self.manifest["weights"], parameters), what)
            for parameters, what in ((base, "model"), (adapter, kind))
        ]
        return max(found, key=lambda one: get_args(Origin).index(one[0]))

    def for_any_weights(self) -> "FisherDiagonal":
        """These scores for a model with other weights than they were measured on, which is refused else.

        For studies of just that: of transfer, or of an aligned model by the Fisher of its base.
        """
        result = copy.copy(self)
        result.manifest = self.manifest | {"any_weights": True}
        return result

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write sharded safetensors and `manifest.json` into `folder`; bf16 halves the size.

        Among several ranks rank 0 writes; sharded scores are gathered a file (4 GiB) at a time, so that all ranks
        must call it.
        """
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file

        if dtype not in (torch.float32, torch.bfloat16):
            raise RPSAError(
                f"a Fisher is stored as float32 or bfloat16, not {dtype}: fp16 turns small values into 0"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {
            name: torch.empty(score.shape, dtype=dtype, device="meta") for name, score in self.scores.items()
        }
        plan = split_torch_state_dict_into_shards(
            shapes, filename_pattern="fisher{suffix}.safetensors", max_shard_size=_SHARD_BYTES
        )
        manifest = self.manifest | {
            "format": "rpsa.fisher/1",
            "dtype": str(dtype).removeprefix("torch."),
            "nonzero": self.nonzero,
            "files": sorted(plan.filename_to_tensors),
            "shapes": {name: list(score.shape) for name, score in self.scores.items()},
        }
        for filename, names in plan.filename_to_tensors.items():
            stored = {name: full(self.scores[name]).to("cpu", dtype).contiguous() for name in names}
            if rank() == 0:
                save_file(stored, folder / filename)
        if rank() == 0:
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if self._sharded:
            barrier()

    @classmethod
    def load(cls, folder: str | Path) -> "FisherDiagonal":
        """Read what `save` wrote.

        Raises:
            RPSAError: there is no Fisher in `folder`, or its files do not hold what the manifest says.
        """
        from safetensors.torch import load_file

        check_type("folder", folder, str | Path, "the folder of a saved Fisher")
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise RPSAError(f"{folder}: no Fisher here ({MANIFEST} is missing)")
        scores: dict[str, Tensor] = {}
        with reading(f"Fisher {folder}"):
            manifest = read_json(folder / MANIFEST)
            for filename in manifest["files"]:
                if not (folder / filename).is_file():
                    raise RPSAError(f"{folder}: {filename} is missing; estimate the Fisher again")
                scores |= load_file(folder / filename)
            for name, shape in manifest["shapes"].items():
                if name not in scores or list(scores[name].shape) != shape:
                    raise RPSAError(
                        f"{folder}: scores of {name!r} are missing or not of shape {tuple(shape)}"
                    )
            return cls({name: scores[name] for name in manifest["shapes"]}, manifest)


def _finite_and_not_negative(score: Tensor) -> bool:
    if score.numel() == 0:
        return True
    low, high = torch.aminmax(score)  # one read; NaN is passed on, and fails both comparisons
    return bool((low >= 0) & (high < torch.inf))


def _what_to_do(what: str) -> str:
    if what == "model":
        return "estimate it on these, or say that you mean it: fisher.for_any_weights()"
    return "load the adapter that was saved with it before training, or say that you mean it: fisher.for_any_weights()"
