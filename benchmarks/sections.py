"""What can be measured, a section each: imported by the processes that measure."""

import time
from collections.abc import Callable

SECTIONS = {
    "step": "a training step of all ways at batch 20, 128 and 512",
    "cost": "the same at batch 20 for K from 1 to 4096",
    "chunks": "a step in chunks, all such K in turns",
    "operations": "where the time of our step goes",
    "log_px": "log p(x) by 5000 particles, against pythae's get_nll",
    "fit": "the fit command against a bare loop, and the cost of the SNR callback",
    "memory": "peaks of a step, each in a process of its own",
    "scaling": "two processes over gloo, with and without their all-reduce",
}


def measured(name: str, quick: bool) -> dict:
    """What a section found, and on what."""
    from lightning_iwae.cli import keep_freed_memory

    from . import fit, log_px, machine, memory, plan, scaling, step

    keep_freed_memory()
    runs: dict[str, Callable] = {
        "step": step.points,
        "cost": step.against_k,
        "chunks": step.in_chunks,
        "operations": step.operations,
        "log_px": log_px.run,
        "fit": fit.run,
        "memory": memory.run,
        "scaling": scaling.run,
    }
    print(f"{name}: {SECTIONS[name]} ...", end=" ", flush=True)
    start = time.perf_counter()
    found = runs[name](plan.QUICK if quick else plan.FULL)
    print(f"{time.perf_counter() - start:.0f} s")
    return {"machine": machine.facts(), "quick": quick, "found": found}
