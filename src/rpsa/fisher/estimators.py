"""Eq. 4: the diagonal of the empirical Fisher information on a model's own responses (section 3.1).

F_i = 1/N sum over samples of 1/|y| sum over t of (d log p(y_t | x, y_<t) / d theta_i)^2

Three estimators:

- `token_signs`: one backward pass of sum_t e_t log p_t with random signs e_t = +-1, squared. The cross terms
  vanish in expectation, so it is unbiased. With m probes the response tokens are dealt to m groups in turn,
  each group has its own backward pass over the same graph, and the squares are summed; exact if m >= |y|.
- `per_token`: Eq. 4 as it stands, with |y| gradients a sample.
- `per_sequence`: |y| times the squared mean gradient, which up to that factor is what many implementations call
  the Fisher. All signs are +1: right in expectation on text that the model sampled itself, up to |y| times too
  large elsewhere.

The first and the last take whole batches where the model's modules are known (`hooked`), and one sequence at
a time elsewhere (`loop`); both give the same numbers. `Estimation` is one estimate on its way: it chooses the path,
adds the squares, and finds and leaves out samples that are not finite.
"""

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from rpsa import settings
from rpsa.errors import RPSAError, check_fields, check_type
from rpsa.fisher.diagonal import FisherDiagonal, sampled_weights
from rpsa.fisher.hooked import Hooks, NotHookable
from rpsa.fisher.log_probs import (
    check_causal,
    evaluation_mode,
    is_checkpointed,
    is_low_precision,
    label_log_probs,
    response_logits,
)
from rpsa.fisher.loop import Loop, only_requiring_grad
from rpsa.fisher.overlap import split_half_overlap
from rpsa.fisher.precision import float32_products
from rpsa.fisher.probes import Probe, signed_probes, whole_probe
from rpsa.fisher.samples import Responses, Samples, data_fingerprint, read_samples, refuse_foreign_ids
from rpsa.fisher.squares import SquaredGradients
from rpsa.parameters import canonical_name, fingerprint, trainable_parameters
from rpsa.progress import Progress, progress_bars
from rpsa.sharding import all_reduce, gather_objects, on_any_rank, rank, reshard, without_ddp, world_size

logger = logging.getLogger(__name__)

_CHECKED_TOKENS = 64


@dataclass(frozen=True)
class FisherConfig:
    """How Eq. 4 is estimated.

    Raises:
        RPSAError: a value is not possible.
    """

    estimator: settings.Estimator = settings.ESTIMATOR.default
    probes: int = settings.PROBES.default
    """Backward passes a batch of `token_signs`: more of them, less noise. The others have no use for it."""
    seed: int = settings.SEED.default
    scope: str | None = settings.SCOPE.default
    """A regular expression searched for in canonical parameter names; None: every trainable parameter."""
    on_nonfinite: settings.OnNonfinite = settings.ON_NONFINITE.default
    """What to do about a sample whose log-probabilities or gradients are not finite; none is averaged in."""
    precision: settings.MatrixPrecision = settings.PRECISION.default
    """How products of matrices are taken: as the weights' dtype has it; with TF32, on CUDA alone; or under bf16
    autocast. The sums are float32 whatever it is."""
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "fisher.")
        for setting in settings.FISHER:
            settings.check(setting, getattr(self, setting.name), f"fisher.{setting.name}")
        try:
            re.compile(self.scope or "")
        except re.error as error:
            raise RPSAError(f"fisher.scope {self.scope!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class Batch:
    """What is known of some samples without the model, all of it on the CPU."""

    samples: Samples
    responses: Responses
    probes: list[Probe]


class Estimation:
    """Sums the squared gradients of `parameters` (by canonical name) over `data` into `squares`.

    Several ranks have the same `data` and take its batches in turn. Where the model is sharded they go through
    their passes in step: one that has no batch left runs along without adding anything.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        data: list[Samples],
        config: FisherConfig,
        squares: SquaredGradients | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.squares = squares or SquaredGradients(parameters, config.seed)
        self.hooks: Hooks | None = None
        """None: the loop."""
        self.excluded: dict[int, str] = {}
        """Places and ids of the samples that are not finite."""
        self.overlap_with_fp32: dict[str, float | None] = {}
        """Of the first finite sample's top k, by k, in the precision asked for; none where that is fp32."""
        self._model = model
        self._parameters = parameters
        self._data = data
        self._config = config
        self._progress = progress
        self._device = next(model.parameters()).device
        self._loop = Loop(parameters, self.squares)

    @property
    def path(self) -> str:
        return "hooked" if self.hooks else "loop"

    def run(self) -> None:
        """Sum over all samples that are finite, in the precision that the config says.

        That one is not shows when its batch was added: the pass then goes on only to find all such samples, and a
        new one leaves them out.

        Raises:
            RPSAError: a sample is not finite and the config says stop, no sample is finite, or the sums are not.
        """
        with float32_products(tf32=self._config.precision == "tf32"):
            with self._autocast():
                check_causal(self._model, self._data[0], self._device)
            self._choose_path()
            if self._config.precision != "fp32":
                self.overlap_with_fp32 = self._overlap_with_fp32()
            self._sum()
        self.squares.sum_over_ranks()
        for excluded in gather_objects(self.excluded):
            self.excluded |= excluded
        if len(self.excluded) == sum(len(samples) for samples in self._data):
            raise RPSAError("no sample has finite log-probabilities and gradients: check the model's weights")

    def _sum(self) -> None:
        while True:
            self.squares.clear()
            known = len(self.excluded)
            try:
                is_clean = self._pass()
            except NotHookable as reason:
                self._take_loop(reason)
                continue
            if is_clean:
                return
            has_found = len(self.excluded) > known
            if not (on_any_rank(has_found) if self.squares.sharded else has_found):
                raise RPSAError(
                    "the sums of squared gradients are too large for float32: check the model's weights"
                )

    def _choose_path(self) -> None:
        if self._config.estimator == "per_token":
            return
        try:
            self.hooks = Hooks(self._model, self._parameters, self.squares)
            self._check_hooks()
        except NotHookable as reason:
            self._take_loop(reason)
        else:
            logger.info("Fisher by hooks on %d modules, a batch at a time", len(self.hooks))

    def _take_loop(self, reason: NotHookable) -> None:
        self.hooks = None
        logger.info("Fisher one sequence at a time: %s", reason)

    def _check_hooks(self) -> None:
        """Compare hooks and loop on one sequence: a weight that is used without its module shows here."""
        hooks = self.hooks
        for sample in self._single_samples():
            self.hooks = None
            expected = self._traces(sample)
            self.hooks = hooks
            found = self._traces(sample)
            if expected is None or found is None:
                continue
            with self._autocast():
                tolerance = 0.05 if is_low_precision(self._model, self._device) else 1e-3
            noise = 1e-3 * tolerance**2 * sum(expected.values())
            for name, trace in expected.items():
                if abs(trace - found[name]) > tolerance * max(trace, found[name]) + noise:
                    logger.warning(
                        "hooks give %s a squared gradient of %g, autograd %g", name, found[name], trace
                    )
                    raise NotHookable(f"{name} is used outside of its module")
            return

    def _single_samples(self) -> Iterator[Samples]:
        for samples in self._data:
            for row in range(len(samples)):
                yield samples.select([row]).cut(_CHECKED_TOKENS)

    def _traces(self, sample: Samples) -> dict[str, float] | None:
        """Each parameter's summed squared gradient; None if something is not finite."""
        with self.installed():
            is_bad = self._nonfinite_rows(self._batch(sample))
        if is_bad:
            return None
        return {name: float(norm[0]) for name, norm in self.squares.read_norms().items()}

    def _overlap_with_fp32(self) -> dict[str, float | None]:
        config = self._config
        for sample in self._single_samples():
            scores: list[Tensor] = []
            for precision in (config.precision, "fp32"):
                self._config = replace(config, precision=precision)
                self.squares.clear()
                with float32_products(tf32=self._config.precision == "tf32"), self.installed():
                    is_finite = self._add(self._batch(replace(sample, places=(0,))))
                self.squares.sum_over_ranks()
                scores += self.squares.sampled_halves()[:1] if is_finite else []
            self._config = config
            if len(scores) == 2:
                return split_half_overlap(scores[0], scores[1])
        return {}

    def _batch(self, samples: Samples) -> Batch:
        responses = samples.responses()
        return Batch(samples, responses, self._probes(samples, responses))

    def _probes(self, samples: Samples, responses: Responses) -> list[Probe]:
        if self._config.estimator == "token_signs":
            return signed_probes(samples, responses, self._config.probes, self._config.seed)
        return [whole_probe(responses)]

    def _pass(self) -> bool:
        """Add all samples that are not excluded; False if one of them was not finite after all."""
        is_clean = True
        shares = self._shares()
        total, done = sum(len(samples) for samples, _ in shares), 0
        is_quiet = self._progress is not None or not self._config.progress or rank() > 0
        with self.installed(), progress_bars(disable=is_quiet) as bars:
            bar = bars.add_task("Fisher", total=total, now="")
            for samples, counts in shares:
                for part in self._parts(samples):
                    batch = self._batch(samples.select(part) if part else samples)
                    is_clean = is_clean and self._add(batch, counts and bool(part))
                    if not is_clean:
                        bad = self._nonfinite_rows(batch, counts and bool(part))
                        self._exclude(batch.samples, bad)
                bars.advance(bar, len(samples))
                done += len(samples)
                if self._progress is not None:
                    self._progress(done, total, unit="sequence")
        return is_clean

    def _parts(self, samples: Samples) -> list[list[int]]:
        """Which rows of a batch to take at once; none of them: run along."""
        rows = [row for row, place in enumerate(samples.places) if place not in self.excluded]
        if not self.hooks:
            return [[row] for row in rows]
        # each half's rows side by side, as the sums take them (`SquaredGradients.groups`)
        rows.sort(key=lambda row: samples.places[row] % 2)
        return [rows] if rows or self._is_in_step else []

    @property
    def _is_in_step(self) -> bool:
        """Whether the ranks work on different samples of one sharded model."""
        return self.squares.sharded and self.hooks is not None

    def _shares(self) -> list[tuple[Samples, bool]]:
        """This rank's batches, and whether they count or are only run along with."""
        if self.squares.sharded and not self.hooks:
            return [(samples, True) for samples in self._data]
        shares = []
        for start in range(0, len(self._data), world_size()):
            mine = start + rank()
            if mine < len(self._data):
                shares.append((self._data[mine], True))
            elif self._is_in_step:
                shares.append((self._data[start], False))
        return shares

    def _autocast(self) -> AbstractContextManager[object]:
        """For a forward pass; a caller's autocast is left to itself."""
        if self._config.precision != "bf16":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks of the present path on, and only what it differentiates requiring grad."""
        differentiated = [] if self.hooks else list(self._parameters.values())
        with only_requiring_grad(self._model, differentiated), (self.hooks or self._loop).installed():
            try:
                yield
            finally:
                reshard(self._model)

    def _add(self, batch: Batch, counts: bool = True) -> bool:
        """Add a batch; False if something was not finite, on any rank of a sharded model: the sums are spoilt then."""
        self.squares.begin([place % 2 for place in batch.samples.places], counts=counts)
        is_finite = self.forward_backward(batch)
        all_finite = self.squares.is_finite()
        if counts:
            all_finite = all_finite & is_finite.all().to(all_finite.device)
        is_clean = bool(all_finite)  # waits for the device
        return not on_any_rank(not is_clean) if self.squares.sharded else is_clean

    def _nonfinite_rows(self, batch: Batch, counts: bool = True) -> list[int]:
        """Rows of a batch whose log-probabilities or gradients are not finite; the sums stay as they are."""
        self.squares.begin_norms(len(batch.samples), counts=counts)
        is_finite = self.forward_backward(batch)
        rows = batch.responses.rows[torch.cat([probe.tokens for probe in batch.probes])]
        found = {*rows[~is_finite.cpu()].tolist(), *self.squares.nonfinite_rows()}
        return sorted(found) if counts else []

    def _exclude(self, samples: Samples, rows: list[int]) -> None:
        if not rows:
            return
        names = ", ".join(repr(samples.ids[row]) for row in rows)
        if self._config.on_nonfinite == "stop":
            raise RPSAError(f"log p or gradients of sample {names} are not finite: drop it, or skip such")
        logger.warning("skipped, as log p or gradients are not finite: sample %s", names)
        self.excluded |= {samples.places[row]: samples.ids[row] for row in rows}

    def forward_backward(self, batch: Batch) -> Tensor:
        """Go forward and back; whether log p of each probe's tokens, one probe's after another's, is finite."""
        samples, responses = batch.samples, batch.responses
        with self._autocast():
            hooked = self.hooks.forward_pass(len(samples), self._device.type) if self.hooks else None
            logits, places = response_logits(self._model, samples, responses, self._device, hooked)
        # the softmax of each pass is that of its own tokens
        log_probs = [
            label_log_probs(logits, *(t[p.tokens].to(logits.device) for t in (places, responses.labels)))
            for p in batch.probes
        ]
        is_finite = torch.cat([values.detach() for values in log_probs]).isfinite()
        del logits
        # The backward pass runs in the dtypes that the forward pass has left: a caller's autocast ends there.
        with torch.autocast(is_finite.device.type, enabled=False):
            self._backward(log_probs, batch.probes)
        if self.hooks is None:
            for name in self._parameters:
                self.squares.look(name, 0)
        return is_finite

    def _backward(self, log_probs: list[Tensor], passes: list[Probe]) -> None:
        """Each pass's backward pass; frees `log_probs` on the way."""
        if self._config.estimator == "per_token":
            self._loop.add_tokens(log_probs.pop())
            return
        weights = [p.weights for p in passes]
        if self._is_in_step:
            # a rank with fewer probes goes back as often as the others, with weights of 0, or they wait for it for ever
            missing = int(all_reduce(torch.tensor(len(passes)), "MAX")) - len(passes)
            log_probs += log_probs[-1:] * missing
            weights += [torch.zeros_like(weights[-1])] * missing
        for seeds in weights:
            values = log_probs.pop(0)
            seeds = seeds.to(values.device, values.dtype)
            torch.autograd.backward(values, seeds, retain_graph=bool(log_probs))


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: FisherConfig = FisherConfig(),
    progress: Progress | None = None,
) -> FisherDiagonal:
    """Estimate Eq. 4 on the response tokens of `batches`.

    Among several ranks (`torch.distributed`) all of them call it with the same batches and share the work. The
    model may be wrapped in DDP or sharded by `fully_shard`; the scores then have the parameters' own shards.

    Args:
        model: called as `model(input_ids=..., attention_mask=..., use_cache=False)`, its result read from
            `.logits`, (B, T, V), with dropout off; the virtual tokens of PEFT's prompt tuning and P-tuning are left
            out. Parameters, gradients and flags are the same afterwards.
        batches: dicts of `input_ids`, `attention_mask` and `labels`, (B, T) integer tensors, right-padded;
            labels are unshifted and -100 where a token is not part of the response. |y| counts labels at
            positions >= 1. Optional `sample_ids`, B strings; the default is the running index. All batches
            are kept in memory.
        config: the estimator and its settings.
        progress: told of each batch, in place of a bar.

    Returns:
        float32 scores of every parameter in scope; up to rounding, neither batching nor padding changes them.
        The manifest's "estimation" tells samples and tokens used, samples skipped, and `split_half`: for
        several k the overlap between the top k of even-numbered and of odd-numbered samples (chance: k). Where the
        precision is not fp32, `overlap_with_fp32` is that of both precisions on the start of the first sample.

    Raises:
        RPSAError: an argument has not the form above; the model's logits are not those of the ids, token by
            token, and of nothing later; no parameter is in scope, a sample has no response token, gradient
            checkpointing is reentrant, TF32 is asked for without CUDA, a sample is not finite and `on_nonfinite` is
            "stop", or ranks have different samples.
    """
    started = time.perf_counter()
    check_type("model", model, nn.Module, "a loaded model")
    check_type("config", config, FisherConfig, "a FisherConfig")
    model = without_ddp(model)
    parameters = _in_scope(model, config.scope)
    _refuse_reentrant_checkpointing(model)
    data = read_samples(batches)
    _refuse_different_data(data)
    refuse_foreign_ids(model, "the samples", max(int(samples.input_ids.max()) for samples in data))
    _refuse_tf32_without_cuda(model, config)
    estimation = Estimation(model, parameters, data, config, progress=progress)
    with evaluation_mode(model), torch.enable_grad():
        estimation.run()
    summary = {
        "estimator": config.estimator,
        "probes": config.probes,
        "seed": config.seed,
        "scope": config.scope,
        "precision": config.precision,
        **_counts(data, estimation.excluded),
        "split_half": split_half_overlap(*estimation.squares.sampled_halves()),
        **({"overlap_with_fp32": estimation.overlap_with_fp32} if config.precision != "fp32" else {}),
        "path": estimation.path,
        "seconds": round(time.perf_counter() - started, 3),
    }
    logger.info("Fisher estimation: %s", summary)
    weights = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    manifest = {
        "estimation": summary,
        "fingerprint": fingerprint(weights),
        "weights": sampled_weights(weights),
        "adapter_fingerprint": _adapter_fingerprint(model),
        "data_fingerprint": data_fingerprint(data),
        "versions": {"torch": torch.__version__, "rpsa": version("rpsa")},
    }
    return FisherDiagonal(estimation.squares.means(summary["samples"]), manifest=manifest)


def _in_scope(model: nn.Module, scope: str | None) -> dict[str, nn.Parameter]:
    trainable = trainable_parameters(model)
    if not trainable:
        raise RPSAError("the model has no trainable parameter: set requires_grad where it will be trained")
    chosen = {name: p for name, p in trainable.items() if scope is None or re.search(scope, name)}
    if not chosen:
        example = next(iter(trainable))
        raise RPSAError(f"fisher.scope {scope!r} matches no trainable parameter (there is {example!r}, ...)")
    return chosen


def _refuse_different_data(data: list[Samples]) -> None:
    """A rank that has other samples, or as many in other batches, would leave its part out or wait for ever."""
    ours = (data_fingerprint(data), [samples.ids for samples in data])
    if any(theirs != ours for theirs in gather_objects(ours)):
        raise RPSAError(
            "the ranks have different samples: give estimate_fisher the same batches on all of them"
        )


def _refuse_tf32_without_cuda(model: nn.Module, config: FisherConfig) -> None:
    device = next(model.parameters()).device.type
    if config.precision == "tf32" and device != "cuda":
        raise RPSAError(
            f"fisher.precision is tf32, which only CUDA has, and the model is on {device}: use fp32"
        )


def _refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """A reentrant checkpoint has its own backward pass: a weight shared across two would be squared twice."""
    for module in model.modules():
        if is_checkpointed(module):
            keywords = getattr(module._gradient_checkpointing_func, "keywords", {})
            if keywords.get("use_reentrant", True):
                raise RPSAError(
                    "reentrant gradient checkpointing squares shared weights wrongly: call "
                    'gradient_checkpointing_enable({"use_reentrant": False})'
                )


def _counts(data: list[Samples], excluded: Mapping[int, str]) -> dict[str, Any]:
    lengths = {
        place: length
        for samples in data
        for place, length in zip(samples.places, samples.response_lengths.tolist(), strict=True)
        if place not in excluded
    }
    skipped = [excluded[place] for place in sorted(excluded)]
    return {"samples": len(lengths), "tokens": sum(lengths.values()), "skipped": skipped}


def _adapter_fingerprint(model: nn.Module) -> str | None:
    return fingerprint(trainable_parameters(model)) if hasattr(model, "peft_config") else None
