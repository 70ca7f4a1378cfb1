"""What every trainer that protects reasoning needs: a Fisher, D_ref, the gradient g_R, and the moment to act."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rpsa.errors import RPSAError
from rpsa.fisher.diagonal import FisherDiagonal
from rpsa.reference import ReferenceDataset
from rpsa.training.engines import refuse_accelerator, refuse_model
from rpsa.training.kept import check_kept
from rpsa.training.reasoning_gradient import reasoning_backward

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class ReasoningMixin(_Trainer):
    """The base of `RPSAMixin` and `AlternativesMixin`: goes before a `Trainer` subclass, as they do.

    Raises:
        RPSAError: the model cannot be trained this way, or the Fisher does not fit it.
    """

    fisher: FisherDiagonal | None

    def __init__(
        self,
        *args: Any,
        fisher: FisherDiagonal | str | Path | None = None,
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
        check_kept(self, kwargs.get("train_dataset"), kwargs.get("formatting_func"))
        refuse_accelerator(self.accelerator, self.args.n_gpu)
        if isinstance(fisher, str | Path):
            fisher = FisherDiagonal.load(fisher)
        if isinstance(reference_dataset, str | Path):
            reference_dataset = ReferenceDataset.load(reference_dataset)
        if fisher is not None:
            fisher.check(self.model)
            if self.accelerator.is_main_process:  # the others may not have read the weights yet
                fisher.check_adapter(self.model)
        self.fisher = fisher
        self.reference_dataset = reference_dataset

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.on_gradients_complete()
        return loss

    def on_gradients_complete(self) -> None:
        """g_S is in `.grad`, of all micro-batches and ranks; clipping and the optimizer's step come next."""
        raise NotImplementedError

    def reasoning_backward(self, measurement: int) -> None:
        """Accumulate g_R of the `measurement`-th batch of D_ref, which has as many sequences as a step."""
        if self.reference_dataset is None:
            raise RPSAError("the reasoning gradient is measured on D_ref: give reference_dataset")
        micro = self.args.per_device_train_batch_size
        ours = micro * self.args.gradient_accumulation_steps
        batch = self.reference_dataset.rotating_batch(
            measurement, ours * self.accelerator.num_processes, self.args.reference_max_length
        )
        first = self.accelerator.process_index * ours
        part = {key: batch[key][first : first + ours] for key in ("input_ids", "attention_mask", "labels")}
        reasoning_backward(self.model_wrapped, part, self.accelerator, micro)
