"""Environment: what a bug report needs to know of a machine, and nothing that tells whose it is."""

import os
import platform
import sys

from rpsa.artifacts import package_versions

_PACKAGES = (
    *("rpsa", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("vllm", "bitsandbytes", "lm-eval"),
)
_GIB = 1 << 30


def facts() -> dict[str, str]:
    """By name: versions of packages, system, CPU cores and memory, GPUs, the sandbox that programs would run in."""
    import torch

    versions = package_versions(_PACKAGES)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "Python": f"{platform.python_version()} ({sys.implementation.name})",
        "System": f"{platform.system()} {platform.machine()}, {_distribution()}",
        "CPU": f"{os.cpu_count()} cores, {_memory()}",
        "GPU": ", ".join(f"{gpu.name} ({gpu.total_memory / _GIB:.0f} GiB)" for gpu in gpus) or "none",
        "CUDA": str(torch.version.cuda or "none"),
        "Sandbox": _sandbox(),
        **{name: version for name, version in versions.items() if version != "absent"},
    }


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.release()


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "memory unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / _GIB:.0f} GiB"


def _sandbox() -> str:
    from rpsa.errors import RPSAError
    from rpsa.evaluation.sandbox import best_sandbox

    try:
        return str(best_sandbox(accept_unsandboxed=False))
    except RPSAError as error:
        return str(error)
