"""What ranks need, imported once in the server that they are started from (which computes nothing: it is forked)."""

import gc
import importlib

for _name in (
    *("helpers.alternatives_runs", "helpers.fisher_models", "helpers.rank_runs", "helpers.sharded"),
    *("peft", "pytest", "rpsa.training.trainer", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3")),
):
    importlib.import_module(_name)

gc.collect()
gc.freeze()  # a collection in a rank takes longer than its training otherwise
