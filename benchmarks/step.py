"""Training steps: all ways at three batch sizes, cost against K, and where the time of ours goes."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from . import by_hand, peers, ways
from .machine import physical_memory
from .plan import Plan
from .products import Limit, of_step
from .timing import Step, Unavailable, made, measure
from .ways import Work

EACH = "matrix products alone"
BEST = "matrix products at the best rate"
EACH_BF16 = "matrix products alone, bf16"

MAKERS: dict[str, Callable[[Work], Step]] = {
    ways.OURS: ways.piwae,
    ways.COMPILED: ways.piwae_compiled,
    ways.BF16: ways.piwae_bf16,
    ways.BF16_COMPILED: partial(ways.piwae_compiled, precision=ways.bf16),
    ways.CHUNKED: ways.piwae_chunked,
    ways.BY_HAND: by_hand.by_hand,
    ways.BY_HAND_COMPILED: by_hand.by_hand_compiled,
    ways.BY_HAND_BF16: partial(by_hand.by_hand, precision=ways.bf16),
    ways.BY_HAND_BF16_COMPILED: partial(by_hand.by_hand_compiled, precision=ways.bf16),
    ways.BY_HAND_TWO_GRADS: partial(by_hand.by_hand, backward_passes=2),
    ways.STOCK_IWAE: ways.stock_iwae,
    ways.TWO_GRADS: ways.two_grads,
    ways.TWO_GRADS_OURS: partial(ways.two_grads, own_kernels=True),
    ways.PYTHAE: peers.pythae,
    ways.JAX: peers.jax_step,
    ways.JAX_IWAE: peers.jax_iwae,
}
CHECKED = (ways.OURS, ways.COMPILED, ways.BF16, ways.BF16_COMPILED, ways.CHUNKED)
AGAINST_K = (ways.OURS, ways.CHUNKED, ways.STOCK_IWAE, ways.TWO_GRADS, ways.PYTHAE, ways.JAX)
ARRAYS = 14  # of a float for each pixel and sample, at most alive at once: pythae's


def points(plan: Plan) -> list[dict]:
    """All ways, and the limit, at each batch size."""
    return [point(Work(batch, plan.samples), plan) for batch in plan.batches]


def point(work: Work, plan: Plan) -> dict:
    """Times of all ways at one batch size, and of the matrix products alone."""
    limit, bf16 = Limit(of_step(work)), Limit(of_step(work), torch.bfloat16)
    steps, skipped = made({name: partial(make, work) for name, make in MAKERS.items() if name != ways.CHUNKED})
    settle(steps, 64)
    steps |= {EACH: limit.each, BEST: limit.best, EACH_BF16: bf16.each}
    times = measure(steps, plan.seconds, plan.rounds)
    times[BEST] = [limit.scale * seconds for seconds in times[BEST]]
    return {
        "batch": work.batch,
        "samples": work.samples,
        "flop": limit.flop,
        "times": times,
        "skipped": skipped,
        "products": limit.table(),
    }


def against_k(plan: Plan) -> list[dict]:
    """Times at the smallest batch for each K."""
    return [cost(Work(min(plan.batches), K), plan) for K in plan.particles]


def cost(work: Work, plan: Plan) -> dict:
    """Times at one K of the ways that have the memory."""
    steps, skipped = made({name: partial(roomy, MAKERS[name], work) for name in AGAINST_K})
    settle(steps)
    times = measure(steps, plan.seconds, plan.rounds)
    return {"batch": work.batch, "samples": work.samples, "times": times, "skipped": skipped}


def in_chunks(plan: Plan) -> dict:
    """Times at the smallest batch, in chunks, of each K that makes more than one; these take turns with each other.

    In `against_k` a K's rounds lie minutes from another's, and its steps between those of ways that fill the memory.
    """
    batch = min(plan.batches)
    steps = {str(K): ways.piwae_chunked(Work(batch, K)) for K in plan.particles if K > ways.CHUNK}
    for step in steps.values():
        settle({ways.CHUNKED: step})
    return {"batch": batch, "times": measure(steps, plan.seconds, plan.rounds)}


def settle(steps: Mapping[str, Step], draws: int = 8) -> None:
    """Go past the first draws of our ways, of which the 1st, 2nd, 4th, 8th and so on are checked both ways.

    In a training of a million steps they are twenty; here one round in five would have one.
    """
    for name, step in steps.items():
        for _ in range(draws if name in CHECKED else 0):
            step()


def roomy(make: Callable[[Work], Step], work: Work) -> Step:
    """Unavailable where a step may take more than half of the machine's memory."""
    need = ARRAYS * work.batch * work.samples * 784 * 4
    if make is not ways.piwae_chunked and need > physical_memory() / 2:
        raise Unavailable(f"may need {need / 2**30:.0f} GiB")
    return make(work)


def operations(plan: Plan, steps: int = 5, most: int = 14) -> dict:
    """Where the time of our step goes at batch 128, or the largest there is: self time of torch's operations."""
    work = Work(128 if 128 in plan.batches else max(plan.batches), plan.samples)
    step = ways.piwae(work)
    settle({ways.OURS: step})
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    found = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in found)
    rows = [{"name": row.key, "calls": row.count / steps, "share": row.self_cpu_time_total / total} for row in found]
    return {"batch": work.batch, "samples": work.samples, "ms": total / steps / 1e3, "rows": rows[:most]}
