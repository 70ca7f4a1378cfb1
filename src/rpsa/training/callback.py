"""Callback: the freezer's life in a run of a Hugging Face trainer.

Where things happen in a step, and why there: the reasoning gradient in `on_step_begin`, when gradients are None
and no `no_sync` is active (inside `training_step` it would be rank-local under DDP); masking at the end of the
`training_step` that completes the gradient, because no callback runs between the last backward and clipping;
exactness in hooks of the optimizer itself.
"""

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rpsa.artifacts import reading
from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.audit import Audit
from rpsa.freezing.compact import CompactFreezer
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.masks import as_many, control_scores
from rpsa.freezing.ratio import ConflictRatio
from rpsa.parameters import module_group, trainable_parameters
from rpsa.training.reasoning import ReasoningMixin

log = logging.getLogger(__name__)

AUDIT_START = "rpsa_audit_start.safetensors"
"""In a checkpoint, if there is an audit: the sampled weights that training started from."""


class RPSACallback(TrainerCallback, ExportableState):
    """The freezer's life within one call of `train`, and its state in checkpoints.

    Args:
        ranking: what is frozen first, if neither the highest Fisher nor a control mask says so.
    """

    def __init__(self, trainer: ReasoningMixin, ranking: FisherDiagonal | None = None) -> None:
        self.trainer = trainer
        self.ranking = ranking
        self.freezer: Freezer | None = None
        self.audit: Audit | None = None
        self.trajectory: list[dict[str, float | None]] = []
        """Step, k, c and tau of each measurement; c is None where a gradient was not finite."""
        self.reported: dict[str, Any] | None = None
        self._frozen_fraction = 0.0
        self._shares: dict[str, float] = {}
        self._between_steps: dict[str, Any] = {}

    # The life of the freezer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.freezer is None:
            self.attach(kwargs["optimizer"])
        assert self.freezer is not None
        freezer = self.freezer
        freezer.step = state.global_step
        self.audit = Audit(freezer, args.seed) if self.trainer.args.audit else None
        self._measure_shares()
        if state.global_step > 0:
            self._resume(state)
        if self.audit is not None:
            self.audit.open()
        self._between_steps = self._state()
        self._warn_if_never_dynamic(state.max_steps)

    def release(self) -> None:
        """Let go of the last run, which may have ended in an exception."""
        if self.freezer is not None:
            self.freezer.detach()
        self.freezer, self.audit, self.trajectory = None, None, []

    def attach(self, optimizer: Any) -> None:
        """Make the freezer: when training begins, or before an optimizer's state is read that only masters fit."""
        self.freezer = self._make_freezer(self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped))
        self.freezer.attach(optimizer)

    def _make_freezer(self, model: nn.Module) -> Freezer:
        args, fisher = self.trainer.args, self.trainer.fisher
        assert fisher is not None  # RPSAMixin wants one
        ranking = None if self.ranking is None else as_many(self.ranking, fisher)
        if args.mask != "fisher":
            ranking = control_scores(args.mask, fisher, trainable_parameters(model), args.seed)
        scores = fisher.for_any_weights()  # the trainer has compared them
        if args.compact:
            return CompactFreezer(model, scores, args.ratio(), ranking=ranking, zero_fisher=args.zero_fisher)
        return Freezer(
            model,
            scores,
            args.ratio(),
            ranking=ranking,
            gradient_only=args.gradient_only,
            frozen_moments=args.frozen_moments,
            zero_fisher=args.zero_fisher,
        )

    def _warn_if_never_dynamic(self, max_steps: int) -> None:
        assert self.freezer is not None
        ratio = self.freezer.ratio
        is_first = self.trainer.accelerator.is_main_process
        if is_first and isinstance(ratio, ConflictRatio) and max_steps <= ratio.first_dynamic_step:
            log.warning(
                "k will stay at 0.5: this run has %d steps, and the first dynamic k comes at step %d "
                "(window %d x every %d); make it longer, or window or every smaller",
                max_steps,
                ratio.first_dynamic_step,
                ratio.window,
                ratio.every,
            )

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # weights may be replaced by those of the best checkpoint after the last epoch
        self.end_interval()

    def end_interval(self) -> None:
        """Check what is frozen now, and go on in a new interval."""
        if self.audit is not None:
            self.audit.next_interval()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.freezer is not None
        self.freezer.detach()

    # One step

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.freezer is not None
        self.freezer.step = state.global_step
        if self.freezer.reference_due:
            assert self.freezer.ratio.every is not None
            self.trainer.reasoning_backward(state.global_step // self.freezer.ratio.every)
            self.freezer.capture_reference()

    def on_gradients_complete(self) -> None:
        """g_S is in `.grad`: measure the conflict if it is due, mask."""
        assert self.freezer is not None
        freezer = self.freezer
        measuring = freezer.reference_captured
        freezer.mask_gradients()
        if measuring:
            self.trajectory.append(
                {
                    "step": freezer.step,
                    "k": freezer.frozen_ratio,
                    "c": freezer.conflict,
                    "tau": freezer.threshold,
                }
            )
            self._measure_shares()
            if self.audit is not None:
                self.audit.next_interval()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.freezer is not None
        self.freezer.step = state.global_step
        self._between_steps = self._state()

    # Logs

    def _measure_shares(self) -> None:
        """Per module group: the part of it that is frozen, and its part of all that still trains."""
        assert self.freezer is not None
        counts = self.freezer.frozen_counts()
        frozen: dict[str, int] = defaultdict(int)
        total: dict[str, int] = defaultdict(int)
        for name, parameter in self.freezer.parameters.items():
            frozen[module_group(name)] += counts[name]
            total[module_group(name)] += parameter.numel()
        trainable = sum(total.values()) - sum(frozen.values())
        self._frozen_fraction = sum(frozen.values()) / sum(total.values())
        self._shares = {}
        for group in total:
            self._shares[f"rpsa/frozen/{group}"] = frozen[group] / total[group]
            self._shares[f"rpsa/trainable_share/{group}"] = (total[group] - frozen[group]) / max(1, trainable)

    def logs(self) -> dict[str, float]:
        assert self.freezer is not None
        ks = [entry["k"] for entry in self.trajectory]
        logs: dict[str, float] = {
            "rpsa/k": self.freezer.frozen_ratio,
            "rpsa/tau": self.freezer.threshold,
            "rpsa/frozen_fraction": self._frozen_fraction,
            **self._shares,
        }
        if not self.trainer.args.compact:  # which has seen the trainable elements' gradients alone
            logs["rpsa/grad_norm_unmasked"] = float(self.freezer.gradient_norm)
        self._shares = {}  # said once, and again when the mask has changed
        if ks:
            if (c := self.trajectory[-1]["c"]) is not None:
                logs["rpsa/c"] = c
            logs["rpsa/share_k_0"] = ks.count(0.0) / len(ks)
            logs["rpsa/share_k_1"] = ks.count(1.0) / len(ks)
        return logs

    def report(self) -> dict[str, Any]:
        """The audit with the trajectory of k: what `rpsa_audit.json` holds."""
        assert self.audit is not None
        self.reported = self.audit.report() | {"trajectory": self.trajectory}
        return self.reported

    @property
    def frozen_fraction(self) -> float:
        """The share of all trainable elements that the present mask freezes."""
        return self._frozen_fraction

    # Checkpoints

    def _state(self) -> dict[str, Any]:
        assert self.freezer is not None
        return {
            "freezer": self.freezer.state_dict(),
            "trajectory": list(self.trajectory),
        }

    def state(self) -> dict[str, Any]:
        """Asked for when a checkpoint is written, on one rank alone; `end_interval` has been called on all."""
        attributes = self._between_steps | {"unsaid": self._shares}
        if self.audit is not None:
            attributes["audit"] = self.audit.state_dict()
        return {"args": {}, "attributes": attributes}

    def save_start(self, folder: Path) -> None:
        """Write what drift is measured from into a checkpoint; all ranks' work."""
        assert self.audit is not None
        values = self.audit.start_values()
        if self.trainer.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(values, folder / AUDIT_START)

    def _resume(self, state: TrainerState) -> None:
        assert self.freezer is not None
        saved: Any = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            saved = saved[-1]
        if not isinstance(saved, dict) or "freezer" not in saved.get("attributes", {}):
            raise RPSAError(
                "this checkpoint was not saved by an RPSA trainer: its frozen ratio cannot be continued; "
                "start without resume_from_checkpoint"
            )
        attributes = saved["attributes"]
        self.freezer.load_state_dict(attributes["freezer"])
        # in the order of a run that was not stopped: checkpoints sort names
        self.trajectory = [
            {name: entry[name] for name in ("step", "k", "c", "tau")} for entry in attributes["trajectory"]
        ]
        self._measure_shares()
        self._shares = attributes["unsaid"]
        if self.audit is not None and "audit" in attributes:
            self.audit.load_state_dict(attributes["audit"])
            assert self.trainer.resumed_from is not None
            with reading(f"checkpoint {self.trainer.resumed_from}: {AUDIT_START}"):
                start = load_file(self.trainer.resumed_from / AUDIT_START)
            self.audit.set_start(start, attributes["audit"]["since_step"])
