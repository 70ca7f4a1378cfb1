"""One Fisher estimate on its way: which path the gradients take, and what is left out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpsa.errors import RPSAError
from rpsa.fisher.config import FisherConfig
from rpsa.fisher.hooked import Hooks, NotHookable
from rpsa.fisher.log_probs import check_causal, is_low_precision, response_log_probs
from rpsa.fisher.loop import Loop, only_requiring_grad
from rpsa.fisher.probes import probe_weights
from rpsa.fisher.samples import Responses, Samples
from rpsa.fisher.squares import SquaredGradients
from rpsa.sharding import all_reduce, gather_objects, on_any_rank, rank, reshard, world_size

logger = logging.getLogger(__name__)


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
    ) -> None:
        self.squares = SquaredGradients(parameters, config.seed)
        self.excluded: dict[int, str] = {}
        """Places and ids of the samples that are not finite."""
        self._model = model
        self._parameters = parameters
        self._data = data
        self._config = config
        self._device = next(model.parameters()).device
        self._loop = Loop(parameters, self.squares)
        self._hooks: Hooks | None = None

    @property
    def path(self) -> str:
        return "hooked" if self._hooks else "loop"

    def run(self) -> None:
        """Sum over all samples that are finite.

        A gradient may turn out not to be finite after parts of it were added: the pass then goes on only to
        find all such samples, and a new one leaves them out.

        Raises:
            RPSAError: a sample is not finite and the config says stop, or no sample is finite.
        """
        check_causal(self._model, self._data[0], self._device)
        self._choose_path()
        while True:
            self.squares.clear()
            try:
                is_clean = self._pass()
            except NotHookable as reason:
                self._take_loop(reason)
                continue
            if is_clean:
                break
        self.squares.sum_over_ranks()
        for excluded in gather_objects(self.excluded):
            self.excluded |= excluded
        if len(self.excluded) == sum(len(samples) for samples in self._data):
            raise RPSAError("no sample has finite log-probabilities and gradients: check the model's weights")

    def _choose_path(self) -> None:
        if self._config.estimator == "per_token":
            return
        try:
            self._hooks = Hooks(self._model, self._parameters, self.squares)
            self._check_hooks()
        except NotHookable as reason:
            self._take_loop(reason)
        else:
            logger.info("Fisher by hooks on %d modules, a batch at a time", len(self._hooks))

    def _take_loop(self, reason: NotHookable) -> None:
        self._hooks = None
        logger.info("Fisher one sequence at a time: %s", reason)

    def _check_hooks(self) -> None:
        """Compare hooks and loop on one sequence: a weight that is used without its module shows here."""
        hooks = self._hooks
        for sample in self._single_samples():
            self._hooks = None
            expected = self._traces(sample)
            self._hooks = hooks
            found = self._traces(sample)
            if expected is None or found is None:
                continue
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
                yield samples.select([row])

    def _traces(self, sample: Samples) -> dict[str, float] | None:
        """Each parameter's summed squared gradient; None if something is not finite."""
        with self._installed():
            log_probs, responses = self._log_probs(sample)
            if not bool(log_probs.isfinite().all()):
                return None
            self._add_squares(sample, log_probs, responses)
        if self.squares.nonfinite_rows():
            return None
        return {name: float(trace[0]) for name, trace in self.squares.read_traces().items()}

    def _pass(self) -> bool:
        """Add all samples that are not excluded; False if one of them was not finite after all."""
        is_clean = True
        shares = self._shares()
        with self._installed(), _progress_bar(shares, self._config.progress and rank() == 0) as bar:
            for samples, counts in shares:
                rows = [row for row, place in enumerate(samples.places) if place not in self.excluded]
                for part in [rows] if self._hooks else [[row] for row in rows]:
                    if part and not self._add(samples.select(part), counts):
                        is_clean = False
                if not rows and self._is_in_step:
                    self._add(samples, counts=False)
                bar.update(len(samples))
        return not on_any_rank(not is_clean) if self._is_in_step else is_clean

    @property
    def _is_in_step(self) -> bool:
        """Whether the ranks work on different samples of one sharded model."""
        return self.squares.sharded and self._hooks is not None

    def _shares(self) -> list[tuple[Samples, bool]]:
        """This rank's batches, and whether they count or are only run along with."""
        if self.squares.sharded and not self._hooks:
            return [(samples, True) for samples in self._data]
        shares = []
        for start in range(0, len(self._data), world_size()):
            mine = start + rank()
            if mine < len(self._data):
                shares.append((self._data[mine], True))
            elif self._is_in_step:
                shares.append((self._data[start], False))
        return shares

    @contextmanager
    def _installed(self) -> Iterator[None]:
        differentiated = [] if self._hooks else list(self._parameters.values())
        with only_requiring_grad(self._model, differentiated), (self._hooks or self._loop).installed():
            try:
                yield
            finally:
                reshard(self._model)

    def _add(self, samples: Samples, counts: bool = True) -> bool:
        """Add a batch, without the samples whose log-probabilities are not finite; False as in `_pass`."""
        log_probs, responses = self._log_probs(samples)
        bad = sorted(set(responses.rows[~log_probs.isfinite()].tolist())) if counts else []
        if on_any_rank(bool(bad)) if self._is_in_step else bad:
            del log_probs
            self._exclude(samples, bad)
            rest = [row for row in range(len(samples)) if row not in bad]
            if rest:
                return self._add(samples.select(rest), counts)
            return not self._is_in_step or self._add(samples, counts=False)
        self._add_squares(samples, log_probs, responses, counts)
        bad = self.squares.nonfinite_rows()
        self._exclude(samples, bad)
        return not bad

    def _exclude(self, samples: Samples, rows: list[int]) -> None:
        if not rows:
            return
        names = ", ".join(repr(samples.ids[row]) for row in rows)
        if self._config.on_nonfinite == "stop":
            raise RPSAError(f"log p or gradients of sample {names} are not finite: drop it, or skip such")
        logger.warning("skipped, as log p or gradients are not finite: sample %s", names)
        self.excluded |= {samples.places[row]: samples.ids[row] for row in rows}

    def _log_probs(self, samples: Samples) -> tuple[Tensor, Responses]:
        """log p of all response tokens of a batch, (N,), and where they are."""
        hooked = self._hooks.forward_pass(len(samples), self._device.type) if self._hooks else None
        return response_log_probs(self._model, samples, self._device, hooked)

    def _add_squares(
        self, samples: Samples, log_probs: Tensor, responses: Responses, counts: bool = True
    ) -> None:
        self.squares.begin([place % 2 for place in samples.places], counts=counts)
        # The backward pass runs in the dtypes that the forward pass has left: a caller's autocast ends there.
        with torch.autocast(log_probs.device.type, enabled=False):
            if self._config.estimator == "per_token":
                self._loop.add_tokens(log_probs)
                return
            probes = probe_weights(self._config, samples, responses)
            if self._is_in_step:
                passes = int(all_reduce(torch.tensor(len(probes)), "MAX"))
                probes += [torch.zeros_like(probes[0])] * (passes - len(probes))
            for number, weights in enumerate(probes, start=1):
                seeds = weights.to(log_probs.device, log_probs.dtype)
                torch.autograd.backward(log_probs, seeds, retain_graph=number < len(probes))


def _progress_bar(shares: list[tuple[Samples, bool]], is_shown: bool) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(
        total=sum(len(samples) for samples, _ in shares), desc="Fisher", unit="sample", disable=not is_shown
    )
