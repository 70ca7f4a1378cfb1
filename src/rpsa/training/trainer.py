"""RPSA inside a Hugging Face trainer: `RPSATrainer` in place of TRL's `SFTTrainer`, `RPSAMixin` for any other.

Where things happen in a step, and why there: the reasoning gradient in `on_step_begin`, when gradients are None
and no `no_sync` is active (inside `training_step` it would be rank-local under DDP); masking at the end of the
`training_step` that completes the gradient, because no callback runs between the last backward and clipping;
exactness in hooks of the optimizer itself.
"""

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.freezing.audit import Audit
from rpsa.freezing.freezer import Freezer
from rpsa.freezing.masks import control_scores
from rpsa.freezing.ratio import ConflictRatio
from rpsa.parameters import module_group, trainable_parameters
from rpsa.reference import ReferenceDataset
from rpsa.sharding import full
from rpsa.training.card import write_card
from rpsa.training.config import RPSAArguments
from rpsa.training.engines import refuse_accelerator, refuse_model
from rpsa.training.metadata import model_metadata
from rpsa.training.names import CardNames
from rpsa.training.reasoning_gradient import reasoning_backward

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

log = logging.getLogger(__name__)

AUDIT_FILE = "rpsa_audit.json"


class RPSAMixin(_Trainer):
    """Put it before any `Trainer` subclass: `class RPSADPOTrainer(RPSAMixin, DPOTrainer)`.

    Args:
        fisher: scores of the model's trainable parameters, or the folder of saved ones.
        reference_dataset: D_ref, or its folder; needed unless the frozen ratio is a number.

    The trainer's `args` must include `RPSAArguments`.

    Raises:
        RPSAError: the Fisher does not fit the model, or D_ref is missing.
    """

    def __init__(
        self,
        *args: Any,
        fisher: FisherDiagonal | str | Path,
        reference_dataset: ReferenceDataset | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"] if "model" in kwargs else args[0]
        has_adapter = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        refuse_model(model, has_adapter=has_adapter)
        quantized = getattr(model, "is_quantized", False)
        adapter = [(p, p.data) for p in model.parameters() if p.requires_grad] if quantized else []
        super().__init__(*args, **kwargs)
        for parameter, weights in adapter:
            # TRL casts it to bf16, in which small updates are rounded away; and F was measured on these weights
            parameter.data = weights.to(parameter.device)
        refuse_accelerator(self.accelerator, self.args.n_gpu)
        if not isinstance(self.args, RPSAArguments):
            raise RPSAError("args must include RPSAArguments: class MyConfig(RPSAArguments, ...)")
        if isinstance(fisher, str | Path):
            fisher = FisherDiagonal.load(fisher)
        if isinstance(reference_dataset, str | Path):
            reference_dataset = ReferenceDataset.load(reference_dataset)
        if self.args.ratio().every is not None and reference_dataset is None:
            raise RPSAError(
                f"frozen_ratio {self.args.frozen_ratio!r} measures the reasoning gradient on D_ref: "
                "give reference_dataset"
            )
        fisher.check(self.model)
        if self.accelerator.is_main_process:  # the others may not have read the weights yet
            fisher.check_adapter(self.model)
        self.fisher = fisher
        self.reference_dataset = reference_dataset
        self.rpsa = RPSACallback(self)
        # before callbacks that save: what they store must be the state between two steps
        self.callback_handler.callbacks.insert(0, self.rpsa)

    @property
    def freezer(self) -> Freezer:
        """The freezer of the current (or last) call of `train`."""
        if self.rpsa.freezer is None:
            raise RPSAError("there is no freezer before train() has begun")
        return self.rpsa.freezer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.rpsa.on_gradients_complete()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.rpsa.freezer is not None:
            logs.update(self.rpsa.logs())
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights, tokenizer, model card, and the audit if there is one."""
        super().save_model(output_dir, _internal_call=_internal_call)
        report = self.rpsa.report() if self.rpsa.audit else None  # of a sharded model, all ranks' work
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            if report is not None:
                (folder / AUDIT_FILE).write_text(json.dumps(report, indent=1) + "\n")
            write_card(folder, model_metadata(self, CardNames(model=self._hub_name())))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.rpsa.end_interval()
        if self.rpsa.audit is not None:
            self.rpsa.report()  # all ranks' work; the model card, which TRL has one rank write, reads it
        super()._save_checkpoint(*args, **kwargs)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        **front_matter: Any,
    ) -> None:
        """Write the card into `args.output_dir`; `push_to_hub` calls this with the keywords that it is given.

        Args:
            dataset_name: the safety data, as a Hugging Face id or what else it is called.
            finetuned_from: the base model, if the model's config does not name it.
            front_matter: more fields of the card's YAML, such as `license` or `language`.
        """
        if not self.is_world_process_zero():
            return
        names = CardNames(
            model=model_name or self._hub_name(),
            base=finetuned_from,
            dataset=dataset_name,
            tags=(tags,) if isinstance(tags, str) else tuple(tags or ()),
            front_matter=front_matter,
        )
        write_card(Path(str(self.args.output_dir)), model_metadata(self, names))

    def _hub_name(self) -> str | None:
        return self.args.hub_model_id.split("/")[-1] if self.args.hub_model_id else None


class RPSATrainer(RPSAMixin, SFTTrainer):
    """TRL's `SFTTrainer` with reasoning-critical parameters frozen: same arguments, `RPSAConfig`, and D_ref."""


class RPSACallback(TrainerCallback, ExportableState):
    """The freezer's life within one call of `train`, and its state in checkpoints."""

    def __init__(self, trainer: RPSAMixin) -> None:
        self.trainer = trainer
        self.freezer: Freezer | None = None
        self.audit: Audit | None = None
        self.trajectory: list[dict[str, float | int]] = []
        self.reported: dict[str, Any] | None = None
        self._frozen_fraction = 0.0
        self._shares: dict[str, float] = {}
        self._unmasked_norm = torch.zeros(())
        self._between_steps: dict[str, Any] = {}

    # The life of the freezer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.freezer is not None:
            self.freezer.detach()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        self.freezer = freezer = self._make_freezer(model)
        self.trajectory = []
        freezer.attach(kwargs["optimizer"])
        self.audit = Audit(freezer, args.seed) if self.trainer.args.audit else None
        if state.global_step > 0:
            self._resume(state)
        freezer.step = state.global_step
        if self.audit is not None:
            self.audit.open()
        self._measure_shares()
        self._between_steps = self._state()
        self._warn_if_never_dynamic(state.max_steps)

    def _make_freezer(self, model: nn.Module) -> Freezer:
        args, fisher = self.trainer.args, self.trainer.fisher
        ranking = None
        if args.mask != "fisher":
            ranking = control_scores(args.mask, fisher, trainable_parameters(model), args.seed)
        return Freezer(
            model,
            fisher,
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
            self.audit.close()
            self.audit.open()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.freezer is not None
        self.freezer.detach()

    # One step

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.freezer is not None
        self.freezer.step = state.global_step
        if self.freezer.reference_due:
            self._capture_reference(state.global_step)

    def _capture_reference(self, step: int) -> None:
        assert self.freezer is not None
        assert self.freezer.ratio.every is not None
        trainer, accelerator = self.trainer, self.trainer.accelerator
        assert trainer.reference_dataset is not None
        micro = trainer.args.per_device_train_batch_size
        ours = micro * trainer.args.gradient_accumulation_steps
        batch = trainer.reference_dataset.rotating_batch(
            step // self.freezer.ratio.every,
            ours * accelerator.num_processes,
            trainer.args.reference_max_length,
        )
        first = accelerator.process_index * ours
        part = {key: batch[key][first : first + ours] for key in ("input_ids", "attention_mask", "labels")}
        reasoning_backward(trainer.model_wrapped, part, accelerator, micro)
        self.freezer.capture_reference()

    def on_gradients_complete(self) -> None:
        """g_S is in `.grad`: measure the conflict if it is due, mask."""
        assert self.freezer is not None
        freezer, audit = self.freezer, self.audit
        gradients = [p.grad for p in freezer.parameters.values() if p.grad is not None]
        self._unmasked_norm = full(nn.utils.get_total_norm(gradients))
        measuring = freezer.reference_captured
        if measuring and audit is not None:
            audit.close()
        freezer.mask_gradients()
        if measuring:
            self.trajectory.append(
                {
                    "step": freezer.step,
                    "k": freezer.frozen_ratio,
                    "c": freezer.conflict or 0.0,
                    "tau": freezer.threshold,
                }
            )
            self._measure_shares()
            if audit is not None:
                audit.open()

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
            "rpsa/grad_norm_unmasked": float(self._unmasked_norm),
            **self._shares,
        }
        self._shares = {}  # said once, and again when the mask has changed
        if ks:
            logs["rpsa/c"] = float(self.trajectory[-1]["c"])
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
        if self.audit is None:
            return {"args": {}, "attributes": self._between_steps}
        return {"args": {}, "attributes": self._between_steps | {"audit": self.audit.state_dict()}}

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
        self.trajectory = list(attributes["trajectory"])
        if self.audit is not None and "audit" in attributes:
            self.audit.load_state_dict(attributes["audit"])
