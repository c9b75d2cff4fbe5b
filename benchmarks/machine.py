"""What was measured on."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import lightning_iwae

LIBRARIES = ("torch", "lightning", "numpy", "jax", "optax", "pythae")


def facts() -> dict:
    """Processor, cores, memory, threads and versions."""
    return {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": physical_memory(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "lightning_iwae": lightning_iwae.__version__,
        **{name: found for name in LIBRARIES if (found := version(name)) is not None},
    }


def cpu() -> str:
    """The processor's name, with what it has for bf16."""
    if not (info := Path("/proc/cpuinfo")).exists():
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in info.read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = [flag for flag in fields.get("flags", "").split() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
    return f"{fields.get('model name', platform.machine())} ({', '.join(flags)})"


def physical_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def version(library: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
