"""How far training is, told at every step: loss, k and c as they were last logged."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rpsa.progress import Progress

_SHOWN = {"loss": "loss", "rpsa/k": "k", "rpsa/c": "c"}


class ProgressCallback(TrainerCallback):
    """Tells `progress` of each step; tokens are those that TRL counts."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._figures: dict[str, float] = {}
        self._tokens: int | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        self._figures |= {short: float(logs[name]) for name, short in _SHOWN.items() if name in logs}
        if "num_tokens" in logs:
            self._tokens = int(logs["num_tokens"])
        self._tell(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        self._progress(state.global_step, state.max_steps, unit="step", tokens=self._tokens, **self._figures)
